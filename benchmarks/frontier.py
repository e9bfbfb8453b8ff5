"""Train a list of recipes on a training split without held-out images, and draw accuracy against cost.

    python benchmarks/frontier.py benchmarks/frontier.txt --data-dir /data/cifar100_lt \\
        --train-list lists/CIFAR100_LT_if100_train.txt --pool-list lists/CIFAR100_LT_if10_train.txt \\
        --output output/frontier --jobs 2 -- --workers 0 --no-amp --channels-last

Settings are chosen by this page alone: the accuracies are those of images that are held out of training, as a mean
over classes, and no test image is read. What is chosen is then trained on all of the training split, with
`train_list.py`, and its last epoch is reported on the test images.

Held out are images of the pool (a list with more images of the same classes) that the training list leaves unused.
Where a class has too few of these, as the most frequent ones, it gives up training images. Which ones is a function of
the file names. With `--whole-pool` all that are unused are held out. The training images stay the same, and so
does the weight of a class.

The list is one of `train_list.py`: names such as `modern-s42`, where runs that differ in their seeds are one recipe,
and arguments of train.py. The same command goes on after an interruption. It leaves `frontier.md`, a table, and
`frontier.svg`. PFLOP are counted, see `cost.py`, with those of the run that a second stage begins with. A recipe with
passes that are not counted, as those of a teacher or an attack, is refused. Core-minutes are those of training steps,
times the threads of a run; runs side by side on shared cores take longer. On a GPU they are minutes of the run.
"""
import argparse
import hashlib
import json
import posixpath
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from cost import check_counted, training_flop
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_plots import style
from train_list import Entry, Runner, about_this_machine, parse_before_train_flags, read_list

from nbn_timm.cli.train import parse_train
from nbn_timm.errors import InputError, run_cli
from nbn_timm.files import write_text_atomic
from nbn_timm.training.settings import TrainSettings

HELD_OUT = 20  # images of a class


@dataclass(frozen=True)
class Point:
    """A recipe: what it costs and what it reaches, over its seeds."""

    name: str
    accuracies: Sequence[float]  # of each seed, percent of the held-out images of a class, mean over classes
    pflop: float
    core_minutes: float  # mean over the seeds

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> str:
        """Sample standard deviation, of several seeds."""
        return f'{statistics.stdev(self.accuracies):.2f}' if len(self.accuracies) > 1 else ''


def hold_out(train: Sequence[str], pool: Sequence[str], images: int = HELD_OUT, whole_pool: bool = False
             ) -> tuple[list[str], list[str]]:
    """Rows 'file label' of the training list that stay, and those held out, `images` of each class.

    Unused rows of the pool come first, then rows of training; of each the first by the SHA-256 of the file name. With
    `whole_pool` all unused rows are held out, and rows of training as before.

    Raises:
        InputError: A class has too few images to hold out so many and keep one for training.
    """
    used = set(map(file_of, train))
    rows = {file_of(row): row for row in (*pool, *train)}  # of a file in both the one of training
    by_class: dict[str, list[str]] = defaultdict(list)
    for file in sorted(rows, key=lambda file: (file in used, hashlib.sha256(file.encode()).digest())):
        by_class[label_of(rows[file])].append(file)
    chosen: set[str] = set()
    for label in {label_of(row) for row in train}:
        taken = by_class[label][:images]
        if len(taken) < images or used.intersection(by_class[label]).issubset(taken):
            raise InputError(f'class {label} has {len(by_class[label])} images in both lists, of which {images} cannot '
                             'be held out with one left for training: give a smaller --held-out, or a larger '
                             '--pool-list')
        chosen.update(taken)
        if whole_pool:
            chosen.update(set(by_class[label]) - used)
    held_out = {file: row for file, row in rows.items() if file in chosen}
    return [row for row in train if file_of(row) not in chosen], list(held_out.values())


def file_of(row: str) -> str:
    """The file of a row, in one spelling."""
    return posixpath.normpath(row.rsplit(maxsplit=1)[0])


def label_of(row: str) -> str:
    return row.split()[-1]


def write_list(path: Path, text: str) -> None:
    """Write a list of images for all runs of the folder.

    Raises:
        InputError: Another one is there, of runs that are no match for those to come.
    """
    if path.exists() and path.read_text(encoding='utf-8') != text:
        raise InputError(f"'{path}' has other images than --train-list, --pool-list, --held-out and --whole-pool give, "
                         'and runs on both cannot be compared: give another --output')
    write_text_atomic(path, text)


def rows_of(path: Path) -> list[str]:
    """Rows of a list file, without empty ones."""
    return [row.strip() for row in path.read_text(encoding='utf-8').splitlines() if row.strip()]


def settings_of(folder: Path) -> TrainSettings:
    """The settings of a run."""
    return TrainSettings.from_record(yaml.safe_load((folder / 'args.yaml').read_text()))


def points_of(output: Path, entries: Sequence[Entry], labels: Counter[str], threads: int) -> list[Point]:
    """The recipes of the runs that are done, the cheapest first."""
    images, costs = labels.total(), {}
    for entry in entries:
        if (output / entry.name / 'test.json').exists():
            costs[entry.name] = _cost(output / entry.name, len(labels), images, threads)
    recipes: dict[str, list[str]] = defaultdict(list)
    firsts = {entry.name: entry.first_stage() for entry in entries}
    for name in tuple(costs):
        recipes[re.sub(r'-s\d+$', '', name)].append(name)
    points = []
    for recipe, runs in recipes.items():
        chains = [_chain(run, firsts) for run in runs]
        for first in {run for chain in chains for run in chain} - costs.keys():  # trained from another list
            if not (output / first / 'args.yaml').exists():
                raise InputError(f"{recipe} begins with the run '{first}', whose cost counts and whose folder is not "
                                 f'in {output}: train it with the same --output')
            costs[first] = _cost(output / first, len(labels), images, threads)
        pflop = statistics.mean(sum(costs[run][0] for run in chain) for chain in chains)
        minutes = statistics.mean(sum(costs[run][1] for run in chain) for chain in chains)
        accuracies = [json.loads((output / run / 'test.json').read_text())['mean_class'] for run in runs]
        points.append(Point(recipe, accuracies, pflop, minutes))
    return sorted(points, key=lambda point: point.pflop)


def _chain(run: str | None, firsts: Mapping[str, str | None]) -> list[str]:
    """A run and those that it began with."""
    return [run, *_chain(firsts.get(run), firsts)] if run else []


def _cost(folder: Path, num_classes: int, images: int, threads: int) -> tuple[float, float]:
    """PFLOP and core-minutes of one run, without those of its first stage."""
    log = folder / 'log.jsonl'
    rates = [json.loads(row)['train_images_per_second'] for row in log.read_text().splitlines()] if log.exists() else []
    minutes = sum(images / rate for rate in rates) * threads / 60
    return training_flop(settings_of(folder), num_classes, images) / 1e15, minutes


def on_frontier(points: Sequence[Point], cost: str) -> list[Point]:
    """The points that are better than all that cost no more, the cheapest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (getattr(point, cost), -point.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found


def table(points: Sequence[Point], held_out: int, train_images: int) -> str:
    """The recipes as a page in Markdown."""
    best = {point.name for point in on_frontier(points, 'pflop')}
    rows = [f'| {"**" * (point.name in best)}{point.name}{"**" * (point.name in best)} | {point.accuracy:.2f} | '
            f'{point.spread} | {len(point.accuracies)} | {point.pflop:.3g} | {point.core_minutes:.3g} |'
            for point in points]
    return '\n'.join([
        '# Accuracy and cost', '',
        f'Accuracy in percent of {held_out:,} held-out images, as the mean over classes, after the last epoch of '
        f'training on {train_images:,} others. No test image was read. In bold: better than all that take no more '
        'PFLOP.', '',
        '| recipe | accuracy | deviation | seeds | PFLOP | core-minutes |', '|---|---|---|---|---|---|', *rows, ''])


def draw(points: Sequence[Point]) -> Figure:
    """Accuracy against PFLOP and core-minutes; a line joins the recipes that are better than all cheaper ones."""
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, cost, label in ((left, 'pflop', 'PFLOP of training'), (right, 'core_minutes', 'core-minutes')):
        _draw_points(axes, points, cost)
        axes.set_xlabel(label)
    left.set_ylabel('accuracy on held-out images, %')
    left.legend(fontsize=8, frameon=False)
    return figure


def _draw_points(axes: Axes, points: Sequence[Point], cost: str) -> None:
    frontier = on_frontier(points, cost)
    axes.plot([getattr(point, cost) for point in frontier], [point.accuracy for point in frontier], color='#999999',
              linewidth=1, drawstyle='steps-post', zorder=1)
    for position, point in enumerate(points):
        spread = statistics.stdev(point.accuracies) if len(point.accuracies) > 1 else 0
        axes.errorbar(getattr(point, cost), point.accuracy, spread, fmt='o', color=style(position)['color'],
                      label=point.name)
    if min(getattr(point, cost) for point in points) > 0:
        axes.set_xscale('log')


def main() -> None:
    args = _parse()
    entries = read_list(args.list)
    for entry in entries:
        if entry.first_stage() is None:  # whose weights are there
            check_counted(parse_train(entry.flags))
    train, held_out = hold_out(*(rows_of(_found(path, args.data_dir)) for path in (args.train_list, args.pool_list)),
                               args.held_out, args.whole_pool)
    lists = {name: args.output / 'lists' / f'{name}.txt' for name in ('train', 'held_out')}
    for name, rows in (('train', train), ('held_out', held_out)):
        write_list(lists[name], '\n'.join(rows) + '\n')
    device = args.train_flags[args.train_flags.index('--device') + 1] if '--device' in args.train_flags else 'cpu'
    flags = ['--train-list', str(lists['train']), '--test-list', str(lists['held_out']), *args.train_flags]
    runner = Runner(args.output, args.data_dir, flags, about_this_machine(device, args.jobs, args.threads),
                    args.threads, args.minutes and 60 * args.minutes)
    left = runner.train(entries, args.jobs)
    points = points_of(args.output, entries, Counter(row.split()[-1] for row in train), args.threads)
    if points:
        write_text_atomic(args.output / 'frontier.md', table(points, len(held_out), len(train)))
        draw(points).savefig(args.output / 'frontier.svg')
        print(table(points, len(held_out), len(train)))
    if left:
        sys.exit(f'not done, see above and train.txt in their folders: {", ".join(left)}')


def _found(path: Path, data_dir: str) -> Path:
    """A list that is named by its place, or by that in the data folder."""
    return path if path.exists() else Path(data_dir, path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('list', type=Path, help='file of names and arguments of train.py')
    parser.add_argument('--data-dir', required=True, help='folder of the images and their lists')
    parser.add_argument('--train-list', type=Path, required=True, help='the long-tailed training images')
    parser.add_argument('--pool-list', type=Path, required=True, help='more images of the same classes')
    parser.add_argument('--held-out', type=int, default=HELD_OUT, help='images of a class that are held out')
    parser.add_argument('--whole-pool', action='store_true', help='hold out all unused images, for smaller errors')
    parser.add_argument('--output', type=Path, default=Path('output/frontier'), help='folder of all runs')
    parser.add_argument('--jobs', type=int, default=1, help='runs side by side')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of a run')
    parser.add_argument('--minutes', type=float, help='interrupt all runs after this time')
    return parse_before_train_flags(parser)


if __name__ == '__main__':
    raise SystemExit(run_cli(lambda argv: main(), 'frontier.py'))

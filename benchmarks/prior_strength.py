"""Does a method do more than give the prior another weight? Two methods at every strength of logit adjustment.

    nbn-validate --checkpoint output/full/modern-s42/last.pth.tar --data-dir /data/cifar100_lt \\
        --logits-file logits/modern-s42.npz    # and so for each run of both
    python benchmarks/prior_strength.py modern nbn_modern --logits logits --output docs/images/prior_strength.png

Whatever moves accuracy from frequent classes to rare ones can be had after training as well: of the logits z [N, C] of
each test image, z - s log p is taken, where p are the shares of the classes in training and s is the strength (Menon et
al., ICLR 2021; 0 leaves the network as it is). The methods are then compared where they are equally good at few-shot
classes, seed by seed. Nothing is chosen by it: all strengths are shown, and the test images are those of the report.

Prints tables in Markdown, means over the seeds that both have with 95% intervals of differences by Student's t, and
draws accuracy over all and over many-shot classes against that of few-shot ones.
"""
import argparse
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from results_page import table, with_interval
from results_plots import style
from results_rows import Spread
from results_runs import SHOTS, Method, read_methods

from nbn_timm.errors import InputError, run_cli
from nbn_timm.files import atomic_write

STRENGTHS = np.linspace(-1, 1, 81)
SHOWN = (-0.5, -0.25, 0.0, 0.25, 0.5)
ALL, MANY, FEW = 0, 1, 3  # columns of accuracies


def read_logits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] and labels [N] of a file of nbn-validate --logits-file.

    Raises:
        InputError: It is not there or cannot be read.
    """
    try:
        with np.load(path) as arrays:
            return arrays['logits'].astype(np.float32), arrays['labels'].astype(np.int64)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"the logits '{path}' cannot be read ({error}): make them by nbn-validate --logits-file"
                         ) from None


def is_right(logits: np.ndarray, labels: np.ndarray, shares: np.ndarray, strength: float) -> np.ndarray:
    """Whether each image's label is the answer of z - s log p, bool [N]."""
    return (logits - strength * np.log(shares)).argmax(axis=1) == labels


def accuracies(logits: np.ndarray, labels: np.ndarray, shares: np.ndarray, shots: Sequence[str | None]) -> np.ndarray:
    """Accuracy in percent over all images and over those of many-, medium- and few-shot classes, at each strength.

    Args:
        logits: [N, C].
        labels: [N].
        shares: Of the classes in training, [C].
        shots: Of the classes.

    Returns:
        [strengths, 4].
    """
    of_image = np.array([str(shot) for shot in shots])[labels]
    groups = [np.ones(len(labels), dtype=bool), *(of_image == shot for shot in SHOTS)]
    found = []
    for strength in STRENGTHS:
        right = is_right(logits, labels, shares, strength)
        found.append([100 * right[group].mean() for group in groups])
    return np.array(found)


def where_few_is(curve: np.ndarray, few: float) -> np.ndarray:
    """A curve of accuracies [strengths, 4] at the strength at which few-shot classes have this one, between strengths.

    Raises:
        InputError: At no strength they have.
    """
    places = np.maximum.accumulate(curve[:, FEW])  # rises with the strength, but for an image here and there
    if not places[0] <= few <= places[-1]:
        raise InputError(f'at no strength from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} few-shot accuracy is {few:.2f}')
    levels, place = np.unique(places, return_inverse=True)  # several strengths may have one accuracy
    strengths = np.bincount(place)
    return np.array([np.interp(few, levels, np.bincount(place, column) / strengths)
                     for column in (*curve.T, STRENGTHS)])


def curves_of(method: Method, logits: Path) -> dict[int, np.ndarray]:
    """Accuracies at each strength, by seed."""
    curves = {}
    for run in method.runs:
        values, labels = read_logits(logits / f'{run.name}.npz')
        images = np.array([row.train_images for row in run.classes])
        curves[run.seed] = accuracies(values, labels, images / images.sum(), [row.shot for row in run.classes])
    return curves


def tables(names: Sequence[str], curves: Sequence[Mapping[int, np.ndarray]], seeds: Sequence[int]) -> list[str]:
    """Both methods at some strengths, and their differences where they are equally good at few-shot classes."""
    rows = []
    for name, by_seed in zip(names, curves, strict=True):
        mean = np.mean([by_seed[seed] for seed in seeds], axis=0)
        rows += [(name, f'{strength:g}', *(f'{value:.2f}' for value in mean[np.abs(STRENGTHS - strength).argmin()]))
                 for strength in SHOWN]
    lines = [table(('method', 'strength', 'all', *SHOTS), rows), '']
    base, other = curves
    found = [(np.append(other[seed][len(STRENGTHS) // 2], 0), where_few_is(
        base[seed], other[seed][len(STRENGTHS) // 2, FEW])) for seed in seeds]
    cells = [with_interval(Spread([float(one[column] - two[column]) for one, two in found])) for column in range(3)]
    strength = np.mean([two[-1] for _, two in found])
    lines += [table(('of', f'over {names[0]}, as good at few-shot classes by strength', 'all', 'many', 'medium'),
                    [(names[1], f'{strength:.2f} on average', *cells)]), '']
    best = [[max(by_seed[seed][:, ALL]) for seed in seeds] for by_seed in curves]
    lines.append('best over all classes at any strength: ' + ', '.join(
        f'{name} {np.mean(values):.2f}' for name, values in zip(names, best, strict=True)) + '; difference '
        + with_interval(Spread([float(two - one) for one, two in zip(*best, strict=True)])))
    return lines


def draw(names: Sequence[str], curves: Sequence[Mapping[int, np.ndarray]], seeds: Sequence[int]) -> Figure:
    """Accuracy over all and over many-shot classes against few-shot ones; a dot is the network as trained."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for axes, column, of in zip(figure.subplots(1, 2), (ALL, MANY), ('all', 'many-shot'), strict=True):
        for place, (name, by_seed) in enumerate(zip(names, curves, strict=True)):
            mean = np.mean([by_seed[seed] for seed in seeds], axis=0)
            axes.plot(mean[:, FEW], mean[:, column], label=name, linewidth=1.8, **style(place))
            middle = mean[len(STRENGTHS) // 2]
            axes.plot(middle[FEW], middle[column], 'o', color=style(place)['color'])
        axes.set(xlabel='accuracy over few-shot classes, %', ylabel=f'accuracy over {of} classes, %')
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False, title='dot: as trained', title_fontsize=9, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('methods', nargs=2, metavar='METHOD', help='names of runs without their seed')
    parser.add_argument('--logits', type=Path, required=True, help='folder with RUN.npz of each run')
    parser.add_argument('--results', type=Path, default=Path(__file__).parents[1] / 'results' / 'cifar100_lt')
    parser.add_argument('--names', nargs=2, help='of the methods, for people')
    parser.add_argument('--output', type=Path, default=Path('prior_strength.png'))
    args = parser.parse_args(argv)
    by_name = {method.runs[0].method: method for method in read_methods(args.results, {})}
    if missing := [name for name in args.methods if name not in by_name]:
        raise InputError(f"no runs of '{missing[0]}' in '{args.results}': give two of {', '.join(sorted(by_name))}")
    names = args.names or args.methods
    curves = [curves_of(by_name[name], args.logits) for name in args.methods]
    seeds = sorted(curves[0].keys() & curves[1].keys())
    if len(seeds) < 2:
        raise InputError(f"'{args.methods[0]}' and '{args.methods[1]}' have {len(seeds)} seeds in common: give two "
                         'methods with at least two')
    print(f'{len(seeds)} seeds\n')
    print('\n'.join(tables(names, curves, seeds)))
    figure = draw(names, curves, seeds)
    atomic_write(args.output, lambda path: figure.savefig(path, format='png', dpi=150))


if __name__ == '__main__':
    sys.exit(run_cli(main, 'prior_strength.py'))

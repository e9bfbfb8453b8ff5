"""The figures of a report; each is an SVG for the page, or None without matplotlib or without anything to show."""
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from markupsafe import Markup

from nbn_timm.evaluation.calibration import BINS, Calibration
from nbn_timm.pages import figure_svg, matrix
from nbn_timm.pages.figures import INK, SERIES, plain_log
from nbn_timm.report.norms import NormSizes
from nbn_timm.report.run import ACCURACY, SHOTS, ClassRow, FinishedRun, Measure

Svg = Markup | None
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]

_OF_SHOT = {'all': INK, 'many': SERIES[0], 'medium': SERIES[1], 'few': SERIES[2]}


def curves(lines: Lines, label: str, ylabel: str, colors: Mapping[str, str] | None = None) -> Svg:
    """Values over epochs, a line for each name."""
    several = len(lines) > 1
    lines = {name: line for name, line in lines.items() if line[0]}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, (epochs, values) in lines.items():
            color = {'color': colors[name]} if colors else {}
            axes.plot(epochs, values, label=name, marker='o' if len(epochs) == 1 else None, markersize=4, **color)
        axes.set(xlabel='epoch', ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if several:
            axes.legend(fontsize=8)

    return figure_svg(draw, label) if lines else None


def training_curves(run: FinishedRun) -> list[tuple[Svg, str]]:
    """Loss, accuracy by shot and rate over the epochs."""
    watched = 'validation' if 'model_best' in str(run.results.get('checkpoint')) else 'evaluation'
    loss = {'training': run.curve('train_loss'), watched: run.curve('eval_loss')}
    measure = run.measure
    judged = {shot: run.curve(f'eval_{column}') for shot, column in measure.columns.items()}
    return [
        (curves(loss, 'loss by epoch', 'loss'), 'Loss. The training loss is of the method, which may weigh classes.'),
        (curves(judged, f'{measure.words} by epoch', f'{measure.words} in %', _OF_SHOT),
         f'{sentence_case(measure.words)} after each epoch, {watched}.'),
        (curves({'rate': run.curve('lr')}, 'learning rate by epoch', 'learning rate'), 'Learning rate.')]


def sentence_case(words: str) -> str:
    """With a capital at the beginning."""
    return words[:1].upper() + words[1:]


def shot_bars(runs: Mapping[str, Mapping[str, Any]], measure: Measure = ACCURACY) -> Svg:
    """What is measured over all, many-, medium- and few-shot classes, a bar for each run."""
    shown = {shot: name for shot, name in measure.columns.items()
             if any(isinstance(results.get(name), int | float) for results in runs.values())}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        width = 0.8 / len(runs)
        for position, (run, results) in enumerate(runs.items()):
            places = np.arange(len(shown)) + (position - (len(runs) - 1) / 2) * width
            heights = [results.get(name) or 0 for name in shown.values()]
            bars = axes.bar(places, heights, width * 0.94, label=run, color=SERIES[position % len(SERIES)])
            if len(runs) < 4:
                axes.bar_label(bars, fmt='%.1f', fontsize=8)
        axes.set_xticks(range(len(shown)), list(shown))
        axes.set(ylabel=f'{measure.words} in %', ylim=(0, None))
        axes.grid(visible=False, axis='x')
        if len(runs) > 1:
            figure.legend(loc='outside lower center', fontsize=8, ncols=1 + (len(runs) > 3))

    return figure_svg(draw, f'{measure.words} by shot', height=3.0 + 0.12 * len(runs)) if shown else None


def rates_by_images(classes: Sequence[ClassRow], first: str = 'recall', second: str = 'precision') -> Svg:
    """Two rates of each class, attributes of `ClassRow`, over its training images."""
    known = [(max(row.train_images, 0.5), getattr(row, first), getattr(row, second)) for row in classes
             if row.train_images is not None and getattr(row, first) is not None]
    names = [name.replace('f1', 'F1').replace('_', ' ') for name in (first, second)]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.scatter([images for images, _, _ in known], [rate for _, rate, _ in known], s=14, label=names[0],
                     color=SERIES[0])
        told = [(images, rate) for images, _, rate in known if rate is not None]
        if told:
            axes.scatter(*zip(*told, strict=True), s=14, marker='x', linewidths=1, label=names[1], color=SERIES[1])
        axes.set(xscale='log', xlabel='training images of the class', ylabel='%', ylim=(-3, 103))
        plain_log(axes.xaxis)
        axes.legend(fontsize=8)

    return figure_svg(draw, f'{names[0]} and {names[1]} by training images') if known else None


def reliability(whole: Calibration, by_shot: Mapping[str, Calibration]) -> Svg:
    """Accuracy by confidence, with a line for each shot."""
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        step = 100 / BINS
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle='--', label='as often right as sure')
        heights = [bar[1] if bar else 0 for bar in whole.bars()]
        axes.bar((np.arange(BINS) + 0.5) * step, heights, step * 0.92, color=SERIES[7], alpha=0.45, label='all')
        for shot, part in by_shot.items():
            bars = [bar for bar in part.bars() if bar is not None]
            if bars:
                axes.plot([bar[0] for bar in bars], [bar[1] for bar in bars], marker='o', markersize=3,
                          linewidth=1.2, label=shot, color=_OF_SHOT[shot])
        axes.set(xlabel='confidence in %', ylabel='accuracy in %', xlim=(0, 100), ylim=(0, 102))
        axes.legend(fontsize=8)

    return figure_svg(draw, 'reliability diagram', height=3.4)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Svg:
    """Shares of each class's pictures by what they were told to be; None for more than `MATRIX_LIMIT` classes."""
    return matrix(counts, counts.sum(axis=1), names, 'confusion matrix', 'told to be', 'is')


def norm_figures(networks: Mapping[str, NormSizes], lengths: Mapping[str, Mapping[str, float]]
                 ) -> list[tuple[Svg, str]]:
    """The paper's figures, a line or bar per network: sorted |g| and |b|, feature length of many, medium and few."""
    found: list[tuple[Svg, str]] = []
    if networks:
        for part, symbol in (('weight', '|g|'), ('bias', '|b|')):
            found.append((figure_svg(_drawer(draw_sizes, networks, part, symbol), f'sorted sizes of {symbol}'),
                          f'{symbol} of the last stage, sorted in each layer and averaged over the layers.'))
    if lengths:
        found.append((figure_svg(_drawer(draw_lengths, lengths), 'feature length by shot'),
                      'Mean length of the vector that the classifier sees, by the shots of the class.'))
    return found


def _drawer(draw: Callable[..., None], *values: Any) -> Callable[[Any], None]:
    return lambda figure: draw(figure.add_subplot(), *values)


def draw_sizes(
        axes: Any,
        networks: Mapping[str, NormSizes],
        part: str,
        symbol: str,
        colors: Sequence[str] = SERIES,
) -> None:
    """Sorted sizes, a line for each network, into matplotlib axes; `part` is 'weight' or 'bias'."""
    for color, (name, sizes) in zip(cycle(colors), networks.items(), strict=False):
        values = getattr(sizes, part)
        axes.plot(range(1, len(values) + 1), values, color=color, label=name)
    largest = max(float(getattr(sizes, part).max()) for sizes in networks.values())
    axes.set(xlabel='channel', ylabel=f'{symbol}, sorted', ylim=(0, 1.05 * largest or None))
    if len(networks) > 1:
        axes.legend(fontsize=8)


def draw_lengths(axes: Any, lengths: Mapping[str, Mapping[str, float]], colors: Sequence[str] = SERIES) -> None:
    """Mean feature length by shot, a group of bars for each network, into matplotlib axes."""
    width = 0.8 / len(lengths)
    there = [shot for shot in SHOTS if any(shot in by_shot for by_shot in lengths.values())]
    for position, (name, by_shot) in enumerate(lengths.items()):
        places = [there.index(shot) + (position - (len(lengths) - 1) / 2) * width for shot in by_shot]
        axes.bar(places, list(by_shot.values()), width * 0.94, label=name, color=colors[position % len(colors)])
    axes.set_xticks(range(len(there)), there)
    axes.set(ylabel='mean feature length')
    axes.grid(visible=False, axis='x')
    if len(lengths) > 1:
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=8)


def labels_each(numbers: Mapping[str, np.ndarray]) -> Svg:
    """How many pictures have so many labels, a group of bars for each kind of label; numbers [N] by what they are."""
    most = max(int(values.max()) for values in numbers.values())

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        width = 0.8 / len(numbers)
        for position, (name, values) in enumerate(numbers.items()):
            places = np.arange(most + 1) + (position - (len(numbers) - 1) / 2) * width
            axes.bar(places, np.bincount(values, minlength=most + 1), width * 0.94, label=name, color=SERIES[position])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel='labels of a picture', ylabel='pictures')
        axes.grid(visible=False, axis='x')
        axes.legend(fontsize=8)

    return figure_svg(draw, 'labels per picture')


def gain_by_images(classes: Sequence[ClassRow], gains: np.ndarray, measure: str = 'recall') -> Svg:
    """Change of each class over its training images; gains [C] in points, NaN where it is not known."""
    known = [(max(row.train_images, 0.5), gain) for row, gain in zip(classes, gains.tolist(), strict=True)
             if row.train_images is not None and gain == gain]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        images, values = np.array(known).T
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.scatter(images, values, s=14, c=[SERIES[2] if value >= 0 else SERIES[4] for value in values])
        axes.set(xscale='log', xlabel='training images of the class', ylabel=f'change of {measure} in points')
        plain_log(axes.xaxis)

    return figure_svg(draw, f'change of {measure} by training images') if known else None

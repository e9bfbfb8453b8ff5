"""The plots of docs/zoo.md. A method has one colour and line style in all of them."""
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from results_rows import Spread
from results_runs import Method

# Okabe and Ito's colours, which the colour-blind tell apart; the yellow, too pale for lines, is left out, and the black
# is a grey that whiskers show on.
COLORS = ('#5c5c5c', '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9')
LINES = ('-', (0, (5, 1.5)), (0, (1.2, 1.2)))
HATCHES = ('', '////', '....')
MARKERS = ('o', 's', '^')
FAINT = '#666666'
SHOTS = ('many', 'medium', 'few')
WIDTH = 9.0  # inches
COLUMNS = 3  # of small plots side by side


def style(position: int) -> dict[str, Any]:
    """Colour and line of the method at a position."""
    return {'color': COLORS[position % len(COLORS)], 'linestyle': LINES[position // len(COLORS) % len(LINES)]}


def classes(methods: Sequence[Method]) -> Figure:
    """Accuracy of each class, most frequent first, a small plot per method: faint points and a smoothed line, beside
    the line of the first method."""
    rows = methods[0].runs[0].classes
    order = sorted(range(len(rows)), key=lambda label: (-rows[label].train_images, label))
    counts = [rows[label].train_images for label in order]
    columns = min(COLUMNS, len(methods))
    lines = -(-len(methods) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.3 * lines), layout='constrained')
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    baseline = smoothed([methods[0].class_accuracies()[label] for label in order])
    for position, (axes, method) in enumerate(zip(grid, methods, strict=False)):
        found = method.class_accuracies()
        accuracies = [found[label] for label in order]
        look = style(position)
        _plain(axes)
        if position:
            axes.plot(baseline, linewidth=1.4, **style(0))
        axes.scatter(range(len(order)), accuracies, s=10, color=look['color'], alpha=0.3, linewidths=0)
        axes.plot(smoothed(accuracies), linewidth=2.4, **look)
        axes.set_title(textwrap.fill(method.label, 34), fontsize=9.5, loc='left', pad=16)
        _mark_shots(axes, [sum(row.shot == shot for row in rows) for shot in SHOTS])
        ticks = {amount: min(range(len(counts)), key=lambda rank: abs(math.log((counts[rank] or 0.5) / amount)))
                 for amount in _round_amounts(min(counts), max(counts))}
        axes.set_xticks(list(ticks.values()), [f'{amount:g}' for amount in ticks], fontsize=8)
        axes.set_xlim(-1.5, len(order) + 0.5)
        axes.set_ylim(0, 100)
    for axes in grid[len(methods):]:
        axes.set_visible(False)
    for position in range(len(methods)):
        grid[position].tick_params(labelbottom=position + columns >= len(methods))
    figure.supxlabel('training images of the class (classes by frequency)'
                     + (f'; grey line: {methods[0].label}' if len(methods) > 1 else ''), fontsize=10)
    figure.supylabel('test accuracy of the class, %', fontsize=10)
    return figure


def smoothed(values: Sequence[float], width: float | None = None) -> list[float]:
    """Means under a Gaussian window, cut off at the ends; its width in values, by default a twentieth of them."""
    width = width or max(1.0, len(values) / 20)
    means = []
    for centre in range(len(values)):
        weights = [math.exp(-0.5 * ((place - centre) / width) ** 2) for place in range(len(values))]
        means.append(sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights))
    return means


def splits(methods: Sequence[Method]) -> Figure:
    """Accuracy over all, many, medium and few; bars are means over seeds, whiskers sample standard deviations."""
    figure = Figure(figsize=(WIDTH, 4.2), layout='constrained')
    axes = figure.subplots()
    _plain(axes)
    groups = (None, *SHOTS)
    width = 0.82 / len(methods)
    for position, method in enumerate(methods):
        values = [method.accuracies(shot) for shot in groups]
        places = [group + (position - (len(methods) - 1) / 2) * width for group in range(len(groups))]
        several = len(method.runs) > 1
        axes.bar(places, [statistics.mean(of_runs) for of_runs in values], width * 0.9, color=style(position)['color'],
                 hatch=HATCHES[position // len(COLORS) % len(HATCHES)], edgecolor='white', linewidth=0,
                 yerr=[statistics.stdev(of_runs) for of_runs in values] if several else None,
                 error_kw={'elinewidth': 1.2, 'capsize': 2.5, 'ecolor': 'black'}, label=method.label)
    axes.set_xticks(range(len(groups)), ['all classes', *SHOTS])
    axes.tick_params(axis='x', length=0)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel('test accuracy, %')
    if any(len(method.runs) > 1 for method in methods):
        axes.set_title('means over seeds; whiskers: standard deviation', fontsize=9, color=FAINT, loc='left')
    _legend(figure, axes)
    return figure


def training(methods: Sequence[Method]) -> Figure:
    """Training loss and learning rate after each epoch, means over seeds."""
    figure = Figure(figsize=(WIDTH, 5.6), layout='constrained')
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    schedules = [tuple(method.curve('lr')) for method in methods]
    for position, method in enumerate(methods):
        epochs = range(1, len(schedules[position]) + 1)
        above.plot(epochs, method.curve('train_loss'), linewidth=1.7, label=method.label, **style(position))
        if schedules[position] not in schedules[:position]:
            look = style(position) if len(set(schedules)) > 1 else {'color': 'black'}
            below.plot(epochs, schedules[position], linewidth=1.7, **look)
    for axes in (above, below):
        _plain(axes)
        axes.set_yscale('log')
        axes.yaxis.set_minor_formatter(NullFormatter())
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    above.set_ylabel('training loss')
    below.set_ylabel('learning rate')
    below.set_xlabel('epoch')
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(set(schedules)) < len(methods):
        below.set_title('one line for methods that share a schedule', fontsize=9, color=FAINT, loc='left')
    _legend(figure, above)
    return figure


def cost(methods: Sequence[tuple[Method, float]], published: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against PFLOP of training: ours with standard deviations, and hollow what is published with one number.

    Args:
        methods: With their PFLOP.
        published: Entries of published.yaml; those without `pflop`, and ranges, are drawn as far as they go.
    """
    figure = Figure(figsize=(WIDTH, 4.2 + 0.2 * math.ceil(len(methods) / 2)), layout='constrained')
    axes = figure.subplots()
    _plain(axes)
    named: list[tuple[float, float]] = []  # points whose names stand to their right
    for entry in sorted((entry for entry in published if 'pflop' in entry), key=lambda entry: -float(entry['pflop'])):
        low, high = _range(entry['all'])
        place, middle = float(entry['pflop']), (low + high) / 2
        if low < high:
            axes.plot([place, place], [low, high], color=FAINT, linewidth=1)
        axes.plot([place], [middle], 'o', markersize=6, markerfacecolor='white', markeredgecolor=FAINT)
        crowded = any(abs(middle - other) < 0.7 and 0.6 < place / cost < 1.7 for cost, other in named)
        if not crowded:
            named.append((place, middle))
        axes.annotate(entry['method'].removesuffix(', with routing'), (place, middle), xytext=(-7 if crowded else 7, 0),
                      textcoords='offset points', ha='right' if crowded else 'left', va='center', fontsize=7.5,
                      color=FAINT)
    for position, (method, pflop) in enumerate(methods):
        values = method.accuracies()
        axes.errorbar([pflop], [statistics.mean(values)], [statistics.stdev(values)] if len(values) > 1 else None,
                      fmt=MARKERS[position // len(COLORS) % len(MARKERS)], markersize=7, capsize=3,
                      color=COLORS[position % len(COLORS)], label=f'{method.label} ({len(values)})')
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel('PFLOP of training')
    axes.set_ylabel('test accuracy, %')
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False, fontsize=9,
                  title='ours, in parentheses the seeds; hollow: published', title_fontsize=9)
    return figure


def _range(value: Any) -> tuple[float, float]:
    """The ends of a published accuracy such as 48.6 or '38 to 41'."""
    low, _, high = str(value).partition(' to ')
    return float(low), float(high or low)


def effect(pairs: Sequence[tuple[str, str, Mapping[str, Spread]]]) -> Figure:
    """What each pair differs by: a point of each seed, the mean and its 95% interval."""
    groups = ('all', *SHOTS)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.3 * len(pairs)), layout='constrained')
    grid = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (other, base, spreads) in zip(grid, pairs, strict=True):
        axes.spines[['top', 'right', 'left']].set_visible(False)
        axes.axvline(0, color=FAINT, linewidth=1)
        for place, shot in enumerate(groups):
            spread = spreads[shot]
            axes.plot(spread.values, [place + 0.22] * len(spread.values), 'o', markersize=5, color=COLORS[1],
                      alpha=0.35, markeredgewidth=0)
            axes.errorbar([spread.mean], [place], xerr=[spread.half_width or 0.0], fmt='o', markersize=7, capsize=4,
                          linewidth=2, color=COLORS[1])
        axes.set_yticks(range(len(groups)), ['all classes', *SHOTS])
        axes.tick_params(axis='y', length=0)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.grid(axis='x', color='#e4e4e4', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(f'{other}, over {base}: {len(spreads["all"].values)} pairs', fontsize=10, loc='left')
    grid[-1].set_xlabel('difference of test accuracy in points: each seed, the mean and its 95% interval')
    return figure


def _round_amounts(low: int, high: int) -> list[float]:
    """1, 2, 5, 10, ... within limits, greatest first."""
    amounts = [digit * 10 ** power for power in range(len(str(high))) for digit in (1, 2, 5)]
    return [amount for amount in reversed(amounts) if low <= amount <= high]


def _mark_shots(axes: Axes, sizes: Sequence[int]) -> None:
    """Name the many-, medium- and few-shot ranges above the axes, and draw their borders."""
    end = 0
    for shot, size in zip(SHOTS, sizes, strict=True):
        begin, end = end, end + size
        if size:
            axes.text((begin + end - 1) / 2, 1.03, shot, transform=axes.get_xaxis_transform(), ha='center', fontsize=8,
                      color=FAINT)
        if size and begin:
            axes.axvline(begin - 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))


def _plain(axes: Axes) -> None:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#e4e4e4', linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    """Beside the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right upper', frameon=False, handlelength=2.6)

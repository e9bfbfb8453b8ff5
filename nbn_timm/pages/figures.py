"""Figures as inline SVG, drawn by matplotlib in the colours of the page."""
import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

# Colours that figures are drawn in, each of which becomes a variable of the page's style: so a figure is light or dark
# with its page.
INK, GRID, *SERIES = (f'#0{number}fe0{number}' for number in range(10))
_VARIABLES = {INK: 'ink', GRID: 'line'} | {colour: f'series-{number}' for number, colour in enumerate(SERIES, 1)}
MATRIX_LIMIT = 50  # classes of which a matrix can be read

_STYLE: dict[str, Any] = {
    'svg.fonttype': 'none', 'text.parse_math': False, 'font.size': 9, 'axes.titlesize': 10,
    'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': INK, 'xtick.color': INK, 'ytick.color': INK,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.color': GRID, 'grid.linewidth': 0.6,
    'axes.facecolor': 'none', 'figure.facecolor': 'none', 'savefig.facecolor': 'none', 'legend.frameon': False,
    'lines.linewidth': 1.6, 'axes.axisbelow': True,
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec('matplotlib') is not None


def how_to_draw() -> str:
    """What a page without figures says."""
    return "There are no figures, since matplotlib is missing: pip install 'nbn_timm[plots]' and write the page again."


def figure_svg(draw: Callable[[Any], None], label: str, width: float = 4.8, height: float = 3.0) -> Markup | None:
    """A figure as SVG to put into a page; None without matplotlib.

    Args:
        draw: Called with a fresh matplotlib figure, which it fills. Colours: `INK`, `GRID` and `SERIES[0]` to
            `SERIES[7]` (the default cycle), which follow the page's light or dark; others stay as they are.
        label: What is seen, for who cannot see it, and told apart by: no two figures of a page have the same.
        width: Inches; of a page on a phone about 3.7 are shown without shrinking.
        height: Inches.
    """
    if not can_draw():
        return None
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    style: Any = _STYLE | {'axes.prop_cycle': cycler(color=SERIES), 'svg.hashsalt': label}
    file = io.StringIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the browser has the letters of other scripts
        figure = Figure(figsize=(width, height), layout='constrained')
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None})
    return _inline(file.getvalue(), label)


def matrix(
        counts: np.ndarray,
        totals: np.ndarray,
        names: Sequence[str],
        label: str,
        xlabel: str,
        ylabel: str,
) -> Markup | None:
    """Pictures by two classes: numbers, and each row coloured by its shares.

    Args:
        counts: [C, C].
        totals: Of which a row is shares, [C].
        names: Of the classes.
        label: See `figure_svg`.
        xlabel: What a column is.
        ylabel: What a row is.

    Returns:
        None without matplotlib, and for more than `MATRIX_LIMIT` classes.
    """
    number = len(names)
    if number > MATRIX_LIMIT:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        picture = np.zeros((number, number, 4))
        picture[..., :3] = (0.18, 0.45, 0.83)
        picture[..., 3] = counts / np.maximum(totals, 1)[:, None]
        axes.imshow(picture, interpolation='nearest')
        size = 8 if number <= 20 else 5.5
        short = [name if len(name) <= 18 else f'{name[:17]}…' for name in names]
        axes.set_xticks(range(number), short, rotation=90, fontsize=size)
        axes.set_yticks(range(number), short, fontsize=size)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(visible=False)
        if number <= 20:
            for row, column in zip(*np.nonzero(counts), strict=True):
                axes.text(column, row, counts[row, column], ha='center', va='center', fontsize=7)

    side = 4.8 if number <= 20 else 6.4
    return figure_svg(draw, label, side, side)


def plain_log(axis: Any) -> None:
    """Plain numbers for a logarithmic axis: matplotlib would write formulas, and text is not taken for one here."""
    from matplotlib.ticker import FuncFormatter, NullFormatter
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axis.set_minor_formatter(NullFormatter())


def _inline(svg: str, label: str) -> Markup:
    """The svg element alone, as wide as its place and with the page's colours; the page's style sets the font."""
    svg = svg[svg.index('<svg'):]
    svg = re.sub(r'<(metadata|style)\b.*?</\1>\s*', '', svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', '<g', svg)  # which nothing refers to, and which two figures would share
    svg = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r'\1', svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r'\1', svg, count=1)
    svg = svg.replace('<svg', Markup('<svg role="img" aria-label="{}"').format(label), 1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f'var(--{variable})')
    return Markup(svg)

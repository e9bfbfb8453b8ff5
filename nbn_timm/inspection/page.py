"""An inspection as a page of one file: numbers, the shape of the tail, and pictures of what was found."""
from pathlib import Path
from typing import Any

import numpy as np

from nbn_timm.errors import InputError, one_line
from nbn_timm.inspection.collection import Collection
from nbn_timm.inspection.findings import TITLES, Finding, Inspection, as_data, shots_of
from nbn_timm.inspection.label_sets import common_pairs, together
from nbn_timm.inspection.text import reason_of_fault, sentence, shown_names, verdict
from nbn_timm.pages import Card, Table, figure_svg, matrix, thumbnail, write_page
from nbn_timm.pages.figures import SERIES

_GROUPS_SHOWN, _PICTURES_SHOWN = 12, 6  # thumbnails of a finding: groups, and pictures of each
_NAMES_SHOWN = 300
_PAIRS_SHOWN, _TALL = 200, 15
_SHOT_COLOURS = dict(zip(('many', 'medium', 'few', ''), SERIES, strict=False))


def write_inspection_page(path: str | Path, result: Inspection) -> None:
    """Write the page, whole or not at all; thumbnails are read from the pictures again.

    Raises:
        InputError: The file system refused.
    """
    write_page(path, 'check.html', **page_content(result))


def page_content(result: Inspection) -> dict[str, Any]:
    """What the template shows."""
    collection, told = result.collection, as_data(result)
    findings = [(title, [_shown(one, result) for one in result.findings if one.severity == severity])
                for severity, title in TITLES.items()]
    return {
        'what': collection.what,
        'verdict': verdict(result),
        'stops': result.stops,
        'cards': _cards(collection, told),
        'splits': _splits(told),
        'figure': _tail(collection),
        'findings': [(title, found) for title, found in findings if found],
        'classes': _classes(collection),
        **_label_sets(collection),
        'files': _files(told['files']),
        'notes': collection.notes,
    }


def _cards(collection: Collection, told: dict[str, Any]) -> list[Card]:
    counted = told['splits'].get(collection.counted)
    cards = [Card('pictures', told['pictures']), Card('classes', told['classes'])]
    if counted:
        factor = counted['imbalance_factor']
        cards += [Card('imbalance factor', None if factor is None else f'{factor:.4g}',
                       f'{counted["largest"]:,} to {counted["smallest"]:,} training pictures'),
                  Card('many / medium / few', ' / '.join(str(counted[shot]) for shot in ('many', 'medium', 'few')),
                       'classes above {}, below {} training pictures'.format(*collection.shot_limits))]
    damaged = next((one['number'] for one in told['findings'] if one['kind'] == 'damaged'), 0)
    if collection.label_sets and counted:
        labels = counted['labels']
        cards.append(Card('labels per picture', labels['mean'],
                          f'{labels["most"]} at most; {labels["none"]:,} training pictures have none'))
    return [*cards, Card('damaged files', damaged)]


def _splits(told: dict[str, Any]) -> Table:
    sets = told['label_sets']
    return Table(['split', 'pictures', 'classes', 'largest class', 'smallest class', 'factor',
                  *(['labels per picture', 'most', 'of no class'] if sets else [])], [
        [part, split['pictures'], split['classes'], split['largest'], split['smallest'], split['imbalance_factor'],
         *(split['labels'][name] for name in ('mean', 'most', 'none') if sets)]
        for part, split in told['splits'].items()], decimals=1)


def _classes(collection: Collection) -> Table:
    shots, counts = shots_of(collection), {part: collection.counts(part).tolist() for part in collection.splits}
    first = next(iter(counts), None)
    order = sorted(range(len(collection.names)), key=lambda label: -counts[first][label] if first else 0)
    rows = [[one_line(collection.names[label]), *(counts[part][label] for part in counts), shots[label]]
            for label in order]
    return Table(['class', *counts, 'shots'], rows, tall=True)


def _label_sets(collection: Collection) -> dict[str, Any]:
    """Labels per picture and classes that come together, where pictures can be of several."""
    shown: dict[str, Any] = {'per_picture': None, 'pairs': None}
    if not collection.label_sets or collection.counted not in collection.splits:
        return shown
    sets = collection.splits[collection.counted].targets
    names = [one_line(name) for name in collection.names]
    rows = [[names[pair.rarer], names[pair.other], pair.pictures, 100 * pair.pictures / pair.of_rarer,
             100 * pair.pictures / pair.of_other] for pair in common_pairs(sets)]
    columns = ['class', 'comes with', 'training pictures', '% of the class', '% of the other']
    return {'per_picture': _per_picture(sets.sum(axis=1, dtype=np.int64)), 'more_pairs': len(rows) - _PAIRS_SHOWN,
            'pairs': Table(columns, rows[:_PAIRS_SHOWN], decimals=1, tall=len(rows) > _TALL) if rows else None,
            'matrix': _matrix(together(sets), names) if rows else None}


def _matrix(counts: np.ndarray, names: list[str]) -> Any:
    return matrix(counts, np.diag(counts), names, 'classes that come together', 'are also of', 'training pictures of')


def _per_picture(numbers: np.ndarray) -> Any:
    """How many training pictures are of so many classes, as SVG."""
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        counts = np.bincount(numbers)
        bars = axes.bar(range(len(counts)), counts, color=SERIES[0])
        if len(counts) <= 12:
            axes.bar_label(bars, fmt='{:,.0f}', fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel='labels of a picture', ylabel='training pictures')
        axes.grid(axis='x', visible=False)

    return figure_svg(draw, 'Labels per training picture', width=4.6, height=3.0)


def _files(files: dict[str, Any]) -> Table:
    rows = [['format', kind, number] for kind, number in files['formats'].items()]
    rows += [['mode', kind, number] for kind, number in files['modes'].items()]
    return Table(['', 'kind', 'pictures'], rows)


def _tail(collection: Collection) -> Any:
    """Training pictures of the classes by size, as SVG; None where there is nothing to draw, or no matplotlib."""
    if collection.counted not in collection.splits:
        return None
    counts, shots = collection.counts(collection.counted), np.array(shots_of(collection))
    order = np.argsort(-counts, kind='stable')

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for shot in ('many', 'medium', 'few'):
            chosen = np.flatnonzero(shots[order] == shot)
            if len(chosen):
                axes.bar(chosen, counts[order][chosen], width=1.0 if len(order) > 60 else 0.8,
                         color=_SHOT_COLOURS[shot], label=f'{shot} ({len(chosen)})')
        if counts.max() > 20 * max(1, counts[counts > 0].min(initial=counts.max())):
            axes.set_yscale('log')
            axes.yaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
            axes.yaxis.set_minor_formatter(lambda value, _: '')
        if len(order) <= 25:
            axes.set_xticks(range(len(order)), [_short(collection.names[label]) for label in order], rotation=90)
        else:
            axes.set_xlabel('classes, the largest first')
        axes.set_ylabel('training pictures')
        axes.grid(axis='x', visible=False)
        axes.legend()

    return figure_svg(draw, 'Training pictures per class', width=4.6, height=3.0)


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= 20 else f'{name[:18]}...'


def _shown(finding: Finding, result: Inspection) -> dict[str, Any]:
    """A finding with its thumbnails, or with the files that cannot be shown."""
    shown: dict[str, Any] = {'text': sentence(finding.text), 'remedy': sentence(finding.remedy), 'groups': [],
                             'lines': [], 'more': 0}
    if finding.kind == 'damaged':
        rows = [[one_line(result.collection.name(group[0])), reason_of_fault(result.facts[group[0]].fault or '')]
                for group in finding.groups]
        return {**shown, 'lines': rows}
    if finding.groups:
        single = all(len(group) == 1 for group in finding.groups)
        groups = [[group[0] for group in finding.groups]] if single else finding.groups
        limit = _GROUPS_SHOWN * 2 if single and finding.severity != 'note' else _PICTURES_SHOWN
        shown['groups'] = [[_thumbnail(index, result) for index in group[:limit]] for group in groups[:_GROUPS_SHOWN]]
        shown['more'] = (len(finding.groups) - limit if single else len(groups) - _GROUPS_SHOWN)
        return shown
    return {**shown, 'lines': [[name, ''] for name in shown_names(finding)[:_NAMES_SHOWN]],
            'more': len(finding.names) - _NAMES_SHOWN}


def _thumbnail(index: int, result: Inspection) -> dict[str, Any]:
    collection, facts = result.collection, result.facts[index]
    try:
        uri = thumbnail(collection.picture(index))
    except InputError:  # it has been changed since it was looked at
        uri = None
    name = one_line(collection.name(index))
    return {'uri': uri, 'alt': name,
            'lines': [one_line(collection.class_name(index)), collection.part(index), name.rpartition('/')[2],
                      f'{facts.width} x {facts.height}']}

"""An inspection as a table on a terminal: what a person takes in at once."""
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nbn_timm.errors import one_line, quoted
from nbn_timm.inspection.collection import Collection
from nbn_timm.inspection.findings import TITLES, Finding, Inspection, as_data, shots_of, split_summary
from nbn_timm.inspection.label_sets import common_pairs

_CLASSES_AT_ONCE = 30  # of more, the largest and the smallest are shown
_ENDS = 10
_EXAMPLES = 3
_PAIRS = 10
_BAR = 30  # characters of the longest


def as_text(result: Inspection) -> str:
    """The tables, the findings with the first examples, and a line that says whether a training would go through."""
    collection = result.collection
    parts = [f'{one_line(collection.what)}: {len(collection):,} pictures of {len(collection.names):,} classes',
             _splits(collection), _files(result), _classes(collection), _pairs(collection), *_found(result)]
    return '\n\n'.join(filter(None, [*parts, '\n'.join(collection.notes), verdict(result)]))


def verdict(result: Inspection) -> str:
    """One line: does anything stop a training, and how much is there to look at."""
    stops, looks = (sum(one.severity == severity for one in result.findings) for severity in ('stops', 'look'))
    begin = f'{stops} thing{"s" * (stops != 1)} would stop a training' if stops else 'Nothing stops a training'
    return begin + (f', {looks} to look at.' if looks else ', nothing to look at.')


def _splits(collection: Collection) -> str:
    sets = collection.label_sets
    rows = [['split', 'pictures', 'classes', 'largest', 'smallest', 'factor', 'many/medium/few',
             *(['labels each', 'most', 'of none'] if sets else [])]]
    for part in collection.splits:
        told = split_summary(collection, part)
        factor = told['imbalance_factor']
        rows.append([part, f'{told["pictures"]:,}', f'{told["classes"]:,}', f'{told["largest"]:,}',
                     f'{told["smallest"]:,}', '-' if factor is None else f'{factor:.4g}',
                     f'{told["many"]}/{told["medium"]}/{told["few"]}' if 'many' in told else '-' if sets else '',
                     *(_labels(told['labels']) if sets else [])])
    many, few = collection.shot_limits
    return table(rows) + f'\n(many: more than {many} training pictures, few: less than {few})'


def _labels(labels: Mapping[str, Any]) -> list[str]:
    """Labels per picture of a split, for its row."""
    mean = labels['mean']
    return ['-' if mean is None else f'{mean:.2f}', f'{labels["most"]:,}', f'{labels["none"]:,}']


def _pairs(collection: Collection) -> str:
    """The classes that come together most often, in training pictures that can be of several."""
    if not collection.label_sets or collection.counted not in collection.splits:
        return ''
    pairs = common_pairs(collection.splits[collection.counted].targets)
    rows = [['classes together', '', 'pictures', '% of the first', '% of the second']]
    rows += [[_cut(collection.names[pair.rarer]), _cut(collection.names[pair.other]), f'{pair.pictures:,}',
              f'{100 * pair.pictures / pair.of_rarer:.1f}', f'{100 * pair.pictures / pair.of_other:.1f}']
             for pair in pairs[:_PAIRS]]
    more = f'\n... {len(pairs) - _PAIRS:,} more pairs' if len(pairs) > _PAIRS else ''
    return table(rows) + more if pairs else ''


def _files(result: Inspection) -> str:
    files = as_data(result)['files']
    lines = [f'{name:<9}' + ', '.join(f'{kind} {number:,}' for kind, number in files[name].items())
             for name in ('formats', 'modes') if files[name]]
    if 'width' in files:
        width, height = files['width'], files['height']
        lines.append(f'pixels   {_span(width)} wide, {_span(height)} high, median {width["median"]:,} x '
                     f'{height["median"]:,}')
    if files['bytes']:
        lines.append(f'size     {files["bytes"] / 1e6:,.1f} MB')
    lines += [f'{name:<9}' + ' '.join(f'{value:.4g}' for value in files[name]) + f' (--{name} of nbn-train)'
              for name in ('mean', 'std') if name in files]
    return '\n'.join(lines)


def _span(side: Mapping[str, int]) -> str:
    low, high = side['smallest'], side['largest']
    return f'{low:,}' if low == high else f'{low:,} to {high:,}'


def _classes(collection: Collection) -> str:
    """Classes by size, of many the ends."""
    counted = collection.counted if collection.counted in collection.splits else next(iter(collection.splits), None)
    if counted is None:
        return ''
    counts = {part: collection.counts(part) for part in collection.splits}
    order = sorted(range(len(collection.names)), key=lambda label: -counts[counted][label])
    shots, largest = shots_of(collection), max(1, int(counts[counted].max()))
    rows = [['class', *counts, 'shots', '']]
    shown = order if len(order) <= _CLASSES_AT_ONCE else [*order[:_ENDS], None, *order[-_ENDS:]]
    for label in shown:
        if label is None:
            rows.append([f'... {len(order) - 2 * _ENDS:,} more', *['' for _ in counts], '', ''])
        else:
            bar = '#' * max(int(counts[counted][label] > 0), round(_BAR * counts[counted][label] / largest))
            numbers = [f'{counts[part][label]:,}' for part in counts]
            rows.append([_cut(collection.names[label]), *numbers, shots[label], bar])
    return table(rows)


def _found(result: Inspection) -> list[str]:
    blocks = []
    for severity, title in TITLES.items():
        lines = [line for one in result.findings if one.severity == severity for line in _lines(one, result)]
        if lines:
            blocks.append('\n'.join([title, *lines]))
    return blocks


def _lines(finding: Finding, result: Inspection) -> list[str]:
    """A finding: thing, number and remedy in one line, and examples below it."""
    examples = [' = '.join(_named(index, result) for index in group[:_EXAMPLES]) + (
        f' and {len(group) - _EXAMPLES} more' if len(group) > _EXAMPLES else '') for group in finding.groups]
    if finding.kind == 'damaged':  # all of them: each has to be replaced
        return [_verdict(finding), *(f'      {name} ({reason_of_fault(result.facts[group[0]].fault or "")})'
                                     for name, group in zip(examples, finding.groups, strict=True))]
    examples = examples or shown_names(finding)
    more = [f'... {len(examples) - _EXAMPLES:,} more'] if len(examples) > _EXAMPLES else []
    return [_verdict(finding), *(f'      {line}' for line in [*examples[:_EXAMPLES], *more])]


def _verdict(finding: Finding) -> str:
    return f'  {sentence(finding.text)}' + (f' -> {finding.remedy}' if finding.remedy else '')


def sentence(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def shown_names(finding: Finding) -> list[str]:
    """Names of classes in quotes, so that blanks are seen; sentences as they are."""
    return [one_line(name) if ' = ' in name else quoted(name) for name in finding.names]


def _named(index: int, result: Inspection) -> str:
    return one_line(result.collection.name(index))


def reason_of_fault(sentence: str) -> str:
    """The reason in the sentence about a damaged file, which names the file again."""
    if ' cannot be read (' in sentence:
        return one_line(sentence.partition(' cannot be read (')[2].partition('):')[0])
    return one_line(re.sub(r"^image '[^']*' ", '', sentence))


def _cut(name: str, width: int = 40) -> str:
    name = one_line(name)
    return name if len(name) <= width else f'{name[:width - 3]}...'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns; the first column on the left, those of numbers on the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    right = [place > 0 and any(row[place][:1].isdigit() for row in rows) for place in range(len(widths))]
    return '\n'.join('  '.join(cell.rjust(width) if aligned else cell.ljust(width) for cell, width, aligned in zip(
        row, widths, right, strict=True)).rstrip() for row in rows)

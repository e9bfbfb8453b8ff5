"""How answers are written: for people, as JSON lines, as a table."""
import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from nbn_timm.evaluation.prediction import PredictedClass

Answer = tuple[PredictedClass, ...]
NOT_SURE = 'not sure'


@dataclass(frozen=True)
class Form:
    """Text for people: a file, and below it its classes.

    Attributes:
        topk: Classes of an answer.
        threshold: Below this probability nothing is sure; None leaves that open.
    """

    topk: int
    threshold: float | None

    @property
    def head(self) -> str:
        """What stands above all answers."""
        return ''

    def entry(self, file: str, classes: Answer | None, fault: str | None) -> str:
        """The answer to a file, or why there is none; here that is left to the standard error."""
        if classes is None:
            return ''
        doubt = [] if self.sure(classes) else [f'  {NOT_SURE}: no class has a probability of {self.threshold:.2%}']
        return '\n'.join([file, *doubt, *(f'  {found}' for found in classes)]) + '\n'

    def sure(self, classes: Answer) -> bool:
        """Whether the likeliest class reaches the threshold."""
        return self.threshold is None or classes[0].probability >= self.threshold

    def files_in(self, path: str) -> frozenset[str]:
        """The files that are answered in what was written before."""
        if not os.path.exists(path):
            return frozenset()
        with open(path, encoding='utf-8', newline='') as file:
            return frozenset(self._files(file))

    def _files(self, file: TextIO) -> Iterator[str]:
        return (line.rstrip('\n') for line in file if not line.startswith('  '))


class JsonLines(Form):
    """One JSON object per line: the predictions, or the error."""

    def entry(self, file: str, classes: Answer | None, fault: str | None) -> str:
        found: dict[str, Any] = {'error': fault}
        if classes is not None:
            found = {'predictions': [found.to_dict() for found in classes]}
            if self.threshold is not None:
                found['sure'] = self.sure(classes)
        return json.dumps({'file': file, **found}) + '\n'

    def _files(self, file: TextIO) -> Iterator[str]:
        for line in file:
            try:
                yield str(json.loads(line)['file'])
            except (ValueError, KeyError, TypeError):  # cut short by a kill
                continue


class Table(Form):
    """CSV: the answer, which may be 'not sure', the likeliest class and those behind it."""

    _PARTS = ('name', 'class', 'probability', 'train_images', 'shot')

    @property
    def head(self) -> str:
        columns = [f'{part}_{place}' if place > 1 else part
                   for place in range(1, self.topk + 1) for part in self._PARTS]
        return self._row(['file', 'answer', *columns, 'error'])

    def entry(self, file: str, classes: Answer | None, fault: str | None) -> str:
        if classes is None:
            return self._row([file, '', *[''] * (self.topk * len(self._PARTS)), fault])
        cells = [found.to_dict()[part] for found in classes for part in self._PARTS]
        return self._row([file, classes[0].name if self.sure(classes) else NOT_SURE, *cells, ''])

    def _row(self, cells: list[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerow(cells)
        return text.getvalue()

    def _files(self, file: TextIO) -> Iterator[str]:
        return (row[0] for row in list(csv.reader(file))[1:] if row)


def form_of(as_json: bool, as_table: bool, topk: int, threshold: float | None) -> Form:
    """The form that was asked for."""
    kind = JsonLines if as_json else Table if as_table else Form
    return kind(topk, threshold)

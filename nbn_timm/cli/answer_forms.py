"""How answers are written: for people, as JSON lines, as a table."""
import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nbn_timm.errors import InputError, in_words, one_line, quoted
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
        return '\n'.join([self.name(file), *doubt, *(f'  {found}' for found in classes)]) + '\n'

    def sure(self, classes: Answer) -> bool:
        """Whether the likeliest class reaches the threshold."""
        return self.threshold is None or classes[0].probability >= self.threshold

    def name(self, file: str) -> str:
        """A file's name as it is written."""
        return one_line(_encodable(file))

    def go_on(self, path: str) -> frozenset[str]:
        """Prepare a file of answers for further ones: a last line that a kill cut short is removed.

        Returns:
            `name` of the files that are answered in it; none of a pipe or device.

        Raises:
            InputError: It holds something else than answers of this form, or cannot be read.
        """
        if not os.path.isfile(path):
            return frozenset()
        try:
            with open(path, 'r+b') as file:
                content = file.read()
                whole = content[:content.rfind(b'\n') + 1]
                found = frozenset(self._files(whole.decode()))
                file.truncate(len(whole))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
            reason = in_words(error)
            raise InputError(f'no answers can be added to {quoted(path)}, which holds something else than answers of '
                             f'this form ({reason}): give another --output') from error
        return found

    def _files(self, text: str) -> Iterator[str]:
        lines = text.split('\n')
        if text and not any(line.startswith('  ') for line in lines):
            raise ValueError('it has no answers')
        for line, below in zip(lines, [*lines[1:], ''], strict=True):
            if below.startswith('  ') and not line.startswith('  '):
                yield line
            elif line and not line.startswith('  ') and below:
                raise ValueError(f'{quoted(line)} has no classes below it')


class JsonLines(Form):
    """One JSON object per line: the predictions, or the error."""

    def entry(self, file: str, classes: Answer | None, fault: str | None) -> str:
        found: dict[str, Any] = {'error': fault}
        if classes is not None:
            found = {'predictions': [found.to_dict() for found in classes]}
            if self.threshold is not None:
                found['sure'] = self.sure(classes)
        return json.dumps({'file': file, **found}) + '\n'

    def name(self, file: str) -> str:
        return file

    def _files(self, text: str) -> Iterator[str]:
        return (str(json.loads(line)['file']) for line in text.splitlines())


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

    def name(self, file: str) -> str:
        return _encodable(file)

    def _row(self, cells: list[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerow(cells)
        return text.getvalue()

    def _files(self, text: str) -> Iterator[str]:
        rows = list(csv.reader(io.StringIO(text, newline='')))
        header = next(csv.reader([self.head]))
        if rows and rows[0] != header:
            raise ValueError(f'its header is {quoted(",".join(rows[0]))}, and it would be {quoted(",".join(header))}')
        if wrong := next((row for row in rows if len(row) != len(header)), None):
            raise ValueError(f'a row has {len(wrong)} fields and not {len(header)}')
        return iter([row[0] for row in rows[1:]])


def _encodable(name: str) -> str:
    """A name with \\xNN in place of bytes that are no UTF-8."""
    return name.encode('utf-8', errors='backslashreplace').decode()


def form_of(as_json: bool, as_table: bool, topk: int, threshold: float | None) -> Form:
    """The form that was asked for."""
    kind = JsonLines if as_json else Table if as_table else Form
    return kind(topk, threshold)

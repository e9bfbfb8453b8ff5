"""How answers are written where a picture can be of several classes: for people, as JSON lines, as a table."""
import json
from typing import Any

from nbn_timm.cli.answer_forms import Answer, Form, JsonLines, Table

NONE_TOLD = 'no class reaches its threshold'
BETWEEN = '; '  # names in a cell of the table


class SetForm(Form):
    """Text for people: a file, and below it the classes that are told of it."""

    def entry(self, file: str, classes: Answer | None, fault: str | None) -> str:
        if classes is None:
            return ''
        lines = map(str, classes) if classes else [NONE_TOLD]
        return '\n'.join([self.name(file), *(f'  {line}' for line in lines)]) + '\n'


class SetJsonLines(JsonLines):
    """One JSON object per line: the classes that are told, or the error."""

    def entry(self, file: str, classes: Answer | None, fault: str | None) -> str:
        found: dict[str, Any] = {'error': fault} if classes is None else {
            'predictions': [found.to_dict() for found in classes]}
        return json.dumps({'file': file, **found}) + '\n'


class SetTable(Table):
    """CSV: the names of the classes that are told, and their probabilities in the same order."""

    @property
    def head(self) -> str:
        return self._row(['file', 'answer', 'probabilities', 'error'])

    def entry(self, file: str, classes: Answer | None, fault: str | None) -> str:
        if classes is None:
            return self._row([file, '', '', fault])
        return self._row([file, BETWEEN.join(found.name for found in classes),
                          BETWEEN.join(str(found.probability) for found in classes), ''])


def set_form_of(as_json: bool, as_table: bool) -> Form:
    """The form that was asked for."""
    kind = SetJsonLines if as_json else SetTable if as_table else SetForm
    return kind(0, None)

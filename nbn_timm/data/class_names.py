"""What classes are called where a person reads, when folders, lists or labels hold a code such as 'n01443537'."""
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nbn_timm.data.classes import Classes
from nbn_timm.errors import InputError, in_words, quoted
from nbn_timm.files import open_regular

BESIDE = 'words.txt'  # as ImageNet's and Tiny-ImageNet's archives have it: a code, a tab and words in each line

CODES = 'none'  # in place of a file: the codes stay

_FORMS = ('write a line per class, its code, a tab and its name, or one name per line in the order of the classes, or '
          'a JSON object {"code": "name"}')
_BLANK_OR_COMMA = re.compile(r'\s*[,\s]\s*')
_SHOWN = 3


@dataclass(frozen=True)
class ClassNames:
    """Names from a file.

    Attributes:
        source: The file, in words for people.
        by_code: Names by what the data call the classes: folders, labels, numbers.
        in_order: Names in label order, where the file may be meant so.
    """

    source: str
    by_code: Mapping[str, str] = field(default_factory=dict)
    in_order: tuple[str, ...] = ()

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.by_code.values())

    @classmethod
    def read(cls, path: str | Path) -> 'ClassNames':
        """Read a file of names.

        Known forms are lines of a code and a name, with a tab between them, else with a comma or a blank; lines of a
        name each; and JSON, as `{"code": "name"}` or as a list of names. A file may have more codes than are needed.

        Raises:
            InputError: The file cannot be read, or is of none of these forms.
        """
        source = f'file {quoted(str(path))}'
        try:
            with open_regular(path) as file:
                text = file.read().decode('utf-8-sig')
        except (OSError, ValueError) as error:
            remedy = _FORMS if isinstance(error, UnicodeDecodeError) else 'correct the path or its permissions'
            raise InputError(f'the class names {source} cannot be read ({getattr(error, "strerror", None) or error}): '
                             f'{remedy}') from error
        if text.lstrip()[:1] in ('{', '['):
            return _from_json(text, source)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError(f'the class names {source} is empty: {_FORMS}')
        tabs = any('\t' in line for line in lines)
        pairs = [line.split('\t', 1) if tabs else _BLANK_OR_COMMA.split(line, maxsplit=1) for line in lines]
        by_code = {_bare(pair[0]): _bare(pair[1]) for pair in pairs if len(pair) == 2 and _bare(pair[1])}
        return cls(source, by_code, () if tabs else tuple(lines))

    def called(self, codes: Sequence[str]) -> dict[str, str] | None:
        """Names by what the data call the classes; None if this file has none of them.

        A class that the file does not name keeps its code. Classes of one name get their code behind it. Classes that
        have names of this file already keep them.
        """
        found = {code: self.by_code[code] for code in codes if code in self.by_code}
        if 2 * len(found) < len(codes) == len(self.in_order):  # a code more or less may be the first word of a name
            found = dict(zip(codes, self.in_order, strict=True))
        if not found and self._names.isdisjoint(codes):
            return None
        names = {code: found.get(code, code) for code in codes}
        number = Counter(names.values())
        return {code: name if number[name] == 1 or name == code else f'{name} ({code})' for code, name in names.items()}

    def required(self, codes: Sequence[str]) -> dict[str, str]:
        """As `called`.

        Raises:
            InputError: The file names none of the classes.
        """
        found = self.called(codes)
        if found is None:
            shown = ', '.join(map(quoted, codes[:_SHOWN])) + (', ...' if len(codes) > _SHOWN else '')
            raise InputError(f'{self.source} names none of the {len(codes):,} classes ({shown}): {_FORMS}')
        return found

    def note(self, called: Mapping[str, str]) -> str:
        """What a person should know of the names that were found."""
        known = self.by_code.keys() | self._names
        unnamed = [code for code, name in called.items() if code == name and code not in known]
        some = ', '.join(map(quoted, unnamed[:_SHOWN])) + (', ...' if len(unnamed) > _SHOWN else '')
        return f'the classes are called as in {self.source}' + (
            f', which does not name {len(unnamed):,} of {len(called):,} ({some})' if unnamed else '')


def renamed(classes: Classes, called: Mapping[str, str]) -> Classes:
    """The classes under other names, those that are not called otherwise as they are."""
    return replace(classes, names=tuple(called.get(name, name) for name in classes.names))


def names_beside(folder: str | Path) -> ClassNames | None:
    """The names in the file `words.txt` of a folder; None if there is none, or it is something else."""
    path = Path(folder, BESIDE)
    if not path.is_file():
        return None
    try:
        names = ClassNames.read(path)
    except InputError:
        return None
    return None if names.in_order else names


def _bare(cell: str) -> str:
    """A cell without blanks around it, and without the quotes that a table has around a comma."""
    cell = cell.strip()
    return cell[1:-1].strip() if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _from_json(text: str, source: str) -> ClassNames:
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'the class names {source} is no valid JSON ({in_words(error)}): {_FORMS}') from error
    names = list(data.values()) if isinstance(data, dict) else data
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f'the class names {source} has something else than names: {_FORMS}')
    names = [name.strip() for name in names]
    return ClassNames(source, dict(zip(data, names, strict=True))) if isinstance(data, dict) else (
        ClassNames(source, in_order=tuple(names)))

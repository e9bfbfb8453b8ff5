"""What classes are called where a person reads, when folders, lists or labels hold a code such as 'n01443537'."""
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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

# Categories of characters that break lines, steer a terminal, turn the direction of writing or cannot be written.
_REFUSED = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')
_JOINERS = '\u200c\u200d'  # Persian words and emojis need them


@dataclass(frozen=True)
class ClassNames:
    """Names from a file.

    Attributes:
        source: The file, in words for people.
        by_code: Names by what the data call the classes: folders, labels, numbers.
        in_order: Names in label order, where the file may be meant so.
        twice: What has two names in the file, or more.
    """

    source: str
    by_code: Mapping[str, str] = field(default_factory=dict)
    in_order: tuple[str, ...] = ()
    twice: frozenset[str] = frozenset()

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.by_code.values())

    @classmethod
    def _of_pairs(cls, source: str, pairs: Sequence[tuple[str, str]], in_order: tuple[str, ...] = ()) -> 'ClassNames':
        by_code = dict(pairs)
        return cls(source, by_code, in_order, frozenset(code for code, name in pairs if by_code[code] != name))

    @classmethod
    def read(cls, path: str | Path) -> 'ClassNames':
        """Read a file of names.

        Known forms are lines of a code and a name, with a tab between them, else with a comma or a blank; lines of a
        name each; and JSON, as `{"code": "name"}` or as a list of names. A file may have more codes than are needed.

        Raises:
            InputError: The file cannot be read, is of none of these forms, or has control characters.
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
        lines = [line.strip() for line in text.replace('\r\n', '\n').split('\n') if line.strip()]
        if not lines:
            raise InputError(f'the class names {source} is empty: {_FORMS}')
        tabs = any('\t' in line for line in lines)
        pairs = [line.split('\t', 1) if tabs else _BLANK_OR_COMMA.split(line, maxsplit=1) for line in lines]
        named = [(_bare(pair[0]), _bare(pair[1])) for pair in pairs if len(pair) == 2 and _bare(pair[1])]
        _refuse_controls(lines, source)
        return cls._of_pairs(source, named, () if tabs else tuple(lines))

    def called(self, codes: Sequence[str]) -> dict[str, str] | None:
        """Names by what the data call the classes; None if this file has none of them.

        A class that the file does not name keeps its code. Classes of one name get their code behind it. Classes that
        have names of this file already keep them, in whatever order its lines are.

        Raises:
            InputError: The file gives a class two names, or two classes one that is not told apart by their codes; or
                some of its lines are classes, so that their order is none of names.
        """
        if self._lists(codes):
            return {code: code for code in codes}
        found = {code: self.by_code[code] for code in codes if code in self.by_code}
        if 2 * len(found) < len(codes) == len(self.in_order):  # a code more or less may be the first word of a name
            of_data = set(codes)
            if own := next((line for line in self.in_order if line in of_data), None):
                raise InputError(f'{quoted(own)}, a line of {self.source}, is what the data call a class, and other '
                                 f'lines are not: {_FORMS}')
            found = dict(zip(codes, self.in_order, strict=True))
        elif twice := next((code for code in found if code in self.twice), None):
            raise InputError(f'{self.source} has {quoted(twice)} twice, with different names: give each class one '
                             'name, or another file with --class-names')
        if not found and self._names.isdisjoint(codes):
            return None
        names = {code: found.get(code, code) for code in codes}
        number = Counter(names.values())
        called = {code: name if number[name] == 1 or name == code else f'{name} ({code})'
                  for code, name in names.items()}
        shared, times = Counter(called.values()).most_common(1)[0]
        if times > 1:
            raise InputError(f'with {self.source} several classes are called {quoted(shared)}: give each its '
                             'own name, or another file with --class-names')
        return called

    def _lists(self, codes: Sequence[str]) -> bool:
        """Whether the file is a list of what the classes are called already."""
        if not codes or len(self.in_order) != len(codes):
            return False
        return set(self.in_order) == set(codes) or all(
            code == name or code.startswith(f'{name} (')
            for code, name in zip(codes, self.in_order, strict=True))

    def required(self, codes: Sequence[str]) -> dict[str, str]:
        """As `called`.

        Raises:
            InputError: See `called`; or the file names none of the classes.
        """
        found = self.called(codes)
        if found is None:
            shown = ', '.join(map(quoted, codes[:_SHOWN])) + (', ...' if len(codes) > _SHOWN else '')
            raise InputError(f'{self.source} names none of the {len(codes):,} classes ({shown}): {_FORMS}')
        return found

    def note(self, called: Mapping[str, str]) -> str:
        """What a person should know of the names that were found."""
        known = self.by_code.keys() | self._names | (called.keys() if self._lists(tuple(called)) else set())
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
    """A cell without blanks around it, tabs in it, and the quotes that a table has around a comma."""
    cell = cell.strip().replace('\t', ' ')
    return cell[1:-1].strip() if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _refuse_controls(cells: Iterable[str], source: str) -> None:
    """Refuse what may be neither a code nor a name."""
    for cell in cells:
        if any(unicodedata.category(char) in _REFUSED and char not in _JOINERS for char in cell.replace('\t', ' ')):
            raise InputError(f'the class names {source} has a control character, or half of one, in {quoted(cell)}: '
                             'remove it')


def _from_json(text: str, source: str) -> ClassNames:
    try:
        data: Any = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise InputError(f'the class names {source} is no valid JSON ({in_words(error)}): {_FORMS}') from error
    pairs = isinstance(data, tuple)  # an object, whose keys may be there twice
    names = [name for _, name in data] if pairs else data
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f'the class names {source} has something else than names: {_FORMS}')
    codes = [code for code, _ in data] if pairs else []
    names = [name.strip() for name in names]
    _refuse_controls((*codes, *names), source)
    return ClassNames._of_pairs(source, list(zip(codes, names, strict=True))) if pairs else (
        ClassNames(source, in_order=tuple(names)))

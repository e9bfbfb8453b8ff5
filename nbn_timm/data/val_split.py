"""A validation split out of the training pictures: drawn once, kept in a file, and read from there by all commands."""
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.grouping import Groups, same_files
from nbn_timm.data.label_sets import images_per_class, is_label_sets
from nbn_timm.data.splits import Source
from nbn_timm.data.tables import Table, read_table, write_table
from nbn_timm.errors import InputError, quoted

SPLIT_FILE = 'split.csv'  # in the folder of a run
_PARTS = ('train', 'val')


def picture_key(path: str, root: str) -> str:
    """What a picture is called in a split file: its path below the data folder, or all of it; with slashes."""
    above = os.path.join(os.path.normpath(root), '')
    return os.path.normpath(path).removeprefix(above).replace(os.sep, '/')


def picture_keys(samples: ImageSamples, data_dir: str | None) -> list[str]:
    """`picture_key` of all pictures."""
    root = samples.root or data_dir or ''
    return [picture_key(samples.path(index), root) for index in range(len(samples))]


def _listed(files: Iterable[str], root: str) -> list[str]:
    """`picture_key` of files as a table has them, relative to the data folder or absolute."""
    return [picture_key(os.path.join(root, file), root) for file in files]


# Drawing -----------------------------------------------------------------------------------------------------------

def draw_validation(
        keys: Sequence[str],
        targets: np.ndarray,
        fraction: float,
        seed: int = 0,
        units: np.ndarray | None = None,
) -> np.ndarray:
    """Draw the validation part of some pictures, class by class, the rarest first.

    Class c gives the whole number nearest to fraction * n_c (half is up), and of two pictures or more at least one and
    not all. What is one unit stays together, so a class may give somewhat more or less, and may have to give nothing.
    The draw goes by the pictures' names: neither their order nor pictures that come later shuffle the others.

    Args:
        keys: Names.
        targets: Labels, int64 [N], or label sets, uint8 [N, C].
        fraction: Share.
        seed: Of the draw.
        units: A number for each picture, int64 [N], equal for those that stay together; None keeps none together.

    Returns:
        Which pictures validate, bool [N].
    """
    members: dict[int, list[int]] = defaultdict(list)
    for position, unit in enumerate(range(len(keys)) if units is None else units.tolist()):
        members[unit].append(position)
    held = {unit: _counted(targets[positions]) for unit, positions in members.items()}
    order = sorted(members, key=lambda unit: _rank(min(keys[position] for position in members[unit]), seed))
    of_class: dict[int, list[int]] = defaultdict(list)
    for unit in order:
        for label in held[unit]:
            of_class[label].append(unit)
    draw = _Draw(images_per_class(targets), fraction, held)
    for label in sorted(of_class, key=lambda label: (draw.total[label], label)):
        draw.fill(label, of_class[label])
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[[position for unit in draw.chosen for position in members[unit]]] = True
    return chosen


class _Draw:
    """A draw under way: what each class is to give, and has given."""

    def __init__(self, total: np.ndarray, fraction: float, held: Mapping[int, Mapping[int, int]]) -> None:
        self.total = total
        nearest = np.floor(fraction * total + 0.5).astype(np.int64)
        self.wanted = np.where(total > 1, np.clip(nearest, 1, np.maximum(total - 1, 1)), 0)
        self.given = np.zeros_like(self.wanted)
        self.held = held  # pictures per class of each unit
        self.chosen: set[int] = set()

    def fill(self, label: int, units: Iterable[int]) -> None:
        """Take units until the class has given what it is to give."""
        units = [unit for unit in units if unit not in self.chosen]
        for unit in units:
            if self.given[label] >= self.wanted[label]:
                return
            if self._gain(unit) > 0:
                self._take(unit)
        if not self.given[label] and self.wanted[label]:
            possible = [unit for unit in units if self._spares(unit)]
            if possible:
                self._take(max(possible, key=self._gain))

    def _gain(self, unit: int) -> int:
        """By how many pictures the classes come nearer to what they are to give; 0 if one would have none left."""
        if not self._spares(unit):
            return 0
        return sum(abs(int(self.wanted[label] - self.given[label]))
                   - abs(int(self.wanted[label] - self.given[label]) - number)
                   for label, number in self.held[unit].items())

    def _spares(self, unit: int) -> bool:
        """Whether every class keeps a picture for training."""
        return all(self.total[label] - self.given[label] > number for label, number in self.held[unit].items())

    def _take(self, unit: int) -> None:
        self.chosen.add(unit)
        for label, number in self.held[unit].items():
            self.given[label] += number


def _counted(labels: np.ndarray) -> dict[int, int]:
    if is_label_sets(labels):
        return {label: number for label, number in enumerate(images_per_class(labels).tolist()) if number}
    if len(labels) == 1:  # nearly always
        return {int(labels[0]): 1}
    found, numbers = np.unique(labels, return_counts=True)
    return dict(zip(found.tolist(), numbers.tolist(), strict=True))


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f'{seed}/{key}'.encode(errors='surrogateescape')).digest()


def kept_together(
        samples: ImageSamples,
        keys: Sequence[str],
        groups: Sequence[str] | None = None,
        more: Mapping[str, str] | None = None,
) -> np.ndarray:
    """Units of pictures that stay together: of one file, of the same bytes, of the same group.

    Args:
        samples: The pictures.
        keys: Their names.
        groups: A group for each, '' for none.
        more: Further groups by name of the picture.

    Returns:
        A number for each picture, int64 [N], equal within a unit.
    """
    joined = Groups(len(samples))
    joined.join_equal(keys)
    for same in same_files([samples.path(index) for index in range(len(samples))]):
        for position in same[1:]:
            joined.join(same[0], position)
    for given in (groups, [more.get(key) for key in keys] if more else None):
        if given is not None:
            joined.join_equal([group or None for group in given])
    return joined.labels()


def read_groups(path: str | Path, root: str) -> dict[str, str]:
    """The groups of a CSV file with the columns 'file' and 'group', by `picture_key`.

    Raises:
        InputError: It cannot be read, has no such columns, or gives a picture two groups.
    """
    return _by_file(read_table(path, ('file', 'group')), 'group', root)


def _by_file(table: Table, column: str, root: str) -> dict[str, str]:
    """A column of a table by `picture_key` of the column 'file'.

    Raises:
        InputError: It says two things of one picture.
    """
    found: dict[str, str] = {}
    for line, key, said in zip(table.lines, _listed(table.columns['file'], root), table.columns[column], strict=True):
        if found.setdefault(key, said) != said:
            raise InputError(f'line {line} of {table.what} gives {quoted(key)} the {column} {quoted(said)}, and an '
                             f'earlier one {quoted(found[key])}: keep one of them')
    return found


def write_split(
        path: Path,
        keys: Sequence[str],
        labels: Sequence[str],
        validates: np.ndarray,
        groups: Sequence[str] | None = None,
) -> None:
    """Write a split file, whole or not at all: a picture per row, with its class, split and perhaps group."""
    parts = [_PARTS[int(val)] for val in validates]
    header = ['file', 'label', 'split', *(['group'] if groups else [])]
    write_table(path, header, zip(keys, labels, parts, *([groups] if groups else []), strict=True))


# Reading -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SplitFile:
    """Which training pictures train and which validate, as a file says.

    Attributes:
        path: The file.
        part_of: 'train' or 'val' by `picture_key`.
    """

    path: str
    part_of: Mapping[str, str]

    @classmethod
    def read(cls, path: str | Path, root: str) -> 'SplitFile':
        """Read a CSV file with the columns 'file' and 'split'.

        Raises:
            InputError: It cannot be read, or says something else of a picture than train or val, or both.
        """
        table = read_table(path, ('file', 'split'))
        for line, part in zip(table.lines, table.columns['split'], strict=True):
            if part not in _PARTS:
                raise InputError(f'line {line} of {table.what} has the split {quoted(part)}: write train or val')
        return cls(str(path), _by_file(table, 'split', root))

    def divide(self, source: Source, data_dir: str | None) -> None:
        """Divide the training pictures of `source`; what the file does not name is left out, and told.

        Raises:
            InputError: There is a validation split already, the pictures are in no files, or the file is about others.
        """
        train = source.datasets.get('train')
        if not isinstance(train, ImageSamples):
            raise InputError(f'--split-file {quoted(self.path)} divides pictures in files, and here are none: leave it '
                             'out')
        if 'val' in source.datasets:
            raise InputError(f'there is a validation split, so {quoted(self.path)} has none to make: leave out '
                             '--split-file and --val-fraction')
        keys = picture_keys(train, data_dir)
        parts = [self.part_of.get(key) for key in keys]
        chosen = {name: np.array([index for index, part in enumerate(parts) if part == name]) for name in _PARTS}
        for name, indices in chosen.items():
            if not len(indices):
                raise InputError(f'{quoted(self.path)} puts no training picture that is here into {name} (the first '
                                 f'one here is {quoted(keys[0])}): give the --data-dir that it was written for, or '
                                 'another --split-file')
            source.datasets[name] = train.select(chosen[name])
        source.notes.append(f'validation split: {len(chosen["val"]):,} of {len(keys):,} training pictures, by '
                            f'{quoted(self.path)}')
        if new := parts.count(None):
            source.notes.append(f'training pictures that {quoted(self.path)} does not name are left out: {new:,}, such '
                                f'as {quoted(keys[parts.index(None)])}')
        if gone := len(self.part_of.keys() - set(keys)):
            source.notes.append(f'pictures of {quoted(self.path)} that are no longer there: {gone:,}')

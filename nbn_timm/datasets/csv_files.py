"""CSV files of one's own: a column of picture files, one of labels, perhaps one of splits.

A cell of the column of labels is one label, or with a separator any number of them.
"""
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.folders import SPLIT_FOLDERS
from nbn_timm.data.label_sets import label_sets
from nbn_timm.data.lists import MAX_CLASSES
from nbn_timm.data.pictures import natural_order
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import PARTS, Source
from nbn_timm.data.tables import Table, in_lines, read_table
from nbn_timm.datasets.named_dataset import CSVS, NamedDataset, image_root, register_dataset
from nbn_timm.errors import InputError, nearest, quoted
from nbn_timm.files import refuse_no_file
from nbn_timm.settings import flag

_PART_OF = {name: part for part, names in SPLIT_FOLDERS.items() for name in names}

NO_COLUMN = 'none'  # for --split-column

# What shows that a column is about splits, though its cells are no names of splits that are known.
_WORDS = re.compile(r'[A-Z]?[a-z]+|[A-Z]+(?![a-z])')  # of is_test, isTest and SPLIT
_SPLIT_WORDS = {'split', 'splits', 'set', 'subset', 'fold', 'folds', 'part', 'partition', 'phase', 'usage'}
_SPLIT_BEGINNINGS = ('train', 'trn', 'val', 'dev', 'test', 'tst', 'eval', 'hold')
# What such a column is called where its cells are numbers, as CelebA's 0, 1 and 2; numbered folds are of one training.
_NUMBERED = {'split', 'splits', 'subset', 'partition', 'phase', 'usage'}
_NUMBER = re.compile(r'\d+(\.0)?', re.ASCII)
_MOST_NUMBERS = 3
# What it is called where its cells are yes and no.
_ASKED = {*_PART_OF, 'training', 'testing', 'held', 'heldout', 'holdout', 'eval', 'evaluation'}
# Cells that say by themselves what they are about, whatever the column is called.
_SPLIT_CELL = re.compile(r'(train|trn|val|dev|test|tst|eval|hold)(id|ing|idation|uation|[-_ ]?out|[-_ ]?set)?')
_YES_NO = {'', '0', '1', '0.0', '1.0', 'true', 'false', 'yes', 'no', 'y', 'n', 't', 'f', 'x'}


@dataclass(frozen=True)
class _Rows:
    """Rows of a table that belong to one split; `labels` as the cells have them."""

    table: Table
    files: list[str]
    labels: list[str]
    lines: list[int]
    groups: list[str] | None = None
    separator: str | None = None

    def labels_of(self, cell: str) -> tuple[str, ...]:
        """The labels of a cell."""
        if self.separator is None:
            return (cell,)
        return tuple(label for part in cell.split(self.separator) if (label := part.strip()))

    def targets(self, names: Sequence[str]) -> np.ndarray:
        """Labels or label sets by the number of each name.

        Raises:
            InputError: There is a label that has none.
        """
        label_of = {name: label for label, name in enumerate(names)}
        members = []
        for line, cell in zip(self.lines, self.labels, strict=True):
            labels = self.labels_of(cell)
            if strange := next((name for name in labels if name not in label_of), None):
                raise InputError(f'the label {quoted(strange)} in line {line} of {self.table.what} is not among the '
                                 f'{len(names)} classes of the training pictures: correct it or remove the row'
                                 f'{nearest(strange, names)}')
            members.append([label_of[name] for name in labels])
        return np.array(members).reshape(-1) if self.separator is None else label_sets(members, len(names))


@register_dataset('csv')
class CsvFiles(NamedDataset):
    """Pictures and labels that CSV files name."""

    hint = 'your own CSV files'

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        return read_csv_files(settings, parts)

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return CSVS | {'data_dir', 'file_column', 'label_column', 'label_separator', 'split_column', 'group_column'}

    def label_sets(self, settings: DataSettings) -> bool:
        return settings.label_separator is not None

    def splits_files(self, settings: DataSettings) -> bool:
        return True

    def validates(self, settings: DataSettings) -> bool | None:
        if settings.val_csv:
            return True
        return None if settings.train_csv and settings.split_column != NO_COLUMN else False


def read_csv_files(settings: DataSettings, parts: Collection[str], names: Sequence[str] | None = None) -> Source:
    """Read the CSV files that are given, the training split even if it is not among `parts`.

    Args:
        settings: What to read.
        parts: The splits that are needed.
        names: Of the classes, in label order; None takes the labels of the training pictures.

    Raises:
        InputError: A file is missing or malformed, or has a label that is no class.
    """
    data_dir = csv_root(settings)
    if settings.label_separator == '':
        raise InputError('--label-separator is empty: give what stands between two labels, such as ";"')
    tables, notes = _read_tables(settings, data_dir, {*parts, 'train'})
    for rows in tables.values():
        _refuse_missing(rows, data_dir, settings.file_column)
    if 'train' in parts and 'train' not in tables:
        raise InputError('the dataset csv needs training pictures: ' + (
            f'no row of {quoted(settings.train_csv)} is of the split train, so correct it, or give --split-column '
            f'{NO_COLUMN} if all are' if settings.train_csv else 'give --train-csv'))
    naming = [tables['train']] if 'train' in tables else list(tables.values())
    separator = settings.label_separator
    if separator and not any(separator in cell for rows in naming for cell in rows.labels):
        notes.append(f'no cell of the column {quoted(settings.label_column)} has the --label-separator '
                     f'{quoted(separator)}, so each is one label')
    if names is None:
        labels = {label for rows in naming for cell in rows.labels for label in rows.labels_of(cell)}
        names = tuple(sorted(labels, key=natural_order))
    if tables and not names:
        raise InputError(f'{naming[0].table.what} has no label in the column {quoted(settings.label_column)}: name '
                         'the column of the classes with --label-column')
    if len(names) > MAX_CLASSES:
        raise InputError(f'{naming[0].table.what} has {len(names):,} different labels: name the column of the '
                         'classes with --label-column')
    source = Source(names=tuple(names) or None, notes=notes)
    for part, rows in tables.items():
        source.datasets[part] = ImageSamples(rows.files, rows.targets(names), root=data_dir)
        source.notes += _notes(rows)
    if 'train' in tables:
        source.groups = tables['train'].groups
    else:
        source.notes.append('there is no training CSV file, so the classes are the labels that are there')
    return source


def csv_root(settings: DataSettings) -> Path:
    """The folder that the pictures' paths are relative to: the data folder, else that of the first CSV file.

    Raises:
        InputError: There is none.
    """
    first = next(iter(settings.csvs.values()), None)
    if settings.data_dir or first is None:
        return image_root(settings)
    return Path(first).parent


def find_csv(settings: DataSettings, data_dir: Path, part: str) -> Path | None:
    """The CSV file that was given for a split, as given or in the data folder.

    Raises:
        InputError: It is in neither.
    """
    given = settings.csvs.get(part)
    if given is None:
        return None
    candidates = (Path(given), data_dir / given)
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        refuse_no_file(*candidates)
        raise InputError(f"the CSV file '{given}' is neither there nor in '{data_dir}': correct --{part}-csv")
    return found


def _read_tables(settings: DataSettings, data_dir: Path, parts: Collection[str]) -> tuple[dict[str, _Rows], list[str]]:
    """The rows of the splits that are needed, the training split first; and what a person should know."""
    file, label = settings.file_column, settings.label_column
    found: dict[str, _Rows] = {}
    notes: list[str] = []
    for part in PARTS:
        of_all = part == 'train' and settings.split_column != NO_COLUMN  # it may hold all splits
        if part not in parts and not of_all or (path := find_csv(settings, data_dir, part)) is None:
            continue
        given = settings.split_column if of_all else None
        more = [name for name in (given, settings.group_column) if name and part == 'train']
        table = read_table(path, [file, label, *more], _flag_of(settings))
        table.require(file, f'name the picture, or remove the row (--file-column is {quoted(file)})')
        if settings.label_separator is None:
            table.require(label, f'label the picture, or remove the row (--label-column is {quoted(label)})')
        if not len(table):
            raise InputError(f'{table.what} has a header and no row: give one picture per line')
        cells = table.columns[given] if given else _found_splits(table, part, settings, notes)
        rows = _divided(table, settings, cells) if cells else {part: _rows(table, settings, range(len(table)))}
        for inner, of_part in rows.items():
            if inner in found or (inner != part and inner in settings.csvs):
                raise InputError(f'{table.what} has pictures of the {inner} split, and so has --{inner}-csv: leave out '
                                 'that flag, or these rows')
            if inner in parts:
                found[inner] = of_part
    return found, notes


def _flag_of(settings: DataSettings) -> Callable[[str], str]:
    columns = ('group_column', 'split_column', 'label_column', 'file_column')
    named = {getattr(settings, name): flag(name) for name in columns}
    return lambda column: named[column]


def _rows(table: Table, settings: DataSettings, chosen: Sequence[int]) -> _Rows:
    files, labels = table.columns[settings.file_column], table.columns[settings.label_column]
    groups = table.columns.get(settings.group_column or '')
    return _Rows(table, [files[row] for row in chosen], [labels[row] for row in chosen],
                 [table.lines[row] for row in chosen], groups and [groups[row] for row in chosen],
                 settings.label_separator)


def _divided(table: Table, settings: DataSettings, cells: Sequence[str]) -> dict[str, _Rows]:
    """The rows by split, as the cells of the split column say."""
    chosen: dict[str, list[int]] = defaultdict(list)
    for row, cell in enumerate(cells):
        part = _PART_OF.get(cell.lower())
        if part is None:
            raise InputError(f'line {table.lines[row]} of {table.what} has the split {quoted(cell)}: write '
                             f'{", ".join(_PART_OF)}')
        chosen[part].append(row)
    return {part: _rows(table, settings, rows) for part, rows in chosen.items()}


def _found_splits(table: Table, part: str, settings: DataSettings, notes: list[str]) -> list[str] | None:
    """Cells of a column that says of which split a picture is, though nobody has named it; None if there is none.

    Whoever overlooks such a column trains on test pictures.

    Args:
        table: With a picture per row.
        part: The split that the file is given for.
        settings: What is read.
        notes: Get a sentence on what was found.

    Raises:
        InputError: A column seems to say so, and it cannot be told what.
    """
    if settings.split_column == NO_COLUMN:
        return None
    found = {}
    looked_at = dict(table.others)
    if settings.group_column in table.columns:
        looked_at[settings.group_column] = table.columns[settings.group_column]
    for name, cells in looked_at.items():
        said = {cell.lower() for cell in cells}
        words = {word.lower() for word in _WORDS.findall(name)}
        filled = said - {''}
        cells_say = len(filled) > 1 and all(map(_SPLIT_CELL.fullmatch, filled))
        if said <= _PART_OF.keys():
            found[name] = cells
        elif (cells_say or words & _SPLIT_WORDS and any(cell.startswith(_SPLIT_BEGINNINGS) for cell in said)
              or words & _NUMBERED and 1 < len(filled) <= _MOST_NUMBERS and all(map(_NUMBER.fullmatch, filled))
              or words & _ASKED and said <= _YES_NO):
            raise InputError(f'the column {quoted(name)} of {table.what} seems to say of which split a picture is, '
                             f'in words that are not known ({_some(cells)}): write {", ".join(_PART_OF)}, or give '
                             f'--split-column {NO_COLUMN} if it says something else')
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f'{table.what} has the columns {" and ".join(map(quoted, found))} of splits: name one with '
                         f'--split-column, or give {NO_COLUMN}')
    name, cells = next(iter(found.items()))
    number = Counter(_PART_OF[cell.lower()] for cell in cells)
    if part != 'train':
        if len(number) == 1:
            return None
        raise InputError(f'{table.what} is given as --{part}-csv, and its column {quoted(name)} has {_some(cells)}: '
                         f'give it as --train-csv alone, or the {part} pictures in a file of their own, or '
                         f'--split-column {NO_COLUMN}')
    counted = ', '.join(f'{number[part]:,} {part}' for part in PARTS if part in number)
    notes.append(f'the column {quoted(name)} of {table.what} says which split a picture is of: {counted} '
                 f'(--split-column {NO_COLUMN} would train on all)')
    return cells


def _some(cells: Sequence[str]) -> str:
    """The first different cells, for a sentence."""
    different = list(dict.fromkeys(cells))
    return ', '.join(map(quoted, different[:4])) + (', ...' if len(different) > 4 else '')


def _refuse_missing(rows: _Rows, data_dir: Path, column: str) -> None:
    """Refuse pictures that are not there; every folder is listed once, which takes no time for each picture."""
    listed: dict[str, frozenset[str]] = {}
    missing: list[int] = []
    for row, file in enumerate(rows.files):
        folder, name = os.path.split(os.path.join(data_dir, file))
        if folder not in listed:
            try:
                listed[folder] = frozenset(os.listdir(folder))
            except OSError:
                listed[folder] = frozenset()
        if name not in listed[folder] and not os.path.isfile(os.path.join(data_dir, file)):
            missing.append(row)
    if missing:
        lines = in_lines([rows.lines[row] for row in missing])
        raise InputError(f'{quoted(rows.files[missing[0]])} of {rows.table.what} is not in '
                         f"{quoted(str(data_dir))}; pictures are missing in {lines}: correct --data-dir, the column "
                         f'{quoted(column)}, or remove these rows')


def _notes(rows: _Rows) -> list[str]:
    """What a person should know: pictures that are there twice."""
    lines: Mapping[str, list[int]] = defaultdict(list)
    labels: Mapping[str, set[str]] = defaultdict(set)
    for file, label, line in zip(rows.files, rows.labels, rows.lines, strict=True):
        lines[file].append(line)
        labels[file].add(label)
    twice = [file for file in lines if len(lines[file]) > 1]
    if not twice:
        return []
    two_labels = next((file for file in twice if len(labels[file]) > 1), None)
    first = two_labels or twice[0]
    under = f' under the labels {", ".join(map(quoted, sorted(labels[first])))}' if two_labels else ''
    return [f'{rows.table.what} names {len(twice):,} pictures more than once, such as {quoted(first)} in '
            f'{in_lines(lines[first])}{under}: keep one row of each']

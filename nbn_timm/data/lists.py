"""`path label` list files."""
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbn_timm.errors import InputError, quoted
from nbn_timm.files import open_regular

MAX_CLASSES = 1_000_000  # a label from here on is taken for an id: counts and classifiers are arrays of that length

_LABEL = re.compile(r'[+-]?[0-9]+')


@dataclass(frozen=True)
class ImageList:
    """Image paths as written in a list file, and their labels, int64 [N].

    `notes` has a sentence for each thing that a person should know about the list.
    """

    paths: list[str]
    targets: np.ndarray
    notes: tuple[str, ...] = ()

    def class_folders(self) -> dict[str, int]:
        """Labels by folder, of folders that hold one class which has no images elsewhere; below their common folder."""
        pairs = {(os.path.dirname(path), label) for path, label in zip(self.paths, self.targets.tolist(), strict=True)}
        folders, labels = Counter(folder for folder, _ in pairs), Counter(label for _, label in pairs)
        alone = {folder: label for folder, label in pairs if folders[folder] == labels[label] == 1 and folder}
        if len(alone) < 2 or len({os.path.isabs(folder) for folder in alone}) > 1:
            return {}
        common = os.path.commonpath(list(alone))
        return {os.path.relpath(folder, common or '.'): label for folder, label in alone.items()}

    def folder_names(self) -> dict[int, str] | None:
        """Class names by label, from the folder of each class's first image; None if these do not tell them apart."""
        labels, first = np.unique(self.targets, return_index=True)
        folders = [os.path.dirname(self.paths[index]) for index in first]
        if len(set(folders)) < len(folders) or len(folders) < 2 or '' in folders:
            return None
        if len({os.path.isabs(folder) for folder in folders}) > 1:
            return None
        common = os.path.commonpath(folders)
        return dict(zip(labels.tolist(), (os.path.relpath(folder, common or '.') for folder in folders), strict=True))


def read_image_list(path: str | Path, num_classes: int | None = None) -> ImageList:
    """Read a list file of one `path label` per line, as ImageNet-LT, Places-LT and iNaturalist 2018 have them.

    The label is what follows the last blank or tab of a line, so paths may contain spaces; empty lines are ignored.
    Images are not looked for here: hundreds of thousands of `stat` calls are slow on network storage, and a missing
    image is an error of its own when it is first read.

    Args:
        path: The list file, UTF-8; other bytes in names are kept as they are.
        num_classes: Labels must lie below it; None accepts any label from 0 up to `MAX_CLASSES`.

    Raises:
        InputError: The file is missing or empty, or a line is malformed or has a label out of range.
    """
    what = f'list file {quoted(str(path))}'
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, ValueError) as error:
        raise InputError(
            f'{what} cannot be read ({getattr(error, "strerror", None) or error}): '
            'give a file of `path label` lines (nbn-prepare fetches the published ones)') from error
    if content[:2] in (b'\xff\xfe', b'\xfe\xff'):
        raise InputError(f'{what} is written in UTF-16: save it as UTF-8')
    # Not splitlines(): a file name may hold a form feed or another of its many line boundaries.
    lines = content.removeprefix(b'\xef\xbb\xbf').decode('utf-8', errors='surrogateescape').split('\n')
    rows = [row for line in lines if (row := line.rsplit(maxsplit=1))]
    if not rows:
        raise InputError(f'{what} names no image: give one `path label` per line')
    try:
        if not all(len(row) == 2 and _LABEL.fullmatch(row[1]) for row in rows):
            raise ValueError
        paths = [row[0] for row in rows]
        targets = np.array([int(row[1]) for row in rows], dtype=np.int64)
    except (ValueError, OverflowError):
        number, line = next(numbered for numbered in _numbered(lines) if not _is_row(numbered[1]))
        raise InputError(
            f'line {number} of {what} is not `path label` ({line.strip()[:80]!r}): write the image path, '
            'a space and a whole-number label') from None
    _check_range(targets, num_classes, what, lines)
    return ImageList(paths, targets, tuple(_notes(paths, targets, num_classes, what)))


def too_many(label: int, source: str) -> str:
    """The sentence about a label that no network could have."""
    return f'label {label} of {source} looks like an id: number the classes from 0, labels lie below {MAX_CLASSES:,}'


def _check_range(targets: np.ndarray, num_classes: int | None, what: str, lines: list[str]) -> None:
    wrong = np.flatnonzero((targets < 0) | (targets >= (num_classes or MAX_CLASSES)))
    if not wrong.size:
        return
    number, _ = _numbered(lines)[wrong[0]]
    label = int(targets[wrong[0]])
    if num_classes is None and label > 0:
        raise InputError(too_many(label, f'line {number} of {what}'))
    if num_classes is not None and targets.min() == 1 and targets.max() == num_classes:
        raise InputError(f'the labels of {what} begin at 1, and those of {num_classes} classes are 0 to '
                         f'{num_classes - 1}: subtract 1 from each')
    allowed = f'0 to {num_classes - 1}' if num_classes else '0 and up'
    raise InputError(f'label {label} in line {number} of {what} is out of range ({allowed}): '
                     'correct the label or the number of classes')


def _notes(paths: list[str], targets: np.ndarray, num_classes: int | None, what: str) -> list[str]:
    notes = []
    present = np.unique(targets)
    if num_classes is None and present[0] == 1 and present[-1] == len(present):
        notes.append(f'the labels of {what} are 1 to {len(present)}, so that class 0 has no image: if they are meant '
                     'to begin at 1, subtract 1 from each')
    if len(set(paths)) < len(paths):
        label_of: dict[str, int] = {}
        twice = {path: label for path, label in zip(paths, targets.tolist(), strict=True)
                 if label_of.setdefault(path, label) != label}
        if twice:
            path, label = next(iter(twice.items()))
            more = f' (and {len(twice) - 1:,} more with two labels)' if len(twice) > 1 else ''
            notes.append(f'{what} has {quoted(path)} under label {label_of[path]} and under label {label}{more}: '
                         'take one of them out')
    return notes


def _numbered(lines: list[str]) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers in the file."""
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _is_row(line: str) -> bool:
    parts = line.rsplit(maxsplit=1)
    return len(parts) == 2 and bool(_LABEL.fullmatch(parts[1])) and (
        len(parts[1]) < 20 and abs(int(parts[1])) <= np.iinfo(np.int64).max)

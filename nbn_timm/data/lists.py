"""`path label` list files."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbn_timm.errors import InputError


@dataclass(frozen=True)
class ImageList:
    """Image paths as written in a list file, and their labels, int64 [N]."""

    paths: list[str]
    targets: np.ndarray


def read_image_list(path: str | Path, num_classes: int | None = None) -> ImageList:
    """Read a list file of one `path label` per line, as ImageNet-LT, Places-LT and iNaturalist 2018 have them.

    The label is what follows the last blank of a line, so paths may contain spaces; empty lines are ignored. Images
    are not looked for here: hundreds of thousands of `stat` calls are slow on network storage, and a missing image is
    an error of its own when it is first read.

    Args:
        path: The list file, UTF-8.
        num_classes: Labels must lie below it; None accepts any label from 0.

    Raises:
        InputError: The file is missing or empty, or a line is malformed or has a label out of range.
    """
    try:
        # Not splitlines(): a file name may hold a form feed or another of its many line boundaries.
        lines = Path(path).read_text(encoding='utf-8', errors='surrogateescape').split('\n')
    except OSError as error:
        raise InputError(
            f"list file '{path}' cannot be read ({error.strerror}): "
            'give a file of `path label` lines (nbn-prepare fetches the published ones)') from error
    rows = [row for line in lines if (row := line.rsplit(maxsplit=1))]
    if not rows:
        raise InputError(f"list file '{path}' names no image: give one `path label` per line")
    try:
        names, labels = zip(*rows, strict=True)
        targets = np.array(list(map(int, labels)), dtype=np.int64)
    except (ValueError, OverflowError):
        number, line = next(numbered for numbered in _numbered(lines) if not _is_row(numbered[1]))
        raise InputError(
            f"line {number} of list file '{path}' is not `path label` ({line.strip()[:80]!r}): write the image path, "
            'a space and a whole-number label') from None
    wrong = np.flatnonzero((targets < 0) | (targets >= (num_classes or np.iinfo(np.int64).max)))
    if wrong.size:
        number, _ = _numbered(lines)[wrong[0]]
        allowed = f'0 to {num_classes - 1}' if num_classes else '0 and up'
        raise InputError(
            f"label {targets[wrong[0]]} in line {number} of list file '{path}' is out of range ({allowed}): "
            'correct the label or the number of classes')
    return ImageList(list(names), targets)


def _numbered(lines: list[str]) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers in the file."""
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _is_row(line: str) -> bool:
    parts = line.rsplit(maxsplit=1)
    try:
        return len(parts) == 2 and abs(int(parts[1])) <= np.iinfo(np.int64).max
    except ValueError:
        return False

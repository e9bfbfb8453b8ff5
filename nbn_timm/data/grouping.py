"""What belongs together: groups by pairs, and files of the same content without reading all of all."""
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from nbn_timm.files import open_regular

_END = 4096  # bytes; the end of a compressed picture tells it from nearly all others of its size


class Groups:
    """Numbers 0 to N - 1 that are joined by pairs (union-find).

    Args:
        size: N.
    """

    def __init__(self, size: int) -> None:
        self._above = np.arange(size, dtype=np.int64)

    def join(self, first: int, second: int) -> None:
        """Put two numbers, and all that is with them, into one group."""
        first, second = self._top(first), self._top(second)
        self._above[max(first, second)] = min(first, second)

    def join_equal(self, keys: Iterable[Hashable]) -> None:
        """Join the numbers whose keys are equal; None is equal to nothing."""
        first: dict[Hashable, int] = {}
        for number, key in enumerate(keys):
            if key is not None and (before := first.setdefault(key, number)) != number:
                self.join(before, number)

    def labels(self) -> np.ndarray:
        """The smallest number of each number's group, int64 [N]."""
        return np.array([self._top(number) for number in range(len(self._above))], dtype=np.int64)

    def members(self) -> list[list[int]]:
        """The groups of two numbers or more, in order."""
        found: dict[int, list[int]] = defaultdict(list)
        for number in range(len(self._above)):
            found[self._top(number)].append(number)
        return [group for group in found.values() if len(group) > 1]

    def _top(self, number: int) -> int:
        above = self._above
        while above[number] != number:
            above[number] = above[above[number]]
            number = int(above[number])
        return number


def same_files(paths: Sequence[str]) -> Iterator[list[int]]:
    """Groups of two files or more with the same bytes, by position; unreadable and empty files are in none.

    Only files of the same size are opened, only those that also end alike are read whole.
    """
    for alike in _apart(range(len(paths)), lambda position: os.stat(paths[position]).st_size or None):
        for ending in _apart(alike, lambda position: _digest(paths[position], end_only=True)):
            yield from _apart(ending, lambda position: _digest(paths[position]))


def _apart(positions: Iterable[int], key_of: Callable[[int], Any]) -> Iterator[list[int]]:
    found: dict[Any, list[int]] = defaultdict(list)
    for position in positions:
        try:
            key = key_of(position)
        except OSError:  # whoever reads it as a picture will say so
            continue
        if key is not None:
            found[key].append(position)
    yield from (group for group in found.values() if len(group) > 1)


def _digest(path: str, end_only: bool = False) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(path) as file:
        if end_only:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()

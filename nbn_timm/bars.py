"""How far something is: bars on a terminal, and lines in a file where a pass is long."""
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar('T')

_SECONDS = 30  # between lines in a file
_SIZE = {'ncols': 80, 'nrows': 24}  # of a terminal that does not tell its own


def on_terminal(stream: TextIO | None = None) -> bool:
    """Whether a stream, the standard error if there is none, is a terminal, on which bars can be drawn."""
    with suppress(ValueError, AttributeError):  # closed, or none
        return (stream or sys.stderr).isatty()
    return False


def _width(stream: TextIO) -> dict[str, Any]:
    """Size of a bar, for tqdm: as the terminal has it at each time, or a usual one where that tells none."""
    try:
        known = os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        known = False
    return {'dynamic_ncols': True} if known else dict(_SIZE)


def bar(total: int | None, what: str, **settings: Any) -> tqdm:
    """A bar on the standard error, gone when it is closed.

    Args:
        total: Steps; None where nobody knows.
        what: Stands before it.
        settings: Further ones of tqdm.
    """
    return tqdm(total=total, desc=what, leave=False, file=sys.stderr, **_width(sys.stderr), **settings)


def with_bar(batches: Iterable[T], what: str) -> Iterator[T]:
    """The batches, with a bar while they pass; where the standard error is a file, nothing is shown."""
    if not on_terminal():
        yield from batches
        return
    try:
        total: int | None = len(batches)  # type: ignore[arg-type]
    except TypeError:
        total = None
    with bar(total, what, unit='batch') as shown:
        for batch in batches:
            yield batch
            shown.update()


def with_bar_or_lines(items: Iterable[T], total: int, what: str, stream: TextIO | None = None) -> Iterator[T]:
    """The items, while `stream` tells how many of `total` have passed.

    Args:
        items: To go through.
        total: How many there are.
        what: They are, in the plural.
        stream: A terminal gets a bar, anything else a line every half minute; None is the standard error.
    """
    stream = stream or sys.stderr
    if on_terminal(stream):
        yield from tqdm(items, total=total, unit=f' {what}', file=stream, leave=False, **_width(stream))
        return
    said = begun = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= _SECONDS:
            said, left = now, (now - begun) / number * (total - number)
            print(f'{number:,} of {total:,} {what}, {number / (now - begun):,.0f} a second, about {left:,.0f} s left',
                  file=stream, flush=True)

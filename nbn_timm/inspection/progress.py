"""How far a pass over many pictures is: a bar on a terminal, a line now and then in a file."""
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

ItemT = TypeVar('ItemT')

_SECONDS = 30  # between lines in a file


def shown(items: Iterable[ItemT], total: int, what: str, stream: TextIO | None = None) -> Iterator[ItemT]:
    """The items, while `stream` tells how many of `total` have passed.

    Args:
        items: To go through.
        total: How many there are.
        what: They are, in the plural.
        stream: A terminal gets a bar, anything else a line every half minute; None is the standard error.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        yield from tqdm(items, total=total, unit=f' {what}', file=stream, leave=False, dynamic_ncols=True)
        return
    said = begun = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= _SECONDS:
            said, left = now, (now - begun) / number * (total - number)
            print(f'{number:,} of {total:,} {what}, {number / (now - begun):,.0f} a second, about {left:,.0f} s left',
                  file=stream, flush=True)

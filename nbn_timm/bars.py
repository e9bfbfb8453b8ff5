"""Bars that show how far something is, on a terminal alone."""
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar('T')


def on_terminal() -> bool:
    """Whether the standard error, where bars are drawn, is a terminal."""
    with suppress(ValueError, AttributeError):  # closed, or none
        return sys.stderr.isatty()
    return False


def bar(total: int | None, what: str, **settings: Any) -> tqdm:
    """A bar on the standard error, gone when it is closed.

    Args:
        total: Steps; None where nobody knows.
        what: Stands before it.
        settings: Further ones of tqdm.
    """
    return tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, file=sys.stderr, **settings)


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

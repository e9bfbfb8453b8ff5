"""Models for which this machine has no memory, or whose making has no end: refused while they are made."""
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

import torch.nn as nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ['LARGEST_NUMBER', 'TooLarge', 'largest_number', 'machine_memory', 'size_limit']

MOST_MODULES = 10_000  # timm's have 1,800 at most
LARGEST_NUMBER = 1_000_000  # of an argument: some models write a list of that length before they make anything

_CONTAINER_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')


class TooLarge(ValueError):
    """A model is too large; the message continues a sentence of which it is the subject."""


@contextmanager
def size_limit() -> Iterator[None]:
    """Stop the body where a model that it makes has outgrown this machine; its weights are counted as they come.

    On the meta device they take no memory, so that there the size of any model is known at once. Weights may take half
    of the memory, because they are there twice while they are read from a file.

    Raises:
        TooLarge: It has.
    """
    memory, thread = machine_memory(), get_ident()
    size = modules = 0

    def count_weights(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal size
        if parameter is None or get_ident() != thread:
            return
        size += parameter.numel() * parameter.element_size()
        if size > memory / 2:
            raise TooLarge(f'its weights take more than half of the {memory / 1e9:.0f} GB of memory here')

    def count_modules(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        if get_ident() != thread:
            return
        modules += 1
        if modules > MOST_MODULES:
            raise TooLarge(f'it has more than {MOST_MODULES:,} modules')

    hooks = [register_module_parameter_registration_hook(count_weights),  # type: ignore[arg-type]
             register_module_module_registration_hook(count_modules)]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def largest_number(value: Any) -> int:
    """The largest whole number in an argument, which may hold several; 0 without any."""
    if isinstance(value, int):
        return abs(value)
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple | set):
        parts = value
    return max(map(largest_number, parts), default=0)


def machine_memory() -> float:
    """Bytes of memory that this process may have; infinite where that is not known."""
    known = [math.inf]
    with suppress(AttributeError, ValueError, OSError):  # there is none of these on Windows
        known.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    for file in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # 'max'
            known.append(int(Path(file).read_text()))
    if sys.platform != 'win32':
        import resource
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        known += [] if allowed == resource.RLIM_INFINITY else [allowed]
    return min(known)

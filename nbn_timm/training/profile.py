"""Where the time of an epoch goes."""
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

T = TypeVar('T')

PARTS = ('input', 'forward', 'backward', 'optimizer', 'evaluation')
REST = 'other'  # logs, checkpoints, averaged weights, mixing, trials of a curriculum, SAM's step uphill


class NoProfile:
    """Measures nothing, and costs nothing."""

    def start(self) -> None:
        """Begin an epoch."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Surround what belongs to a part."""
        return nullcontext()

    def input(self, loader: Iterable[T]) -> Iterable[T]:
        """The loader, whose waits are measured."""
        return loader

    def seconds(self) -> Mapping[str, float] | None:
        """Of the parts of this epoch so far."""
        return None

    def finish(self) -> None:
        """End an epoch."""

    def table(self) -> str | None:
        """The mean epoch, for people."""
        return None


class Profile(NoProfile):
    """Seconds of the parts of each epoch, by the clock of this process.

    A GPU is waited for at the borders of the parts, so a profiled run is slower there than another.

    Args:
        device: That computes.
        clock: Seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.epochs: list[dict[str, float]] = []

    def start(self) -> None:
        self.epochs.append(dict.fromkeys(PARTS, 0.0))
        self.began = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.epochs[-1][name] += self._now() - start

    def input(self, loader: Iterable[T]) -> Iterator[T]:
        batches = iter(loader)
        nothing = object()
        while True:
            with self.part('input'):
                batch = next(batches, nothing)
            if batch is nothing:
                return
            yield batch  # type: ignore[misc]

    def seconds(self) -> dict[str, float]:
        known = self.epochs[-1]
        return known | {REST: max(0.0, self._now() - self.began - sum(known.values()))}

    def finish(self) -> None:
        self.epochs[-1] = self.seconds()

    def table(self) -> str | None:
        if not self.epochs:
            return None
        means = {name: sum(epoch[name] for epoch in self.epochs) / len(self.epochs) for name in (*PARTS, REST)}
        total = sum(means.values())
        lines = [f'{f"time of an epoch, mean of {len(self.epochs)}":<28}{"seconds":>10}{"share":>9}']
        lines += [f'{name:<28}{seconds:>10.2f}{100 * seconds / (total or 1):>7.1f} %'
                  for name, seconds in [*means.items(), ('all', total)]]
        return '\n'.join(lines)

    def _now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return self.clock()

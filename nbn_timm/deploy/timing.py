"""Times of several functions that do the same, measured in turns, so that a busy machine slows all of them alike."""
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ['Timing', 'interleaved']


@dataclass(frozen=True)
class Timing:
    """Times of one function.

    Attributes:
        milliseconds: Of one call, one per round.
    """

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """In milliseconds."""
        return statistics.median(self.milliseconds)

    def ratio(self, base: 'Timing') -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratio to another function's time in the same round."""
        ratios = [own / other for own, other in zip(self.milliseconds, base.milliseconds, strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive')
        return low, middle, high


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 3) -> dict[str, Timing]:
    """Call each function once per round, in alternating order.

    Args:
        calls: Functions without arguments, by name.
        repeats: Rounds that count.
        warmup: Calls of each before.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[::1 if turn % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: Timing(tuple(values)) for name, values in times.items()}

"""Intervals for the difference of two networks on the same pictures.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (the percentile interval). Both
networks are judged on the same drawn pictures, so what makes a picture hard for both does not widen the interval.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 5000
_AT_ONCE = 2_000_000  # drawn indices in memory


@dataclass(frozen=True)
class Interval:
    """A difference and its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> int:
        """1 if all of the interval lies above zero, -1 if below, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def paired_interval(
        differences: np.ndarray,
        level: float = LEVEL,
        resamples: int = RESAMPLES,
        seed: int = 0,
) -> Interval:
    """The percentile interval of the mean.

    Args:
        differences: One per picture, or per class, [N].
        level: Of the interval.
        resamples: How often N of the N differences are drawn with replacement.
        seed: Of the draws.
    """
    differences = np.asarray(differences, dtype=np.float64)
    random, number = np.random.default_rng(seed), len(differences)
    values, counts = np.unique(differences, return_counts=True)
    if len(values) <= 8:  # as of right and wrong: how often each value is drawn is a multinomial draw
        means = random.multinomial(number, counts / number, size=resamples) @ values / number
    else:
        rows = max(1, _AT_ONCE // number)
        means = np.concatenate([
            differences[random.integers(0, number, (min(rows, resamples - done), number))].mean(axis=1)
            for done in range(0, resamples, rows)])
    return percentile_interval(float(differences.mean()), means, level)


def percentile_interval(value: float, drawn: np.ndarray, level: float = LEVEL) -> Interval:
    """The interval of a value from what it came to in each draw, [R]; draws in which it is not defined are NaN."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def draws_of(number: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of `number` pictures is drawn, for what is no mean over pictures: int [R, N], in blocks."""
    random, rows = np.random.default_rng(seed), max(1, _AT_ONCE // number)
    for done in range(0, resamples, rows):
        block = min(rows, resamples - done)
        drawn = random.integers(0, number, (block, number)) + number * np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=block * number).reshape(block, number)

"""Intervals for the difference of two networks on the same pictures.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (the percentile interval). Both
networks are judged on the same drawn pictures, so what makes a picture hard for both does not widen the interval.
"""
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 5000
_AT_ONCE = 2_000_000  # drawn indices in memory


@dataclass(frozen=True)
class Interval:
    """A mean difference and its bootstrap interval."""

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
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences.mean()), float(low), float(high))

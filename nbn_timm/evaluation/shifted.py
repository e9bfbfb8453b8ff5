"""Test-agnostic evaluation: accuracy under long-tailed test distributions, as the training set's and reversed.

Source: Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition" (SADE),
NeurIPS 2022, whose tables have ratios from 50 forward over the uniform test to 50 backward. Each of these tests is a
part of the whole one (`nbn_timm.data.shift`), so one pass over that gives all accuracies.
"""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nbn_timm.data.shift import ClassShift


@dataclass(frozen=True)
class ShiftedAccuracy:
    """Top-1 accuracies in per cent."""

    forward: dict[float, float]  # by imbalance ratio; frequent classes in training are frequent in the test
    uniform: float
    backward: dict[float, float]  # rare classes in training are frequent in the test

    def rows(self) -> Iterator[tuple[str, float]]:
        """All distributions by name, from the strongest forward one over the uniform to the strongest backward one."""
        yield from ((f'forward {ratio:g}', self.forward[ratio]) for ratio in sorted(self.forward, reverse=True))
        yield 'uniform', self.uniform
        yield from ((f'backward {ratio:g}', self.backward[ratio]) for ratio in sorted(self.backward))

    def to_dict(self) -> dict[str, float]:
        """Accuracies by the name of the distribution, as 'forward_50', rounded to 6 decimals."""
        return {name.replace(' ', '_'): round(accuracy, 6) for name, accuracy in self.rows()}

    def table(self) -> str:
        """One row per distribution, for people."""
        return '\n'.join([f'{"Test distribution":<20}{"accuracy":>10}',
                          *(f'{name.capitalize():<20}{accuracy:>10.2f}' for name, accuracy in self.rows())])


def shifted_accuracy(hits: np.ndarray, tests: Mapping[ClassShift, np.ndarray]) -> ShiftedAccuracy:
    """The accuracies on parts of a test set.

    Args:
        hits: Whether each image was recognised, bool [N].
        tests: Indices of the images of each shifted test.
    """
    found: dict[str, dict[float, float]] = {'forward': {}, 'backward': {}}
    for shift, indices in tests.items():
        found[shift.direction][shift.ratio] = 100 * float(hits[indices].mean())
    return ShiftedAccuracy(found['forward'], 100 * float(hits.mean()), found['backward'])

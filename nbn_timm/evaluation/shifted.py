"""Test-agnostic evaluation: accuracy under long-tailed test distributions, as the training set's and reversed.

Source: Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition" (SADE),
NeurIPS 2022. Its test sets are drawn from the balanced one: the class of rank r, by training images, keeps a share of
ratio^(-r / (C - 1)) of its images ('forward'), or ratio^(-(C - 1 - r) / (C - 1)) ('backward').

Which images are drawn is chance, and the mean over all draws needs none: each class counts with its accuracy on all of
its test images, weighted by its share. That mean is what is computed here. Shares are not rounded to whole images, so
that a ratio means the same on every test set.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nbn_timm.data.classes import ClassCounts
from nbn_timm.evaluation.result import EvalResult

RATIOS = (50, 25, 10, 5, 2)


@dataclass(frozen=True)
class ShiftedAccuracy:
    """Top-1 accuracies in per cent."""

    forward: dict[int, float]  # by imbalance ratio; frequent classes in training are frequent in the test
    uniform: float
    backward: dict[int, float]  # rare classes in training are frequent in the test

    def rows(self) -> Iterator[tuple[str, float]]:
        """All distributions by name, from the strongest forward one over the uniform to the strongest backward one."""
        yield from ((f'forward {ratio}', self.forward[ratio]) for ratio in self.forward)
        yield 'uniform', self.uniform
        yield from ((f'backward {ratio}', self.backward[ratio]) for ratio in reversed(self.backward))

    def to_dict(self) -> dict[str, float]:
        """Accuracies by the name of the distribution, as 'forward_50', rounded to 6 decimals."""
        return {name.replace(' ', '_'): round(accuracy, 6) for name, accuracy in self.rows()}

    def table(self) -> str:
        """One row per distribution, for people."""
        return '\n'.join([f'{"Test distribution":<20}{"accuracy":>10}',
                          *(f'{name.capitalize():<20}{accuracy:>10.2f}' for name, accuracy in self.rows())])


def shifted_accuracy(
        result: EvalResult,
        class_counts: ClassCounts,
        ratios: tuple[int, ...] = RATIOS,
) -> ShiftedAccuracy:
    """The accuracies that a result amounts to under shifted test distributions.

    Classes without a test image are left out.

    Args:
        result: On a test set, usually a balanced one.
        class_counts: The training set's, which rank the classes; of equal ones the smaller label is first.
        ratios: Most to least frequent class of the test.
    """
    correct, total = np.asarray(result.per_class_correct), np.asarray(result.per_class_total)
    tested = total > 0
    accuracy = 100 * correct[tested] / total[tested]
    order = np.argsort(-np.asarray(class_counts.train_images), kind='stable')
    place = np.empty(len(order))
    place[order] = np.linspace(0, 1, len(order))  # 0 for the class with the most training images, 1 for the least

    def mean(exponent: np.ndarray, ratio: int) -> float:
        return float(np.average(accuracy, weights=float(ratio) ** -exponent[tested]))

    return ShiftedAccuracy(
        {ratio: mean(place, ratio) for ratio in ratios},
        mean(place, 1),
        {ratio: mean(1 - place, ratio) for ratio in ratios})

"""Long-tailed test sets: a part of a balanced one, with the classes that are frequent in training frequent or rare.

Source: Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition" (SADE),
NeurIPS 2022, and its code (Vanint/SADE-AgnosticLT, commit cba11b8).
"""
import re
from dataclasses import dataclass

import numpy as np

from nbn_timm.data.classes import ClassCounts
from nbn_timm.data.longtail import draw_by_counts
from nbn_timm.errors import InputError

DIRECTIONS = ('forward', 'backward')
RATIOS = (50, 25, 10, 5, 2)  # of SADE's tables
UNIFORM = 'uniform'

_FORM = re.compile(rf'({"|".join(DIRECTIONS)})[_:-]?(\d+(?:\.\d+)?)')


@dataclass(frozen=True)
class ClassShift:
    """How the classes of a test set are distributed.

    Attributes:
        direction: 'forward', frequent in training is frequent in the test, or 'backward', it is rare.
        ratio: Of the most to the least frequent class, from 1 on.
    """

    direction: str
    ratio: float

    def __str__(self) -> str:
        return f'{self.direction}_{self.ratio:g}'

    @classmethod
    def parse(cls, text: str) -> 'ClassShift | None':
        """'forward_50' or 'backward_2.5'; None for 'uniform', the test set as it is.

        Raises:
            InputError: It is something else.
        """
        if text == UNIFORM:
            return None
        found = _FORM.fullmatch(text)
        if found is None or float(found[2]) < 1:
            raise InputError(f"--test-distribution is '{text}': give forward_RATIO or backward_RATIO with a number "
                             f'from 1, as forward_50, or {UNIFORM}')
        return cls(found[1], float(found[2]))


def shifted_indices(targets: np.ndarray, class_counts: ClassCounts, shift: ClassShift, seed: int = 0) -> np.ndarray:
    """The images of a shifted test set, as SADE draws them from CIFAR's.

    The class of rank r among C, by training images, keeps int(n ratio^(-r / (C - 1))) images forward and
    int(n ratio^(-(C - 1 - r) / (C - 1))) backward, at least one, with n the test images of the largest class. Which
    ones is LDAM's draw, see `draw_by_counts`. With seed 0 these are SADE's images of CIFAR, whose ranks are the labels.

    Args:
        targets: Labels of the test set, [N].
        class_counts: The training set's, which rank the classes; of equal ones the smaller label is first.
        shift: The distribution.
        seed: Of the draw.

    Returns:
        Indices into `targets`, int64, by class in label order.
    """
    train_images = np.asarray(class_counts.train_images)
    num_classes = len(train_images)
    largest = int(np.bincount(targets, minlength=num_classes).max())
    last = max(num_classes - 1.0, 1.0)
    counts = np.empty(num_classes, dtype=np.int64)
    for rank, label in enumerate(np.argsort(-train_images, kind='stable')):
        place = rank if shift.direction == 'forward' else num_classes - 1 - rank
        counts[label] = max(int(largest * (1 / shift.ratio) ** (place / last)), 1)
    return draw_by_counts(targets, counts.tolist(), seed)

"""Answers for pictures that can be of several classes: those whose probability reaches their threshold."""
from collections.abc import Sequence

import numpy as np
import torch

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.evaluation.prediction import PredictedClass, TopClasses
from nbn_timm.evaluation.thresholds import Thresholds


class ToldClasses(TopClasses):
    """The classes that are told of each image, the likeliest first; there may be none.

    The probability of a class is the sigmoid of its logit.

    Args:
        names: Of all classes, [C].
        thresholds: From which probability on a class is told.
        class_counts: Training images per class, where they are known.

    Raises:
        InputError: `class_counts` is of another number of classes.
    """

    def __init__(
            self,
            names: Sequence[str],
            thresholds: Thresholds,
            class_counts: ClassCounts | None = None,
    ) -> None:
        super().__init__(names, class_counts, len(names))
        self.thresholds = thresholds

    def __call__(self, logits: torch.Tensor) -> list[tuple[PredictedClass, ...]]:
        """The classes that are told of each image, from logits [B, C].

        Raises:
            InputError: The logits are not [B, C], or not finite.
        """
        self.check(logits)
        values = logits.float().cpu()
        if not values.isfinite().all():
            raise InputError('the model gave NaN or infinite logits: the weights have diverged, or float16 overflowed '
                             '(try --amp-dtype bfloat16)')
        told, probabilities = self.thresholds.answers(values.numpy()), values.double().sigmoid().numpy()
        order = np.argsort(-probabilities, axis=1, kind='stable')
        return [tuple(self.describe(int(label), float(row[label])) for label in ranked if chosen[label])
                for ranked, row, chosen in zip(order, probabilities, told, strict=True)]

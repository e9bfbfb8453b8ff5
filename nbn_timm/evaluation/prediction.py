"""Predictions for images without labels: the likeliest classes, and how often training has seen each of them."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError

TOP_K = 5  # classes of an answer


@dataclass(frozen=True)
class PredictedClass:
    """A class that an image may be of."""

    label: int
    name: str
    probability: float  # softmax of the logits by the temperature, 0 to 1
    train_images: int | None  # of this class; None where the counts are not known
    shot: str | None  # 'many', 'medium' or 'few'; None likewise

    def __str__(self) -> str:
        known = 'training images n/a' if self.train_images is None else (
            f'{self.train_images:,} training image{"" if self.train_images == 1 else "s"}, {self.shot}')
        return f'{self.probability:7.2%}  {self.name} ({known})'

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the probability in full precision."""
        return {'class': self.label, 'name': self.name, 'probability': self.probability,
                'train_images': self.train_images, 'shot': self.shot}


class TopClasses:
    """The likeliest classes of each image.

    Args:
        names: Of all classes, [C].
        class_counts: Training images per class, where they are known.
        topk: How many classes to give; at most all.
        logit_offset: [C], added to all logits, see `logit_offset`; None adds nothing.
        temperature: Divides the logits; it changes probabilities, and no order.

    Raises:
        InputError: `class_counts` is of another number of classes.
    """

    def __init__(
            self,
            names: Sequence[str],
            class_counts: ClassCounts | None = None,
            topk: int = TOP_K,
            logit_offset: torch.Tensor | None = None,
            temperature: float = 1.0,
    ) -> None:
        self.temperature = temperature
        if class_counts is not None and class_counts.num_classes != len(names):
            raise InputError(
                f'the class counts from {class_counts.source} are for {class_counts.num_classes} classes but the model '
                f'has {len(names)}: give the counts of the training set that the model was trained on')
        self.names = names
        self.topk = min(topk, len(names))
        self.counts = class_counts.counts if class_counts is not None else None
        splits = class_counts.shot_split().items() if class_counts is not None and self.counts is not None else ()
        self.shot_of = {label: shot for shot, labels in splits for label in labels}
        self.logit_offset = None if logit_offset is None else logit_offset.float()

    def __call__(self, logits: torch.Tensor) -> list[tuple[PredictedClass, ...]]:
        """The classes of each image, likeliest first, from logits [B, C].

        Classes with the same logit are ranked by label, as `LongTailEvaluator` ranks them.

        Raises:
            InputError: The logits are not [B, C].
        """
        self.check(logits)
        logits = logits.float()
        if self.logit_offset is not None:
            logits = logits + self.logit_offset.to(logits.device)
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :self.topk]
        probabilities = (logits.double() / self.temperature).softmax(dim=1).gather(1, order)
        return [tuple(self.describe(label, value) for label, value in zip(labels, values, strict=True))
                for labels, values in zip(order.tolist(), probabilities.tolist(), strict=True)]

    def check(self, logits: torch.Tensor) -> None:
        """Refuse what are no logits of these classes.

        Raises:
            InputError: They are not [B, C].
        """
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] != len(self.names):
            shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise InputError(f'the model returned {shape} where logits [batch, {len(self.names)}] were expected: '
                             'give a classification model')

    def describe(self, label: int, probability: float) -> PredictedClass:
        """A class with what is known of it."""
        train_images = None if self.counts is None else self.counts[label]
        return PredictedClass(label, self.names[label], probability, train_images, self.shot_of.get(label))


def predict(
        model: nn.Module,
        loader: Iterable[Any],
        top_classes: TopClasses,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
        channels_last: bool = False,
) -> Iterator[tuple[int, tuple[PredictedClass, ...] | None]]:
    """Position and predictions of each image, in order, as they come.

    Args:
        model: Maps images [B, 3, H, W] to logits [B, C]; is put into eval mode.
        loader: Of an `UnlabelledImages`; for an image that could not be read the predictions are None.
        top_classes: Chooses from the logits.
        device: Where the model is.
        amp_dtype: Autocast to this type; None computes in the model's own.
        channels_last: Give the model channels-last images.

    Raises:
        InputError: The output is no logits, or not finite.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.eval()
    for images, positions in loader:
        with torch.inference_mode():
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            predictions = top_classes(logits)
        for position, classes in zip(positions.tolist(), predictions, strict=True):
            if position < 0:
                yield -1 - position, None
                continue
            if not all(0 <= found.probability <= 1 for found in classes):  # NaN is neither
                raise InputError('the model gave NaN or infinite logits: the weights have diverged, or float16 '
                                 'overflowed (try --amp-dtype bfloat16)')
            yield position, classes

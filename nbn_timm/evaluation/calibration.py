"""How far the confidence of a network is to be trusted: images counted by it, and the calibration error.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with 15 bins of equal width, each
with its upper border.
"""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

BINS = 15
_UNIT = 2.0 ** -32  # in which probabilities are summed as whole numbers, so that the order does not matter


def whole_units(probabilities: torch.Tensor) -> torch.Tensor:
    """Numbers around 1 as int64 multiples of 2^-32, which processes can add without rounding."""
    return (probabilities.float().nan_to_num() / _UNIT).round().to(torch.int64)


def from_units(total: int) -> float:
    """A sum of `whole_units`."""
    return total * _UNIT


def bin_of(confidence: torch.Tensor) -> torch.Tensor:
    """Index [N] of the bin of each probability."""
    return ((confidence.float().nan_to_num() * BINS).ceil().to(torch.int64) - 1).clamp(0, BINS - 1)


@dataclass(frozen=True)
class Calibration:
    """Images by their confidence, one entry per bin.

    Attributes:
        images: Their number.
        correct: Those whose likeliest class is the label.
        confidence: Sum over them, in units of 2^-32.
    """

    images: tuple[int, ...]
    correct: tuple[int, ...]
    confidence: tuple[int, ...]

    @classmethod
    def of(cls, confidence: np.ndarray, correct: np.ndarray) -> 'Calibration':
        """Count images by their confidence [N] and whether they were told right [N]."""
        values = torch.from_numpy(np.ascontiguousarray(confidence, np.float32))
        bins = bin_of(values)
        sums = torch.zeros(BINS, dtype=torch.int64).index_add_(0, bins, whole_units(values))
        hits = torch.from_numpy(np.ascontiguousarray(correct, bool))
        return cls(tuple(torch.bincount(bins, minlength=BINS).tolist()),
                   tuple(torch.bincount(bins[hits], minlength=BINS).tolist()), tuple(sums.tolist()))

    @classmethod
    def together(cls, parts: Iterable['Calibration']) -> 'Calibration':
        """That of all the images of some."""
        columns = [(part.images, part.correct, part.confidence) for part in parts]
        return cls(*(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*columns, strict=True)))

    @property
    def error(self) -> float | None:
        """Expected calibration error in percentage points; None without an image."""
        number = sum(self.images)
        if not number:
            return None
        gaps = (abs(correct - from_units(confidence))
                for correct, confidence in zip(self.correct, self.confidence, strict=True))
        return 100 * sum(gaps) / number

    def bars(self) -> list[tuple[float, float, int] | None]:
        """Mean confidence and accuracy in percent and number of images of each bin; None for an empty one."""
        return [(100 * from_units(confidence) / images, 100 * correct / images, images) if images else None
                for images, correct, confidence in zip(self.images, self.correct, self.confidence, strict=True)]

"""Class weights from training counts."""
import torch

from nbn_timm.data.class_counts import ClassCounts
from nbn_timm.errors import InputError


def effective_number_weights(class_counts: ClassCounts, beta: float = 0.9999) -> torch.Tensor:
    """Inverse effective numbers of images per class, (1 - beta) / (1 - beta ** n), float64 [C] with mean 1.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, eq. 12. A class without
    training images counts as having one.

    Args:
        class_counts: Training images per class.
        beta: In [0, 1); 0 gives equal weights.

    Raises:
        InputError: `beta` is out of range.
    """
    if not 0 <= beta < 1:
        raise InputError(f'beta is {beta}: give a number from 0 to less than 1')
    weights = (1 - beta) / (1 - beta ** class_counts.tensor().clamp(min=1))
    return weights / weights.mean()

"""Class weights from training counts."""
import torch

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses.checks import check_choice, check_number

BETA = 0.9999  # of effective numbers
WEIGHTINGS = ('inverse', 'effective_number')


def class_weights(
        class_counts: ClassCounts,
        loss: str,
        weighting: str,
        exponent: float = 1.0,
        beta: float | None = None,
) -> torch.Tensor:
    """Weight of each class, float64 [C] with mean 1. A class without training images counts as having one.

    - 'inverse': proportional to (n_min / n) ** exponent, the cost-sensitive weights of Zhang et al., "Bag of Tricks for
      Long-Tailed Visual Recognition", AAAI 2021;
    - 'effective_number': see `effective_number_weights`, to the power of `exponent`.

    Args:
        class_counts: Training images per class.
        loss: Whose setting it is, for messages.
        weighting: One of `WEIGHTINGS`.
        exponent: 0 gives equal weights, 0.5 the square root.
        beta: Of effective numbers, which None sets to 0.9999.

    Raises:
        InputError: A setting is out of range, or would have no effect.
    """
    check_choice(loss, 'weighting', weighting, WEIGHTINGS)
    check_number(loss, 'exponent', exponent)
    if beta is not None:
        check_number(loss, 'beta', beta, high=1, below=True)
    if weighting == 'inverse':
        if beta is not None:
            raise InputError(f"loss '{loss}' has beta={beta!r}, which inverse frequencies do not use: leave it out, or "
                             'give weighting=effective_number')
        weights = 1 / class_counts.tensor().clamp(min=1)
    else:
        weights = effective_number_weights(class_counts, BETA if beta is None else beta)
    weights = weights ** exponent
    return weights / weights.mean()


def effective_number_weights(class_counts: ClassCounts, beta: float = BETA) -> torch.Tensor:
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

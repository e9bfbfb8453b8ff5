"""Logit adjustment after training (Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, eq. 9)."""
import torch

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError


def logit_offset(class_counts: ClassCounts, tau: float = 1.0) -> torch.Tensor | None:
    """What post-hoc logit adjustment adds to a model's logits: -tau log prior, float64 [C]; None for tau 0.

    Args:
        class_counts: The training set's.
        tau: Strength; 0 changes nothing.

    Raises:
        InputError: A class has no training image, so that its logarithm is infinite.
    """
    if not tau:
        return None
    if 0 in class_counts.train_images:
        name = class_counts.names[class_counts.train_images.index(0)]
        raise InputError(f"class '{name}' of {class_counts.source} has no training image, so its logit cannot be "
                         'adjusted by its prior: leave out logit adjustment, or give counts without zeros')
    return -tau * class_counts.prior().log()

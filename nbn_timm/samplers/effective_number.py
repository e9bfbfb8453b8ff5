"""Images by the inverse effective number of their class (Cui et al., "Class-Balanced Loss Based on Effective Number of
Samples", CVPR 2019, as the resampling of Cao et al., "LDAM", NeurIPS 2019, has it)."""
from typing import Any

import numpy as np

from nbn_timm.errors import InputError
from nbn_timm.samplers.sampler import register_sampler
from nbn_timm.samplers.weighted import ClassWeighted


@register_sampler('effective_number')
class EffectiveNumber(ClassWeighted):
    """N independent draws of images, each with a weight of 1 / E(n_c), the inverse effective number of its class.

    E(n) = (1 - beta ** n) / (1 - beta), so class c has probability proportional to n_c / E(n_c). beta = 0 draws
    instances alike, beta towards 1 draws classes alike.

    Args:
        beta: In [0, 1).

    Raises:
        InputError: `beta` is out of range.
    """

    def __init__(self, *args: Any, beta: float = 0.9999, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= beta < 1:
            raise InputError(f"the beta of sampler 'effective_number' is {beta}: give a number from 0 to less than 1")
        self.beta = beta

    def class_weights(self, counts: np.ndarray) -> np.ndarray:
        return counts * (1 - self.beta) / (1 - self.beta ** counts)

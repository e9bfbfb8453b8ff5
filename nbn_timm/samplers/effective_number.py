"""Images by the inverse effective number of their class (Cui et al., "Class-Balanced Loss Based on Effective Number of
Samples", CVPR 2019, as the resampling of Cao et al., "LDAM", NeurIPS 2019, has it)."""
from typing import Any

import numpy as np

from nbn_timm.key_values import check_number
from nbn_timm.samplers.sampler import FLAG, register_sampler
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

    balances = True

    def __init__(self, *args: Any, beta: float = 0.9999, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = check_number("sampler 'effective_number'", FLAG, 'beta', beta, high=1, below=True)

    def class_weights(self, counts: np.ndarray) -> np.ndarray:
        return counts * (1 - self.beta) / (1 - self.beta ** counts)

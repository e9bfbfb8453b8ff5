"""All classes equally often (Kang et al., "Decoupling Representation and Classifier", ICLR 2020, eq. 1 with q = 0)."""
from typing import Any

import numpy as np

from nbn_timm.key_values import check_number
from nbn_timm.samplers.sampler import FLAG, EpochSampler, register_sampler


@register_sampler('class_balanced')
class ClassBalanced(EpochSampler):
    """N independent draws: a class uniformly among those that have images, then one of its images uniformly.

    An image of several classes comes as one of each of them, and one of none never.

    Args:
        size: Draws of an epoch, over all ranks; None is N, all images that there are.

    Raises:
        InputError: `size` is no number of images.
    """

    balances = True
    label_sets = True

    def __init__(self, *args: Any, size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.size = size
        if size is not None:
            check_number("sampler 'class_balanced'", FLAG, 'size', size, low=1, whole=True)

    @property
    def epoch_length(self) -> int:
        return len(self.targets) if self.size is None else self.size

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        groups = self.groups
        group = rng.integers(len(groups.counts), size=self.epoch_length)
        return groups.images[groups.first[group] + rng.integers(groups.counts[group])]

"""Every image once per epoch."""
import numpy as np

from nbn_timm.samplers.sampler import EpochSampler, register_sampler


@register_sampler('instance_balanced')
class InstanceBalanced(EpochSampler):
    """A random permutation of the training set: each image once."""

    label_sets = True

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.targets))

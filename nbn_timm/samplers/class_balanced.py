"""All classes equally often (Kang et al., "Decoupling Representation and Classifier", ICLR 2020, eq. 1 with q = 0)."""
import numpy as np

from nbn_timm.samplers.sampler import EpochSampler, register_sampler


@register_sampler('class_balanced')
class ClassBalanced(EpochSampler):
    """N independent draws: a class uniformly among those that have images, then one of its images uniformly.

    An image of several classes comes as one of each of them, and one of none never.
    """

    balances = True
    label_sets = True

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        groups = self.groups
        group = rng.integers(len(groups.counts), size=self.epoch_length)
        return groups.images[groups.first[group] + rng.integers(groups.counts[group])]

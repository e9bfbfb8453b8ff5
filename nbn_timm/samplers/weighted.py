"""Independent draws: a class by its weight, then one of its images. Most samplers are a choice of these weights."""
from abc import abstractmethod

import numpy as np

from nbn_timm.samplers.sampler import EpochSampler


class ClassWeighted(EpochSampler):
    """N independent draws with replacement: a class by `class_weights`, then one of its images uniformly."""

    @abstractmethod
    def class_weights(self, counts: np.ndarray) -> np.ndarray:
        """Return weights [G], to be normalised, of the classes that have images.

        Args:
            counts: Their images, float64 [G], in the order of `groups.labels`.
        """

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return self.pick(rng, self.epoch_length)

    def pick(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draw any number of dataset indices, int64 [size]."""
        groups = self.groups
        weights = self.class_weights(groups.counts.astype(np.float64))
        # Independent draws are a multinomial number of each class in random order, which is cheaper to draw.
        drawn = rng.multinomial(size, weights / weights.sum())
        place = np.repeat(groups.first, drawn) + rng.integers(np.repeat(groups.counts, drawn))
        return rng.permutation(groups.images[place])

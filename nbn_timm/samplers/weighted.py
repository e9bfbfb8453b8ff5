"""Independent draws: a class by its weight, then one of its images. Most samplers are a choice of these weights."""
from abc import abstractmethod

import numpy as np

from nbn_timm.samplers.registry import EpochSampler


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
        group = rng.choice(len(weights), size, p=weights / weights.sum())
        return groups.images[groups.first[group] + rng.integers(groups.counts[group])]

"""All classes equally often (Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 3, q = 0)."""
import numpy as np

from nbn_timm.samplers.registry import EpochSampler, register_sampler


@register_sampler('class_balanced')
class ClassBalanced(EpochSampler):
    """N independent draws: a class uniformly among those that have images, then one of its images uniformly."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        by_class = np.argsort(self.targets, kind='stable')  # image indices, grouped by class
        first = np.flatnonzero(np.diff(self.targets[by_class], prepend=-1))  # where each non-empty class begins
        size = np.diff(first, append=len(by_class))
        group = rng.integers(len(first), size=len(by_class))
        return by_class[first[group] + rng.integers(size[group])]

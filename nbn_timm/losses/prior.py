"""The class prior as losses add it to logits."""
import torch

from nbn_timm.data.classes import ClassCounts


def log_prior(class_counts: ClassCounts, epsilon: float = 0.0) -> torch.Tensor:
    """log(prior + epsilon) of each class, float64 [C]. A class without training images counts as having one.

    Args:
        class_counts: Training images per class.
        epsilon: Added to the prior, where the authors of a loss do so.
    """
    counts = class_counts.tensor().clamp(min=1)
    return (counts / counts.sum() + epsilon).log()

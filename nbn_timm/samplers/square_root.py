"""Classes by the square root of their images (Mahajan et al., "Exploring the Limits of Weakly Supervised Pretraining",
ECCV 2018; Kang et al., "Decoupling Representation and Classifier", ICLR 2020, eq. 1 with q = 1/2)."""
import numpy as np

from nbn_timm.samplers.sampler import register_sampler
from nbn_timm.samplers.weighted import ClassWeighted


@register_sampler('square_root')
class SquareRoot(ClassWeighted):
    """N independent draws: class c with probability proportional to sqrt(n_c), then one of its images uniformly.

    An image of several classes comes as one of each of them, and one of none never.
    """

    balances = True
    label_sets = True

    def class_weights(self, counts: np.ndarray) -> np.ndarray:
        return np.sqrt(counts)

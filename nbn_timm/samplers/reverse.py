"""The tail most often (Zhou et al., "BBN: Bilateral-Branch Network", CVPR 2020)."""
import numpy as np

from nbn_timm.samplers.sampler import register_sampler
from nbn_timm.samplers.weighted import ClassWeighted


@register_sampler('reverse')
class Reverse(ClassWeighted):
    """N independent draws: class c with probability proportional to n_max / n_c, then one of its images uniformly.

    In BBN this is the stream of the second, re-balancing branch, beside an instance-balanced one.
    """

    balances = True

    def class_weights(self, counts: np.ndarray) -> np.ndarray:
        return counts.max() / counts

"""From instance-balanced to class-balanced over the run (Kang et al., "Decoupling Representation and Classifier",
ICLR 2020, eq. 2)."""
from typing import Any

import numpy as np

from nbn_timm.errors import InputError
from nbn_timm.samplers.sampler import register_sampler
from nbn_timm.samplers.weighted import ClassWeighted


@register_sampler('progressively_balanced')
class ProgressivelyBalanced(ClassWeighted):
    """N independent draws: class c with probability (1 - t) n_c / N + t / C, then one of its images uniformly.

    t grows evenly from 0 in the first epoch to 1 in the last, as in the released code of the paper. C counts the
    classes that have images.

    Raises:
        InputError: The number of epochs is unknown.
    """

    balances = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.epochs is None:
            raise InputError("sampler 'progressively_balanced' needs the number of epochs of the run: give epochs=N")

    def progress(self) -> float:
        """t in the present epoch."""
        assert self.epochs is not None
        return min(self.epoch / max(self.epochs - 1, 1), 1.0)

    def class_weights(self, counts: np.ndarray) -> np.ndarray:
        progress = self.progress()
        return (1 - progress) * counts / counts.sum() + progress / len(counts)

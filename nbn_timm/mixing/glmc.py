"""GLMC's two mixtures (Du et al., "Global and Local Mixture Consistency Cumulative Learning for Long-tailed Visual
Recognitions", CVPR 2023).
"""
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nbn_timm.data import TrainLoader
from nbn_timm.mixing.cmo import patch_loader
from nbn_timm.mixing.mixing import MixingRun, StreamMixing, register_mixing
from nbn_timm.settings import NOT_NEGATIVE, Settings, only_with, setting


@dataclass(frozen=True)
class GlmcSettings(Settings):
    """GLMC."""

    title = 'GLMC'

    glmc: float = setting(0.0, 'mixup of one view and CutMix of another with a second stream of images, for --loss '
                          'glmc: parameter of their Beta distribution; 0 for none', limits=NOT_NEGATIVE,
                          metavar='ALPHA')
    glmc_resampling: float = setting(0.0, 'the second stream draws an image of class c in proportion to n_c ** -R; 1 '
                                     'draws all classes equally often', metavar='R', limits=NOT_NEGATIVE,
                                     effect=only_with('glmc'))


@register_mixing('glmc', GlmcSettings)
class GlobalLocalMixture(StreamMixing):
    """Mix two views of a batch with those of a second stream: the first as a whole, the second in a box.

    Of views x_0, x_1 with labels y and x'_0, x'_1 with labels y' of the second stream it makes lam x_0 + (1 - lam) x'_0
    and x_1 with a box of x'_1, both with lam y + (1 - lam) y', lam from Beta(alpha, alpha) once for a batch. The box
    has sides of sqrt(1 - lam) of the image, anywhere, and is cut off at the border. As in the authors' code
    (ynu-yangpeng/GLMC, commit 2c0261c) lam is not corrected to what is left of it.

    Args:
        others: Loader of the second stream, see `StreamMixing`, of as many views.
        num_classes: C.
        alpha: Of the Beta distribution.
        smoothing: See `Mixing`.
    """

    uses = ()
    views = 2

    def __init__(
            self,
            others: TrainLoader,
            num_classes: int,
            alpha: float = 1.0,
            smoothing: float = 0.0,
    ) -> None:
        super().__init__(others, num_classes, smoothing)
        self.alpha = alpha

    @classmethod
    def create(cls, settings: Any, run: MixingRun) -> 'GlobalLocalMixture':
        """GLMC's mixtures of a run, with a second stream of its training images."""
        others = patch_loader(run, '--glmc', settings.glmc_resampling - 1, cls.views)
        return cls(others, run.num_classes, settings.glmc, run.smoothing)

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others, other_target = next(self.stream)
        others, other_target = others[:, :len(target)], other_target[:len(target)]
        lam = float(np.random.beta(self.alpha, self.alpha))
        whole, boxed = lam * images[0] + (1 - lam) * others[0], images[1].clone()
        rows, columns = (_span(side, lam) for side in images.shape[-2:])
        boxed[..., rows, columns] = others[1][..., rows, columns]
        return torch.stack([whole, boxed]), lam * self.soft_target(target) + (1 - lam) * self.soft_target(other_target)


def _span(side: int, lam: float) -> slice:
    """Where the box is on an axis of the image."""
    half = int(np.ceil(side * np.sqrt(1 - lam))) // 2
    middle = np.random.randint(side)
    return slice(max(middle - half, 0), min(middle + half, side))

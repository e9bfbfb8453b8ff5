"""Manifold mixup (Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States", ICML 2019) at
one layer, as in Zhang et al., "Bag of Tricks for Long-Tailed Visual Recognition", AAAI 2021.
"""
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nbn_timm.errors import InputError, nearest
from nbn_timm.mixing.mixing import ALWAYS, Mixing, MixingRun, register_mixing
from nbn_timm.settings import NOT_NEGATIVE, Settings, only_with, setting


@dataclass(frozen=True)
class ManifoldMixupSettings(Settings):
    """Manifold mixup."""

    title = 'manifold mixup'

    manifold_mixup: float = setting(0.0, 'mixup of what a layer gives: parameter of its Beta distribution; 0 for none',
                                    limits=NOT_NEGATIVE, metavar='ALPHA')
    manifold_mixup_layer: str = setting(
        'global_pool', "the layer, by its name in the network, such as layer2; Bag of Tricks' is the pooling",
        metavar='NAME', effect=only_with('manifold_mixup'))


@register_mixing('manifold_mixup', ManifoldMixupSettings)
class ManifoldMixup(Mixing):
    """Mix what a layer of the network gives, lam h_i + (1 - lam) h_j, and the labels likewise; images stay as they are.

    There is one lam from Beta(alpha, alpha) for a batch, and j is from a random permutation of it. `connect` must be
    called with the network, in which the layer mixes by a hook while it is in training mode.

    Args:
        num_classes: C.
        alpha: Of the Beta distribution.
        layer: Name of the layer.
        smoothing, prob, epochs: See `Mixing`.
    """

    def __init__(
            self,
            num_classes: int,
            alpha: float = 1.0,
            layer: str = ManifoldMixupSettings.manifold_mixup_layer,
            smoothing: float = 0.0,
            prob: float = 1.0,
            epochs: range = ALWAYS,
    ) -> None:
        super().__init__(num_classes, smoothing, prob, epochs)
        self.alpha = alpha
        self.layer = layer
        self.waiting: deque[tuple[float, torch.Tensor] | None] = deque()  # of batches that the network has yet to see

    @classmethod
    def create(cls, settings: Any, run: MixingRun) -> 'ManifoldMixup':
        """Manifold mixup of a run."""
        if run.batch_size < 2:
            raise InputError('--manifold-mixup mixes the images of a batch: give a --batch-size of at least 2')
        return cls(run.num_classes, settings.manifold_mixup, settings.manifold_mixup_layer, run.smoothing,
                   run.common.mixup_prob, run.common.active)

    def connect(self, network: nn.Module) -> None:
        """Let the layer mix.

        Raises:
            InputError: The network has no such layer.
        """
        names = [name for name, _ in network.named_modules() if name]
        if self.layer not in names:
            raise InputError(f"{type(network).__name__} has no layer '{self.layer}': give the name of one as "
                             f'--manifold-mixup-layer{nearest(self.layer, names)}')
        network.get_submodule(self.layer).register_forward_hook(_mixing_hook(self.waiting))

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.waiting.clear()

    def end_epoch(self) -> None:
        """Make sure that the layer has mixed.

        Raises:
            InputError: The network does not call it once for a batch.
        """
        if self.waiting:
            raise InputError(f"the network does not call the layer '{self.layer}' once for every batch, as some "
                             'networks have it: give another --manifold-mixup-layer')

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = len(self.waiting)
        mixed = super().__call__(images, target)
        if len(self.waiting) == before:
            self.waiting.append(None)  # this batch stays as it is
        return mixed

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lam = np.random.beta(self.alpha, self.alpha)
        partner = torch.randperm(len(target)).to(target.device)
        self.waiting.append((lam, partner))
        soft = self.soft_target(target)
        return images, lam * soft + (1 - lam) * soft[partner]


def _mixing_hook(waiting: deque[tuple[float, torch.Tensor] | None]) -> Callable[..., torch.Tensor | None]:
    """A forward hook that mixes what its module gives as the next batch in line wants it.

    It is a function of no object, so that a copy of the network shares it.
    """
    def mix(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        drawn = waiting.popleft() if module.training and waiting else None
        if drawn is None:
            return None
        lam, partner = drawn
        return lam * output + (1 - lam) * output[partner]
    return mix

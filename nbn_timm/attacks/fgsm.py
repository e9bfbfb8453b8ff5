"""FGSM (Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015)."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.attacks.ascent import ascend
from nbn_timm.attacks.attack import Attack, register_attack


@register_attack('fgsm')
class FGSM(Attack):
    """One step of the whole bound up the cross-entropy, from the picture itself."""

    title = 'FGSM'

    def __call__(
            self, network: nn.Module, pixels: torch.Tensor, target: torch.Tensor, noise: torch.Tensor,
    ) -> torch.Tensor:
        eps = self.bound.eps
        return ascend(lambda changed: F.cross_entropy(network(changed), target, reduction='sum'),
                      pixels, pixels.clone(), eps, eps, 1)

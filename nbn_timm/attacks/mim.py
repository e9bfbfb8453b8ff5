"""MIM (Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018)."""
import torch

from nbn_timm.attacks.attack import register_attack
from nbn_timm.attacks.pgd import PGD


@register_attack('mim')
class MIM(PGD):
    """PGD along a sum of all gradients so far, each divided by the mean of its absolute values."""

    title = 'MIM'

    def direction(self):
        """The sign of the sum."""
        total = None

        def step(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal total
            scaled = gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
            total = scaled if total is None else total + scaled
            return total.sign()
        return step

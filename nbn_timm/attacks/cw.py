"""CW inside a bound: PGD up the margin of Carlini and Wagner.

Source: Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE S&P 2017, eq. f6, climbed by
PGD as in Madry et al. (ICLR 2018) and in RoBal's `_cw_whitebox` (wutong16/Adversarial_Long-Tail, commit ab2f3a7). It is
not the attack of that paper that looks for the smallest L2 change, which torchattacks calls CW.
"""
import torch

from nbn_timm.attacks.ascent import margin
from nbn_timm.attacks.attack import register_attack
from nbn_timm.attacks.pgd import PGD

CONFIDENCE = 50.0  # of the wrong class, beyond which nothing is gained


@register_attack('cw')
class CW(PGD):
    """PGD up min(highest other logit - label's logit, 50)."""

    title = 'CW'

    def objective(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return margin(logits, target).clamp(max=CONFIDENCE)

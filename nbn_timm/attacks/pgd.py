"""PGD (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018)."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.attacks.ascent import ascend, project
from nbn_timm.attacks.attack import Attack, register_attack


@register_attack('pgd')
class PGD(Attack):
    """Steps up the cross-entropy, from a random picture inside the bound."""

    title = 'PGD'
    usual_steps = 20

    def __call__(
            self, network: nn.Module, pixels: torch.Tensor, target: torch.Tensor, noise: torch.Tensor,
    ) -> torch.Tensor:
        eps = self.bound.eps
        start = project(pixels + eps * noise, pixels, eps)
        return ascend(lambda changed: self.objective(network(changed), target).sum(), pixels, start, eps,
                      self.bound.step, self.steps, self.direction())

    def objective(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What grows, of each picture."""
        return F.cross_entropy(logits, target, reduction='none')

    def direction(self):
        """From a gradient to a direction, made anew for each batch."""
        return torch.sign

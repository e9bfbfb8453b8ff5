"""Adversarial training (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018)."""
import torch

from nbn_timm.adversarial.adversarial import AdversarialTraining, Loss, Network, register_adversarial


@register_adversarial('pgd')
class PGDTraining(AdversarialTraining):
    """The loss of the attacked pictures, L(z', y)."""

    usual_start = 'uniform'

    def loss(
            self, network: Network, loss: Loss, images: torch.Tensor, attacked: torch.Tensor, target: torch.Tensor,
    ) -> torch.Tensor:
        return loss(network(attacked), target)

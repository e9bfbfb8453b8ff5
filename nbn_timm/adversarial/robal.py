"""RoBal: Wu et al., "Adversarial Robustness under Long-Tailed Distribution", CVPR 2021."""
import torch

from nbn_timm.adversarial.adversarial import AdversarialTraining, Loss, Network, register_adversarial


@register_adversarial('robal')
class RoBalTraining(AdversarialTraining):
    """L(z', y) + weight KL(p || p'): the loss of the attacked picture, and TRADES's comparison with the picture.

    It is `add_reg_train` with `reg_opt: trades` of the authors' code (wutong16/Adversarial_Long-Tail, commit ab2f3a7),
    whose files have the weight 6, and 3 for RoBal-N on CIFAR-100. There the classifier gives cosines, and the loss
    multiplies them by 10; attack and comparison see them without that factor. With a head of this package, which
    multiplies by itself, that is the temperature 10. Their attack begins between 0 and +eps. The loss with their
    margins is `robal`, the head `cosplus`. Their code passes either batch twice through BatchNorm, attacked, plain,
    plain, attacked; here each passes once, so the running statistics follow more slowly and have the same halves.
    """

    usual_start = 'positive'
    usual_weight = 6.0

    def loss(
            self, network: Network, loss: Loss, images: torch.Tensor, attacked: torch.Tensor, target: torch.Tensor,
    ) -> torch.Tensor:
        of_attacked = network(attacked)
        picture = network(images)
        return loss(of_attacked, target) + self.weight * self.divergence(of_attacked, picture)

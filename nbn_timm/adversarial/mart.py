"""MART: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020."""
import torch
import torch.nn.functional as F

from nbn_timm.adversarial.adversarial import AdversarialTraining, Loss, Network, register_adversarial
from nbn_timm.attacks import agreement


@register_adversarial('mart')
class Mart(AdversarialTraining):
    """L(z', y) - log(1 - max over k != y of p'_k) + weight KL(p || p') (1 - p_y).

    Eq. 11 of the paper with the loss of the run in the place of cross-entropy, and with the constants of the authors'
    code (YisenWang/MART, commit 2d83e17), that keep logarithms finite. The weight, lambda, is 5 in the paper's CIFAR-10
    tables for ResNet-18 and 6 in the code.
    """

    usual_start = 'gaussian'
    usual_weight = 6.0

    def loss(
            self, network: Network, loss: Loss, images: torch.Tensor, attacked: torch.Tensor, target: torch.Tensor,
    ) -> torch.Tensor:
        picture = network(images)
        of_attacked = network(attacked)
        logits = self.logits_of(of_attacked)
        others = logits.softmax(dim=1).masked_fill(F.one_hot(target, logits.shape[1]).bool(), 0)
        boost = -torch.log(1.0001 - others.amax(dim=1) + 1e-12).mean()
        by_picture = self.logits_of(picture)
        of_label = by_picture.softmax(dim=1).gather(1, target[:, None])[:, 0]
        compared = (agreement(logits, by_picture) * (1.0000001 - of_label)).mean()
        return loss(of_attacked, target) + boost + self.weight * compared

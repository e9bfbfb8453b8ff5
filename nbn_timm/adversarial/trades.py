"""TRADES (Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, eq. 5)."""
import torch
import torch.nn.functional as F

from nbn_timm.adversarial.adversarial import AdversarialTraining, Loss, Network, register_adversarial


@register_adversarial('trades')
class Trades(AdversarialTraining):
    """L(z, y) + weight KL(p || p'), with z of the picture and p' of the attacked one, which is to differ most.

    The weight is the paper's 1 / lambda, 6 in its tables (yaodongyu/TRADES, commit 6e8e11b). The attack climbs the
    same divergence. BatchNorm counts the picture twice, as in that code.
    """

    usual_start = 'gaussian'
    usual_weight = 6.0
    sees_picture = True

    def objective(
            self, logits: torch.Tensor, target: torch.Tensor, of_picture: torch.Tensor | None,
    ) -> torch.Tensor:
        assert of_picture is not None
        return F.kl_div(logits.log_softmax(dim=1), of_picture.softmax(dim=1), reduction='sum')

    def loss(
            self, network: Network, loss: Loss, images: torch.Tensor, attacked: torch.Tensor, target: torch.Tensor,
    ) -> torch.Tensor:
        picture = network(images)
        of_attacked = network(attacked)
        with torch.no_grad():
            network(images)
        return loss(picture, target) + self.weight * self.divergence(of_attacked, picture)

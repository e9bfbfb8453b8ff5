"""Influence-balanced loss (Park et al., "Influence-Balanced Loss for Imbalanced Visual Classification", ICCV 2021)."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import as_distribution
from nbn_timm.losses.weights import class_weights

_EPS = 1e-3  # of the authors' code


@register_loss('influence_balanced', features=True, balances=True)
class InfluenceBalanced(nn.Module):
    """Mean over the images of w_y CE(z, y) alpha / (|h|_1 |p - y|_1 + 1e-3), with p the softmax and h the features.

    The L1 norms of the features h that the classifier sees and of p - y are those of the gradient of the classifier's
    weights, so that images that would move the classifier most are held back. As in the authors' code
    (pseulki/IB-Loss) the gradient flows through this factor too; `detach_factor=True` makes it a plain weight. It is
    meant for the last epochs (`start_epoch=100` of 200, at a hundredth of the learning rate).

    Called as `loss((logits [B, C], features [B, D]), target)`. Soft targets take the place of y, and their weight is
    the mean w of their labels within the cross-entropy.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        alpha: Factor of the loss, whose size the norms make small.
        weighting: Of w, which has mean 1 over the classes: 'inverse' or 'effective_number', see `class_weights`; None
            leaves it out.
        detach_factor: Do not let the gradient flow through the factor.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    class_weights: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            alpha: float = 1000.0,
            weighting: str | None = 'inverse',
            detach_factor: bool = False,
    ) -> None:
        super().__init__()
        name = 'influence_balanced'
        counts = require_counts(class_counts, name)
        self.alpha = check_number(name, 'alpha', alpha, above=True)
        self.detach_factor = detach_factor
        weights = torch.ones(counts.num_classes) if weighting is None else class_weights(counts, name, weighting)
        self.register_buffer('class_weights', weights.float(), persistent=False)

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        logits, features = (part.float() for part in output)
        labels = as_distribution(target, logits.shape[1])
        influence = features.abs().sum(dim=1) * (logits.softmax(dim=1) - labels).abs().sum(dim=1)
        if self.detach_factor:
            influence = influence.detach()
        losses = -(labels * self.class_weights * F.log_softmax(logits, dim=1)).sum(dim=1)
        return (losses * self.alpha / (influence + _EPS)).mean()

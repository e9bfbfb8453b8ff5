"""Class-balanced binary cross-entropy of softmax probabilities, the loss of weight balancing (Alshammari et al.,
"Long-Tailed Recognition via Weight Balancing", CVPR 2022).
"""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.margins import log_sum_of_others
from nbn_timm.losses.targets import as_distribution
from nbn_timm.losses.weights import effective_number_weights


@register_loss('class_balanced_bce', balances=True)
class ClassBalancedBCE(nn.Module):
    """Mean over images and classes of -w_y [log p_y, or log(1 - p_c) of the others], with p the softmax of the logits.

    Source: the authors' code (ShadeAlsha/LTR-weight-balancing, commit e89f292), which calls it 'softmax' among the
    class-balanced losses of Cui et al. Soft targets mix the losses of their classes.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        beta: Of the weights, inverse effective numbers with mean 1, see `effective_number_weights`.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    class_weights: torch.Tensor

    def __init__(self, class_counts: ClassCounts | None, beta: float = 0.9999) -> None:
        super().__init__()
        weights = effective_number_weights(require_counts(class_counts, 'class_balanced_bce'), beta)
        self.register_buffer('class_weights', weights.float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        is_class = F.log_softmax(logits, dim=1)
        is_other = log_sum_of_others(logits) - logits.logsumexp(dim=1, keepdim=True)  # log(1 - p)
        of_label = is_class + is_other.sum(dim=1, keepdim=True) - is_other  # for each class as the label
        weighted = as_distribution(target, logits.shape[1]) * self.class_weights
        return -(weighted * of_label).sum() / logits.numel()

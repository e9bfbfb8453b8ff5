"""Logit-adjusted cross-entropy (Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, eq. 10)."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.prior import log_prior


@register_loss('logit_adjusted', balances=True)
class LogitAdjusted(nn.Module):
    """Cross-entropy of `z + tau log prior`; the plain `z` are used at test time. With tau 1 it is balanced softmax.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        tau: Strength of the prior; 0 is plain cross-entropy.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    shift: torch.Tensor

    def __init__(self, class_counts: ClassCounts | None, tau: float = 1.0, smoothing: float = 0.0) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'logit_adjusted')
        check_number('logit_adjusted', 'tau', tau)
        self.smoothing = check_number('logit_adjusted', 'smoothing', smoothing, high=1)
        self.register_buffer('shift', (tau * log_prior(counts)).float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float() + self.shift, target, label_smoothing=self.smoothing)

"""Balanced softmax (Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. 3)."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts


@register_loss('balanced_softmax', balances=True)
class BalancedSoftmax(nn.Module):
    """Cross-entropy of `z + log n`, with `n` the training images per class; the plain `z` are used at test time.

    Soft targets meet the same shifted logits. A class without training images counts as having one: log 0 would make
    the loss infinite as soon as a soft or smoothed target puts mass on it.

    Args:
        class_counts: Training images per class.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts, or `smoothing` is out of range.
    """

    log_counts: torch.Tensor

    def __init__(self, class_counts: ClassCounts | None, smoothing: float = 0.0) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'balanced_softmax')
        self.smoothing = check_number('balanced_softmax', 'smoothing', smoothing, high=1)
        self.register_buffer('log_counts', counts.tensor().clamp(min=1).log().float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float() + self.log_counts, target, label_smoothing=self.smoothing)

"""Softmax cross-entropy."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss


@register_loss('cross_entropy', deferrable=False)
class CrossEntropy(nn.Module):
    """Softmax cross-entropy in float32, with label smoothing.

    Args:
        class_counts: Not used; every loss takes it first.
        smoothing: Share of each target that is spread evenly over all classes, in [0, 1].

    Raises:
        InputError: `smoothing` is out of range.
    """

    def __init__(self, class_counts: ClassCounts | None = None, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = check_number('cross_entropy', 'smoothing', smoothing, high=1)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.smoothing)

"""Balanced softmax of each expert, as SHIKE's second stage has it.

Source: Jin et al., "Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation", CVPR
2023, and its code (jinyan-06/SHIKE, commit 2b04b62).
"""
import torch

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.balanced_softmax import BalancedSoftmax
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.shifts import shifted_cross_entropy


@register_loss('expert_balanced_softmax', experts=True, balances=True)
class ExpertBalancedSoftmax(BalancedSoftmax):
    """Σ over experts of CE(z_e + log n, y), for the logits of each expert [B, E, C].

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts.
    """

    def __init__(self, class_counts: ClassCounts | None, smoothing: float = 0.0) -> None:
        super().__init__(require_counts(class_counts, 'expert_balanced_softmax'), smoothing)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        num_experts = logits.shape[1]
        return num_experts * shifted_cross_entropy(logits, target, [self.log_counts] * num_experts, self.smoothing)

"""Softmax equalization loss (Tan et al., "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020, section on
image classification).
"""
import torch
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import refuse_soft_targets


@register_loss('seql', soft_targets=False)
class SEQL(nn.Module):
    """Cross-entropy in which rare classes are mostly left out of the softmax of other classes' images.

    The loss is -log(exp z_y / sum of w_k exp z_k) with `w_k = 1 - beta [prior_k < threshold] [k != y]`, where beta is
    1 with probability `gamma` and else 0, drawn anew for every image and class: a rare class is pushed down by the
    images of others only now and then. The draws come from torch's generator, which is seeded for every epoch.

    Args:
        class_counts: Training images per class.
        gamma: Probability that a rare class is left out; 0 is plain cross-entropy.
        threshold: Share of the training images below which a class is rare, the paper's lambda.

    Raises:
        InputError: No class counts, a setting out of range, or soft targets in training.
    """

    rare: torch.Tensor

    def __init__(self, class_counts: ClassCounts | None, gamma: float = 0.9, threshold: float = 0.005) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'seql')
        self.gamma = check_number('seql', 'gamma', gamma, high=1)
        check_number('seql', 'threshold', threshold, high=1)
        self.register_buffer('rare', counts.prior() < threshold, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'seql', 'leaves out classes beside the label, and mixed targets have several')
        logits = logits.float()
        left_out = self.rare & (torch.rand_like(logits) < self.gamma)
        left_out = left_out.scatter(1, target[:, None], False)
        denominator = logits.masked_fill(left_out, -torch.inf).logsumexp(dim=1)
        return (denominator - logits.gather(1, target[:, None]).squeeze(1)).mean()

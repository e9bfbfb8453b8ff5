"""Hard category mining, HCM (Li et al., "Nested Collaborative Learning for Long-Tailed Visual Recognition" (NCL), CVPR
2022).
"""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_choice, check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import refuse_soft_targets

EASY = ('excluded', 'zeroed')


@register_loss('hcm', soft_targets=False, balances=True)
class HCM(nn.Module):
    """Balanced softmax over all classes plus `hard_weight` times balanced softmax over each image's hard classes.

    Hard are the label and the other classes with the highest logits z, int(share * C) together. The logits of the
    second softmax are z + log n, and what becomes of those of easy classes is `easy`:

    - 'excluded' (default): they take no part, as in the paper;
    - 'zeroed': they are set to 0, as in the authors' code (Bazinga699/NCL, and `HCMLoss` in yuxiangbao/NBN), where they
      go on competing with exp(0) each.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        share: Of all classes that are hard; 0.3 is 300 of 1000 and 30 of 100, as in NCL.
        hard_weight: Of the second softmax.
        easy: 'excluded' or 'zeroed'.

    Raises:
        InputError: No class counts, a setting out of range, or soft targets in training.
    """

    log_counts: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            share: float = 0.3,
            hard_weight: float = 1.0,
            easy: str = 'excluded',
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'hcm')
        check_number('hcm', 'share', share, high=1, above=True)
        self.num_hard = max(2, int(share * counts.num_classes + 1e-6))  # a softmax over the label alone is constant
        self.hard_weight = check_number('hcm', 'hard_weight', hard_weight)
        self.easy = check_choice('hcm', 'easy', easy, EASY)
        self.register_buffer('log_counts', counts.tensor().clamp(min=1).log().float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'hcm', 'mines hard classes beside the label, and mixed targets have several')
        logits = logits.float()
        adjusted = logits + self.log_counts
        hard = self.hard_classes(logits, target)
        partial = adjusted.masked_fill(~hard, 0.0 if self.easy == 'zeroed' else -torch.inf)
        return F.cross_entropy(adjusted, target) + self.hard_weight * F.cross_entropy(partial, target)

    def hard_classes(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The label and the other classes with the highest logits, bool [B, C]."""
        ranked = logits.detach().scatter(1, target[:, None], torch.inf)
        highest = ranked.topk(min(self.num_hard, logits.shape[1]), dim=1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, highest, True)

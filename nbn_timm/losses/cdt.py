"""Class-dependent temperatures (Ye et al., "Identifying and Compensating for Feature Deviation in Imbalanced Deep
Learning", arXiv 2001.01385).
"""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts


@register_loss('cdt')
class CDT(nn.Module):
    """Cross-entropy of `z_c / a_c` with a_c = (n_max / n_c) ** gamma; the plain `z` are used at test time.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        gamma: The authors search 0 to 0.4 for CIFAR-10-LT, 0 to 0.2 for CIFAR-100-LT and 0 to 0.1 for iNaturalist;
            0 is plain cross-entropy.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    temperatures: torch.Tensor

    def __init__(self, class_counts: ClassCounts | None, gamma: float = 0.2, smoothing: float = 0.0) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'cdt').tensor().clamp(min=1)
        check_number('cdt', 'gamma', gamma)
        self.smoothing = check_number('cdt', 'smoothing', smoothing, high=1)
        self.register_buffer('temperatures', ((counts.max() / counts) ** gamma).float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float() / self.temperatures, target, label_smoothing=self.smoothing)

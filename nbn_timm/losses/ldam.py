"""LDAM (Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019)."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.class_counts import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses.registry import register_loss, require_counts


def ldam_margins(class_counts: ClassCounts, max_margin: float = 0.5) -> torch.Tensor:
    """Margin of each class, proportional to n ** (-1/4), the rarest class's being `max_margin`; float64 [C] (eq. 13).

    A class without training images counts as having one.
    """
    margins = class_counts.tensor().clamp(min=1) ** -0.25
    return margins * (max_margin / margins.max())


def subtract_margin(logits: torch.Tensor, target: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Logits [B, C] whose entry of the target class [B] is lowered by that class's margin."""
    return logits - F.one_hot(target, logits.shape[1]) * margins


@register_loss('ldam', soft_targets=False)
class LDAM(nn.Module):
    """Cross-entropy of logits whose target entry is lowered by `scale` times the class's margin.

    Where the scale stands: the paper's loss is CE(s (cos - m_y)), with the cosines of a normalised classifier. The
    cosine heads of this package give s cos, so that s multiplies the margin alone here: CE(z - s m_y). It must be the
    head's (30). With a linear head the margin is the same number of logit units.

    Args:
        class_counts: Training images per class.
        max_margin: Of the rarest class, as a difference of cosines.
        scale: s.

    Raises:
        InputError: No class counts, or soft targets in training.
    """

    margins: torch.Tensor

    def __init__(self, class_counts: ClassCounts | None, max_margin: float = 0.5, scale: float = 30.0) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'ldam')
        self.register_buffer('margins', (scale * ldam_margins(counts, max_margin)).float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'ldam')
        return F.cross_entropy(subtract_margin(logits.float(), target, self.margins), target)


def refuse_soft_targets(target: torch.Tensor, loss: str) -> None:
    """Stop before a margin is taken from a mixture of classes, for which it is not defined."""
    if target.is_floating_point():
        raise InputError(f"loss '{loss}' has margins per class, which mixed targets have not: leave out --mixup and "
                         '--cutmix')

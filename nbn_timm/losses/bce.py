"""Binary cross-entropy of every class by itself, the plain loss of label sets."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.loss import register_loss
from nbn_timm.losses.targets import as_members


@register_loss('bce', deferrable=False, label_sets=True)
class BCE(nn.Module):
    """Mean over images and classes of -log sigmoid(z_c) where the image is of class c, else of -log sigmoid(-z_c).

    A label is a set of one.

    Args:
        class_counts: Not used; every loss takes it first.
    """

    def __init__(self, class_counts: ClassCounts | None = None) -> None:
        super().__init__()

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            return F.binary_cross_entropy_with_logits(logits.float(), as_members(target, logits.shape[1]))

"""BBN's cumulative learning (Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed
Visual Recognition", CVPR 2020): attention moves from the data as they are to the rare classes.
"""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_whole
from nbn_timm.losses.loss import register_loss
from nbn_timm.losses.targets import refuse_soft_targets


@register_loss('bbn', streams=True, soft_targets=False)
class BBN(nn.Module):
    """a CE(z, y_0) + (1 - a) CE(z, y_1) with z = a z_0 + (1 - a) z_1 and a = 1 - (epoch / epochs)^2 (epoch from 0).

    z_0 and z_1 are the logits of the two branches, each for an image of its own stream, and y_0 and y_1 the labels of
    these. With z_e = 2 W_e f_e + b, as `resnet32_bbn` gives them, z is the classifier's output for the features
    2 [a f_0, (1 - a) f_1], as in the authors' code (Megvii-Nanjing/BBN, commit 7992e90).

    Args:
        class_counts: Not used; every loss takes it first.
        epochs: In which a falls from 1 to 0; the authors have those of the run, but 100 for 90 epochs and 200 for 180.

    Raises:
        InputError: A setting out of range, or soft targets in training.
    """

    def __init__(self, class_counts: ClassCounts | None = None, epochs: int = 200) -> None:
        super().__init__()
        self.epochs = check_whole('bbn', 'epochs', epochs)
        self.share = 1.0

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based)."""
        self.share = 1 - min(epoch / self.epochs, 1) ** 2

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [B, 2, C] and labels [B, 2], or [B] where both branches saw the same images, to the mean loss."""
        refuse_soft_targets(target, 'bbn')
        first, second = logits.float().unbind(dim=1)
        labels, other_labels = target.unbind(dim=1) if target.ndim > 1 else (target, target)
        mixed = self.share * first + (1 - self.share) * second
        return self.share * F.cross_entropy(mixed, labels) + (1 - self.share) * F.cross_entropy(mixed, other_labels)

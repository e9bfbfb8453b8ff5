"""MDCS (Zhao et al., "MDCS: More Diverse Experts with Consistency Self-distillation for Long-tailed Recognition",
ICCV 2023).
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import refuse_soft_targets

_EPS = 1e-9  # of the authors' code, which matters where n to the power is small


@register_loss('mdcs', experts=True, views=2, soft_targets=False, balances=True)
class MDCS(nn.Module):
    """Diverse experts that learn from themselves, for the logits of each on two views of an image [2, B, E, C].

    With the adjusted logits a_e = z_e + log(n ** power_e + 1e-9), the first view weakly augmented and the second
    strongly, the loss is the sum over the experts of

        CE(a_e, y) over both views + weight ramp KL(softmax of a_e on the first view || softmax of a_e on the second),

    where the divergence is the mean over the images that the expert has right on the first view, whose softmax is a
    constant; without such an image it is 0. The ramp goes from 1 / warmup_epochs in the first epoch to 1. Source: the
    authors' code (fistyee/MDCS, commit 1a1d54e).

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        powers: One for each expert: below 0 for frequent classes, above 1 for rare ones.
        weight: Of the divergence.
        warmup_epochs: In which its weight rises evenly.

    Raises:
        InputError: No class counts, a setting out of range, or, in training, another number of experts or soft targets.
    """

    shifts: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            powers: Sequence[float] = (-0.5, 1.0, 2.5),
            weight: float = 0.6,
            warmup_epochs: int = 20,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'mdcs').tensor().clamp(min=1)
        if isinstance(powers, str) or not isinstance(powers, Sequence) or not powers:
            raise InputError(f"loss 'mdcs' has powers={powers!r}: give one number for each expert, such as "
                             'powers=[-0.5,1,2.5]')
        for power in powers:
            check_number('mdcs', 'powers', power, low=-10, high=10)
        self.weight = check_number('mdcs', 'weight', weight)
        self.warmup_epochs = check_number('mdcs', 'warmup_epochs', warmup_epochs, low=1)
        self.epoch = 0
        shifts = torch.stack([(counts ** power + _EPS).log() for power in powers])
        self.register_buffer('shifts', shifts.float(), persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based)."""
        self.epoch = epoch

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'mdcs', 'asks which images are right, and mixed targets have several labels')
        num_experts = len(self.shifts)
        if logits.shape[2] != num_experts:
            raise InputError(f"loss 'mdcs' has {num_experts} powers, and the network {logits.shape[2]} experts: give "
                             'one for each expert')
        log_probabilities = F.log_softmax(logits.float() + self.shifts, dim=3)
        labels = target[None, :, None].expand(2, -1, num_experts)
        base = F.nll_loss(log_probabilities.flatten(0, 2), labels.flatten()) * num_experts
        weak, strong = log_probabilities[0].detach(), log_probabilities[1]
        right = weak.argmax(dim=2) == target[:, None]
        divergences = F.kl_div(strong, weak, reduction='none', log_target=True).sum(dim=2) * right
        distillation = (divergences.sum(dim=0) / right.sum(dim=0).clamp(min=1)).sum()
        return base + self.weight * min((self.epoch + 1) / self.warmup_epochs, 1.0) * distillation

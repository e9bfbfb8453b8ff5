"""Asymmetric loss (Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021); timm has it."""
import torch
from timm.loss import AsymmetricLossMultiLabel
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_choice, check_number
from nbn_timm.losses.loss import register_loss
from nbn_timm.losses.targets import as_members, refuse_soft_targets

REDUCTIONS = ('batchmean', 'sum', 'mean')


@register_loss('asymmetric', soft_targets=False, deferrable=False, label_sets=True)
class Asymmetric(nn.Module):
    """Binary cross-entropy in which easy negatives count less than easy positives.

    Of a class that the image is of, with p = sigmoid(z): -(1 - p) ** gamma_pos * log p. Of another, with
    p_m = max(p - clip, 0): -p_m ** gamma_neg * log(1 - p_m). A label is a set of one. Computed by timm's
    `AsymmetricLossMultiLabel`.

    Args:
        class_counts: Not used; every loss takes it first.
        gamma_neg: Exponent of negatives.
        gamma_pos: Exponent of positives.
        clip: A negative of at most this probability counts nothing.
        reduction: 'batchmean' sums over the classes and takes the mean over the images, 'sum' sums over both as the
            released code does, 'mean' takes the mean over both.
        detach_factor: No gradient through the factors with the exponents, as in the released training.

    Raises:
        InputError: A setting is out of range.
    """

    def __init__(
            self,
            class_counts: ClassCounts | None = None,
            gamma_neg: float = 4.0,
            gamma_pos: float = 1.0,
            clip: float = 0.05,
            reduction: str = REDUCTIONS[0],
            detach_factor: bool = False,
    ) -> None:
        super().__init__()
        self.loss = AsymmetricLossMultiLabel(
            check_number('asymmetric', 'gamma_neg', gamma_neg), check_number('asymmetric', 'gamma_pos', gamma_pos),
            check_number('asymmetric', 'clip', clip, high=1, below=True), disable_torch_grad_focal_loss=detach_factor,
            reduction=check_choice('asymmetric', 'reduction', reduction, REDUCTIONS))

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'asymmetric', 'is defined for whole classes, and mixed targets have parts of them')
        with torch.autocast(logits.device.type, enabled=False):
            return self.loss(logits, as_members(target, logits.shape[1]))

"""LADE (Hong et al., "Disentangling Label Distribution for Long-tailed Visual Recognition", CVPR 2021)."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import refuse_soft_targets


@register_loss('lade', soft_targets=False, balances=True)
class LADE(nn.Module):
    """Balanced softmax plus `weight` times a regulariser that makes z_c the log-ratio log(p(x|c) / p(x)).

    For each class the regularised Donsker-Varadhan bound of a batch of B images is

        mean of z_c over the images of class c - D_c - regularisation * D_c ** 2,
        D_c = log of the mean over the batch of exp(z_c - log prior_c - log C),

    and the regulariser is minus its mean over the classes, weighted by the prior. Source: the authors' code
    (hyperconnect/LADE), `PriorCELoss` and `LADELoss`. As there, a class without an image in the batch has 0 for its
    first mean. The statistics are of one process and step, so that small batches make them noisy.

    Args:
        class_counts: Training images per class; a class without any counts as having one in the softmax, and has no
            part in the regulariser.
        weight: Of the regulariser.
        regularisation: Of the bound, the authors' `remine_lambda`.

    Raises:
        InputError: No class counts, a setting out of range, or soft targets in training.
    """

    log_counts: torch.Tensor
    prior: torch.Tensor
    shift: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            weight: float = 0.1,
            regularisation: float = 0.1,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'lade')
        self.weight = check_number('lade', 'weight', weight)
        self.regularisation = check_number('lade', 'regularisation', regularisation)
        at_least_one = counts.tensor().clamp(min=1)
        shift = -(at_least_one / counts.total).log() - math.log(counts.num_classes)
        for name, value in (('log_counts', at_least_one.log()), ('prior', counts.prior()), ('shift', shift)):
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'lade', 'averages over the images of a class, and mixed images are of several')
        logits = logits.float()
        return F.cross_entropy(logits + self.log_counts, target) + self.weight * self.regulariser(logits, target)

    def regulariser(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Minus the bound, from float32 logits [B, C] and labels [B]."""
        of_class = F.one_hot(target, logits.shape[1])
        own_mean = (logits * of_class).sum(dim=0) / of_class.sum(dim=0).clamp(min=1)
        log_mean = (logits + self.shift).logsumexp(dim=0) - math.log(len(logits))
        bound = own_mean - log_mean - self.regularisation * log_mean ** 2
        return -(self.prior * bound).sum()

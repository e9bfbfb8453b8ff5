"""BalPoE (Aimar et al., "Balanced Product of Calibrated Experts for Long-Tailed Recognition", CVPR 2023)."""
from collections.abc import Sequence

import torch
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.prior import log_prior
from nbn_timm.losses.shifts import shifted_cross_entropy


@register_loss('balpoe', experts=True, balances=True)
class BalPoE(nn.Module):
    """Mean over experts of the cross-entropy of `z_e + tau_e log prior`, for the logits of each expert [B, E, C].

    Each expert learns for another class distribution: tau 0 for that of training, 1 for a uniform one, 2 for the
    reversed one. The mean of the plain logits is unbiased on a uniform test set if the mean of all tau is 1. As in the
    authors' code (emasa/BalPoE-CalibratedLT, commit ca607ae) 1e-9 is added to the prior, and the mean over the experts
    is taken where RIDE has their sum.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        tau: One for each expert; None spreads them evenly from 0 to 2, for three experts 0, 1 and 2.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts, a setting out of range, or, in training, another number of experts.
    """

    log_prior: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            tau: Sequence[float] | None = None,
            smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'balpoe')
        if tau is not None and (isinstance(tau, str) or not isinstance(tau, Sequence) or not tau):
            raise InputError(f"loss 'balpoe' has tau={tau!r}: give one number for each expert, such as tau=[0,1,2]")
        self.tau = None if tau is None else [check_number('balpoe', 'tau', value) for value in tau]
        self.smoothing = check_number('balpoe', 'smoothing', smoothing, high=1)
        self.register_buffer('log_prior', log_prior(counts, epsilon=1e-9).float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        num_experts = logits.shape[1]
        tau = self.tau or _spread(num_experts)
        if len(tau) != num_experts:
            raise InputError(f"loss 'balpoe' has {len(tau)} numbers for tau, and the network {num_experts} experts: "
                             'give one for each, or leave tau out')
        return shifted_cross_entropy(logits, target, [value * self.log_prior for value in tau], self.smoothing)


def _spread(num_experts: int) -> list[float]:
    """Numbers from 0 to 2 at even distances, whose mean is 1."""
    return [2 * expert / (num_experts - 1) for expert in range(num_experts)] if num_experts > 1 else [1.0]

"""Vector-scaling loss, VS (Kini et al., "Label-Imbalanced and Group-Sensitive Classification under
Overparameterization", NeurIPS 2021).
"""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.prior import log_prior


@register_loss('vs', balances=True)
class VS(nn.Module):
    """Cross-entropy of `z_c / D_c + tau log prior_c` with D_c = (n_max / n_c) ** gamma; plain `z` at test time.

    It joins class-dependent temperatures (tau 0, `cdt`) and logit adjustment (gamma 0, `logit_adjusted`).

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        gamma: Exponent of the temperatures; this default and the next are those of the authors' code
            (orparask/VS-Loss).
        tau: Strength of the prior.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    temperatures: torch.Tensor
    shift: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            gamma: float = 0.3,
            tau: float = 1.0,
            smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'vs')
        check_number('vs', 'gamma', gamma)
        check_number('vs', 'tau', tau)
        self.smoothing = check_number('vs', 'smoothing', smoothing, high=1)
        at_least_one = counts.tensor().clamp(min=1)
        self.register_buffer('temperatures', ((at_least_one.max() / at_least_one) ** gamma).float(), persistent=False)
        self.register_buffer('shift', (tau * log_prior(counts)).float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float() / self.temperatures + self.shift, target, label_smoothing=self.smoothing)

"""SADE (Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition",
NeurIPS 2022).
"""
import torch
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.prior import log_prior
from nbn_timm.losses.shifts import shifted_cross_entropy


@register_loss('sade', experts=True, balances=True)
class SADE(nn.Module):
    """Sum of three experts' losses, for the logits of each expert [B, 3, C], one for each kind of test distribution:

        CE(z_0, y) + CE(z_1 + log prior, y) + CE(z_2 + log prior - tau log reversed prior, y).

    The reversed prior has the same shares in the opposite order of the classes, the most frequent class the smallest.
    Of classes with equally many images the later label counts as the rarer, so that the reversed prior of classes in
    the order of their frequency is the prior from behind; the authors' code (Vanint/SADE-AgnosticLT, commit cba11b8)
    leaves ties to torch's sort. As there, 1e-9 is added to both.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        tau: Strength of the reversed prior.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts, a setting out of range, or, in training, a network of other than three experts.
    """

    shifts: torch.Tensor

    def __init__(self, class_counts: ClassCounts | None, tau: float = 2.0, smoothing: float = 0.0) -> None:
        super().__init__()
        prior = log_prior(require_counts(class_counts, 'sade'), epsilon=1e-9)
        check_number('sade', 'tau', tau)
        self.smoothing = check_number('sade', 'smoothing', smoothing, high=1)
        shifts = torch.stack([torch.zeros_like(prior), prior, prior - tau * reversed_order(prior)])
        self.register_buffer('shifts', shifts.float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] != 3:
            raise InputError(f"loss 'sade' is for three experts, and the network has {logits.shape[1]}: give "
                             '--model-kwargs num_experts=3')
        return 3 * shifted_cross_entropy(logits, target, self.shifts.unbind(), self.smoothing)


def reversed_order(values: torch.Tensor) -> torch.Tensor:
    """The same numbers [C], of which the r-th largest is where the r-th smallest was; see `SADE` for equal ones."""
    ascending, order = values.flip(0).sort(stable=True)
    return torch.empty_like(values).scatter(0, len(values) - 1 - order, ascending.flip(0))

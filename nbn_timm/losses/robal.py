"""RoBal's margins (Wu et al., "Adversarial Robustness under Long-Tailed Distribution", CVPR 2021)."""
import torch
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.layers.head import COSINE_SCALE
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.margins import margin_cross_entropy


@register_loss('robal', balances=True)
class RoBal(nn.Module):
    """Cross-entropy with a uniform margin, a margin that grows with the class, and a bias of the prior.

    Where the scale stands: the authors' loss (`MultiMarginLoss` in wutong16/Adversarial_Long-Tail) is

        CE(s (cos - m_y) + tau_b log prior),  m_y = margin + tau_m log(n_y / n_min) / s,

    with m_y taken from the label's cosine alone. The cosine heads of this package give z = s cos, so that s multiplies
    the uniform margin alone here: the label's logit is lowered by s margin + tau_m log(n_y / n_min). It must be the
    head's: 30 for `head=cosine`, 10, the authors', for their own classifier, `head=cosplus`. With both tau 0 it is the
    uniform margin of CosFace, their `UniMarginLoss`. Soft targets mix the losses of their classes, see
    `margin_cross_entropy`.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        margin: Of every class, as a difference of cosines.
        scale: s.
        tau_b: Strength of the prior, as in `logit_adjusted`.
        tau_m: Strength of the class-aware margin, in logits.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    margins: torch.Tensor
    shift: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            margin: float = 0.1,
            scale: float = COSINE_SCALE,
            tau_b: float = 1.5,
            tau_m: float = 0.3,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'robal').tensor().clamp(min=1)
        for setting, value in (('margin', margin), ('tau_b', tau_b), ('tau_m', tau_m)):
            check_number('robal', setting, value)
        check_number('robal', 'scale', scale, above=True)
        margins = scale * margin + tau_m * (counts / counts.min()).log()
        self.register_buffer('margins', margins.float(), persistent=False)
        self.register_buffer('shift', (tau_b * (counts / counts.sum()).log()).float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return margin_cross_entropy(logits.float() + self.shift, target, self.margins)

"""Gaussian clouded logits, GCL (Li et al., "Long-tailed Visual Recognition via Gaussian Clouded Logit Adjustment", CVPR
2022).
"""
import torch
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.margins import margin_losses
from nbn_timm.losses.targets import as_distribution


@register_loss('gcl')
class GCL(nn.Module):
    """Cross-entropy of cosines that a class loses the more of, at random, the rarer it is.

    For cosines x the logits of the loss are s (x_c - noise |e_c| d_c), the label's lower by s margin as well, with

        d_c = log(n_max / n_c) / log(n_max / n_min),

    0 for the largest and 1 for the smallest class, and e_c normal with standard deviation 1/3, kept in [-1, 1], anew
    for every image and class. The value of an image is multiplied by (1 - p_y) ** gamma, through which no gradient
    goes. The cosine heads of this package give `scale` x; s is the same unless `loss_scale` says otherwise. The authors
    (Keke921/GCLLoss, commit c2a6233) train the network with the defaults, and then its classifier with margin 0.1,
    loss_scale 20 and gamma 1.

    Soft targets mix the losses of their classes, all with the same e.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        noise: Greatest loss of the smallest class, as a difference of cosines.
        margin: Of every class, as a difference of cosines.
        gamma: Exponent of the focal factor.
        scale: Of the cosine head.
        loss_scale: s; None is `scale`.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    rarity: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            noise: float = 0.5,
            margin: float = 0.0,
            gamma: float = 0.0,
            scale: float = 30.0,
            loss_scale: float | None = None,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'gcl').tensor().clamp(min=1)
        self.noise = check_number('gcl', 'noise', noise)
        self.margin = check_number('gcl', 'margin', margin)
        self.gamma = check_number('gcl', 'gamma', gamma)
        self.scale = check_number('gcl', 'scale', scale, above=True)
        self.loss_scale = scale if loss_scale is None else check_number('gcl', 'loss_scale', loss_scale, above=True)
        distance = (counts.max() / counts).log()
        self.register_buffer('rarity', (distance / distance.max().clamp(min=1e-9)).float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        cosines = logits.float() / self.scale
        clouded = self.loss_scale * (cosines - self.noise * self.clouds(cosines) * self.rarity)
        losses = margin_losses(clouded, self.loss_scale * self.margin)
        if self.gamma:
            losses = (1 - torch.exp(-losses.detach())) ** self.gamma * losses
        return (as_distribution(target, logits.shape[1]) * losses).sum() / len(logits)

    def clouds(self, cosines: torch.Tensor) -> torch.Tensor:
        """|e| of every image and class, [B, C]."""
        return (torch.randn_like(cosines) / 3).abs().clamp(max=1)

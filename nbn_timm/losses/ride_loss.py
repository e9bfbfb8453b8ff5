"""RIDE's losses on experts: each expert's own loss, less a term for being different from the others.

Sources: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021, and its code
(frank-xwang/RIDE-LongTailRecognition, commit ab8be5c); the balanced-softmax form is that of the NBN release
(yuxiangbao/NBN, commit 7365e21). For expert logits z_e and their mean z,

    loss = sum over e of  base(z_e, y) - diversity * mean(T)^2 * KL(softmax(z / T) || softmax(z_e / T)),

where z is a constant in the second term and the divergence is the mean over the batch. Without diversity RIDE's code
takes the base loss of z, once for each expert; the NBN release keeps that of each z_e. Both are so here.
"""
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.layers.head import COSINE_SCALE
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.ldam import MAX_MARGIN, ldam_margins
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.margins import margin_cross_entropy
from nbn_timm.losses.weights import effective_number_weights

DIVERSITY = 0.2


class _RideLoss(nn.Module):
    """The sum over experts; a subclass gives the base loss.

    Args:
        name: Of the loss, for messages.
        diversity: Weight of the divergence.
        temperature: T of every class, until a subclass has one per class.

    Attributes:
        mean_alone: Without diversity the base loss is that of the mean logits.
    """

    mean_alone: ClassVar[bool] = True

    def __init__(self, name: str, diversity: float, temperature: float) -> None:
        super().__init__()
        check_number(name, 'temperature', temperature, above=True)
        self.diversity = check_number(name, 'diversity', diversity)
        self.base_temperature = temperature

    @abstractmethod
    def base_loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over the batch, from logits [B, C]."""

    def temperature(self, logits: torch.Tensor) -> torch.Tensor:
        """T of each class, [1] or [C]."""
        return logits.new_full((1,), self.base_temperature)

    def compared(self, logits: torch.Tensor) -> torch.Tensor:
        """Of what the divergence is taken, from logits [..., C]."""
        return logits

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        num_experts = logits.shape[1]
        mean = logits.mean(dim=1)
        if not self.diversity and self.mean_alone:
            return num_experts * self.base_loss(mean, target)
        # With equally many images for each, the mean over experts and images is the mean over experts of the means.
        every = logits.transpose(0, 1).flatten(0, 1)
        base = self.base_loss(every, target.repeat(num_experts, *[1] * (target.ndim - 1)))
        if not self.diversity:
            return num_experts * base
        temperature = self.temperature(logits)
        divergence = F.kl_div(
            F.log_softmax(self.compared(logits) / temperature, dim=2),
            F.log_softmax(self.compared(mean.detach()[:, None]) / temperature, dim=2).expand_as(logits),
            reduction='sum', log_target=True) / len(logits)
        return num_experts * base - self.diversity * temperature.mean() ** 2 * divergence


@register_loss('ride', experts=True, both_labels=True)
class Ride(_RideLoss):
    """RIDE's loss with LDAM as each expert's base loss, for the logits of each expert [B, E, C].

    After `reweight_epoch` the base loss is weighted by effective numbers (beta 0.9999) and T becomes distribution
    aware: T = v / max(v), with v = C * prior * reweight_factor + 1 - reweight_factor.

    Args:
        class_counts: Training images per class.
        diversity: Weight of the divergence; RIDE's CIFAR recipe has 0.45.
        reweight_epoch: Number of epochs (as in RIDE, of which the first is 1) before the weights come; None never.
        reweight_factor: How much T depends on the class; RIDE has 0.02 for ImageNet-LT, 0.015 for iNaturalist.
        max_margin, scale: Of LDAM, see `LDAM`: the scale is that of a cosine head.
        temperature: Factor of T.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    margins: torch.Tensor
    class_weights: torch.Tensor
    class_temperatures: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            diversity: float = DIVERSITY,
            reweight_epoch: int | None = None,
            reweight_factor: float = 0.05,
            max_margin: float = MAX_MARGIN,
            scale: float = COSINE_SCALE,
            temperature: float = 1.0,
    ) -> None:
        super().__init__('ride', diversity, temperature)
        counts = require_counts(class_counts, 'ride')
        check_number('ride', 'reweight_factor', reweight_factor, high=1, below=True)
        check_number('ride', 'max_margin', max_margin)
        check_number('ride', 'scale', scale, above=True)
        self.reweight_epoch = reweight_epoch
        self.reweighting = False
        v = counts.num_classes * counts.prior() * reweight_factor + 1 - reweight_factor
        for name, value in (('margins', scale * ldam_margins(counts, max_margin)),
                            ('class_weights', effective_number_weights(counts)),
                            ('class_temperatures', temperature * v / v.max())):
            self.register_buffer(name, value.float(), persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based)."""
        self.reweighting = self.reweight_epoch is not None and epoch >= self.reweight_epoch

    def base_loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return margin_cross_entropy(logits, target, self.margins, self.class_weights if self.reweighting else None)

    def temperature(self, logits: torch.Tensor) -> torch.Tensor:
        return self.class_temperatures if self.reweighting else super().temperature(logits)


@register_loss('ride_balanced_softmax', experts=True, balances=True)
class RideBalancedSoftmax(_RideLoss):
    """RIDE's loss with balanced softmax as each expert's base loss, for the logits of each expert [B, E, C].

    It has no margins and no reweighting. Without diversity it is the sum of the experts' own losses. As released the
    divergence is that of plain logits, while the base loss sees z_e + log n. Then nothing that most images teach holds
    an expert's logits of rare classes against the divergence, which drives them apart; docs/ride.md has what that does.
    `adjusted` takes the divergence of z_e + log n as well.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        diversity: Weight of the divergence.
        smoothing: Label smoothing of the base loss, in [0, 1].
        temperature: T.
        adjusted: Take the divergence of z_e + log n, as the base loss, and not of plain logits.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    log_counts: torch.Tensor
    mean_alone = False

    def __init__(
            self,
            class_counts: ClassCounts | None,
            diversity: float = DIVERSITY,
            smoothing: float = 0.0,
            temperature: float = 1.0,
            adjusted: bool = False,
    ) -> None:
        super().__init__('ride_balanced_softmax', diversity, temperature)
        self.adjusted = adjusted
        counts = require_counts(class_counts, 'ride_balanced_softmax')
        self.smoothing = check_number('ride_balanced_softmax', 'smoothing', smoothing, high=1)
        self.register_buffer('log_counts', counts.tensor().clamp(min=1).log().float(), persistent=False)

    def compared(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.log_counts if self.adjusted else logits

    def base_loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits + self.log_counts, target, label_smoothing=self.smoothing)

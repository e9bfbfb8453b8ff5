"""LDAM (Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019)."""
from copy import deepcopy

import torch
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.layers.head import COSINE_SCALE
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.margins import margin_cross_entropy
from nbn_timm.losses.weights import class_weights

MAX_MARGIN = 0.5


def ldam_margins(class_counts: ClassCounts, max_margin: float = MAX_MARGIN) -> torch.Tensor:
    """Margin of each class, proportional to n ** (-1/4), the rarest class's being `max_margin`; float64 [C] (eq. 13).

    A class without training images counts as having one.
    """
    margins = class_counts.tensor().clamp(min=1) ** -0.25
    return margins * (max_margin / margins.max())


@register_loss('ldam', both_labels=True)
class LDAM(nn.Module):
    """Cross-entropy of logits whose target entry is lowered by `scale` times the class's margin.

    Where the scale stands: the paper's loss is CE(s (cos - m_y)), with the cosines of a normalised classifier. The
    cosine heads of this package give s cos, so that s multiplies the margin alone here: CE(z - s m_y). It must be the
    head's (30). With a linear head the margin is the same number of logit units.

    LDAM-DRW is `weighting='effective_number'` with `start_epoch=160` of 200 epochs: the class weights, which divide by
    their sum over the batch, come in epoch 161 of 200, and before that the loss is LDAM without weights.

    Soft targets mix the losses of their classes, see `margin_cross_entropy`, and class weights divide as in
    `mean_by_weight`.

    Args:
        class_counts: Training images per class.
        max_margin: Of the rarest class, as a difference of cosines.
        scale: s.
        weighting: Class weights, see `class_weights`; None has none.
        exponent, beta: Of the class weights.

    Raises:
        InputError: No class counts, or a setting out of range or without effect.
    """

    margins: torch.Tensor
    class_weights: torch.Tensor | None

    def __init__(
            self,
            class_counts: ClassCounts | None,
            max_margin: float = MAX_MARGIN,
            scale: float = COSINE_SCALE,
            weighting: str | None = None,
            exponent: float = 1.0,
            beta: float | None = None,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'ldam')
        check_number('ldam', 'max_margin', max_margin)
        check_number('ldam', 'scale', scale, above=True)
        if weighting is None and (beta is not None or exponent != 1.0):
            raise InputError("loss 'ldam' has an exponent or a beta of class weights, and no class weights: give "
                             'weighting=effective_number, or leave them out')
        weights = None if weighting is None else class_weights(counts, 'ldam', weighting, exponent, beta).float()
        self.register_buffer('class_weights', weights, persistent=False)
        self.register_buffer('margins', (scale * ldam_margins(counts, max_margin)).float(), persistent=False)

    def unweighted(self) -> 'LDAM':
        """LDAM without class weights, which the deferred one is before its epoch.

        Raises:
            InputError: This one has none, so that there is nothing to defer.
        """
        if self.class_weights is None:
            raise InputError("loss 'ldam' has a start_epoch, which is that of its class weights, and no class weights: "
                             'give weighting=effective_number, or leave start_epoch out')
        loss = deepcopy(self)
        loss.class_weights = None
        return loss

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return margin_cross_entropy(logits.float(), target, self.margins, self.class_weights)

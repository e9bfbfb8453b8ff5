"""Cross-entropy with class weights, also called cost-sensitive or class-balanced cross-entropy."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import as_distribution, mean_by_weight
from nbn_timm.losses.weights import class_weights


@register_loss('weighted_cross_entropy', balances=True, both_labels=True)
class WeightedCrossEntropy(nn.Module):
    """Weighted mean over the batch: sum of w_y CE(z, y) / sum of w_y, as in torch's cross-entropy with labels.

    Soft targets t, smoothed labels among them, give every class its share: - sum of t_c w_c log p_c / sum of t_c w_c;
    two labels of an image have a mean each, see `mean_by_weight`.
    Only the ratios of the weights matter, so 'inverse' is the cost-sensitive (n_min / n) ** exponent of Zhang et al.,
    "Bag of Tricks for Long-Tailed Visual Recognition", AAAI 2021, and 'effective_number' the class-balanced loss of
    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, eq. 12. Because the batch's
    weights divide, several processes or accumulated steps are not the same as one large batch.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        weighting: 'inverse' or 'effective_number', see `class_weights`.
        exponent: Of the weights; 0.5 is the square root, 0 plain cross-entropy.
        beta: Of effective numbers (default 0.9999).
        smoothing: Label smoothing, in [0, 1].

    Raises:
        InputError: No class counts, or a setting out of range or without effect.
    """

    class_weights: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            weighting: str = 'inverse',
            exponent: float = 1.0,
            beta: float | None = None,
            smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'weighted_cross_entropy')
        weights = class_weights(counts, 'weighted_cross_entropy', weighting, exponent, beta)
        self.smoothing = check_number('weighted_cross_entropy', 'smoothing', smoothing, high=1)
        self.register_buffer('class_weights', weights.float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shares = as_distribution(target, logits.shape[1], self.smoothing)
        return mean_by_weight(-F.log_softmax(logits.float(), dim=1), shares, self.class_weights)

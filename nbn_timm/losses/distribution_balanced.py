"""Distribution-balanced loss (Wu et al., "Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
Datasets", ECCV 2020); timm has it.
"""
import torch
from timm.loss import DistributionBalancedLoss
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import as_members, refuse_soft_targets


@register_loss('distribution_balanced', soft_targets=False, deferrable=False, label_sets=True)
class DistributionBalanced(nn.Module):
    """Binary cross-entropy with weights for what class-aware sampling does to label sets, and softer negatives.

    - Re-balanced weights: with n_c images of class c, an image's r_c = (1 / n_c) / (the sum of 1 / n over its classes)
      gives the weight `alpha` + sigmoid(`beta` * (r_c - `mu`)).
    - Negative tolerance: with N images, z_c - `init_bias` / `neg_scale` * log(N / n_c - 1) takes the place of the
      logit, and a negative has softplus(`neg_scale` * z) / `neg_scale`.
    - A focal factor: the probability of the other answer to the power of `gamma`, times `focal_balance`.

    It is made for the sampler class_aware, whose effect on classes that come together the weights make up for.

    The mean is over images and classes. A label is a set of one. Computed by timm's `DistributionBalancedLoss`. The
    defaults are those of the released recipe for COCO-MLT; the one for VOC-MLT has mu=0.3 and neg_scale=5.

    Args:
        class_counts: Training images per class and in all; a class without any counts as having one.
        alpha: Least weight.
        beta: Slope of the weights.
        mu: Where the weights rise.
        neg_scale: 1 takes negatives as they are.
        init_bias: Of the shift by the prior; 0 does not shift.
        gamma: Exponent of the focal factor; 0 leaves out the factor and `focal_balance`.
        focal_balance: Factor of all, where there is a focal factor.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    def __init__(
            self,
            class_counts: ClassCounts | None,
            alpha: float = 0.1,
            beta: float = 10.0,
            mu: float = 0.2,
            neg_scale: float = 2.0,
            init_bias: float = 0.05,
            gamma: float = 2.0,
            focal_balance: float = 2.0,
    ) -> None:
        super().__init__()
        name = 'distribution_balanced'
        counts = require_counts(class_counts, name)
        for setting, value in (('alpha', alpha), ('beta', beta), ('mu', mu), ('init_bias', init_bias),
                               ('gamma', gamma)):
            check_number(name, setting, value)
        for setting, value in (('neg_scale', neg_scale), ('focal_balance', focal_balance)):
            check_number(name, setting, value, above=True)
        images = max(counts.total, 2)  # of a single one there is no odds of a class
        self.loss = DistributionBalancedLoss(
            counts.tensor().clamp(max=images).float(), images, alpha, beta, mu, neg_scale, init_bias, gamma,
            focal_balance)
        for key, values in list(self.loss.named_buffers()):  # they follow from the counts
            self.loss.register_buffer(key, values, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'distribution_balanced',
                            'is defined for whole classes, and mixed targets have parts of them')
        with torch.autocast(logits.device.type, enabled=False):
            return self.loss(logits, as_members(target, logits.shape[1]))

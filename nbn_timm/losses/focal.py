"""Focal loss (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4), alone and with class weights."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_choice, check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import as_distribution
from nbn_timm.losses.weights import class_weights

FORMS = ('softmax', 'sigmoid')
GAMMA = 2.0


def focal_losses(logits: torch.Tensor, gamma: float, form: str) -> torch.Tensor:
    """The focal loss of each image for each label that it could have, logits [B, C] to float32 [B, C].

    - 'softmax': -(1 - p_y) ** gamma * log p_y, with p the softmax;
    - 'sigmoid': the sum over all classes of the binary focal loss, with label y against the others.
    """
    logits = logits.float()
    if form == 'sigmoid':
        # log(1 - sigmoid(z)) = -softplus(z), and -softplus(-z) is log sigmoid(z).
        positive = torch.exp(-gamma * F.softplus(logits)) * F.softplus(-logits)
        negative = torch.exp(-gamma * F.softplus(-logits)) * F.softplus(logits)
        return positive - negative + negative.sum(dim=1, keepdim=True)
    log_p = F.log_softmax(logits, dim=1)
    missing = -torch.expm1(log_p)  # 1 - p without cancellation
    # Below 1 gamma has an infinite derivative at p = 1, where the loss is 0.
    return -missing.clamp(min=torch.finfo(missing.dtype).tiny) ** gamma * log_p


@register_loss('focal')
class Focal(nn.Module):
    """Mean over the images of the focal loss, see `focal_losses`. Soft targets mix the losses of their labels.

    The softmax form with gamma 0 is cross-entropy. The sigmoid form is the paper's, summed over the classes as in Cui
    et al., CVPR 2019; it is of the size of the number of classes, and so are its gradients at the start.

    Args:
        class_counts: Not used; every loss takes it first.
        gamma: Exponent of the factor 1 - p, which takes weight from images that are recognised already.
        form: 'softmax' or 'sigmoid'.

    Raises:
        InputError: A setting is out of range.
    """

    def __init__(self, class_counts: ClassCounts | None = None, gamma: float = GAMMA, form: str = FORMS[0]) -> None:
        super().__init__()
        self.gamma = check_number('focal', 'gamma', gamma)
        self.form = check_choice('focal', 'form', form, FORMS)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = focal_losses(logits, self.gamma, self.form)
        return (as_distribution(target, logits.shape[1]) * losses).sum() / len(logits)


@register_loss('class_balanced_focal', balances=True)
class ClassBalancedFocal(nn.Module):
    """Mean over the images of w_y times the focal loss, see `focal_losses`; the weights have mean 1 over the classes.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, in the sigmoid form.
    Unlike weighted cross-entropy it divides by the number of images. If it is deferred, it is the focal loss without
    weights before.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        gamma: Exponent of the factor 1 - p.
        form: 'softmax' or 'sigmoid'.
        weighting: 'effective_number' or 'inverse', see `class_weights`.
        exponent: Of the weights.
        beta: Of effective numbers (default 0.9999).

    Raises:
        InputError: No class counts, or a setting out of range or without effect.
    """

    class_weights: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            gamma: float = GAMMA,
            form: str = FORMS[0],
            weighting: str = 'effective_number',
            exponent: float = 1.0,
            beta: float | None = None,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'class_balanced_focal')
        self.gamma = check_number('class_balanced_focal', 'gamma', gamma)
        self.form = check_choice('class_balanced_focal', 'form', form, FORMS)
        weights = class_weights(counts, 'class_balanced_focal', weighting, exponent, beta)
        self.register_buffer('class_weights', weights.float(), persistent=False)

    def unweighted(self) -> Focal:
        """The focal loss with the same settings."""
        return Focal(gamma=self.gamma, form=self.form)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = self.class_weights * focal_losses(logits, self.gamma, self.form)
        return (as_distribution(target, logits.shape[1]) * losses).sum() / len(logits)

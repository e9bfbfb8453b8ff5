"""BCL (Zhu et al., "Balanced Contrastive Learning for Long-Tailed Visual Recognition", CVPR 2022)."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number, check_whole
from nbn_timm.losses.contrast import classifier_of, on_sphere, projection, without_autocast
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.prior import log_prior
from nbn_timm.losses.targets import refuse_soft_targets


@register_loss('bcl', features=True, views=3, soft_targets=False, balances=True)
class BCL(nn.Module):
    """classifier_weight CE(z + log prior, y) on the first view + weight times the contrastive term of the two others.

    Called with the logits [3, B, C] and features [3, B, D] of three views. Features and the classifier's class vectors
    pass a head each (Linear, BatchNorm, ReLU, Linear) and are scaled to length 1; `balanced_contrast` is the term. The
    gradient reaches the classifier by both. Source: the authors' code (FlamieZhu/Balanced-Contrastive-Learning, commit
    f72d070), whose defaults these are.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        weight: Of the contrastive term.
        classifier_weight: Of the cross-entropy.
        temperature: Of the contrastive term.
        hidden: Width of the heads' first layer; None is that of the features.
        dim: Of the vectors that are compared.

    Raises:
        InputError: No class counts, a setting out of range, or, in training, a network with several classifiers.
    """

    log_prior: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            weight: float = 0.35,
            classifier_weight: float = 1.0,
            temperature: float = 0.07,
            hidden: int | None = None,
            dim: int = 1024,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'bcl')
        self.weight = check_number('bcl', 'weight', weight)
        self.classifier_weight = check_number('bcl', 'classifier_weight', classifier_weight)
        self.temperature = check_number('bcl', 'temperature', temperature, above=True)
        self.hidden = None if hidden is None else check_whole('bcl', 'hidden', hidden)
        self.dim = check_whole('bcl', 'dim', dim)
        self.register_buffer('log_prior', log_prior(counts).float(), persistent=False)

    def prepare(self, network: Any) -> None:
        """Make the heads; the class vectors stay the network's own."""
        classifier = classifier_of(network, 'bcl')
        features = classifier.weight.shape[1]
        sizes = (features, self.hidden or features, self.dim)
        self.head, self.class_head = projection(sizes, norm=True), projection(sizes, norm=True)
        self.classifiers = (classifier,)  # in a tuple, since it is no part of the loss

    @without_autocast
    def forward(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'bcl')
        logits, features = output
        base = F.cross_entropy(logits[0].float() + self.log_prior, target)
        vectors = on_sphere(self.head, features)[1:]
        centres = on_sphere(self.class_head, self.classifiers[0].weight)
        return (self.classifier_weight * base
                + self.weight * balanced_contrast(vectors, centres, target, self.temperature))


def balanced_contrast(
        vectors: torch.Tensor,
        centres: torch.Tensor,
        target: torch.Tensor,
        temperature: float,
) -> torch.Tensor:
    """The contrastive term: mean over all vectors i of

        - mean over the others j of i's class of [s_ij - log sum over classes c of the mean over the others k of c of
        exp(s_ik)],

    where s are products over the temperature and each class's centre is among its others. So every class counts once,
    however many images it has in the batch.

    Args:
        vectors: Of the views, [V, B, d], of length 1.
        centres: One for each class, [C, d], of length 1.
        target: Labels [B].
        temperature: Of the products.
    """
    anchors, labels = vectors.flatten(0, 1), target.repeat(len(vectors))
    everyone = torch.cat([labels, torch.arange(len(centres), device=target.device)])
    similarity = anchors @ torch.cat([anchors, centres]).T / temperature
    itself = torch.eye(*similarity.shape, dtype=torch.bool, device=target.device)
    same = (labels[:, None] == everyone) & ~itself
    members = torch.bincount(everyone, minlength=len(centres))[everyone]
    others = members - (labels[:, None] == everyone).long()  # an image is not among its own others
    shares = (similarity - others.clamp(min=1).log()).masked_fill(itself, -torch.inf)
    log_ratio = similarity - shares.logsumexp(dim=1, keepdim=True)
    return -((log_ratio * same).sum(dim=1) / same.sum(dim=1)).mean()

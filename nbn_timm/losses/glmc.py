"""GLMC (Du et al., "Global and Local Mixture Consistency Cumulative Learning for Long-tailed Visual Recognitions", CVPR
2023).
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number, check_whole
from nbn_timm.losses.contrast import without_autocast
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import as_distribution
from nbn_timm.losses.weights import class_weights


@register_loss('glmc', features=True, views=2, mixing='glmc', apart=True, parallel=True, balances=True)
class GLMC(nn.Module):
    """Cumulative learning of two classifiers, and consistency of two mixtures of the same images [2, B, ...].

    With the soft target t of an image, which is that of its two views, the network's own logits z_v and those u_v of a
    second classifier on the same features f_v, the loss is the mean over the images of

        sum over the views v of  a CE(u_v, t) + (1 - a) CE(z_v, w t)  -  contrast cos(p_v, stop(h_v')),

    where CE(z, t) = - sum over the classes of t_c log softmax(z)_c, w_c is proportional to n_c ** -power with mean 1, h
    is a linear map of the features (projection) and p one of h (prediction), v' is the other view, and a = 1 - (epoch /
    epochs)^2 (epoch from 0). So training begins with the second classifier, which is left behind, and ends with the
    network's own. Source: the authors' code (ynu-yangpeng/GLMC, commit 2c0261c), whose `fc_cb` is the network's
    classifier here and whose `fc` the second one. As in their networks for CIFAR, the three maps start by Kaiming's
    rule.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        contrast: Weight of the consistency.
        power: Of the class weights, the authors' `label_weighting`.
        epochs: In which a falls from 1 to 0; the authors have those of the run.
        dim: Of projection and prediction; the authors have 128 on CIFAR and 256 on larger images.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    class_weights: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            contrast: float = 4.0,
            power: float = 1.2,
            epochs: int = 200,
            dim: int = 128,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'glmc')
        self.contrast = check_number('glmc', 'contrast', contrast)
        weights = class_weights(counts, 'glmc', 'inverse', check_number('glmc', 'power', power))
        self.epochs = check_whole('glmc', 'epochs', epochs)
        self.dim = check_whole('glmc', 'dim', dim)
        self.share = 1.0
        self.register_buffer('class_weights', weights.float(), persistent=False)

    def prepare(self, network: Any) -> None:
        """Make the second classifier and the two maps."""
        width = network.head_hidden_size
        self.classifier = nn.Linear(width, len(self.class_weights))
        self.projection = nn.Linear(width, self.dim)
        self.prediction = nn.Linear(self.dim, self.dim)
        for layer in (self.classifier, self.projection, self.prediction):
            nn.init.kaiming_normal_(layer.weight)

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based)."""
        self.share = 1 - min(epoch / self.epochs, 1) ** 2

    @without_autocast
    def forward(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Logits [2, B, C] and features [2, B, D], and the targets of both views, [B, C] or labels [B], to the loss."""
        logits, features = output[0].float(), output[1].float()
        target = as_distribution(target, logits.shape[2])
        plain = _cross_entropy(self.classifier(features), target)
        balanced = _cross_entropy(logits, target * self.class_weights)
        projected = self.projection(features)
        alike = F.cosine_similarity(self.prediction(projected), projected.flip(0).detach(), dim=2)
        per_image = self.share * plain + (1 - self.share) * balanced - self.contrast * alike
        return per_image.sum(dim=0).mean()


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of logits [2, B, C] with targets [B, C] of any sum, [2, B]."""
    return -(F.log_softmax(logits, dim=2) * target).sum(dim=2)

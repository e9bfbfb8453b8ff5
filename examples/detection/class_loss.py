"""The losses of a detector's classifier by name, and what each of them says of its logits."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.registry import Registry


class ClassLoss(nn.Module):
    """Base: a loss over the classes of region proposals, and the scores that detections get.

    Logits are [N, C + 1] for N proposals. Column 0 is the background and label 0 means it, as in torchvision.

    Args:
        image_counts: Training images that each of the C classes is in, [C].
        num_images: Training images.
    """

    def __init__(self, image_counts: torch.Tensor, num_images: int) -> None:
        super().__init__()
        self.num_classes = len(image_counts)

    def initialise(self, classifier: nn.Linear) -> None:
        """Set the first weights of the layer that gives the logits; torch's own unless a loss says otherwise."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes without the background, [N, C]."""
        raise NotImplementedError

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar; `labels` are int64 [N]."""
        raise NotImplementedError


CLASS_LOSSES: Registry[ClassLoss] = Registry('class loss')


@CLASS_LOSSES.register('softmax')
class SoftmaxLoss(ClassLoss):
    """Cross-entropy over the classes and the background, as in Faster R-CNN."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=1)[:, 1:]

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels)


class SigmoidLoss(ClassLoss):
    """Base of losses with one sigmoid per class, where the background is that no class is there: column 0 is unused.

    Args:
        image_counts, num_images: See `ClassLoss`.
        prior: Probability that each class has at first.
    """

    def __init__(self, image_counts: torch.Tensor, num_images: int, prior: float) -> None:
        super().__init__(image_counts, num_images)
        self.prior = prior

    def initialise(self, classifier: nn.Linear) -> None:
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.constant_(classifier.bias, -math.log((1 - self.prior) / self.prior))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()[:, 1:]

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        target = F.one_hot(labels, self.num_classes + 1)[:, 1:].to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits[:, 1:], target, reduction='none')
        return (losses * self.weights(labels, target)).sum() / max(len(labels), 1)

    def weights(self, labels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """How much each term counts, [N, C] or what spreads to it; `target` is `labels` as 0 and 1 [N, C]."""
        raise NotImplementedError

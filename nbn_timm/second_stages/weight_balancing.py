"""Weight balancing (Alshammari et al., "Long-Tailed Recognition via Weight Balancing", CVPR 2022): the classifier is
trained further under strong weight decay and an upper bound on the length of each class's weight vector.
"""
from copy import deepcopy

import torch
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.layers import RectifiedLinear
from nbn_timm.second_stages.classifier import classifier_of, linear_classifiers
from nbn_timm.second_stages.second_stage import TrainedSecondStage, register_second_stage


@register_second_stage('weight_balancing')
class WeightBalancing(TrainedSecondStage):
    """Train the linear classifier further, with weight vectors that are no longer than a radius; the rest is frozen.

    Of a classifier whose weight vectors have lengths from m to M as the first stage left them, the radius is
    m + share (M - m). After each epoch a longer vector is shortened to it (MaxNorm); biases are not. Source: the
    authors' code (ShadeAlsha/LTR-weight-balancing, commit e89f292). Each of several experts has a radius of its own.
    The result is an ordinary model of the same architecture.

    Args:
        share: Of the way from the shortest to the longest weight vector; 1 bounds them by the longest.

    Raises:
        InputError: A setting out of range.
    """

    def __init__(self, share: float = 0.1) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise InputError(f'--stage weight_balancing has share={share!r}: give a number from 0 to 1')
        self.share = share

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is; its radii are kept."""
        self.classifiers = linear_classifiers(model, 'weight_balancing')
        if any(isinstance(classifier, RectifiedLinear) for classifier in self.classifiers.values()):
            raise InputError(f'the classifier of {type(model).__name__} is rectified, so that the length of its weight '
                             'vectors has no effect: use another second stage, such as crt')
        self.radii = {name: radius(classifier.weight, self.share)  # type: ignore[arg-type]
                      for name, classifier in self.classifiers.items()}
        return model

    def trained(self, model: nn.Module) -> nn.Module:
        """The classifier."""
        return classifier_of(model)

    def set_epoch(self, epoch: int) -> None:
        """Shorten what the epoch before has made too long."""
        if epoch:
            for name, classifier in self.classifiers.items():
                shorten(classifier.weight, self.radii[name])  # type: ignore[arg-type]

    def finished(self, model: nn.Module) -> nn.Module:
        """A copy with weight vectors within the radius, as at the end of an epoch."""
        model = deepcopy(model)
        for name, bound in self.radii.items():
            shorten(model.get_submodule(name).weight, bound)  # type: ignore[arg-type]
        return model


@torch.no_grad()
def radius(weight: torch.Tensor, share: float) -> float:
    """Length that lies by `share` between the shortest and the longest weight vector of a classifier [C, ...]."""
    lengths = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    shortest, longest = lengths.min().item(), lengths.max().item()
    return shortest + share * (longest - shortest)


@torch.no_grad()
def shorten(weight: torch.Tensor, bound: float) -> None:
    """Shorten weight vectors [C, ...] that are longer than `bound` to that length, in place."""
    lengths = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    weight *= (bound / lengths).clamp(max=1).view(-1, *[1] * (weight.ndim - 1))

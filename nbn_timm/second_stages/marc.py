"""MARC (Wang et al., "Margin Calibration for Long-Tailed Visual Recognition", ACML 2022): a factor and an offset for
each class's logit, the offset in units of the length of its weight vector.
"""
from typing import Any

import torch
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.second_stages.classifier import linear_form, write_linear
from nbn_timm.second_stages.lws import ClassScale, LearnableWeightScaling, ScaledClassifier
from nbn_timm.second_stages.second_stage import register_second_stage


class ClassCalibration(ClassScale):
    """A factor for each class, 1 at first, and an offset, 0 at first."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.offset = nn.Parameter(torch.zeros(num_classes))


class CalibratedClassifier(ScaledClassifier):
    """A linear classifier with calibrated margins, omega_c z_c + beta_c ||w_c||, bias included in z.

    Raises:
        InputError: The classifier has no bias, of which the offsets become a part.
    """

    scale: ClassCalibration

    def __init__(self, classifier: Any) -> None:
        super().__init__(classifier)
        if classifier.bias is None:
            raise InputError('the classifier has no bias, and the offsets of --stage marc become a part of it: use a '
                             'model whose classifier has one, or another second stage, such as lws')
        self.scale = ClassCalibration(classifier.weight.shape[0])

    def lengths(self) -> torch.Tensor:
        """Of the weight vectors, [C]; they are frozen."""
        return torch.linalg.vector_norm(self.classifier.weight.detach().flatten(1), dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits + (self.scale.offset * self.lengths()).view(-1, *[1] * (logits.ndim - 2))

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The classifier with weight diag(omega) W and bias omega b + beta ||w||."""
        lengths, scale = self.lengths(), self.scale.weight
        weight, bias = linear_form(self.classifier)
        assert bias is not None
        write_linear(self.classifier, weight * scale[:, None], bias * scale + self.scale.offset * lengths)
        return self.classifier


@register_second_stage('marc')
class MARC(LearnableWeightScaling):
    """Train a factor omega_c and an offset beta_c for each class: logits omega_c z_c + beta_c ||w_c||.

    Weights and biases are frozen. The authors train by cross-entropy with class weights n_c ** -1.2 on
    instance-balanced draws, which is `--loss weighted_cross_entropy --loss-kwargs exponent=1.2`, while BatchNorm
    statistics drift (`--no-freeze-bn`). Source: their code (marc in microsoft/robustlearn, commit 31580cd).

    The result is an ordinary model of the same architecture, with factors and offsets folded into weight and bias. What
    is said of several experts and of rectified classifiers in `LearnableWeightScaling` holds here too.
    """

    name = 'marc'
    scaled = CalibratedClassifier

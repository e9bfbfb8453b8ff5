"""DisAlign (Zhang et al., "Distribution Alignment: A Unified Framework for Long-Tail Visual Recognition", CVPR 2021):
the logits are corrected class by class, as far as a learned confidence says for each image.
"""
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.key_values import check_number
from nbn_timm.layers import ClassVectors
from nbn_timm.second_stages.classifier import linear_classifiers, linear_form, replace_module, vector_classifiers
from nbn_timm.second_stages.second_stage import FLAG, TrainedSecondStage, register_second_stage


class Alignment(nn.Module):
    """Logits z [B, C] of features x [B, D] to (1 + sigma s_c) z_c + sigma t_c, with sigma = sigmoid(v x + a).

    Args:
        in_features: Length of a feature vector, D.
        num_classes: C.
        start: Of every factor s; every offset t begins with 0, each entry of v with 0.1, and a by torch's rule.
    """

    def __init__(self, in_features: int, num_classes: int, start: float = 1.0, device=None, dtype=None) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((num_classes,), start, device=device, dtype=dtype))
        self.offset = nn.Parameter(torch.zeros(num_classes, device=device, dtype=dtype))
        self.confidence = nn.Linear(in_features, 1, device=device, dtype=dtype)
        nn.init.constant_(self.confidence.weight, 0.1)

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        sigma = self.confidence(x).sigmoid()
        return (1 + sigma * self.factor) * logits + sigma * self.offset


class AlignedLinear(ClassVectors):
    """A linear classifier with an alignment behind it, under the keys of `nn.Linear` and `alignment.*`.

    Args:
        in_features: Length of a feature vector, D.
        out_features: Number of classes, C.
        start: See `Alignment`.
    """

    def __init__(self, in_features: int, out_features: int, start: float = 1.0, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.alignment = Alignment(in_features, out_features, start, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alignment(x, F.linear(x, self.weight, self.bias))


@register_second_stage('disalign')
class DisAlign(TrainedSecondStage):
    """Train a factor and an offset for each class, and how far they hold for an image; the classifier is frozen.

    The logits become z_c + sigma(x) (s_c z_c + t_c), which is the paper's sigma (alpha z + beta) + (1 - sigma) z with
    s = alpha - 1 and t = beta. The authors train by cross-entropy with class weights n_c ** -rho on instance-balanced
    draws, rho = 1.2 for ImageNet-LT: `--loss weighted_cross_entropy --loss-kwargs exponent=1.2`. Source: their code
    (Megvii-BaseDetection/DisAlign, commit a2fc350, with `DisAlignLinear` and `GRWCrossEntropyLoss` of cvpods).

    How much is corrected differs from image to image, so each classifier becomes an `AlignedLinear`, which
    `validate.py` knows by its entry `alignment.factor`. The rectification of a rectified classifier is folded into
    weight and bias first. Each of several experts has an alignment of its own.

    Args:
        start: Of every s_c. With 1, as in the authors' code, the logits begin with (1 + sigma) z; with 0 they begin
            unchanged, as in the paper's equation with alpha = 1.

    Raises:
        InputError: A setting out of range.
    """

    def __init__(self, start: float = 1.0) -> None:
        self.start = check_number('--stage disalign', FLAG, 'start', start)

    @classmethod
    def restore(cls, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model with the aligned classifiers that a checkpoint has, if it has them."""
        if hasattr(model, 'get_classifier'):
            for name, classifier in vector_classifiers(model).items():
                if f'{name}.alignment.factor' in state_dict:
                    replace_module(model, name, AlignedLinear(classifier.in_features, classifier.out_features))
        return model

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with alignments behind its classifiers."""
        for name, classifier in linear_classifiers(model, 'disalign').items():
            if isinstance(classifier, nn.Conv2d):
                raise InputError(f'the classifier of {type(model).__name__} is a convolution, and disalign is for '
                                 'classifiers on feature vectors: use another second stage, such as marc')
            replace_module(model, name, _aligned(classifier, self.start))
        return model

    def trained(self, model: nn.Module) -> nn.Module:
        """The alignments."""
        return nn.ModuleList(module for module in model.modules() if isinstance(module, Alignment))


def _aligned(classifier: Any, start: float) -> AlignedLinear:
    """A classifier with an alignment in its place."""
    weight, bias = linear_form(classifier)
    aligned = AlignedLinear(weight.shape[1], weight.shape[0], start, weight.device, weight.dtype)
    with torch.no_grad():
        aligned.weight.copy_(weight)
        if bias is None:
            aligned.bias.zero_()
        else:
            aligned.bias.copy_(bias)
    return aligned.train(classifier.training)

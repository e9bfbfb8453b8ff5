"""Learnable weight scaling (Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition",
ICLR 2020, section 4.4).
"""
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import nn

from nbn_timm.second_stages.classifier import linear_classifiers, linear_form, replace_module, write_linear
from nbn_timm.second_stages.second_stage import TrainedSecondStage, register_second_stage


class ClassScale(nn.Module):
    """A factor for each class, 1 at first: logits [B, C] or [B, C, H, W] to the same shape."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_classes))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * self.weight.view(-1, *[1] * (logits.ndim - 2))


class ScaledClassifier(nn.Module):
    """A linear classifier whose logits are scaled, z_c * s_c, bias included."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        write_linear(classifier, *linear_form(classifier))  # rectification becomes part of weight and bias
        self.classifier = classifier
        self.scale = ClassScale(classifier.weight.shape[0])

    def train(self, mode: bool = True) -> 'ScaledClassifier':
        """Set the mode of the scale; the classifier is a fixed linear map."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(self.classifier(x))

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The classifier with weight diag(s) W and bias s b."""
        weight, bias = linear_form(self.classifier)
        scale = self.scale.weight
        write_linear(self.classifier, weight * scale[:, None], None if bias is None else bias * scale)
        return self.classifier


@register_second_stage('lws')
class LearnableWeightScaling(TrainedSecondStage):
    """Train a scale for each class, on class-balanced draws in the paper; weights and biases are frozen.

    The result is an ordinary model of the same architecture, with the scales folded into weight and bias. Each of
    several experts has scales of its own. The rectification of a rectified classifier, which scaled weights could not
    pass, is folded into weight and bias first, and its BatchNorm becomes the identity.

    Attributes:
        name: Of the stage, for messages.
        scaled: What is put around each classifier.
    """

    name: ClassVar[str] = 'lws'
    scaled: ClassVar[type[ScaledClassifier]] = ScaledClassifier

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with scales behind its classifiers."""
        for name, classifier in linear_classifiers(model, self.name).items():
            replace_module(model, name, self.scaled(classifier))
        return model

    def trained(self, model: nn.Module) -> nn.Module:
        """The scales."""
        return nn.ModuleList(module.scale for module in model.modules() if isinstance(module, ScaledClassifier))

    def finished(self, model: nn.Module) -> nn.Module:
        """A copy with the scales folded."""
        model = deepcopy(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, ScaledClassifier):
                replace_module(model, name, module.fold())
        return model

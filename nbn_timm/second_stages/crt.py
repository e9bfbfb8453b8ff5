"""Classifier re-training (Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition",
ICLR 2020, section 4.1).
"""
from typing import Any

from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.second_stages.classifier import classifier_of
from nbn_timm.second_stages.second_stage import TrainedSecondStage, register_second_stage


@register_second_stage('crt')
class ClassifierRetraining(TrainedSecondStage):
    """Train the classifier anew, on class-balanced draws in the paper, while the rest is frozen.

    The result is an ordinary model of the same architecture. All classifiers of several experts are trained. The
    BatchNorm of a rectified classifier is part of it: it starts and is estimated anew.

    Args:
        reinit: Start from a new classifier, by torch's rule for its layers; else from the one that is there.
    """

    def __init__(self, reinit: bool = True) -> None:
        self.reinit = reinit
        self.keeps_classifier = not reinit

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with a new classifier."""
        classifier = self.trained(model)
        if self.reinit:
            reset(classifier, type(model).__name__)
        return model

    def trained(self, model: nn.Module) -> nn.Module:
        """The classifier; of models with several, as timm's distilled ones, all of them."""
        classifier = classifier_of(model)
        return classifier if isinstance(classifier, nn.Module) else nn.ModuleList(classifier)


def reset(classifier: nn.Module, model: str) -> None:
    """Give the layers of a classifier new weights, by their own `reset_parameters`.

    Raises:
        InputError: A layer has parameters and no such method.
    """
    for name, module in classifier.named_modules():
        reset_parameters: Any = getattr(module, 'reset_parameters', None)
        if reset_parameters is not None:
            reset_parameters()
        elif next(module.parameters(recurse=False), None) is not None:
            raise InputError(f"the classifier of {model} has a {type(module).__name__} ('{name}') that cannot be "
                             'initialised anew: give --stage-kwargs reinit=False to start from the trained one')

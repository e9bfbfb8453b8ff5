"""The classifier of any timm model as the linear maps that it consists of: how to find, read and write them."""
from typing import Any

import torch
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.layers import ClassVectors, ExpertHead, RectifiedLinear


def classifier_of(model: nn.Module) -> Any:
    """What timm's `get_classifier` names.

    Raises:
        InputError: The model has no classifier.
    """
    get_classifier: Any = getattr(model, 'get_classifier', None)
    if get_classifier is None:
        raise InputError(f'{type(model).__name__} does not say what its classifier is: give a timm model')
    classifier = get_classifier()
    if isinstance(classifier, nn.Identity):
        raise InputError(f'{type(model).__name__} has no classifier: give a checkpoint that has one')
    return classifier


def linear_classifiers(model: nn.Module, purpose: str) -> dict[str, nn.Module]:
    """The linear classifiers of a model, by module name: one, or one for each expert, whose logits are averaged.

    Each is an `nn.Linear`, a 1x1 `nn.Conv2d` or a `RectifiedLinear`, which in evaluation is linear as well.

    Args:
        model: A timm model.
        purpose: Of the caller, for the message.

    Raises:
        InputError: The classifier is something else.
    """
    classifier = classifier_of(model)
    parts = list(classifier) if isinstance(classifier, ExpertHead) else [classifier]
    for part in parts:
        pointwise = type(part) is nn.Conv2d and set(part.kernel_size) == {1} and part.groups == 1
        if type(part) not in (nn.Linear, RectifiedLinear) and not pointwise:
            kind = f'a {type(part).__name__}' if isinstance(part, nn.Module) else f'{len(part)} classifiers'
            raise InputError(f'the classifier of {type(model).__name__} is {kind}, and {purpose} is for linear '
                             'classifiers: use another second stage, such as crt')
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(part)]: part for part in parts}


@torch.no_grad()
def linear_form(classifier: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [C, D] and bias [C] of a linear classifier; of a rectified one, of the Linear that it is in evaluation."""
    plain = classifier.fuse() if isinstance(classifier, RectifiedLinear) else classifier
    bias = None if plain.bias is None else plain.bias.detach().clone()
    return plain.weight.detach().flatten(1).clone(), bias


@torch.no_grad()
def write_linear(classifier: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Make a classifier compute `x @ weight.T + bias` in evaluation; its keys and shapes stay as they are.

    The BatchNorm of a rectified classifier becomes the identity.

    Args:
        classifier: Of `linear_classifiers`.
        weight: [C, D].
        bias: [C]; None is zero.

    Raises:
        InputError: There is a bias and the classifier has no place for it.
    """
    if classifier.bias is None and bias is not None and bool(bias.any()):
        raise InputError('the classifier has no bias, which is needed here: use a model whose classifier has one')
    classifier.weight.copy_(weight.reshape(classifier.weight.shape))
    if classifier.bias is not None:
        classifier.bias.copy_(torch.zeros_like(classifier.bias) if bias is None else bias)
    if isinstance(classifier, RectifiedLinear):
        assert classifier.bn.running_mean is not None and classifier.bn.running_var is not None
        classifier.bn.running_mean.zero_()
        classifier.bn.running_var.fill_(1 - classifier.bn.eps)


def vectors(features: torch.Tensor) -> torch.Tensor:
    """Input of a classifier as vectors [B, D].

    Raises:
        InputError: It has a place for more than one vector per image.
    """
    vectors = features.flatten(1)
    if vectors.shape[1] != features.shape[1]:
        raise InputError(f'the classifier is given maps {list(features.shape[1:])}, which are pooled only afterwards: '
                         'use a model that pools first')
    return vectors


def vector_classifiers(model: nn.Module) -> dict[str, Any]:
    """The classifiers of a model that take feature vectors, by module name; none if it has others."""
    classifier = classifier_of(model)
    parts = list(classifier) if isinstance(classifier, ExpertHead) else [classifier]
    names = {id(module): name for name, module in model.named_modules()}
    on_vectors = all(isinstance(part, nn.Linear | ClassVectors) for part in parts)
    return {names[id(part)]: part for part in parts} if on_vectors else {}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name`."""
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)

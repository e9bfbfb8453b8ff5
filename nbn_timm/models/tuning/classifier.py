"""A new classifier for a network, and the class vectors that it starts with."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.layers import CosineLinear
from nbn_timm.layers.head import convert_head
from nbn_timm.models.transfer import classifier_names
from nbn_timm.models.weight_files import read_state_dict

__all__ = ['read_vectors', 'start_from_vectors', 'with_head']


def with_head(model: nn.Module, kind: str | None, settings: Mapping[str, Any]) -> nn.Module:
    """The model with a new classifier of a kind, see `convert_head`; None keeps its own.

    Raises:
        InputError: The kind is unknown, or the model has not one linear classifier.
    """
    if kind is None:
        return model
    name = _classifier(model)
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, convert_head(model.get_submodule(name), kind, settings))
    return model


@torch.no_grad()
def start_from_vectors(model: nn.Module, vectors: torch.Tensor) -> None:
    """Let the classifier of a model begin with class vectors [C, D], at unit length; a bias begins at zero.

    Raises:
        InputError: They are of another shape, or one is zero or not finite.
    """
    classifier: Any = model.get_submodule(_classifier(model))
    wanted = list(classifier.weight.shape)
    if list(vectors.shape) != wanted:
        raise InputError(f'the class vectors are {list(vectors.shape)}, and the classifier is {wanted}: give one for '
                         'each class, of the length of the features')
    lengths = vectors.norm(dim=1)
    wrong = ((lengths == 0) | ~lengths.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise InputError(f'the class vector of label {wrong[0]} is zero or not finite, as of a class without a '
                         'picture: give --head-start random, or pictures of every class')
    classifier.weight.copy_(F.normalize(vectors, dim=1))
    if getattr(classifier, 'bias', None) is not None:
        classifier.bias.zero_()


def read_vectors(path: str | Path) -> torch.Tensor:
    """The class vectors [C, D] of a file.

    Raises:
        InputError: It cannot be read, or has none.
    """
    found = read_state_dict(path)
    if found.keys() != {'vectors'}:
        raise InputError(f"'{path}' holds {', '.join(sorted(found)[:3])}: give a safetensors file with 'vectors' alone")
    return found['vectors'].float()


def _classifier(model: nn.Module) -> str:
    names = classifier_names(model)
    known = [name for name in names if isinstance(model.get_submodule(name), nn.Linear | CosineLinear)]
    if len(names) != 1 or not known:
        raise InputError(f'{type(model).__name__} has not one linear or cosine classifier, which --head and '
                         '--head-start are for: leave them out')
    return known[0]

"""What the normalisation of a network looks like inside, as the NBN paper shows it: sorted sizes of g and b."""
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.layers import NormalizedBatchNorm2d


@dataclass(frozen=True)
class NormSizes:
    """Sizes of the weights and biases that the normalisation layers of the last stage apply.

    Attributes:
        weight, bias: |g| and |b|, sorted within each layer, largest first, and averaged over the layers, [C].
        layers: How many these are.
        nbn: They are NBN.
    """

    weight: np.ndarray
    bias: np.ndarray
    layers: int
    nbn: bool


def norm_sizes(model: Any) -> NormSizes:
    """The sizes of a timm model.

    Raises:
        InputError: Its last stage has no BatchNorm2d with parameters, or it does not say which that is.
    """
    layers = last_stage(model)
    pairs = [applied_affine(layer) for layer in layers]
    weight, bias = (torch.stack([pair[part].detach().abs().float().sort(descending=True).values for pair in pairs])
                    .mean(dim=0).cpu().numpy() for part in (0, 1))
    return NormSizes(weight, bias, len(layers), any(isinstance(layer, NormalizedBatchNorm2d) for layer in layers))


def applied_affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias [C] that a normalisation layer applies."""
    if isinstance(norm, NormalizedBatchNorm2d):
        return norm.effective_affine()
    return norm.weight, norm.bias


def last_stage(model: Any) -> list[nn.BatchNorm2d]:
    """The normalisation layers with parameters, and of the last one's width, of the last stage.

    Raises:
        InputError: There is none, or the model does not say which its last stage is.
    """
    stages = getattr(model, 'feature_info', None)
    if not stages:
        raise InputError(f'{type(model).__name__} does not say what its last stage is: give a timm model')
    stage = stages[-1]['module']
    found = [module for name, module in model.named_modules() if f'{name}.'.startswith(f'{stage}.')
             and isinstance(module, nn.BatchNorm2d) and module.affine]
    if not found:
        raise InputError(f"there is no BatchNorm2d in '{stage}': give a network with BatchNorm or NBN")
    return [norm for norm in found if norm.num_features == found[-1].num_features]

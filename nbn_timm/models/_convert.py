"""Checkpoints of other formats to this package's: recognised by their keys and shapes, never by a file name.

The released format (yuxiangbao/NBN, commit 7365e21): torchvision's keys, raw NBN vectors, and one tensor
`scale_factor` that holds alpha for all NBN layers in its first entry; keys may carry `module.`.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.models import clean_state_dict, create_model, is_model

from nbn_timm.errors import InputError
from nbn_timm.layers import nbn_layers

__all__ = ['Recognized', 'checkpoint_filter_fn', 'convert_checkpoint', 'recognize', 'to_model_format']

StateDict = dict[str, torch.Tensor]

_BENCHMARKS = {1000: 'imagenet_lt', 8142: 'inat18', 365: 'places_lt', 100: 'cifar100_lt', 10: 'cifar10_lt'}
_BOTTLENECK_DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_BASIC_DEPTHS: dict[tuple[int, ...], int] = {(1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 34}

_FAMILIES: dict[tuple[int, ...], str] = {(64, 64): 'resnet', (128, 4): 'resnext'}  # by the first 3x3 convolution


@dataclass(frozen=True)
class Recognized:
    """What the keys and shapes of a checkpoint say it is."""

    arch: str  # a name in timm's registry, unless `experts` says that no model of this package fits
    num_classes: int
    released: bool  # needs conversion: it has the released `scale_factor`
    experts: int = 0  # of a RIDE network

    @property
    def tag(self) -> str:
        """The benchmark with that number of classes, or an empty string."""
        return _BENCHMARKS.get(self.num_classes, '')

    @property
    def name(self) -> str:
        """`arch.tag`."""
        return f'{self.arch}.{self.tag}' if self.tag else self.arch

    def __str__(self) -> str:
        form = 'released NBN format' if self.released else 'no conversion needed'
        experts = f', {self.experts} experts' if self.experts else ''
        benchmark = f' ({self.tag})' if self.tag else ''
        return f'{self.arch}{experts}, {self.num_classes} classes{benchmark}, {form}'


def recognize(state_dict: Mapping[str, torch.Tensor]) -> Recognized | None:
    """Tell which ResNet of this package, of timm or of the released code a bare state dict belongs to, if any."""
    keys = state_dict.keys()
    is_ride = 'linears.0.weight' in keys
    classifier = 'linears.0' if is_ride else 'fc'
    if f'{classifier}.weight' not in keys or 'conv1.weight' not in keys:
        return None
    backbone = _backbone(state_dict, 'layer{}s.0' if is_ride else 'layer{}')
    if backbone is None:
        return None
    nbn = 'scale_factor' in keys or any(key.endswith('.scale.alpha') for key in keys)
    rectified = f'{classifier}.bn.running_mean' in keys
    if backbone == 'resnext50' and not nbn and not is_ride:
        backbone = 'resnext50_32x4d'
    experts = sum(f'linears.{index}.weight' in keys for index in range(len(keys))) if is_ride else 0
    arch = f'{backbone}{"_ride" * is_ride}{"_nbn" * nbn}{"_lr" * rectified}'
    return Recognized(arch, state_dict[f'{classifier}.weight'].shape[0], 'scale_factor' in keys, experts)


def convert_checkpoint(state_dict: Mapping[str, torch.Tensor], recognized: Recognized) -> StateDict:
    """A released state dict with this package's keys, for the model that `recognized` names.

    Raises:
        InputError: There is no such model, or the keys do not fit it.
    """
    if not is_model(recognized.arch):
        raise InputError(f'the checkpoint is a {recognized}, for which this package has no model: give one of an '
                         'architecture that timm.list_models() names')
    model = create_model(recognized.arch, num_classes=recognized.num_classes, device='meta')
    converted = to_model_format(state_dict, model)
    wrong = converted.keys() ^ model.state_dict().keys()
    if wrong:
        raise InputError(f'the checkpoint looks like a {recognized.arch} but differs in {_some(wrong)}: it is damaged '
                         'or of a variant that this package does not know')
    return {key: value.contiguous() for key, value in converted.items()}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Make a state dict of this package's, timm's or the released format fit a zoo model; timm calls it while loading.

    Beyond `to_model_format` it drops a classifier of another number of classes whole, statistics of its logit
    rectification included, of which timm drops the weight and bias alone.
    """
    return _without_foreign_classifier(to_model_format(state_dict, model), model)


def to_model_format(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Bring a state dict of this package's, timm's or the released format to the keys of `model`.

    Raises:
        InputError: One of the two has NBN and the other has not: loaded regardless, the outputs would be garbage.
    """
    for wrapper in ('state_dict', 'model'):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    state_dict = clean_state_dict(dict(state_dict))
    layers = nbn_layers(model)
    owners = [name for name, layer in layers.items() if layer.owns_scale]
    has_scale = any(key.endswith('.scale.alpha') for key in state_dict)
    model_name = type(model).__name__
    if layers and not has_scale and 'scale_factor' not in state_dict:
        raise InputError(f'the checkpoint has no NBN scale, but {model_name} has NBN layers: load it into the plain '
                         'architecture, or give a checkpoint of an NBN model')
    if not layers and (has_scale or 'scale_factor' in state_dict):
        raise InputError(f'the checkpoint is of an NBN model, but {model_name} has no NBN layers, so that its outputs '
                         'would be garbage: use the architecture with _nbn in its name, or fold the checkpoint first')
    if 'scale_factor' in state_dict:
        alpha = state_dict.pop('scale_factor')[:1].clone()
        state_dict.update({f'{name}.scale.alpha': alpha.clone() for name in owners})
    return state_dict


def _without_foreign_classifier(state_dict: StateDict, model: nn.Module) -> StateDict:
    name = model.get_classifier(name_only=True)  # type: ignore[operator]
    there = state_dict.get(f'{name}.weight')
    here = getattr(model.get_submodule(name), 'weight', None)
    if there is not None and (here is None or here.shape[0] != there.shape[0]):
        return {key: value for key, value in state_dict.items() if not key.startswith(f'{name}.')}
    return state_dict


def _backbone(state_dict: Mapping[str, torch.Tensor], last_stages: str) -> str | None:
    """Name of a ResNet by its depth, width and grouping; `last_stages` is the key pattern of stages 3 and 4."""
    def blocks(stage: int) -> int:
        pattern = last_stages.format(stage) if stage > 2 else f'layer{stage}'
        return len({key.split('.')[pattern.count('.') + 1] for key in state_dict if key.startswith(f'{pattern}.')})

    depths = tuple(blocks(stage) for stage in range(1, 5))
    if depths[3] == 0:  # CIFAR: three stages
        same = depths[0] == depths[1] == depths[2] > 0
        return f'resnet{6 * depths[0] + 2}' if same and state_dict['conv1.weight'].shape[0] == 16 else None
    if 'layer1.0.conv3.weight' not in state_dict:
        depth = _BASIC_DEPTHS.get(depths)
        return f'resnet{depth}' if depth else None
    depth = _BOTTLENECK_DEPTHS.get(depths)
    family = _FAMILIES.get(tuple(state_dict['layer1.0.conv2.weight'].shape[:2]))
    return f'{family}{depth}' if depth and family else None


def _some(keys: set[str]) -> str:
    first = sorted(keys)[:3]
    return ', '.join(first) + (f' and {len(keys) - 3} more entries' if len(keys) > 3 else '')

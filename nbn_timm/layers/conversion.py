"""NBN into any model, out of it again, and across processes."""
import re
from collections.abc import Sequence
from copy import deepcopy
from itertools import takewhile
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as convert_plain_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm

from nbn_timm.errors import InputError
from nbn_timm.layers.frozen import is_frozen
from nbn_timm.layers.guard import forbid_lossy_conversions
from nbn_timm.layers.head import RectifiedLinear
from nbn_timm.layers.norm import (
    CAPPED,
    NormalizedBatchNorm2d,
    NormalizedBatchNormAct2d,
    SyncNormalizedBatchNorm2d,
    SyncNormalizedBatchNormAct2d,
    share_scale,
)

__all__ = ['add_nbn', 'fold_nbn', 'nbn_layers', 'convert_sync_batchnorm']


def nbn_layers(model: nn.Module) -> dict[str, NormalizedBatchNorm2d]:
    """All NBN layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NormalizedBatchNorm2d)}


def add_nbn(
        model: nn.Module,
        stages: str | Sequence[str] | None = None,
        layers: str = '',
        share_alpha: bool = True,
        gradient: str = CAPPED,
        alpha: float = 1.0,
        keep_function: bool = False,
) -> nn.Module:
    """Turn BatchNorm layers of a model into NBN layers, in place; their weights and biases stay.

    The function of the model changes, as the affine vectors get length `alpha`, unless it is to be kept. Weights that
    are all zero, as timm's `zero_init_last` leaves them, are set to one, since zero has no direction.

    Args:
        model: Any model with `nn.BatchNorm2d` or timm `BatchNormAct2d` layers, such as timm's ResNets, RegNets,
            EfficientNets and MobileNets.
        stages: Names of the submodules to treat; by default the last stage of `model.feature_info`.
        layers: Regular expression; inside the stages, BatchNorm2d layers whose name it finds are taken, by default
            all. BatchNorm1d layers stay as they are.
        share_alpha: One alpha for all layers of a stage, else one for each layer.
        gradient: See `NormalizedBatchNorm2d`.
        alpha: Initial alpha.
        keep_function: In evaluation the model computes what it did, up to rounding. Alpha is then the length of the
            longest weight, and the running statistics, which are else left as they are, take up what differs. In
            training, where batch statistics take their place, the vectors have that length.

    Returns:
        The same model.

    Raises:
        InputError: A stage does not exist, has no BatchNorm layer that matches, or has a kind that would be lost.
    """
    stages = stages or _last_stage(model)
    for stage in [stages] if isinstance(stages, str) else stages:
        converted: dict[nn.Module, NormalizedBatchNorm2d] = {}  # a layer may stand in several places
        for name in _batch_norms(model, stage, layers):
            norm = model.get_submodule(name)
            if norm not in converted:
                converted[norm] = _to_nbn(norm, name, gradient, alpha)
            _set_submodule(model, name, converted[norm])
            _guard_fusion(model, name)
        if share_alpha:
            share_scale(converted.values())
        if keep_function:
            _keep_function(list(converted.values()), share_alpha)
    return model


@torch.no_grad()
def _keep_function(layers: Sequence[NormalizedBatchNorm2d], share_alpha: bool) -> None:
    """Choose alpha and running statistics so that NBN layers compute in evaluation what plain BatchNorm would.

    With G and B the effective weight and bias, G (x - m') / s' + B = g (x - m) / s + b holds for s' = s G / g and
    m' = m - s (b - B) / g. No s' is smaller than s if no G is smaller than g.
    """
    lengths = [layer.weight.double().norm() for layer in layers]
    for layer, length in zip(layers, lengths, strict=True):
        if layer.running_mean is None or layer.running_var is None:
            continue
        g = layer.weight.double()
        # A weight of zero could not be divided by; this one is lost in rounding.
        floor = 1e-7 * g.abs().max()
        g = torch.where(g.abs() < floor, floor, g)
        layer.weight.copy_(g)
        layer.scale.alpha.fill_(float(max(lengths) if share_alpha else length))
        weight, bias = (value.double() for value in layer.effective_affine())
        variance = layer.running_var.double() + layer.eps
        mean = layer.running_mean.double() - variance.sqrt() * (layer.bias.double() - bias) / g
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((variance * (weight / g).square() - layer.eps).clamp(min=0))


def fold_nbn(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Fold every NBN layer into a plain BatchNorm and every rectified head into a plain Linear.

    In eval mode the result computes the same function, up to rounding, and its state dict has exactly the keys of the
    plain model, so timm loads it strictly without this package. Fold before anything that merges BatchNorm into other
    layers from its raw weight and bias, such as `torch.nn.utils.fuse_conv_bn_eval`.

    Args:
        model: A model with NBN layers or rectified heads; others pass unchanged.
        inplace: Change the model given, else a copy.
    """
    if isinstance(model, NormalizedBatchNorm2d | RectifiedLinear):
        return model.fuse()
    model = model if inplace else deepcopy(model)
    _lift_guards(model)
    folded: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, NormalizedBatchNorm2d | RectifiedLinear):
            folded.setdefault(module, module.fuse())
            _set_submodule(model, name, folded[module])
    return model


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Make all BatchNorm layers synchronise their training statistics between processes; NBN layers stay NBN.

    timm's and torch's functions of this name would replace NBN by plain BatchNorm, and are refused on such models.
    Layers that `freeze_nbn` froze stay as they are.

    Args:
        module: The model; it is changed in place, unless it is itself a BatchNorm layer.
        process_group: Processes to synchronise over, by default all.

    Returns:
        The converted module.
    """
    if is_frozen(module):
        return module
    if isinstance(module, NormalizedBatchNorm2d):
        # Only the class changes, so parameters, buffers and the shared alpha stay as they are.
        act = isinstance(module, NormalizedBatchNormAct2d)
        module.__class__ = SyncNormalizedBatchNormAct2d if act else SyncNormalizedBatchNorm2d
        module.process_group = process_group
        return module
    if isinstance(module, _BatchNorm):
        return convert_plain_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        converted = convert_sync_batchnorm(child, process_group)
        if converted is not child:
            setattr(module, name, converted)
    return module


def _last_stage(model: nn.Module) -> str:
    info = getattr(model, 'feature_info', None)
    if not info:
        raise InputError(f'{type(model).__name__} does not list its stages (feature_info): name them in `stages`')
    name = info[-1]['module']
    if next(_get_stage(model, name).parameters(), None) is not None:
        return name
    # Some families list an activation, or a final convolution that most members lack, in place of what precedes it.
    parent, _, last = name.rpartition('.')
    before = list(takewhile(lambda child: child[0] != last, model.get_submodule(parent).named_children()))
    for child, module in reversed(before):
        if next(module.parameters(), None) is not None:
            full_name = f'{parent}.{child}' if parent else child
            return f'{full_name}.{len(module) - 1}' if isinstance(module, nn.Sequential) else full_name
    raise InputError(f"the last stage of {type(model).__name__}, '{name}', has no parameters: name others in `stages`")


def _get_stage(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = ', '.join(child for child, _ in model.named_children())
        raise InputError(f"{type(model).__name__} has no stage '{name}': choose among {known}") from None


def _batch_norms(model: nn.Module, stage: str, layers: str) -> list[str]:
    """Full names of the layers of a stage to convert; a stage may be a BatchNorm layer itself."""
    found = [name for name, module in _get_stage(model, stage).named_modules(remove_duplicate=False)
             if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and re.search(layers, name)]
    if not found:
        wanted = f' that matches {layers!r}' if layers else ''
        raise InputError(f"'{stage}' of {type(model).__name__} has no BatchNorm2d layer{wanted}: name other stages, or "
                         'use a model with BatchNorm')
    return [f'{stage}.{name}' if name else stage for name in found]


_FUSIONS = ('fuse', 'reparameterize', 'switch_to_deploy')  # what timm's reparameterize_model calls


def _guard_fusion(model: nn.Module, name: str) -> None:
    """Make the modules around an NBN layer refuse to fuse, until it is folded.

    RepVIT, FastViT and their kind merge a BatchNorm into the convolution before it, from the raw `weight` and `bias`.
    """
    while name:
        name = name.rpartition('.')[0]
        around = model.get_submodule(name)
        for method in _FUSIONS:
            if hasattr(around, method):
                setattr(around, method, _RefusedFusion(type(around).__name__))


def _lift_guards(model: nn.Module) -> None:
    for module in model.modules():
        for method in _FUSIONS:
            if isinstance(vars(module).get(method), _RefusedFusion):
                delattr(module, method)


class _RefusedFusion:
    """Stands in for a method of a module that would fuse away NBN."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise InputError(f'{self.owner} would fuse its BatchNorm layers without their NBN: call nbn_timm.fold_nbn on '
                         'the model first')


def _to_nbn(norm: nn.Module, name: str, gradient: str, alpha: float) -> NormalizedBatchNorm2d:
    # By exact type: a subclass would lose what it adds.
    if type(norm) is nn.BatchNorm2d and norm.affine:
        return NormalizedBatchNorm2d.from_batch_norm(norm, gradient, alpha)
    if type(norm) is BatchNormAct2d and norm.affine:
        return NormalizedBatchNormAct2d.from_batch_norm(norm, gradient, alpha)
    if isinstance(norm, NormalizedBatchNorm2d):
        raise InputError(f"'{name}' has NBN already: add it once, or name other stages")
    raise InputError(
        f"'{name}' is a {type(norm).__name__}{'' if getattr(norm, 'affine', True) else ' without affine parameters'},"
        ' which cannot become NBN: add NBN first and convert afterwards, or leave this layer out with `layers`')


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)


forbid_lossy_conversions()

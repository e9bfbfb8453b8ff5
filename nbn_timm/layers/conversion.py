"""NBN into any model, out of it again, and across processes."""
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as convert_plain_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm

from nbn_timm.errors import InputError
from nbn_timm.layers.affine import CAPPED, NormalizedAffine, share_scale
from nbn_timm.layers.frozen import keeps_statistics
from nbn_timm.layers.guard import forbid_lossy_conversions
from nbn_timm.layers.head import BottleneckLinear, RectifiedLinear
from nbn_timm.layers.layer_norm import is_stateless, stateless_kind
from nbn_timm.layers.norm import (
    NormalizedBatchNorm2d,
    NormalizedBatchNormAct2d,
    SyncNormalizedBatchNorm2d,
    SyncNormalizedBatchNormAct2d,
)
from nbn_timm.layers.readers import NOT_KEPT, Reader, linear_readers
from nbn_timm.layers.try_images import try_images

__all__ = ['add_nbn', 'fold_nbn', 'nbn_layers', 'convert_sync_batchnorm']


def nbn_layers(model: nn.Module) -> dict[str, Any]:
    """All NBN layers of a model by name, in module order; each is a `NormalizedAffine`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NormalizedAffine)}


def add_nbn(
        model: nn.Module,
        stages: str | Sequence[str] | None = None,
        layers: str = '',
        share_alpha: bool = True,
        gradient: str = CAPPED,
        alpha: float = 1.0,
        keep_function: bool = False,
) -> nn.Module:
    """Turn normalisation layers of a model into NBN layers, in place; their weights and biases stay.

    In a stage with `nn.BatchNorm2d` or timm's `BatchNormAct2d` these are taken, as in the paper. In any other stage it
    is the LayerNorm, GroupNorm and RmsNorm layers, torch's and timm's, for maps and with an activation too.

    The function of the model changes, as the affine vectors get length `alpha`, unless it is to be kept. Weights that
    are all zero, as timm's `zero_init_last` leaves them, are set to one, since zero has no direction.

    Args:
        model: Any model with normalisation layers that have a weight, such as timm's convolutional networks and
            transformers.
        stages: Names of the submodules to treat; by default the last stage of `model.feature_info`.
        layers: Regular expression; inside the stages, layers whose name it finds are taken, by default all.
            BatchNorm1d layers stay as they are.
        share_alpha: One alpha for all layers of a stage, else one for each layer.
        gradient: See `NormalizedBatchNorm2d`.
        alpha: Initial alpha.
        keep_function: In evaluation the model computes what it did, up to rounding. Alpha is then the length of the
            longest weight. What differs is taken up by the running statistics of a BatchNorm, which are else left as
            they are (in training, where batch statistics take their place, the vectors have that length), and after
            a layer without such statistics by the linear layers and convolutions that read what it gives.

    Returns:
        The same model.

    Raises:
        InputError: A stage does not exist, has no layer that matches, or has one of a kind that would be lost; or the
            function cannot be kept, which is tried on a copy. The model has not been changed then.
    """
    stages = stages or _last_stage(model)
    found = {stage: _norms(model, stage, layers) for stage in ([stages] if isinstance(stages, str) else stages)}
    names = list(dict.fromkeys(name for of_stage in found.values() for name in of_stage))
    for name in names:
        _check_kind(model, name)
    once = {model.get_submodule(name): name for name in reversed(names)}
    stateless = [name for norm, name in once.items() if is_stateless(norm)]
    convert = partial(_convert, found=list(found.values()), share_alpha=share_alpha, gradient=gradient, alpha=alpha)
    if not keep_function:
        return convert(model)
    for name in names:
        _check_keeps(model, name)
    convert = partial(convert, readers=linear_readers(model, stateless) if stateless else {})
    if stateless:
        _check_kept(model, convert)
    return convert(model)


def _convert(
        model: nn.Module,
        found: Sequence[Sequence[str]],
        share_alpha: bool,
        gradient: str,
        alpha: float,
        readers: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Put NBN into a model, in place.

    Args:
        found: Names of the layers, by stage.
        share_alpha, gradient, alpha: See `add_nbn`.
        readers: To keep the function, by layer without running statistics the names of those that take up what
            changes; None lets the function change.
    """
    for of_stage in found:
        converted: dict[nn.Module, NormalizedAffine] = {}
        read_by: dict[nn.Module, list[Reader]] = {}
        for name in of_stage:
            norm = model.get_submodule(name)
            if norm not in converted:  # a layer may stand in several places
                converted[norm] = _to_nbn(norm, gradient, alpha)
                read_by[converted[norm]] = []
            read_by[converted[norm]] += [Reader(model.get_submodule(reader))  # type: ignore[arg-type]
                                         for reader in (readers or {}).get(name, ())]
            _set_submodule(model, name, converted[norm])
            _guard_fusion(model, name)
        if share_alpha:
            share_scale(converted.values())
        if readers is not None:
            _keep_function(read_by, share_alpha)
    return model


_KEPT = 1e-4  # of the largest output; a function that moved does so by far more, and rounding by far less


@torch.no_grad()
def _check_kept(model: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> None:
    """Try on a copy, in float32 at least, whether a conversion keeps what the model gives for an image.

    Raises:
        InputError: It does not.
    """
    trial = deepcopy(model).cpu().eval()
    image = try_images(trial)
    if image.dtype not in (torch.float32, torch.float64):
        trial, image = trial.float(), image.float()
    before = _tensors(trial(image))
    moved = max(float((after - value).abs().max() / value.abs().max().clamp(min=1e-12))
                for after, value in zip(_tensors(convert(trial)(image)), before, strict=True))
    if not moved <= _KEPT:
        raise InputError('the function of the network cannot be kept, since its outputs on an image would move by '
                         f'{moved:.1e} of the largest: {NOT_KEPT}')


def _tensors(output: Any) -> list[torch.Tensor]:
    """What a network gives: logits, or several maps."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in _tensors(part)]


@torch.no_grad()
def _keep_function(layers: Mapping[Any, Sequence[Reader]], share_alpha: bool) -> None:
    """Choose alpha, and what takes up the rest, so that NBN layers compute in evaluation what plain ones would.

    Args:
        layers: With the layers that read what each of them gives.
        share_alpha: All layers have the longest weight's length.
    """
    lengths = [layer.weight.double().norm() for layer in layers]
    for (layer, readers), length in zip(layers.items(), lengths, strict=True):
        alpha = float(max(lengths) if share_alpha else length)
        if isinstance(layer, NormalizedBatchNorm2d):
            _move_to_statistics(layer, alpha)
        else:
            _move_to_readers(layer, alpha, readers)


def _move_to_statistics(layer: NormalizedBatchNorm2d, alpha: float) -> None:
    """With G and B the effective weight and bias, G (x - m') / s' + B = g (x - m) / s + b holds for s' = s G / g and
    m' = m - s (b - B) / g. No s' is smaller than s if no G is smaller than g.
    """
    if layer.running_mean is None or layer.running_var is None:
        return
    g = layer.weight.double()
    # A weight of zero could not be divided by; this one is lost in rounding.
    floor = 1e-7 * g.abs().max()
    g = torch.where(g.abs() < floor, floor, g)
    layer.weight.copy_(g)
    layer.scale.alpha.fill_(alpha)
    weight, bias = (value.double() for value in layer.effective_affine())
    variance = layer.running_var.double() + layer.eps
    mean = layer.running_mean.double() - variance.sqrt() * (layer.bias.double() - bias) / g
    layer.running_mean.copy_(mean)
    layer.running_var.copy_((variance * (weight / g).square() - layer.eps).clamp(min=0))


def _move_to_readers(layer: NormalizedAffine, alpha: float, readers: Sequence[Reader]) -> None:
    """The effective weight is that of before times a number, by which the readers divide theirs; theirs also take up
    what the bias lacks or has too much.
    """
    weight, bias = layer.weight.double(), layer.bias
    layer.scale.alpha.fill_(alpha)
    applied, applied_bias = layer.effective_affine()
    factor = float(applied.double().norm() / weight.norm())
    missing = None if bias is None or applied_bias is None else bias.double() - applied_bias.double() / factor
    for reader in readers:
        reader.take_up(factor, missing)


def fold_nbn(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Fold every NBN layer into a plain layer of its kind, and every rectified or bottleneck head into a plain Linear.

    In eval mode the result computes the same function, up to rounding, and its state dict has exactly the keys of the
    plain model, so timm loads it strictly without this package. Fold before anything that merges BatchNorm into other
    layers from its raw weight and bias, such as `torch.nn.utils.fuse_conv_bn_eval`.

    Args:
        model: A model with NBN layers or such heads; others pass unchanged.
        inplace: Change the model given, else a copy.
    """
    foldable = NormalizedAffine | RectifiedLinear | BottleneckLinear
    if isinstance(model, foldable):
        return model.fuse()
    model = model if inplace else deepcopy(model)
    _lift_guards(model)
    folded: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, foldable):
            folded.setdefault(module, module.fuse())
            _set_submodule(model, name, folded[module])
    return model


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Make all BatchNorm layers synchronise their training statistics between processes; NBN layers stay NBN.

    timm's and torch's functions of this name would replace NBN by plain BatchNorm, and are refused on such models.
    Layers whose statistics are fixed stay as they are.

    Args:
        module: The model; it is changed in place, unless it is itself a BatchNorm layer.
        process_group: Processes to synchronise over, by default all.

    Returns:
        The converted module.
    """
    if keeps_statistics(module):
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
    if name not in dict(model.named_modules()):  # a few families list names that their modules do not have
        name = _last_group(model) or name
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


def _last_group(model: Any) -> str | None:
    """The last of the numbered modules into which timm groups the parameters of a model; None if it does not.

    Where several have the last number, such as a stage and the embedding before it, it is the one with most parameters.
    """
    if not hasattr(model, 'group_matcher'):
        return None
    blocks = model.group_matcher(coarse=True).get('blocks', ())
    patterns = [blocks] if isinstance(blocks, str) else [pattern for pattern, number in blocks if number is None]
    sizes: dict[tuple[tuple[int, ...], str], int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        found = next(filter(None, (re.match(pattern, name) for pattern in patterns)), None)
        if found is not None:
            sizes[tuple(int(number) for number in found.groups() if number), found[0]] += parameter.numel()
    last = max((numbers for numbers, _ in sizes), default=())
    return max(((size, name) for (numbers, name), size in sizes.items() if numbers == last), default=(0, None))[1]


def _get_stage(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = ', '.join(child for child, _ in model.named_children())
        raise InputError(f"{type(model).__name__} has no stage '{name}': choose among {known}") from None


def _norms(model: nn.Module, stage: str, layers: str) -> list[str]:
    """Full names of the layers of a stage to convert; a stage may be a layer itself."""
    there = {name: module for name, module in _get_stage(model, stage).named_modules(remove_duplicate=False)
             if re.search(layers, name)}
    found = [name for name, module in there.items() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    found = found or [name for name, module in there.items()
                      if isinstance(module, NormalizedAffine) or is_stateless(module)]
    if not found:
        wanted = f' that matches {layers!r}' if layers else ''
        raise InputError(f"'{stage}' of {type(model).__name__} has no BatchNorm2d layer{wanted}, and no LayerNorm, "
                         'GroupNorm or RmsNorm with a weight: name other stages, or use a model that has some')
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


def _check_kind(model: nn.Module, name: str) -> None:
    """Refuse a layer that cannot become NBN, before anything has changed.

    Raises:
        InputError: It is one.
    """
    norm = model.get_submodule(name)
    if isinstance(norm, NormalizedAffine):
        raise InputError(f"'{name}' has NBN already: add it once, or name other stages")
    if _kind(norm) is None:
        lacks = '' if getattr(norm, 'affine', True) else ' without affine parameters'
        raise InputError(f"'{name}' is a {type(norm).__name__}{lacks}, which cannot become NBN: add NBN first and "
                         'convert afterwards, or leave this layer out with `layers`')
    parent = model.get_submodule(name.rpartition('.')[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise InputError(f"'{name}' is a part of torch's TransformerEncoderLayer, which reads its raw weight in "
                         'evaluation: leave this layer out with `layers`')


def _check_keeps(model: nn.Module, name: str) -> None:
    """Refuse a layer whose function NBN cannot have.

    Raises:
        InputError: It is one.
    """
    norm: Any = model.get_submodule(name)
    if norm.weight.is_meta:
        reason = 'has no values on the device meta'
    elif not norm.weight.any():
        reason = 'has a weight of zeros, which NBN cannot have'
    elif isinstance(norm, _BatchNorm) and norm.running_var is None:
        reason = 'has no running statistics, which would take up what changes'
    else:
        return
    raise InputError(f"the function of the network cannot be kept, since '{name}' {reason}: {NOT_KEPT}")


def _kind(norm: nn.Module) -> Callable[[str, float], NormalizedAffine] | None:
    """What makes an NBN layer of a plain one, by gradient and alpha; None if nothing does."""
    # By exact type: a subclass would lose what it adds.
    if type(norm) is nn.BatchNorm2d and norm.affine:
        return partial(NormalizedBatchNorm2d.from_batch_norm, norm)
    if type(norm) is BatchNormAct2d and norm.affine:
        return partial(NormalizedBatchNormAct2d.from_batch_norm, norm)
    return stateless_kind(norm)


def _to_nbn(norm: nn.Module, gradient: str, alpha: float) -> NormalizedAffine:
    make = _kind(norm)
    assert make is not None  # `_check_kind` was asked
    return make(gradient, alpha)


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)


forbid_lossy_conversions()

"""Stops code that knows NBN only as a `BatchNorm2d` before it puts a plain layer in its place.

A converter of torch, timm, transformers, detectron2 or apex asks for `BatchNorm2d`, builds its own kind of layer of the
same size and copies the raw weight and bias, which without their normalisation give garbage. All of them build a layer
with running statistics from within a function that walks the model, so that is where they are stopped: at the first
layer, before anything of the model has changed. What cannot be seen is written in docs/freezing.md.

NBN in the place of a LayerNorm, GroupNorm or RmsNorm is of none of these kinds, so that what asks for them passes over
it. What puts a layer with the raw weight in the place of any NBN layer by name is stopped there, and what gives an NBN
layer another class in `NormalizedAffine`. A wrapper keeps the layer in it, and may take its place.
"""
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_module_registration_hook

from nbn_timm.errors import InputError
from nbn_timm.layers.affine import NormalizedAffine
from nbn_timm.layers.layer_norm import StatelessNbn
from nbn_timm.layers.norm import NormalizedBatchNorm2d

__all__ = ['forbid_lossy_conversions']

# Of these, models are built, and NBN is folded into them.
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)

# These compute what they were made from.
_COMPILED = (torch.fx.GraphModule, torch.jit.ScriptModule)

# Frames of their own inside of a function, before Python 3.12.
_INNER = ('<listcomp>', '<dictcomp>', '<setcomp>', '<genexpr>')

_ROUNDED = 0.01  # relative difference of a vector that was copied in bfloat16

_THIS_ROOM = str(Path(__file__).parent)  # whose walkers know NBN


def forbid_lossy_conversions() -> None:
    """Install the two hooks, the only globals of torch that this package sets."""
    register_module_buffer_registration_hook(_refuse_to_build)  # type: ignore[arg-type]
    register_module_module_registration_hook(_refuse_to_replace)  # type: ignore[arg-type]


def _is_foreign(module: Any) -> bool:
    return type(module) not in _PLAIN and not isinstance(module, (NormalizedBatchNorm2d, *_COMPILED))


def _refuse_to_build(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
    if name == 'running_mean' and buffer is not None and _is_foreign(module):
        lost = _nbn_under_conversion(module, buffer.numel())
        if lost:
            raise _refusal(type(module).__name__, lost)


def _refuse_to_replace(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    there = parent._modules.get(name)
    if not isinstance(there, NormalizedAffine) or module is None or _holds_nbn(module):
        return
    lost = isinstance(there, NormalizedBatchNorm2d) and hasattr(module, 'running_var') and _is_foreign(module)
    with suppress(RuntimeError, AssertionError):  # of fake tensors, which have no values to compare
        lost = lost or (_has_raw_scale(module, there) if isinstance(there, NormalizedBatchNorm2d) else
                        isinstance(there, StatelessNbn) and _has_raw_weight(module, there))
    if lost:
        raise _refusal(type(module).__name__, name)


def _holds_nbn(module: nn.Module) -> bool:
    """Whether a module is a wrapper around NBN, registered or not, or a compiled form of whatever it was."""
    return isinstance(module, _COMPILED) or any(
        isinstance(part, NormalizedAffine) for part in (*module.modules(), *vars(module).values()))


@torch.no_grad()
def _has_raw_scale(module: nn.Module, nbn: NormalizedBatchNorm2d) -> bool:
    """Whether a layer has the raw vector g of a trained NBN layer, or g over the standard deviations, as its scale.

    Before a training g is 1 in all places, as in any new layer, which then tells nothing.
    """
    raw = nbn.weight.detach()
    if not _can_compare(raw) or raw.numel() < 2 or torch.equal(raw, raw[:1].expand_as(raw)):
        return False
    pairs = [(raw, nbn.effective_affine()[0])]
    if nbn.running_var is not None and _can_compare(nbn.running_var):
        deviation = torch.rsqrt(nbn.running_var + nbn.eps)
        pairs.append((raw * deviation, pairs[0][1] * deviation))
    tensors = [tensor.detach().reshape(-1).to(raw) for tensor in (*module.parameters(), *module.buffers())
               if _can_compare(tensor) and tensor.numel() == raw.numel() and tensor.is_floating_point()]
    return any(torch.allclose(tensor, copied, rtol=_ROUNDED, atol=0)
               and torch.dist(tensor, copied) < torch.dist(tensor, applied)
               for tensor in tensors for copied, applied in pairs)


def _can_compare(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values of its own: none of fake, sharded or empty ones."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta


def _has_raw_weight(module: nn.Module | None, nbn: StatelessNbn) -> bool:
    """Whether a layer of another kind has the vector of an NBN layer without its normalisation."""
    weight = getattr(module, 'weight', None)
    if isinstance(module, NormalizedAffine) or not isinstance(weight, torch.Tensor) or weight.shape != nbn.weight.shape:
        return False
    if weight is nbn.weight:
        return True
    if weight.is_meta or nbn.weight.is_meta:
        return False
    raw, applied = nbn.weight.detach(), nbn.effective_affine()[0].detach()
    like_raw, like_applied = (torch.dist(weight.detach().to(vector), vector) for vector in (raw, applied))
    return bool(like_raw < like_applied)


def _refusal(kind: str, lost: str) -> InputError:
    return InputError(
        f"this conversion to {kind} of an NBN layer ('{lost}') would drop its normalisation: use "
        'nbn_timm.convert_sync_batchnorm for synchronised statistics, nbn_timm.freeze_nbn for frozen layers, or '
        'nbn_timm.fold_nbn before anything else')


def _nbn_under_conversion(made: nn.Module, size: int) -> str | None:
    """The NBN layer that is lost if `made`, of `size` channels, is to take the place of a BatchNorm; None if none is.

    It is if the function that makes it has a BatchNorm of that size at hand, and that BatchNorm is NBN, or the function
    was called on a model with NBN, or another one that walks such a model has handed it the BatchNorm.
    """
    maker = _frame_outside(made)
    if maker is None:
        return None
    held = [value for value in maker.f_locals.values() if isinstance(value, _BatchNorm) and value.num_features == size]
    if not held:
        return None
    walker, around = _walker(maker, held)
    if walker.f_code.co_filename.startswith(_THIS_ROOM):
        return None
    first_calls = [_first_call(frame) for frame in {maker, walker}]
    arguments = [one for frame in first_calls for one in _module_arguments(frame)]
    for root in [*around, *held, *arguments, *_applied_to(first_calls)]:
        for name, module in root.named_modules():
            if isinstance(module, NormalizedBatchNorm2d):
                return name or type(module).__name__
    return None


def _walker(maker: FrameType, held: list[_BatchNorm]) -> tuple[FrameType, list[nn.Module]]:
    """The nearest frame, from `maker` up, that has one of the layers at hand and a module around it, and these modules.

    That is a function which walks a model, and calls another one to make each layer. Without one it is `maker`.
    """
    frame: FrameType | None = maker
    while frame is not None:
        modules = [value for value in frame.f_locals.values() if isinstance(value, nn.Module)]
        mine = [layer for layer in held if any(module is layer for module in modules)]
        around = [module for module in (*modules, *_modules_reached(frame)) if not isinstance(module, _BatchNorm)
                  and any(part is layer for part in module.modules() for layer in mine)] if mine else []
        if around:
            return frame, around
        frame = frame.f_back
    return maker, []


def _frame_outside(made: nn.Module) -> FrameType | None:
    """The frame that called the constructor of `made`; None if that is not running."""
    frame: FrameType | None = sys._getframe(3)
    constructs = False
    while frame is not None and (_first_argument(frame) is made or frame.f_code.co_name in _INNER):
        constructs = constructs or frame.f_code.co_name == '__init__'
        frame = frame.f_back
    return frame if constructs else None


def _first_call(frame: FrameType) -> FrameType:
    """The outermost call of a recursive function; between two may stand others of its file, as comprehensions."""
    first, code = frame, frame.f_code
    above = frame.f_back
    while above is not None and above.f_code.co_filename == code.co_filename:
        first = above if above.f_code is code else first
        above = above.f_back
    return first


def _module_arguments(frame: FrameType) -> list[nn.Module]:
    code = frame.f_code
    arguments = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
    values = [frame.f_locals.get(name) for name in arguments]
    return [value for value in values if isinstance(value, nn.Module)]


def _applied_to(frames: list[FrameType]) -> list[nn.Module]:
    """The models on which `nn.Module.apply` calls one of these functions, part by part."""
    found = []
    for frame in frames:
        above = frame.f_back
        while above is not None and above.f_code is nn.Module.apply.__code__:
            found.append(above.f_locals['self'])
            above = above.f_back
    return found


def _modules_reached(frame: FrameType) -> list[nn.Module]:
    """Modules that a function has from its object or from globals; none if it was called on modules."""
    if any(not isinstance(module, _BatchNorm) for module in _module_arguments(frame)):
        return []
    values = [*getattr(_first_argument(frame), '__dict__', {}).values(),
              *(frame.f_globals.get(name) for name in frame.f_code.co_names)]
    return [value for value in values if isinstance(value, nn.Module)]


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None

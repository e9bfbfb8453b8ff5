"""What NBN does to an affine part: vectors of a learnable common length in the place of weight and bias.

The formula stands here alone. `norm.py` applies it to BatchNorm, `layer_norm.py` to LayerNorm, GroupNorm and RmsNorm.
"""
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from nbn_timm.errors import InputError, nearest

__all__ = ['CAPPED', 'GRADIENTS', 'NbnScale', 'NormalizedAffine', 'give_direction', 'share_scale']

CAPPED = 'capped'
GRADIENTS = (CAPPED, 'released')
_NORM_EPS = 1e-6  # of the released code; a larger one changes the outputs of released checkpoints


def give_direction(weight: torch.Tensor) -> None:
    """Set a weight that is all zero to ones, in place, since it has no direction to normalise.

    Weights without values (of the device meta, or fake ones) are left alone.
    """
    try:
        all_zero = not weight.is_meta and not weight.any()
    except RuntimeError:  # of a fake tensor nothing is known but its shape
        return
    if all_zero:
        nn.init.ones_(weight)


class NbnScale(nn.Module):
    """Owner of one alpha, the learnable length of normalised vectors. Layers that share an alpha share this module.

    Sharing the module, not the Parameter, keeps the layers tied through `load_state_dict(assign=True)`, `to_empty`,
    `deepcopy` and EMA. Wherever names are listed, the first layer in module order has the alpha: in the state dict of a
    model, of a part of it, and of a model whose first layer was replaced.
    """

    def __init__(self, alpha: float = 1.0, device=None, dtype=None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device, dtype=dtype))
        self._loads: list[str] | None = None

    def named_modules(self, memo: Any = None, prefix: str = '', remove_duplicate: bool = True) -> Iterator[Any]:
        """As of any module, but once per listing also where duplicates are asked for.

        `torch.func.functional_call` swaps a tensor in once for each of its names and puts the first one's value back,
        then the second one's, so that a module with two names keeps the foreign tensor.
        """
        yield from super().named_modules(memo, prefix, remove_duplicate=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not any(_is_same(value, self.alpha) for key, value in destination.items() if key.endswith('alpha')):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
            self,
            state_dict: dict[str, Any],
            prefix: str,
            local_metadata: Any,
            strict: bool,
            missing_keys: list[str],
            unexpected_keys: list[str],
            error_msgs: list[str],
    ) -> None:
        key = f'{prefix}alpha'
        if self._loads is not missing_keys:  # this list is one object per load, and the first layer comes first
            self._loads = missing_keys
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        elif key in state_dict:
            error_msgs.append(f'{key} is there, but this layer shares the alpha of another: build the model with '
                              'share_alpha=False to load a checkpoint that has one alpha per layer')

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_loads': None}


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same tensor, or one detached from it."""
    if one is other:
        return True
    one, other = (getattr(tensor, '_local_tensor', tensor) for tensor in (one, other))  # of a DTensor
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata
                and one.storage_offset() == other.storage_offset())


def _unit(vector: torch.Tensor, cap_gradient: bool, eps: float = _NORM_EPS) -> torch.Tensor:
    """`vector` scaled to unit length, [C] to [C].

    The Jacobian contains 1/(|v| + eps): at the initial bias, zero, it multiplies the gradient by 1e6, after which the
    bias is too long to turn. Capping that factor at 1 changes no value: d + c (v - d) equals v, bit for bit.
    """
    if cap_gradient:
        fixed = vector.detach()
        factor = (torch.linalg.vector_norm(fixed) + eps).clamp(max=1.0)
        vector = fixed + factor * (vector - fixed)
    return vector / (torch.linalg.vector_norm(vector) + eps)


class _Kept:
    """What a layer keeps between forward passes in evaluation: weight, bias and alpha, and what they amount to.

    Copies and pickles of it are empty, and TorchScript, which would save a tuple, passes over it.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _may_keep(*tensors: torch.Tensor | None) -> bool:
    """Whether results of these parameters may be kept: nothing differentiates, traces or transforms them, comparing
    them does not wait for a GPU, and they are in full precision, which autocast does not change.

    Nothing is to outlive a dispatch mode, as that of fake tensors or of `make_fx`, or to come into one.
    """
    learns = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not nn.Parameter or tensor.dtype is not torch.float32 or not tensor.is_cpu or (
                learns and tensor.requires_grad):
            return False
    return not torch.jit.is_tracing() and not torch._C._len_torch_dispatch_stack()


class NormalizedAffine(nn.Module):
    """Mixed into a normalisation layer: weight alpha * g / (|g| + 1e-6) and bias alpha * b / (|b| + 1e-6).

    `weight` and `bias` hold the raw vectors g and b, of whatever shape; a layer without a bias has None there. The
    layer computes with what `_applied_affine` gives.
    """

    if TYPE_CHECKING:  # TorchScript would take the annotations for declarations
        weight: Any
        bias: Any

    def _normalize_affine(self, gradient: str, alpha: float, device=None, dtype=None) -> None:
        """Give the layer, which is being made, its alpha.

        Raises:
            InputError: `gradient` is unknown.
        """
        if gradient not in GRADIENTS:
            raise InputError(f"gradient '{gradient}' is unknown: choose one of {', '.join(GRADIENTS)}"
                             f'{nearest(str(gradient), GRADIENTS)}')
        self.scale = NbnScale(alpha, device=device, dtype=dtype)
        self.cap_gradient = gradient == CAPPED
        self._kept = _Kept()

    def effective_affine(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and the bias that are applied, each with length |alpha|; None without a bias."""
        bias = self.bias
        return self._scaled(self.weight), None if bias is None else self._scaled(bias)

    def _scaled(self, vector: torch.Tensor) -> torch.Tensor:
        return _unit(vector, self.cap_gradient) * self.scale.alpha

    def _applied_affine(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`effective_affine`, in evaluation without computing it again while weight, bias and alpha are the same."""
        if torch.jit.is_scripting():
            return self.effective_affine()
        return self._folded_affine()

    @torch.jit.unused
    def _folded_affine(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = self.weight
        if self.training or torch.compiler.is_compiling() or type(weight) is not nn.Parameter:
            return self.effective_affine()
        bias, alpha = self._parameters.get('bias'), self._modules['scale']._parameters.get('alpha')  # type: ignore[union-attr]
        if not _may_keep(weight, bias, alpha):
            return self.effective_affine()
        assert bias is not None and alpha is not None
        kept = self._kept.tensors
        # Values are compared, since versions do not count edits through `.data`; it costs a microsecond a tensor.
        if kept is None or not (
                torch.equal(weight, kept[0]) and torch.equal(bias, kept[1]) and torch.equal(alpha, kept[2])):
            with torch.inference_mode(False), torch.no_grad():
                kept = (weight.clone(), bias.clone(), alpha.clone(), *self.effective_affine())
            self._kept.tensors = kept
        return kept[3], kept[4]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            InputError: It is the class, and another one that is not NBN, whose `forward` would take the raw vectors.
        """
        if name == '__class__' and not issubclass(value, NormalizedAffine):
            raise InputError(f'{value.__name__} as the class of an NBN layer would drop its normalisation: use '
                             'nbn_timm.convert_sync_batchnorm, nbn_timm.freeze_nbn or nbn_timm.fold_nbn')
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault('_kept', _Kept())  # whole layers that were saved before there was this

    def fuse(self) -> nn.Module:
        """The same function as a plain layer; `timm.models.reparameterize_model` calls this."""
        raise NotImplementedError


def share_scale(layers: Iterable[NormalizedAffine]) -> None:
    """Give all `layers` the alpha of the first; it has one key in the state dict, see `NbnScale`."""
    first, *others = layers
    for layer in others:
        layer.scale = first.scale

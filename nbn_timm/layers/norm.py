"""Normalised batch normalisation (NBN): BatchNorm whose weight and bias vectors have a learnable common length.

Source: Bao et al., "Normalizing Batch Normalization for Long-Tailed Recognition", IEEE TIP 2024 (arXiv 2501.03122).
"""
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch.distributed.nn.functional import all_gather

from nbn_timm.errors import InputError, nearest

__all__ = [
    'NormalizedBatchNorm2d', 'NormalizedBatchNormAct2d', 'SyncNormalizedBatchNorm2d', 'SyncNormalizedBatchNormAct2d',
    'NbnScale', 'share_scale', 'GRADIENTS',
]

CAPPED = 'capped'
GRADIENTS = (CAPPED, 'released')
_NORM_EPS = 1e-6  # of the released code; a larger one changes the outputs of released checkpoints


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
        self.tensors: tuple[torch.Tensor, ...] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _may_keep(*tensors: torch.Tensor | None) -> bool:
    """Whether results of these parameters may be kept: nothing differentiates, traces or transforms them, comparing
    them does not wait for a GPU, and they are in full precision, which autocast does not change.
    """
    learns = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not nn.Parameter or tensor.dtype is not torch.float32 or not tensor.is_cpu or (
                learns and tensor.requires_grad):
            return False
    return not torch.jit.is_tracing()


class NormalizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with weight alpha * g / (|g| + 1e-6) and bias alpha * b / (|b| + 1e-6); a drop-in `norm_layer`.

    `weight` and `bias` hold the raw vectors g and b, as in released checkpoints; running statistics, eps and momentum
    are those of `nn.BatchNorm2d`. Give all three parameters weight decay: g and b are free in length, and without
    decay they grow until they no longer turn.

    Args:
        num_features: C of an input [B, C, H, W].
        eps, momentum, track_running_stats: As in `nn.BatchNorm2d`.
        affine: Must be True; accepted so that the layer fits wherever a `norm_layer` is asked for.
        gradient: 'capped' bounds the factor 1/|v| of the backward pass by 1; 'released' is the gradient of the
            authors' code, which the zero-initialised bias multiplies by 1e6. The forward pass is the same.
        alpha: Initial length of the normalised vectors.

    Raises:
        ValueError: `affine` is False, or `gradient` is unknown.
    """

    def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            momentum: float | None = 0.1,
            affine: bool = True,
            track_running_stats: bool = True,
            gradient: str = CAPPED,
            alpha: float = 1.0,
            device=None,
            dtype=None,
    ) -> None:
        if not affine:
            raise InputError('NBN normalises the weight and bias of BatchNorm, so it needs affine=True')
        if gradient not in GRADIENTS:
            raise InputError(f"gradient '{gradient}' is unknown: choose one of {', '.join(GRADIENTS)}"
                             f'{nearest(str(gradient), GRADIENTS)}')
        super().__init__(num_features, eps, momentum, True, track_running_stats, device=device, dtype=dtype)
        self.scale = NbnScale(alpha, device=device, dtype=dtype)
        self.cap_gradient = gradient == CAPPED
        self._kept = _Kept()

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, gradient: str = CAPPED, alpha: float = 1.0):
        """An NBN layer that takes over the parameters, buffers and mode of a BatchNorm layer (with affine=True).

        Weights that are all zero (timm's `zero_init_last`) have no direction to normalise and are set to one.
        """
        layer = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, gradient, alpha,
            device=norm.weight.device, dtype=norm.weight.dtype)
        layer._take_over(norm)
        if not layer.weight.is_meta and not layer.weight.any():
            nn.init.ones_(layer.weight)
        return layer

    def _take_over(self, norm: nn.BatchNorm2d) -> None:
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def effective_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and the bias that are applied, each [C] with length |alpha|."""
        return self._scaled(self.weight, self.bias)

    def _scaled(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = self.scale.alpha
        return _unit(weight, self.cap_gradient) * alpha, _unit(bias, self.cap_gradient) * alpha

    def _applied_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`effective_affine`, in evaluation without computing it again while weight, bias and alpha are the same."""
        if torch.jit.is_scripting():
            return self.effective_affine()
        return self._folded_affine()

    @torch.jit.unused
    def _folded_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
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

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Batch normalisation with the effective affine parameters, [B, C, H, W] to [B, C, H, W]."""
        average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                average_factor = 1.0 / float(self.num_batches_tracked)
        weight, bias = self._applied_affine()
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias,
            self.training or self.running_mean is None, average_factor, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalize(x)

    def fuse(self) -> nn.BatchNorm2d:
        """The same function as a plain `nn.BatchNorm2d`; `timm.models.reparameterize_model` calls this."""
        return self._fill_plain(nn.BatchNorm2d(**self._plain_args()))

    def _plain_args(self) -> dict[str, Any]:
        return dict(
            num_features=self.num_features, eps=self.eps, momentum=self.momentum,
            track_running_stats=self.track_running_stats, device=self.weight.device, dtype=self.weight.dtype)

    @torch.no_grad()
    def _fill_plain(self, plain: nn.BatchNorm2d) -> nn.BatchNorm2d:
        weight, bias = self.effective_affine()
        plain.weight.copy_(weight)
        plain.bias.copy_(bias)
        plain.running_mean, plain.running_var = self.running_mean, self.running_var
        plain.num_batches_tracked = self.num_batches_tracked
        return plain.train(self.training)

    def extra_repr(self) -> str:
        gradient = 'capped' if self.cap_gradient else 'released'
        return f'{super().extra_repr()}, gradient={gradient}'


class NormalizedBatchNormAct2d(NormalizedBatchNorm2d):
    """NBN in place of timm's `BatchNormAct2d`: normalisation, then `drop` and `act`, which keep their names."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def _take_over(self, norm: nn.BatchNorm2d) -> None:
        super()._take_over(norm)
        self.drop, self.act = norm.drop, norm.act  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(self.normalize(x)))

    def fuse(self) -> nn.BatchNorm2d:
        plain = BatchNormAct2d(**self._plain_args())
        plain.drop, plain.act = self.drop, self.act
        return self._fill_plain(plain)


class SyncNormalizedBatchNorm2d(NormalizedBatchNorm2d):
    """NBN whose training statistics are those of the batch of all processes; also on CPU, unlike `nn.SyncBatchNorm`.

    Outside training, or without a process group of more than one process, it is `NormalizedBatchNorm2d`.
    """

    process_group: Any = None

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if not (self.training and distributed):
            return super().normalize(x)
        mean, var, count = self._global_statistics(x)
        self._update_running_statistics(mean.detach(), var.detach(), count)
        weight, bias = self.effective_affine()
        weight = weight * torch.rsqrt(var + self.eps)
        bias = bias - mean * weight
        return (x.float() * weight[:, None, None] + bias[:, None, None]).to(x.dtype)

    def _global_statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean [C], biased variance [C] and number of values [1] over the batches of all processes, in float32."""
        local_var, local_mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        local_count = local_mean.new_full((1,), x.numel() // x.shape[1])
        gathered = torch.stack(all_gather(torch.cat([local_mean, local_var, local_count]), self.process_group))
        means, variances, counts = gathered.split([x.shape[1], x.shape[1], 1], dim=1)
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        # The variance of a union: variances inside the parts plus the spread of their means.
        var = (shares * (variances + (means - mean).square())).sum(0)
        return mean, var, counts.sum()

    @torch.no_grad()
    def _update_running_statistics(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


class SyncNormalizedBatchNormAct2d(SyncNormalizedBatchNorm2d, NormalizedBatchNormAct2d):
    """`NormalizedBatchNormAct2d` with the statistics of `SyncNormalizedBatchNorm2d`."""


def share_scale(layers: Iterable[NormalizedBatchNorm2d]) -> None:
    """Give all `layers` the alpha of the first; it has one key in the state dict, see `NbnScale`."""
    first, *others = layers
    for layer in others:
        layer.scale = first.scale

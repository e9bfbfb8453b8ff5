"""Normalised batch normalisation (NBN): BatchNorm whose weight and bias vectors have a learnable common length.

Source: Bao et al., "Normalizing Batch Normalization for Long-Tailed Recognition", IEEE TIP 2024 (arXiv 2501.03122).
"""
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch.distributed.nn.functional import all_gather

from nbn_timm.errors import InputError
from nbn_timm.layers.affine import CAPPED, GRADIENTS, NbnScale, NormalizedAffine, give_direction, share_scale

__all__ = [
    'NormalizedBatchNorm2d', 'NormalizedBatchNormAct2d', 'SyncNormalizedBatchNorm2d', 'SyncNormalizedBatchNormAct2d',
    'CAPPED', 'NbnScale', 'share_scale', 'GRADIENTS',
]


class NormalizedBatchNorm2d(NormalizedAffine, nn.BatchNorm2d):
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
        super().__init__(num_features, eps, momentum, True, track_running_stats, device=device, dtype=dtype)
        self._normalize_affine(gradient, alpha, device=device, dtype=dtype)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, gradient: str = CAPPED, alpha: float = 1.0):
        """An NBN layer that takes over the parameters, buffers and mode of a BatchNorm layer (with affine=True).

        Weights that are all zero (timm's `zero_init_last`) have no direction to normalise and are set to one.
        """
        layer = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, gradient, alpha,
            device=norm.weight.device, dtype=norm.weight.dtype)
        layer._take_over(norm)
        give_direction(layer.weight)
        return layer

    def _take_over(self, norm: nn.BatchNorm2d) -> None:
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def effective_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and the bias that are applied, each [C] with length |alpha|."""
        return self._scaled(self.weight), self._scaled(self.bias)

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

"""NBN on normalisation without statistics of its own: LayerNorm, GroupNorm and RmsNorm, torch's and timm's.

The layers are made from plain ones and fold back into them. They do not inherit from these: code that replaces every
`nn.LayerNorm` copies its raw weight and bias, which mean nothing without their normalisation. Such code passes over
these layers, and the network stays what it is.
"""
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import norm, norm_act

from nbn_timm.layers.affine import CAPPED, NormalizedAffine, give_direction

__all__ = ['NormalizedGroupNorm', 'NormalizedLayerNorm', 'NormalizedRmsNorm', 'StatelessNbn', 'channel_axis',
           'is_stateless', 'stateless_kind']


class StatelessNbn(NormalizedAffine):
    """A layer made from a plain one, whose parameters, mode, dropout and activation it takes over.

    Weights that are all zero have no direction to normalise and are set to one.

    Args:
        plain: With a weight of any shape, and a bias of the same or none.
        gradient: See `NormalizedBatchNorm2d`.
        alpha: Initial length of the normalised vectors.
    """

    __constants__ = ['shape', 'groups', 'channels_first', 'in_float32']

    def __init__(self, plain: nn.Module, gradient: str = CAPPED, alpha: float = 1.0) -> None:
        super().__init__()
        form = _FORMS[_computation(plain)]
        weight = cast(nn.Parameter, plain.weight)
        self._normalize_affine(gradient, alpha, device=weight.device, dtype=weight.dtype)
        self.weight = weight
        self.register_parameter('bias', cast(nn.Parameter | None, getattr(plain, 'bias', None)))
        self.shape = tuple(weight.shape)
        self.groups = int(getattr(plain, 'num_groups', 1))
        self.eps: Any = plain.eps
        self.channels_first, self.in_float32 = form.channels_first, form.in_float32
        self.frozen = False  # set by `freeze_nbn`
        self.drop = getattr(plain, 'drop', nn.Identity())
        self.act = getattr(plain, 'act', nn.Identity())
        self._plain = _Emptied(plain)
        self.train(plain.training)
        give_direction(weight)

    def effective_affine(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and the bias that are applied, each with length |alpha|; frozen, they give alpha alone a
        gradient.
        """
        weight, bias = self.weight, self.bias
        if self.frozen:
            weight = weight.detach()
        applied = self._scaled(weight)
        if bias is None:
            return applied, None
        if self.frozen:
            bias = bias.detach()
        return applied, self._scaled(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x, whose channels are last, or first after the batch in layers for maps; the shape stays."""
        weight, bias = self._applied_affine()
        given = x.dtype
        if self.in_float32:
            x, weight = x.float(), weight.float()
            if bias is not None:
                bias = bias.float()
        if self.channels_first:
            x = self.normalize(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        else:
            x = self.normalize(x, weight, bias)
        if self.in_float32:
            x = x.to(given)
        return self.act(self.drop(x))

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The normalisation of the kind, with an affine part."""
        raise NotImplementedError

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same function as a layer of the kind that this one was made from."""
        weight, bias = self.effective_affine()
        plain = self._plain.filled(weight, bias, self._modules)
        plain.eps = self.eps
        return plain.train(self.training)

    def extra_repr(self) -> str:
        gradient = 'capped' if self.cap_gradient else 'released'
        return f'{self.shape}, eps={self.eps}, gradient={gradient}{", frozen" if self.frozen else ""}'


class NormalizedLayerNorm(StatelessNbn):
    """NBN in the place of a LayerNorm, over the last dimensions or, of maps [B, C, H, W], over the channels."""

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Over the last dimensions."""
        return F.layer_norm(x, self.shape, weight, bias, self.eps)


class NormalizedGroupNorm(StatelessNbn):
    """NBN in the place of a GroupNorm on [B, C, ...]."""

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Over groups of channels and all places."""
        return F.group_norm(x, self.groups, weight, bias, self.eps)


class NormalizedRmsNorm(StatelessNbn):
    """NBN in the place of an RmsNorm, which has no bias."""

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Over the last dimensions."""
        return F.rms_norm(x, self.shape, weight, self.eps)


class _Emptied:
    """A plain layer without its parameters, to be filled again; TorchScript passes over it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = copy(layer)
        self.layer._parameters = dict.fromkeys(layer._parameters)
        self.layer._modules = dict.fromkeys(layer._modules)

    def filled(self, weight: torch.Tensor, bias: torch.Tensor | None, modules: dict[str, Any]) -> nn.Module:
        """A new layer with copies of these parameters and the modules of its names."""
        layer = copy(self.layer)
        values = {'weight': weight, 'bias': bias}
        layer._parameters = {name: None if (value := values[name]) is None else nn.Parameter(value.clone())
                             for name in layer._parameters}
        layer._modules = {name: modules[name] for name in layer._modules}
        return layer


@dataclass(frozen=True)
class _Form:
    """What takes the place of a layer, and how that layer reads its input."""

    kind: type[StatelessNbn]
    channels_first: bool = False  # of maps, where the normalisation wants them last
    in_float32: bool = False


# By what a layer computes: a subclass that changes the constructor alone, as timm's layers without a bias do, is
# known; one that computes something else is not.
_FORMS = {plain.forward: form for form, layers in (
    (_Form(NormalizedLayerNorm), (nn.LayerNorm, norm.LayerNorm, norm_act.LayerNormAct)),
    (_Form(NormalizedLayerNorm, in_float32=True), (norm.LayerNormFp32, norm_act.LayerNormActFp32)),
    (_Form(NormalizedLayerNorm, channels_first=True), (norm.LayerNorm2d, norm.LayerNormExp2d, norm_act.LayerNormAct2d)),
    (_Form(NormalizedLayerNorm, channels_first=True, in_float32=True),
     (norm.LayerNorm2dFp32, norm_act.LayerNormAct2dFp32)),
    (_Form(NormalizedGroupNorm),
     (nn.GroupNorm, norm.GroupNorm, norm.GroupNorm1, norm_act.GroupNormAct, norm_act.GroupNorm1Act)),
    (_Form(NormalizedRmsNorm), (nn.RMSNorm, norm.RmsNorm, norm_act.RmsNormAct)),
    (_Form(NormalizedRmsNorm, in_float32=True), (norm.RmsNormFp32, norm_act.RmsNormActFp32)),
    (_Form(NormalizedRmsNorm, channels_first=True), (norm.RmsNorm2d, norm_act.RmsNormAct2d)),
    (_Form(NormalizedRmsNorm, channels_first=True, in_float32=True),
     (norm.RmsNorm2dFp32, norm_act.RmsNormAct2dFp32)),
) for plain in layers}
_KINDS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, norm.RmsNorm, norm.RmsNormFp32, norm.RmsNorm2d, norm.RmsNorm2dFp32)


def _computation(layer: nn.Module) -> Any:
    return type(layer).forward


def is_stateless(layer: nn.Module) -> bool:
    """Whether a layer is a LayerNorm, GroupNorm or RmsNorm with a weight, or one of a kind that nobody knows."""
    return isinstance(layer, _KINDS) and layer.weight is not None


def stateless_kind(layer: nn.Module) -> Callable[[str, float], StatelessNbn] | None:
    """What makes an NBN layer of a plain one, by gradient and alpha; None of a kind that is not known, or without a
    weight.
    """
    form = _FORMS.get(_computation(layer))
    return None if form is None or layer.weight is None else partial(form.kind, layer)


def channel_axis(layer: nn.Module) -> int:
    """The axis of the channels in what a layer of a known kind gives: 1, or -1 for the last."""
    form = _FORMS[_computation(layer)]
    return 1 if form.channels_first or form.kind is NormalizedGroupNorm else -1

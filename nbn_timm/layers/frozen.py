"""BatchNorm and NBN that no longer learn: fixed statistics and a fixed affine part, the convention of detection; and
those of which the statistics alone are fixed.
"""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from nbn_timm.errors import InputError
from nbn_timm.layers.head import BottleneckLinear, RectifiedLinear
from nbn_timm.layers.layer_norm import StatelessNbn
from nbn_timm.layers.norm import NormalizedBatchNorm2d, NormalizedBatchNormAct2d

__all__ = ['FrozenNormalizedBatchNorm2d', 'FrozenNormalizedBatchNormAct2d', 'FrozenPlainBatchNorm1d',
           'FrozenPlainBatchNorm2d', 'FrozenPlainBatchNormAct2d', 'freeze_nbn', 'is_frozen', 'keep_statistics',
           'keeps_statistics', 'moves_statistics', 'unfreeze_nbn']


class _KeptStatistics(nn.Module):
    """Mixed in before a BatchNorm: evaluation mode for ever, so that the running statistics are used and stay."""

    def train(self, mode: bool = True) -> Any:
        super().train(False)
        for child in self.children():  # dropout and activation follow the network
            child.train(mode)
        return self


class _FrozenStatistics(_KeptStatistics):
    """The same for a layer that does not learn at all."""


class _FrozenPlain(_FrozenStatistics, _BatchNorm):
    """A plain BatchNorm whose weight and bias get no gradient, whatever `requires_grad` is set."""

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """By the running statistics, with the affine part, if there is one; the shape stays."""
        weight, bias = self.weight, self.bias
        if weight is not None:
            weight = weight.detach()  # type: ignore[assignment]
        if bias is not None:
            bias = bias.detach()  # type: ignore[assignment]
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalize(x)


class FrozenPlainBatchNorm1d(_FrozenPlain, nn.BatchNorm1d):
    """Frozen `nn.BatchNorm1d`, as transformers with BatchNorm have it."""


class FrozenPlainBatchNorm2d(_FrozenPlain, nn.BatchNorm2d):
    """Frozen `nn.BatchNorm2d`; keys and parameters stay, so a checkpoint fits the model before and after."""


class FrozenPlainBatchNormAct2d(_FrozenPlain, BatchNormAct2d):
    """Frozen `BatchNormAct2d` of timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(self.normalize(x)))


class FrozenNormalizedBatchNorm2d(_FrozenStatistics, NormalizedBatchNorm2d):
    """NBN whose statistics, g and b are fixed, whatever mode and `requires_grad` are set; alpha may still learn."""

    def effective_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `NormalizedBatchNorm2d`, with a gradient for alpha alone."""
        return self._scaled(self.weight.detach()), self._scaled(self.bias.detach())


class FrozenNormalizedBatchNormAct2d(FrozenNormalizedBatchNorm2d, NormalizedBatchNormAct2d):
    """`FrozenNormalizedBatchNorm2d` with the `drop` and `act` of `NormalizedBatchNormAct2d`."""


class KeptPlainBatchNorm1d(_KeptStatistics, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with kept statistics; weight and bias learn."""


class KeptPlainBatchNorm2d(_KeptStatistics, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with kept statistics; weight and bias learn."""


class KeptPlainBatchNormAct2d(_KeptStatistics, BatchNormAct2d):
    """`BatchNormAct2d` of timm with kept statistics."""


class KeptNormalizedBatchNorm2d(_KeptStatistics, NormalizedBatchNorm2d):
    """NBN with kept statistics; g, b and alpha learn."""


class KeptNormalizedBatchNormAct2d(_KeptStatistics, NormalizedBatchNormAct2d):
    """`NormalizedBatchNormAct2d` with kept statistics."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenPlainBatchNorm1d,
    nn.BatchNorm2d: FrozenPlainBatchNorm2d,
    BatchNormAct2d: FrozenPlainBatchNormAct2d,
    NormalizedBatchNorm2d: FrozenNormalizedBatchNorm2d,
    NormalizedBatchNormAct2d: FrozenNormalizedBatchNormAct2d,
}

_KEPT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: KeptPlainBatchNorm1d,
    nn.BatchNorm2d: KeptPlainBatchNorm2d,
    BatchNormAct2d: KeptPlainBatchNormAct2d,
    NormalizedBatchNorm2d: KeptNormalizedBatchNorm2d,
    NormalizedBatchNormAct2d: KeptNormalizedBatchNormAct2d,
}


# Layers of timm that keep statistics and are none of torch's normalisations.
_OTHERS = (EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2)


def moves_statistics(module: nn.Module) -> bool:
    """Whether a layer is of a kind that keeps statistics of its batches in training."""
    if isinstance(module, (_BatchNorm, *_OTHERS)):
        return True
    return isinstance(module, _NormBase) and module.track_running_stats  # an InstanceNorm seldom does


def keeps_statistics(module: nn.Module) -> bool:
    """Whether `freeze_nbn` or `keep_statistics` fixed the statistics of this layer."""
    return isinstance(module, _KeptStatistics)


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze_nbn` froze this layer."""
    return isinstance(module, _FrozenStatistics) or isinstance(module, StatelessNbn) and module.frozen


def freeze_nbn(model: nn.Module, alpha_trainable: bool = False) -> nn.Module:
    """Freeze all NBN and BatchNorm layers of a model, or of a part of it, in place; NBN layers stay NBN.

    Those in a classifier of this package stay as they are, since their statistics are of what it learns. A plain
    LayerNorm, GroupNorm or RmsNorm has no statistics, so `requires_grad_(False)` is all that it needs.

    Statistics, weights and biases are fixed, in training mode too and whatever `requires_grad` is set later; keys,
    values and the function in evaluation stay as they are. timm's `freeze_batch_norm_2d` and others of its kind would
    replace NBN by a plain layer, and are refused.

    Args:
        model: A model or a part of it. An alpha that layers outside of the part share is frozen for them as well.
        alpha_trainable: Let alpha, the length of the normalised vectors, still learn.

    Returns:
        The same model.

    Raises:
        InputError: A layer is of a kind that cannot be frozen, such as a synchronised one; nothing has been changed.
    """
    layers = _checked(model, _FrozenStatistics, (*_FROZEN, *_KEPT.values()))
    learn_statistics(model)
    for layer in layers:
        _become(layer, _FROZEN[type(layer)])
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, StatelessNbn):
            module.frozen = True
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if isinstance(module, FrozenNormalizedBatchNorm2d | StatelessNbn):
            module.scale.alpha.requires_grad_(alpha_trainable)
    return model


def unfreeze_nbn(model: nn.Module) -> nn.Module:
    """Let the layers that `freeze_nbn` froze learn again, alpha included, in place.

    Each takes the mode of the module around it; one that is given alone stays in evaluation until its next `train()`.

    Returns:
        The same model.
    """
    frozen = [module for module in model.modules() if is_frozen(module)]
    _make_plain(model, {frozen: plain for plain, frozen in _FROZEN.items()})
    for module in frozen:
        if isinstance(module, StatelessNbn):
            module.frozen = False
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    return model


def keep_statistics(model: nn.Module) -> nn.Module:
    """Let the NBN and BatchNorm layers of a model normalise by their running statistics in training too, in place.

    These stay as they are, and all parameters learn on. It is for fine-tuning by batches that are too small or too
    uniform to measure statistics on. Frozen layers stay frozen, and those in a classifier of this package are left out,
    since their statistics are of what it learns.

    Returns:
        The same model.

    Raises:
        InputError: A layer is of a kind that cannot be kept so; nothing has been changed.
    """
    for layer in _checked(model, _KeptStatistics, tuple(_KEPT)):
        _become(layer, _KEPT[type(layer)])
    return model


def learn_statistics(model: nn.Module) -> nn.Module:
    """Undo `keep_statistics`, in place; each layer takes the mode of the module around it, as in `unfreeze_nbn`.

    Returns:
        The same model.
    """
    _make_plain(model, {kept: plain for plain, kept in _KEPT.items()})
    return model


def _make_plain(model: nn.Module, plain: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Undo `_become`; the mode that a layer had before is not known, so it follows the module around it."""
    if type(model) in plain:
        _become(model, plain[type(model)])
    for parent in model.modules():
        for layer in parent.children():
            if type(layer) in plain:
                _become(layer, plain[type(layer)])
                layer.train(parent.training)


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class alone, so that parameters, buffers and the shared alpha stay as they are."""
    layer.__class__ = kind  # type: ignore[assignment]
    layer.train(layer.training)


def _checked(model: nn.Module, done: type[nn.Module], kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    """The layers of a model that keep statistics, but those that are `done` or in a classifier of this package.

    Raises:
        InputError: One is of none of these kinds, or has no running statistics.
    """
    found = []
    of_classifiers = {part for head in model.modules() if isinstance(head, RectifiedLinear | BottleneckLinear)
                      for part in head.modules()}
    for name, layer in model.named_modules():
        if not moves_statistics(layer) or isinstance(layer, done) or layer in of_classifiers:
            continue
        running: Any = getattr(layer, 'running_mean', None)
        if type(layer) not in kinds or running is None:
            without = type(layer) in kinds and running is None
            kind = type(layer).__name__ + (' without running statistics' if without else '')
            raise InputError(f"'{name or type(layer).__name__}' is a {kind}, which cannot be frozen: freeze before you "
                             'convert or synchronise, and give layers with running statistics')
        found.append(layer)
    return found

"""Classifier heads of a single network; `experts.py` has those of several experts."""
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nbn_timm.errors import InputError, nearest

__all__ = ['COSINE_SCALE', 'HEADS', 'LINEAR', 'BottleneckLinear', 'ClassVectors', 'CosPlusLinear', 'CosineLinear',
           'RectifiedLinear', 'convert_head']

LINEAR = 'linear'  # the head of timm's models
COSINE_SCALE = 30.0


class ClassVectors(nn.Module):
    """Base of classifiers on feature vectors that have a weight [C, D] as `nn.Linear` has, but are none.

    They do not inherit from `nn.Linear`, because what merges or replaces linear layers, as adapters do, takes
    `W x + b` for what an instance of it computes.

    Args:
        in_features: Length of a feature vector, D.
        out_features: Number of classes, C.
        bias: With a bias [C].
    """

    if TYPE_CHECKING:  # None without a bias; TorchScript would take the annotation for a declaration
        bias: torch.Tensor

    weight: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            'bias', nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self)  # type: ignore[arg-type]


class RectifiedLinear(ClassVectors):
    """Linear classifier with logit rectification: its logits pass a BatchNorm1d without affine parameters.

    Every class's logit gets zero mean and unit variance over the training stream, so frequent classes cannot keep a
    head start. Source: the NBN paper (arXiv 2501.03122), `Linear_fcbn_notaffine` in the authors' code, whose key
    names `weight`, `bias`, `bn.*` are kept. In training a batch needs two samples or more; `bias` has no effect
    there, because the batch mean takes it out.

    Args:
        in_features: Length of a feature vector.
        out_features: Number of classes.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(out_features, affine=False, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> 'RectifiedLinear':
        """A rectified head that takes over the weight and bias of a Linear."""
        head = cls(linear.in_features, linear.out_features, linear.weight.device, linear.weight.dtype)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(F.linear(x, self.weight, self.bias))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The same function in eval mode as a plain `nn.Linear`; `timm.models.reparameterize_model` calls this."""
        mean, var = self.bn.running_mean, self.bn.running_var
        assert mean is not None and var is not None
        std = torch.rsqrt(var + self.bn.eps)
        plain = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=self.weight.dtype)
        plain.weight.copy_(self.weight * std[:, None])
        plain.bias.copy_((self.bias - mean) * std)
        return plain.train(self.training)


class CosineLinear(ClassVectors):
    """Cosine classifier: `scale` times the cosine between feature and class vector, without bias.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019; RIDE
    (Wang et al., ICLR 2021) uses it with scale 30. The logits leave this layer scaled, so that a loss must not scale
    them again.

    Args:
        in_features: Length of a feature vector.
        out_features: Number of classes.
        scale: Factor of the cosines.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            scale: float = COSINE_SCALE,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.scale = scale

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> 'CosineLinear':
        """A new head of this kind, with these arguments, in the place of a Linear."""
        head = cls(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype,
                   **kwargs)
        return head.train(linear.training)

    def reset_parameters(self) -> None:
        """Class vectors of unit length in random directions; the length does not matter to the output."""
        with torch.no_grad():
            self.weight.uniform_(-1, 1)
            self.weight /= torch.linalg.vector_norm(self.weight, dim=1, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, scale={self.scale}'


class CosPlusLinear(CosineLinear):
    """RoBal's classifier: `scale` times x / ||x|| . w / (||w|| + gamma), a cosine that is smaller for short vectors.

    Source: Wu et al., "Adversarial Robustness under Long-Tailed Distribution", CVPR 2021, and `CosPlus_Classifier` in
    its code (wutong16/Adversarial_Long-Tail, commit ab2f3a7), where the loss has the scale, 10. The vectors start by
    torch's rule for linear layers, as there. The moving average of features that the authors' class keeps has no part
    in its output.

    Args:
        in_features: Length of a feature vector.
        out_features: Number of classes.
        scale: Factor of the shrunk cosines.
        gamma: Added to the length of a class vector; the authors have 1/32 for RoBal-N and, on CIFAR-100, 1/16 for
            RoBal-R.

    Raises:
        InputError: `gamma` is negative.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            scale: float = 10.0,
            gamma: float = 1 / 32,
            device=None,
            dtype=None,
    ) -> None:
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not gamma >= 0:
            raise InputError(f'a cosplus head has gamma={gamma!r}: give a number from 0')
        super().__init__(in_features, out_features, scale, device=device, dtype=dtype)
        self.gamma = gamma

    def reset_parameters(self) -> None:
        """As `nn.Linear` does; the length of a class vector matters here."""
        ClassVectors.reset_parameters(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True)
        return self.scale * F.linear(F.normalize(x, dim=1), self.weight / (length + self.gamma))

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, gamma={self.gamma}'


class BottleneckLinear(nn.Module):
    """A linear layer to fewer features, BatchNorm and dropout, and then the classifier.

    Source: the neck `PFC` with `ClsHead` in the code of Wu et al., "Distribution-Balanced Loss for Multi-Label
    Classification in Long-Tailed Datasets", ECCV 2020 (wutong16/DistributionBalancedLoss, commit 14460d0), whose
    initial weights these are. In training a batch needs two samples or more.

    Args:
        in_features: Length of a feature vector, D.
        out_features: Number of classes, C.
        width: Features between the two layers.
        dropout: Probability that one of these is zero in training.

    Raises:
        InputError: The width or the dropout is none.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            width: int = 256,
            dropout: float = 0.5,
            device=None,
            dtype=None,
    ) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise InputError(f'a bottleneck head has width={width!r}: give a whole number from 1')
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise InputError(f'a bottleneck head has dropout={dropout!r}: give a number from 0, below 1')
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.reduce = nn.Linear(in_features, width, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(width, device=device, dtype=dtype)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(width, out_features, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.reduce.weight, mode='fan_out')
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.reduce.bias)
        nn.init.zeros_(self.fc.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> 'BottleneckLinear':
        """A new head of this kind, with these arguments, in the place of a Linear."""
        head = cls(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype,
                   **kwargs)
        return head.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(self.reduce(x))))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The same function in eval mode as one plain `nn.Linear`; `timm.models.reparameterize_model` calls this."""
        norm, kind = self.norm, self.fc.weight.dtype
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.double() + scale * (self.reduce.bias.double() - norm.running_mean.double())
        weight = self.fc.weight.double()
        plain = nn.Linear(self.in_features, self.out_features, device=weight.device, dtype=kind)
        plain.weight.copy_((weight * scale) @ self.reduce.weight.double())
        plain.bias.copy_(weight @ shift + self.fc.bias.double())
        return plain.train(self.training)


HEADS: dict[str, type[nn.Linear] | type[ClassVectors] | type[BottleneckLinear]] = {
    LINEAR: nn.Linear, 'cosine': CosineLinear, 'cosplus': CosPlusLinear, 'rectified': RectifiedLinear,
    'bottleneck': BottleneckLinear}
_SETTINGS = {'cosine': ('scale',), 'cosplus': ('scale', 'gamma'), 'bottleneck': ('width', 'dropout')}


def convert_head(classifier: nn.Module, kind: str, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """The classifier of a network in the kind asked for; a network without one (`nn.Identity`) keeps that.

    Args:
        classifier: As timm's `create_classifier` makes it.
        kind: A key of `HEADS`.
        settings: Of that kind, as the scale of a cosine head.

    Raises:
        InputError: `kind` is unknown, or has no such setting.
    """
    if kind not in HEADS:
        raise InputError(f"unknown head '{kind}': give one of {', '.join(HEADS)}{nearest(str(kind), HEADS)}")
    settings = settings or {}
    for name, value in settings.items():
        known = _SETTINGS.get(kind, ())
        if name not in known:
            there = f'it has {" and ".join(known)}' if known else 'it has none'
            raise InputError(f"a {kind} head has no setting '{name}' in head_kwargs: {there}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not number or not value >= 0 or (name == 'scale' and not value):
            lowest = 'above 0' if name == 'scale' else 'from 0'
            raise InputError(f'a {kind} head has {name}={value!r}: give a number {lowest}')
    if kind == LINEAR or not isinstance(classifier, nn.Linear):
        return classifier
    return HEADS[kind].from_linear(classifier, **settings)  # type: ignore[union-attr]

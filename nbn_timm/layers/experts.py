"""Several experts in one network: stages that run them side by side and a head that averages them.

Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts" (RIDE), ICLR 2021.
Feature maps of all experts are concatenated on channels, [B, E * C, H, W], so that a multi-expert network has the
same shape as any timm network. A loop over the experts in channels_last was measured to be the fastest formulation on
a CPU; grouped convolutions win only against a loop in the contiguous layout, which is slower by more (docs/ride.md).
"""
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from nbn_timm.errors import InputError

from .head import HEADS, BottleneckLinear, RectifiedLinear, convert_head

__all__ = ['ExpertBlock', 'ExpertHead', 'ExpertStage', 'merge_experts']


class ExpertBlock(nn.ModuleList):
    """The blocks of one depth, one for each expert.

    Args:
        blocks: One per expert, of the same shape.
        shared_input: All experts see the whole input, instead of each its own share of the channels.
    """

    def __init__(self, blocks: Iterable[nn.Module], shared_input: bool = False) -> None:
        super().__init__(blocks)
        self.num_experts = len(self)
        self.shared_input = shared_input

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each expert's input."""
        if self.shared_input:
            return [x for _ in range(self.num_experts)]
        # One split, whose backward pass is one concatenation; E slices would add up E maps of all experts.
        parts = x.chunk(self.num_experts, dim=1)
        return [parts[expert] for expert in range(self.num_experts)]

    def each(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each expert's block on its own input."""
        outputs: list[torch.Tensor] = []
        for expert, block in enumerate(self):
            outputs.append(block(parts[expert]))
        return outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, E * C, H, W], or [B, C, H, W] with a shared input, to [B, E * C', H', W']."""
        return torch.cat(self.each(self.split(x)), dim=1)


class ExpertStage(nn.Sequential):
    """A stage of every expert: `ExpertBlock`s in a row, concatenated only at the end.

    It is a sequence of blocks like timm's stages, so that gradient checkpointing and layer-wise learning rates treat
    it as one. Keys are `<block>.<expert>.*`.
    """

    @classmethod
    def from_stage(cls, stage: nn.Sequential, num_experts: int, shared_input: bool) -> 'ExpertStage':
        """A stage of experts that are all copies of the given one; the caller gives them different weights.

        Args:
            stage: Of a single network.
            num_experts: E.
            shared_input: The stage before is not of experts.
        """
        return cls(*[
            ExpertBlock([block, *(deepcopy(block) for _ in range(num_experts - 1))], shared_input and index == 0)
            for index, block in enumerate(stage)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            return self._expert_by_expert(x)
        parts: list[torch.Tensor] = [x]
        for index, blocks in enumerate(self):
            if index == 0:
                parts = blocks.split(x)  # type: ignore[operator]
            parts = blocks.each(parts)  # type: ignore[operator]
        return torch.cat(parts, dim=1)

    @torch.jit.unused
    def _expert_by_expert(self, x: torch.Tensor) -> torch.Tensor:
        """The same in an order that TorchScript cannot express, and a CPU's cache likes better."""
        parts = self[0].split(x)  # type: ignore[operator]
        return torch.cat([self.expert(part, expert) for expert, part in enumerate(parts)], dim=1)

    def expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """One expert's stage on its own input, [B, C, H, W] to [B, C', H', W']."""
        for blocks in self:
            x = blocks[expert](x)  # type: ignore[index]
        return x


class ExpertHead(nn.ModuleList):
    """One classifier per expert; the output is the mean of their logits [B, C].

    With `separate` set, the training output is the logits of each expert [B, E, C], as losses on experts need them.
    With `expert_weights`, a buffer [E] that is None at first, the weighted sum takes the place of the mean.

    Args:
        kind: Of the classifiers, see `HEADS`.
        in_features: Length of the pooled features of all experts together.
        out_features: Number of classes.
        num_experts: E.
        pool_outputs: How many values the pooling gives per channel; each is a run of all experts' channels.

    Raises:
        InputError: `kind` is unknown.
    """

    if TYPE_CHECKING:  # TorchScript would take the annotation for a declaration
        expert_weights: torch.Tensor | None

    def __init__(
            self,
            kind: str,
            in_features: int,
            out_features: int,
            num_experts: int,
            pool_outputs: int = 1,
            device=None,
            dtype=None,
    ) -> None:
        features = in_features // num_experts
        super().__init__(
            convert_head(nn.Linear(features, out_features, device=device, dtype=dtype), kind)
            for _ in range(num_experts))
        self.in_features = in_features
        self.out_features = out_features
        self.num_experts = num_experts
        self.pool_outputs = pool_outputs
        self.separate = False
        self.register_buffer('expert_weights', None)

    def expert_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features of all experts [B, in_features] to the logits of each [B, E, C]."""
        parts = x.unflatten(1, (self.pool_outputs, self.num_experts, -1))
        logits: list[torch.Tensor] = []
        for expert, classifier in enumerate(self):
            logits.append(classifier(parts[:, :, expert].flatten(1)))
        return torch.stack(logits, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.expert_logits(x)
        if self.separate and self.training:
            return logits
        weights = self.expert_weights
        return logits.mean(dim=1) if weights is None else (logits * weights[:, None]).sum(dim=1)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The mean of linear classifiers as one `nn.Linear` on all features; `reparameterize_model` calls this.

        Rectified and bottleneck classifiers are folded on the way. Cosine classifiers normalise each expert's
        features, which no linear layer can, so a head of these stays as it is.
        """
        plain: list[Any] = [
            classifier.fuse() if isinstance(classifier, RectifiedLinear | BottleneckLinear) else classifier
            for classifier in self]
        if any(type(classifier) is not nn.Linear for classifier in plain):
            return self
        weight = plain[0].weight
        merged = nn.Linear(self.in_features, self.out_features, device=weight.device, dtype=weight.dtype)
        shape = (self.out_features, self.pool_outputs, -1)
        weights = torch.stack([classifier.weight.reshape(shape) for classifier in plain], dim=2)
        biases = torch.stack([classifier.bias for classifier in plain])
        shares = self.expert_weights
        if shares is None:
            shares = torch.full((self.num_experts,), 1 / self.num_experts, device=weight.device, dtype=weight.dtype)
        merged.weight.copy_((weights * shares[:, None]).flatten(1))
        merged.bias.copy_((biases * shares[:, None]).sum(dim=0))
        return merged.train(self.training)


def merge_experts(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Turn the heads of a multi-expert network into one Linear that gives the mean logits, for deployment.

    Args:
        model: A network with an `ExpertHead`.
        inplace: Change the model given, else a copy.

    Raises:
        InputError: There is no such head, or its classifiers are cosines, which cannot be merged.
    """
    model = model if inplace else deepcopy(model)
    heads = [name for name, module in model.named_modules() if isinstance(module, ExpertHead)]
    if not heads:
        raise InputError(f'{type(model).__name__} has no heads of experts to merge: give a RIDE network')
    for name in heads:
        merged = model.get_submodule(name).fuse()  # type: ignore[operator]
        if isinstance(merged, ExpertHead):
            raise InputError(f"the heads '{name}' are cosines, whose mean is no linear function of the features: merge "
                             f'networks with {" or ".join(kind for kind in HEADS if not kind.startswith("cos"))} heads')
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, merged)
    return model

"""A copy of a network that follows it slowly, as momentum contrast has it."""
from copy import deepcopy
from typing import Any

import torch
from torch import nn

__all__ = ['SlowCopy']


class SlowCopy(nn.Module):
    """A copy of a module whose parameters are an exponential average of the module's, and which gives no gradient.

    Buffers, as statistics of BatchNorm, are the copy's own. Source: He et al., "Momentum Contrast for Unsupervised
    Visual Representation Learning" (MoCo), CVPR 2020.

    Args:
        module: Is copied as it is now.
        momentum: Share of the average that `follow` keeps.
    """

    def __init__(self, module: nn.Module, momentum: float) -> None:
        super().__init__()
        self.copy = deepcopy(module).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Go a step towards the parameters of `module`."""
        for slow, fast in zip(self.copy.parameters(), module.parameters(), strict=True):
            slow.mul_(self.momentum).add_(fast, alpha=1 - self.momentum)

    @torch.no_grad()
    def forward(self, *args: Any) -> Any:
        return self.copy(*args)

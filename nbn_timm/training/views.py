"""Models that are given several views of each image in training."""
import torch
from torch import nn


class WithViews(nn.Module):
    """A model that takes views [V, B, 3, H, W] in training, all in one pass, and in evaluation images as usual.

    BatchNorm thus sees all views together. The model is called `module`, as in DistributedDataParallel, because that is
    what timm unwraps: checkpoints and averaged weights have the model's own keys.

    Args:
        model: Gives logits, or logits and features.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Views to outputs [V, B, ...], or in evaluation images [B, 3, H, W] to logits."""
        if not self.training:
            return self.module(x)
        output = self.module(x.flatten(0, 1))
        if isinstance(output, tuple):
            return tuple(part.unflatten(0, x.shape[:2]) for part in output)
        return output.unflatten(0, x.shape[:2])

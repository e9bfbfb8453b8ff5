"""Models that are given several views of each image in training."""
import torch
from torch import nn

from nbn_timm.layers import SlowCopy


class WithViews(nn.Module):
    """A model that takes views [V, B, 3, H, W] in training, and in evaluation images as usual.

    All views pass in one, so that BatchNorm sees them together, or one after the other. Views for a slow copy pass that
    instead, after it has gone a step. The model is called `module`, as in DistributedDataParallel, because that is what
    timm unwraps: checkpoints and averaged weights have the model's own keys.

    Args:
        model: Gives logits, or logits and features.
        slow: A slow copy of it, which belongs to the loss and not to the model.
        slow_views: How many views, the last ones, are for the slow copy.
        apart: They pass one after the other.
    """

    def __init__(
            self,
            model: nn.Module,
            slow: SlowCopy | None = None,
            slow_views: int = 0,
            apart: bool = False,
    ) -> None:
        super().__init__()
        self.module = model
        self.slow_copies = (slow,) * bool(slow_views)
        self.slow_views = slow_views
        self.apart = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Views to outputs [V, B, ...], or in evaluation images [B, 3, H, W] to logits."""
        if not self.training:
            return self.module(x)
        views = len(x) - self.slow_views
        passes = x[:views].split(1 if self.apart else views)
        parts = [_all_at_once(self.module, images) for images in passes]
        for slow in self.slow_copies:
            assert slow is not None
            slow.follow(self.module)
            parts.append(_all_at_once(slow, x[views:]))
        output = tuple(torch.cat(both) for both in zip(*parts, strict=True))
        return output if len(output) > 1 else output[0]


def _all_at_once(model: nn.Module, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a model gives of views [V, B, ...], as a tuple of [V, B, ...]."""
    output = model(views.flatten(0, 1))
    return tuple(part.unflatten(0, views.shape[:2]) for part in (output if isinstance(output, tuple) else (output,)))

"""Models whose training output is their logits and their features, for losses that need both."""
import inspect

import torch
from torch import nn

from nbn_timm.errors import InputError


class WithFeatures(nn.Module):
    """A model that gives logits and features in training, and in evaluation its usual output.

    Features are what the classifier sees: timm's `forward_head(..., pre_logits=True)`, of which a gradient flows back.
    If the head has dropout, logits and features have different draws of it.

    The model is called `module`, as in DistributedDataParallel, because that is what timm unwraps: checkpoints and
    averaged weights have the model's own keys.

    Args:
        model: A model with timm's `forward_features` and `forward_head`.

    Raises:
        InputError: It has not got them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        head = getattr(model, 'forward_head', None)
        if not hasattr(model, 'forward_features') or head is None \
                or 'pre_logits' not in inspect.signature(head).parameters:
            raise InputError(f"{type(model).__name__} does not tell its features by timm's forward_features and "
                             'forward_head(pre_logits), and this loss needs them: choose another model or loss')
        self.module = model

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 3, H, W] to logits [B, C] and features [B, D], or in evaluation to logits."""
        model = self.module
        if not self.training:
            return model(x)
        maps = model.forward_features(x)  # type: ignore[operator]
        return (model.forward_head(maps),  # type: ignore[operator]
                model.forward_head(maps, pre_logits=True))  # type: ignore[operator]

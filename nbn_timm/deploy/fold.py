"""The form of a network that is deployed: NBN folded away, one classifier, normalisation inside if wanted."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from nbn_timm.layers import BottleneckLinear, ExpertHead, NormalizedAffine, RectifiedLinear, fold_nbn, merge_experts
from nbn_timm.models import RoutedExperts
from nbn_timm.models.tuning.lora import merge_lora
from nbn_timm.settings import Settings, setting

__all__ = ['FoldSettings', 'Preprocessed', 'deployed']


@dataclass(frozen=True)
class FoldSettings(Settings):
    """Whether the network is used in the form of its training."""

    title = 'form'

    fuse: bool = setting(False, 'fold NBN into plain normalisation, and the heads of experts into one, first (exact)',
                         also=('--reparam',))


NOTHING_TO_FOLD = '--fuse has no effect here: there is nothing to fold.'


def foldable(model: nn.Module) -> bool:
    """Whether there is anything that `deployed` would change."""
    foldable_layers = NormalizedAffine | RectifiedLinear | BottleneckLinear | ExpertHead
    return any(isinstance(module, foldable_layers) for module in model.modules()) or (
        any('.base_layer.' in name for name, _ in model.named_parameters()))


def deployed(model: nn.Module) -> nn.Module:
    """A copy with NBN and rectification folded, LoRA merged, and the heads of experts in one where that is possible."""
    model = merge_lora(fold_nbn(model))
    heads = [module for module in model.modules() if isinstance(module, ExpertHead)]
    linear = all(type(part) in (nn.Linear, RectifiedLinear) for head in heads for part in head)
    mergeable = heads and linear and not isinstance(model, RoutedExperts)
    return merge_experts(model, inplace=True) if mergeable else model


class Preprocessed(nn.Module):
    """A network that takes pixels as they come from an image file: uint8 [B, C, H, W], 0 to 255, not normalised.

    Args:
        network: Takes normalised float32 images of the same shape.
        mean, std: Of pixels in [0, 1], one for each channel or one for all.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer('mean', torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer('std', torch.tensor(std).reshape(-1, 1, 1))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, C, H, W] to what the network takes, float32 of the same shape."""
        return (pixels.float() / 255 - self.mean) / self.std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(self.normalize(pixels))

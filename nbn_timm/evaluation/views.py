"""Several views of each picture in an evaluation, whose logits are averaged.

Source of the crops: the test-time ensembling of LIFT (Shi et al., "Long-Tail Learning with Foundation Model: Heavy
Fine-Tuning Hurts", ICML 2024; shijxcs/LIFT at 661ead9, `trainer.py`).
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import str_to_interp_mode
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from nbn_timm.data.bands import MOST_OF_PILLOW
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.pictures import mode_of
from nbn_timm.data.transforms import ToMode, create_transform
from nbn_timm.errors import InputError
from nbn_timm.settings import NOT_NEGATIVE, Settings, all_of, only_with, setting

__all__ = ['CROPS', 'FLIP', 'MeanOfViews', 'ViewSettings', 'view_transform']

# By name: what cuts a picture, and into how many.
CROPS: dict[str, tuple[Callable[[Any], Callable[[Any], Any]], int]] = {
    'five_crop': (transforms.FiveCrop, 5), 'ten_crop': (transforms.TenCrop, 10)}
FLIP = 'flip'


@dataclass(frozen=True)
class ViewSettings(Settings):
    """Several views of each picture in an evaluation."""

    title = 'views'

    test_views: str | None = setting(
        None, 'average the logits of the usual view and its mirror image, or of several crops: corners and centre, or '
        'these and their mirror images; --crop-pct has no part in the crops',
        choices=(FLIP, *CROPS), unset='the usual view alone')
    test_views_expand: int = setting(
        24, 'pixels by which the shorter side of a picture is larger than a crop of five_crop or ten_crop',
        limits=NOT_NEGATIVE, effect=all_of(only_with('test_views'), only_with('test_views', *CROPS)))

    @property
    def number(self) -> int:
        """Of views of each picture."""
        if self.test_views is None:
            return 1
        return 2 if self.test_views == FLIP else CROPS[self.test_views][1]

    def __str__(self) -> str:
        """What a record of an evaluation says."""
        crops = self.test_views in CROPS
        return f'{self.test_views}, {self.test_views_expand} pixels more' if crops else self.test_views or ''


def view_transform(settings: ViewSettings, images: DataDefaults) -> Callable[[Any], torch.Tensor] | None:
    """PIL image to the views of it, uint8 [views * channels, H, W]; None for the one of any evaluation.

    'flip' is that one and its mirror image. For crops the shorter side is resized to that of a crop and so many pixels
    more; --crop-pct has no part in it.

    Raises:
        InputError: The pictures have more channels than PIL images can have, and crops are asked for.
    """
    if settings.test_views is None:
        return None
    if settings.test_views == FLIP:
        return transforms.Compose([create_transform(images), _and_mirrored])
    channels, height, width = images.input_size
    if channels > MOST_OF_PILLOW:
        raise InputError(f'--test-views {settings.test_views} cuts pictures of up to {MOST_OF_PILLOW} channels, and '
                         f'these have {channels}: give --test-views {FLIP}, or leave it out')
    cut, _ = CROPS[settings.test_views]
    steps = [
        transforms.Resize(max(height, width) + settings.test_views_expand, str_to_interp_mode(images.interpolation)),
        cut((height, width)),
        _in_channels,
    ]
    return transforms.Compose([ToMode(mode_of(channels)), *steps])


def _and_mirrored(image: torch.Tensor) -> torch.Tensor:
    """An image [channels, H, W] and its mirror image, [2 * channels, H, W]."""
    return torch.cat([image, image.flip(-1)])


def _in_channels(crops: Sequence[Any]) -> torch.Tensor:
    """PIL images of one size as uint8 [images * channels, H, W]."""
    return torch.cat([pil_to_tensor(crop) for crop in crops])


class MeanOfViews(nn.Module):
    """A network on several views of each image, [B, views * channels, H, W] to their mean logits [B, C].

    Args:
        network: Takes images [B, channels, H, W].
        views: Their number.
    """

    def __init__(self, network: nn.Module, views: int) -> None:
        super().__init__()
        self.network = network
        self.views = views

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        single = images.unflatten(1, (self.views, -1)).flatten(0, 1)
        return self.network(single).unflatten(0, (-1, self.views)).mean(dim=1)

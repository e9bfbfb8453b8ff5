"""Smaller images in the first part of a training, which make it cheaper.

Sources: Howard, "Training Imagenet in 3 hours for USD 25" (fast.ai, 2018); for 32 pixels crisostomi/cifar100-speedrun,
commit 9206f71, which scales the images on the device.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.settings import SIDE
from nbn_timm.errors import InputError
from nbn_timm.models.create import check_input_size
from nbn_timm.settings import PROBABILITY, Settings, only_with, setting


@dataclass(frozen=True)
class ProgressiveSettings(Settings):
    """Smaller images at first."""

    title = 'progressive size'
    of_training = True

    progressive_size: int | None = setting(
        None, 'scale the training images of the first epochs down to so many pixels a side; evaluation has the full '
        'size', limits=SIDE)
    progressive_epochs: float = setting(0.5, 'share of the epochs, from the first on, that have small images',
                                        limits=PROBABILITY, effect=only_with('progressive_size'))


class ProgressiveSize:
    """Scales batches down in the first epochs: bilinearly and with antialiasing, after augmentation and mixing.

    Args:
        size: Pixels of a side.
        epochs: How many there are of such.
    """

    def __init__(self, size: int, epochs: int) -> None:
        self.size = size
        self.epochs = epochs
        self.active = False

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based)."""
        self.active = epoch < self.epochs

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., 3, H, W] to such of `size` pixels a side, or as they are."""
        if not self.active:
            return images
        small = F.interpolate(images.flatten(0, -4), (self.size, self.size), mode='bilinear', antialias=True)
        return small.unflatten(0, images.shape[:-3])


def build_progressive_size(
        settings: ProgressiveSettings,
        epochs: int,
        input_size: tuple[int, int, int],
        model: nn.Module,
        name: str,
) -> ProgressiveSize | None:
    """What scales the batches of a run, if it is asked for.

    Args:
        settings: Size and share.
        epochs: Of the run.
        input_size: (channels, height, width) of the images.
        model: Is tried on a small image.
        name: Of the model.

    Raises:
        InputError: The size is not below that of the input, the images are not square, no epoch would have small ones,
            or the model cannot take them.
    """
    size = settings.progressive_size
    if size is None:
        return None
    full = min(input_size[1:])
    if size >= full:
        raise InputError(f'--progressive-size {size} is not below the {full} pixels of the images: give a smaller one, '
                         'or leave it out')
    if input_size[1] != input_size[2]:
        raise InputError(f'--progressive-size {size} makes squares, and the images are of {input_size[1]} x '
                         f'{input_size[2]} pixels: leave it out, or give square images')
    small = round(settings.progressive_epochs * epochs)
    if not small:
        raise InputError(f'--progressive-size {size} would have no effect, as --progressive-epochs '
                         f'{settings.progressive_epochs:g} of {epochs} epochs is less than one: give a greater share, '
                         'or leave it out')
    check_input_size(model, name, (input_size[0], size, size))
    return ProgressiveSize(size, small)

"""Pixels in [0, 1], in which attacks are bounded, and the normalised images that networks see."""
from collections.abc import Sequence

import torch
from typing_extensions import Self

from nbn_timm.data.bands import MOST_OF_PILLOW
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.errors import InputError

EPS = 8 / 255  # the bound that the field uses for CIFAR; RoBal, TRADES and MART write 0.031
STEP = 2 / 255


class Pixels:
    """The way from normalised images to pixels and back; without mean and std (0 and 1) both are the same numbers.

    Args:
        mean, std: Of pixels in [0, 1], one or one per channel.
        device: Of the images.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str | None = None) -> None:
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1) for values in (mean, std))

    @classmethod
    def of_format(cls, images: DataDefaults, device: torch.device | str | None = None) -> Self:
        """Those of an input format.

        Raises:
            InputError: Its values have no bound: of more than four channels they are whatever was measured.
        """
        channels = images.input_size[0]
        if channels > MOST_OF_PILLOW:
            raise InputError(f'attacks are bounded in pixels from 0 to 1, and pictures of {channels} channels have '
                             'measured values instead: leave out --attack or --adversarial')
        return cls(images.mean, images.std, device)

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, C, H, W] of any floating type to float32 pixels."""
        return images.float() * self.std + self.mean

    def images(self, pixels: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Pixels to normalised images of a type, float32 if none is given."""
        return ((pixels - self.mean) / self.std).to(dtype or torch.float32)

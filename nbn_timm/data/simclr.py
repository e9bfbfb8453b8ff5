"""The augmentation that contrastive methods have for small images.

Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), ICML 2020, with
the numbers of MoCo v2, PaCo and ProCo.
"""
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter
from timm.data import str_to_interp_mode
from timm.data.transforms import MaybePILToTensor
from torchvision import transforms

JITTER = (0.4, 0.4, 0.4, 0.1)  # of brightness, contrast, saturation and hue
_JITTER_PROB = 0.8
_GREY_PROB = 0.2
SIGMA = (0.1, 2.0)  # of the blur, in pixels


class Blur:
    """Gaussian blur of a PIL image by a deviation that is drawn evenly from `SIGMA`."""

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(*SIGMA))
        return image.filter(ImageFilter.GaussianBlur(sigma))


def simclr_transform(
        size: tuple[int, int],
        scale: tuple[float, float] | None,
        ratio: tuple[float, float] | None,
        hflip: float,
        blur: float,
        interpolation: str,
) -> transforms.Compose:
    """PIL image to uint8 tensor [3, H, W].

    Args:
        size: H and W.
        scale, ratio: Area and aspect ratio of the random resized crop; None for 0.08 to 1 and 3/4 to 4/3.
        hflip: Probability of a flip.
        blur: Probability of a blur.
        interpolation: timm's name.
    """
    mode: Any = str_to_interp_mode(interpolation)
    steps: list[Callable[[Any], Any]] = [
        transforms.RandomResizedCrop(size, scale or (0.08, 1.0), ratio or (3 / 4, 4 / 3), mode),
        transforms.RandomHorizontalFlip(hflip),
        transforms.RandomApply([transforms.ColorJitter(*JITTER)], _JITTER_PROB),
        transforms.RandomGrayscale(_GREY_PROB),
        transforms.RandomApply([Blur()], blur),
        MaybePILToTensor(),
    ]
    return transforms.Compose(steps)

"""Photometric distortion (Liu et al., "SSD", ECCV 2016), in the form of mmdetection, and the crop that goes with it.

The recipes of Wu et al., "Distribution-Balanced Loss", ECCV 2020, train with these.
"""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

BRIGHTNESS = 32.0  # of 255, either way
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18.0  # degrees, either way
LEAST_SIDE = 0.8  # of the image, that a crop keeps
TRIES = 50


@dataclass(frozen=True)
class Distortion:
    """What is done to the colours of an image; a part that is None is left out.

    Attributes:
        brightness: Is added to all values.
        contrast: Multiplies all values, before saturation and hue or after them.
        contrast_first: Before them.
        saturation: Multiplies the saturation.
        hue: Degrees that are added to the hue.
        order: Of the channels.
    """

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = False
    saturation: float | None = None
    hue: float | None = None
    order: tuple[int, ...] | None = None

    @classmethod
    def drawn(cls) -> 'Distortion':
        """Each part with a probability of one half, by torch's global generator."""
        return cls(_perhaps(-BRIGHTNESS, BRIGHTNESS), _perhaps(*CONTRAST), _happens(), _perhaps(*SATURATION),
                   _perhaps(-HUE, HUE), tuple(torch.randperm(3).tolist()) if _happens() else None)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The distorted pixels, float32 [H, W, 3] in RGB, from 0 to 255 and beyond."""
        pixels = pixels + np.float32(self.brightness or 0)
        if self.contrast is not None and self.contrast_first:
            pixels = pixels * np.float32(self.contrast)
        hue, saturation, value = to_hsv(pixels)  # in any case, since it changes colours below 0
        pixels = to_rgb(np.mod(hue + (self.hue or 0), 360), saturation * (
            1 if self.saturation is None else self.saturation), value)
        if self.contrast is not None and not self.contrast_first:
            pixels = pixels * np.float32(self.contrast)
        return pixels if self.order is None else pixels[..., list(self.order)]


def to_hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation (0 to 1 of real colours) and value of RGB pixels [H, W, 3] of any range, as OpenCV."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    value, least = pixels.max(axis=-1), pixels.min(axis=-1)
    spread, tiny = value - least, np.finfo(np.float32).eps
    turn = 60 / (spread + tiny)
    hue = np.where(value == red, (green - blue) * turn,
                   np.where(value == green, (blue - red) * turn + 120, (red - green) * turn + 240))
    return np.where(hue < 0, hue + 360, hue), spread / (np.abs(value) + tiny), value


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """RGB pixels, float32 [H, W, 3], of hue in degrees, saturation and value [H, W]."""
    channels = []
    for offset in (5, 3, 1):
        place = np.mod(offset + hue / 60, 6)
        channels.append(value - value * saturation * np.clip(np.minimum(place, 4 - place), 0, 1))
    return np.stack(channels, axis=-1).astype(np.float32)


class PhotometricCrop:
    """A PIL image in RGB, distorted, cropped and resized without regard to its ratio.

    Width and height of the crop are drawn between `LEAST_SIDE` of the image's and all of it, its place is drawn, and a
    crop that is more than twice as long as wide, or as wide as long, is drawn again.

    Args:
        size: (height, width).
        resample: One of PIL's filters.
    """

    def __init__(self, size: tuple[int, int], resample: int) -> None:
        self.size = size
        self.resample = resample

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.mode == 'RGB':
            pixels = Distortion.drawn()(np.asarray(image, dtype=np.float32))
            image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        image = image.crop(draw_crop(*image.size))
        return image.resize(self.size[::-1], self.resample)  # type: ignore[arg-type]


def draw_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge."""
    for _ in range(TRIES):
        new_width, new_height = _between(LEAST_SIDE * width, width), _between(LEAST_SIDE * height, height)
        if 0.5 <= new_height / new_width <= 2:
            left, top = _between(0, width - new_width), _between(0, height - new_height)
            return int(left), int(top), max(int(left + new_width), 1), max(int(top + new_height), 1)
    return 0, 0, width, height


def _between(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _happens() -> bool:
    return bool(torch.rand(()) < 0.5)


def _perhaps(low: float, high: float) -> float | None:
    return _between(low, high) if _happens() else None

"""Cutout (DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017)."""
import random
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Cutout:
    """Blacken a square around a uniformly drawn pixel; what of it lies beyond the border is lost.

    Black, as in the published long-tail recipes, which cut before they normalise; the paper cuts afterwards, which is
    the mean colour. timm's random erasing draws area and shape and keeps the rectangle inside the image.

    Args:
        size: Side of the square in pixels.
    """

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        left = random.randrange(image.width) - self.size // 2
        top = random.randrange(image.height) - self.size // 2
        image = image.copy()
        image.paste(0, (left, top, left + self.size, top + self.size))
        return image

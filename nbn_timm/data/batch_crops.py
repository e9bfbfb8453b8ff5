"""Random resized crops of whole batches, with torchvision's draws and PIL's pixels (`tests/test_batch_crops.py`)."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nbn_timm.data.batch_ops import FEW

_TRIES = 10  # of an area and a ratio that fit, in torchvision
_BITS = 22  # of the fraction of PIL's weights


def _triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' cubic convolution with a = -1/2."""
    x, a = distance.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


# Reach in pixels and weight by distance, of what enlarges.
FILTERS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    'bilinear': (1, _triangle),
    'bicubic': (2, _cubic),
}


@dataclass(frozen=True)
class ResizedCrop:
    """A rectangle of each image at random, enlarged to the whole: torchvision's `RandomResizedCrop`.

    Args:
        scale: Least and greatest share of the area.
        ratio: Least and greatest width by height.
        interpolation: One of `FILTERS`.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str = 'bilinear'

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, H, W] to others of that size."""
        height, width = images.shape[2:]
        return resized(images, self.draw(len(images), height, width).to(images.device), self.interpolation)

    def draw(self, count: int, height: int, width: int) -> torch.Tensor:
        """Top, left, height and width of each crop, int64 [count, 4]; draws come from torch's generator on the CPU."""
        area = height * width * torch.empty(count, _TRIES, dtype=torch.float64).uniform_(*self.scale)
        ratio = torch.empty(count, _TRIES, dtype=torch.float64).uniform_(*map(math.log, self.ratio)).exp()
        wide, high = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (0 < wide) & (wide <= width) & (0 < high) & (high <= height)
        first = fits.int().argmax(1, keepdim=True)
        whole_height, whole_width = self._centre(height, width)
        found = fits.any(1)
        high = torch.where(found, high.gather(1, first)[:, 0], whole_height)
        wide = torch.where(found, wide.gather(1, first)[:, 0], whole_width)
        free = torch.stack([height - high, width - wide], dim=1)
        corner = torch.where(found[:, None], (torch.rand(count, 2, dtype=torch.float64) * (free + 1)).long(), free // 2)
        return torch.cat([corner, high[:, None], wide[:, None]], dim=1)

    def _centre(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the crop where none that was drawn fits: the largest in the middle with such a ratio."""
        if width / height < min(self.ratio):
            return round(width / min(self.ratio)), width
        if width / height > max(self.ratio):
            return height, round(height * max(self.ratio))
        return height, width


def resized(images: torch.Tensor, boxes: torch.Tensor, interpolation: str) -> torch.Tensor:
    """Enlarge a box of each image to the whole, as PIL does with the cropped image: along rows, then along columns.

    Args:
        images: uint8 [B, C, H, W].
        boxes: Top, left, height and width of each, int64 [B, 4].
        interpolation: One of `FILTERS`.
    """
    few = FEW if images.device.type == 'cpu' else max(1, len(images))
    out = []
    for part, box in zip(images.split(few), boxes.split(few), strict=True):
        top, left, high, wide = box.unbind(1)
        rows = _along(part, 3, left, wide, interpolation)
        out.append(_along(rows, 2, top, high, interpolation))
    return torch.cat(out)


def _along(
        images: torch.Tensor,
        axis: int,
        start: torch.Tensor,
        length: torch.Tensor,
        interpolation: str,
) -> torch.Tensor:
    reach, weight_of = FILTERS[interpolation]
    size = images.shape[axis]
    shape = (len(images), 1, 1, size) if axis == 3 else (len(images), 1, size, 1)
    centre = (torch.arange(size, device=images.device) + 0.5) * (length.double() / size)[:, None]
    low = (centre - reach + 0.5).long().clamp(min=0)
    high = torch.minimum((centre + reach + 0.5).long(), length[:, None])
    total, taps = torch.zeros_like(centre), []
    for step in range(2 * reach):  # all that are less than `reach` away
        weight = torch.where(low + step < high, weight_of(low + step - centre + 0.5), 0.0)
        total += weight
        taps.append((low + step, weight))
    out = torch.full(images.shape, 1 << (_BITS - 1), dtype=torch.int32, device=images.device)
    for place, weight in taps:
        share = weight / total * (1 << _BITS)
        fixed = (share + torch.where(share < 0, -0.5, 0.5)).int()
        source = (start[:, None] + place).clamp(max=size - 1).view(shape).expand(images.shape)
        out += images.gather(axis, source).int() * fixed.view(shape)
    return (out >> _BITS).clamp_(0, 255).to(torch.uint8)

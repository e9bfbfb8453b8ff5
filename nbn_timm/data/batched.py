"""Small images as one array in memory, augmented a batch at a time.

One image at a time, loading and augmenting CIFAR's pictures costs more than a small network on them. Here a batch is
one gather from the array: padding, crop, flip, rotation and Cutout together say which pixel stands where.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nbn_timm.data.dataset import ArraySamples, LabelledImages
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.settings import AugmentSettings
from nbn_timm.data.transforms import hflip_probability
from nbn_timm.errors import InputError

MEMORY_LIMIT = 2**30  # bytes of pixels that are kept in memory unasked


@dataclass(frozen=True)
class BatchAugment:
    """The augmentation of small images for whole batches, distributed as that of `create_transform`.

    In its order: zero padding by an eighth and a random crop, horizontal flip, vertical flip, rotation by PIL's nearest
    pixel (corners turn black), Cutout. Draws come from torch's global generator.

    Args:
        pad: Zeros at each border before the crop, in pixels.
        hflip, vflip: Probabilities.
        rotation: Greatest angle in degrees, either way.
        cutout: Side of the black square in pixels; 0 for none.
    """

    pad: int = 0
    hflip: float = 0.0
    vflip: float = 0.0
    rotation: float = 0.0
    cutout: int = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Augment images uint8 [B, H, W, 3], each by draws of its own; the result is a new tensor."""
        batch, height, width = images.shape[:3]
        rows, columns = self._sources(batch, height, width)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        if self.cutout:
            inside &= ~self._square(batch, height, width)
        index = (torch.arange(batch)[:, None, None] * height + rows.clamp(0, height - 1)) * width
        index += columns.clamp(0, width - 1)
        pixels = images.reshape(-1, images.shape[3])[index.to(images.device)]
        return pixels * inside[..., None].to(images.device)

    def _sources(self, batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column [B, H, W] of the source of each pixel, beyond the image where it is black."""
        top, left = (_draw_integers(-self.pad, self.pad, batch) for _ in range(2))
        mirrored, upside_down = _happens(self.hflip, batch), _happens(self.vflip, batch)
        rows = torch.arange(height)[None, :, None].expand(batch, height, width)
        columns = torch.arange(width)[None, None, :].expand(batch, height, width)
        beyond = torch.zeros((), dtype=torch.bool)
        if self.rotation:  # the last step, hence the first to be traced back
            rows, columns = self._rotated(rows, columns, batch)
            beyond = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        rows = torch.where(upside_down, height - 1 - rows, rows) + top
        columns = torch.where(mirrored, width - 1 - columns, columns) + left
        return torch.where(beyond, -1, rows), columns

    def _rotated(self, rows: torch.Tensor, columns: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = rows.shape[1:]
        angle = torch.deg2rad((2 * torch.rand(batch, 1, 1, dtype=torch.float64) - 1) * self.rotation)
        y, x = rows + 0.5 - height / 2, columns + 0.5 - width / 2
        cos, sin = angle.cos(), angle.sin()
        return ((sin * x + cos * y + height / 2).floor().long(), (cos * x - sin * y + width / 2).floor().long())

    def _square(self, batch: int, height: int, width: int) -> torch.Tensor:
        top, left = (_draw_integers(0, size - 1, batch) - self.cutout // 2 for size in (height, width))
        rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
        return ((rows >= top) & (rows < top + self.cutout) & (columns >= left) & (columns < left + self.cutout))


def _draw_integers(low: int, high: int, batch: int) -> torch.Tensor:
    """[B, 1, 1], both ends included."""
    return torch.randint(low, high + 1, (batch, 1, 1))


def _happens(probability: float, batch: int) -> torch.Tensor:
    """[B, 1, 1], True with the probability."""
    return torch.rand(batch, 1, 1) < probability


class MemoryImages(ArraySamples):
    """Images of one size in memory that loaders take and augment by the batch."""


class BatchedImages(Dataset):
    """What a loader reads of `MemoryImages`.

    Args:
        samples: The images.
        augment: Applied to each batch; None leaves the images as they are.
        device: Where the images are kept.
    """

    def __init__(
            self,
            samples: MemoryImages,
            augment: BatchAugment | None = None,
            device: torch.device | str = 'cpu',
    ) -> None:
        self.images = torch.from_numpy(samples.images).to(device)
        self.targets = torch.from_numpy(samples.targets).to(device)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: uint8 [B, 3, H, W] and int64 [B]."""
        index = torch.tensor(indices, device=self.images.device)
        images = self.images[index]
        if self.augment is not None:
            images = self.augment(images)
        return images.permute(0, 3, 1, 2).contiguous(), self.targets[index]


def batch_augment(defaults: DataDefaults, augment: AugmentSettings) -> BatchAugment | None:
    """What `create_transform` would do, for whole batches; None where that takes single images."""
    if augment.no_aug:
        return BatchAugment()
    jitter = defaults.color_jitter if augment.color_jitter is None else augment.color_jitter
    if defaults.train_transform == 'imagenet' or jitter or augment.aa or augment.force_color_jitter:
        return None
    return BatchAugment(min(defaults.input_size[1:]) // 8, hflip_probability(defaults, augment), augment.vflip,
                        augment.rotation, augment.cutout)


def keep_in_memory(
        dataset: Dataset,
        defaults: DataDefaults,
        augment: AugmentSettings,
        wanted: bool | None = None,
        num_workers: int = 0,
) -> Dataset:
    """Small images read once for all epochs and augmented in batches, where nothing else changes by that.

    Args:
        dataset: Of images in files or memory.
        defaults: Input format.
        augment: Training augmentation; checked when the loader is built.
        wanted: False leaves the dataset as it is. None does so where batches cannot be augmented, the images are not
            of the very size of the input, or they take more than `MEMORY_LIMIT`; True makes this an error.
        num_workers: Processes that read.

    Returns:
        `MemoryImages`, or `dataset` itself.

    Raises:
        InputError: It was asked for and cannot be done; an image cannot be read.
    """
    if wanted is False:
        return dataset
    height, width = defaults.input_size[1:]
    if not isinstance(dataset, LabelledImages):
        problem = 'the images come from a data set that reads them itself'
    elif batch_augment(defaults, augment) is None:
        problem = 'the augmentation takes one image at a time (random resized crops, colour jitter, --aa)'
    elif not wanted and len(dataset) * height * width * 3 > MEMORY_LIMIT:
        return dataset
    else:
        images = dataset.images if isinstance(dataset, ArraySamples) else _read(dataset, (height, width), num_workers)
        if images is not None and images.shape[1:3] == (height, width):
            return MemoryImages(images, dataset.targets)
        problem = f'not all images are of {height}x{width} pixels, the size of the input'
    if wanted:
        raise InputError(f'--in-memory cannot be had, since {problem}: leave it out')
    return dataset


def _read(samples: LabelledImages, size: tuple[int, int], num_workers: int) -> np.ndarray | None:
    """All images, uint8 [N, H, W, 3], or None as soon as one has another size."""
    pixels = samples.select(np.arange(len(samples)))
    pixels.transform = np.asarray
    images = np.empty((len(pixels), *size, 3), np.uint8)
    first = 0
    for batch in DataLoader(pixels, batch_size=256, num_workers=num_workers, collate_fn=_first_of_each):
        if any(image.shape != images.shape[1:] for image in batch):
            return None
        images[first:first + len(batch)] = batch
        first += len(batch)
    return images


def _first_of_each(batch: list[tuple[np.ndarray, int]]) -> list[np.ndarray]:
    return [image for image, _ in batch]

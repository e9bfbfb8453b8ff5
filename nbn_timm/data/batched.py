"""Small images as one array in memory, augmented a batch at a time.

One image at a time, loading and augmenting CIFAR's pictures costs more than a small network on them. Here a batch is
one gather from the array: padding, crop, flip, rotation and Cutout together say which pixel stands where. Policies and
colour jitter (`batch_policies`) come in between.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.data import transforms as timm_transforms
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from nbn_timm.data.batch_crops import FILTERS, ResizedCrop
from nbn_timm.data.batch_ops import pick
from nbn_timm.data.batch_policies import Policy, batch_policy
from nbn_timm.data.cutout import Cutout
from nbn_timm.data.dataset import ArraySamples, LabelledImages
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.settings import AugmentSettings
from nbn_timm.data.transforms import create_transform
from nbn_timm.errors import InputError

MEMORY_LIMIT = 2**30  # bytes of pixels that are kept in memory unasked
BLOCK = 1024  # images that policies change at once
LARGEST_RESIZED = 64  # pixels of a side


@dataclass(frozen=True)
class BatchAugment:
    """The augmentation of small images for whole batches, distributed as that of `create_transform`.

    In its order: zero padding by an eighth and a random crop, horizontal flip, vertical flip, colour jitter and policy,
    rotation by PIL's nearest pixel (corners turn black), Cutout. Draws come from torch's global generator.

    Args:
        pad: Zeros at each border before the crop, in pixels.
        hflip, vflip: Probabilities.
        rotation: Greatest angle in degrees, either way.
        cutout: Side of the black square in pixels; 0 for none.
        policies: What else changes the pictures, after the flips.
        resized: A crop that is enlarged, before the flips.
    """

    pad: int = 0
    hflip: float = 0.0
    vflip: float = 0.0
    rotation: float = 0.0
    cutout: int = 0
    policies: tuple[Policy, ...] = ()
    resized: ResizedCrop | None = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Augment images uint8 [B, H, W, 3], each by draws of its own; the result is a new tensor."""
        batch, height, width = images.shape[:3]
        planes = images.permute(0, 3, 1, 2).contiguous()
        if self.resized is not None:
            planes = self.resized(planes)
        crop = self._crop(batch, height, width)
        rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
        if self.policies:
            planes = _pick(planes, *crop.sources(rows, columns))
            for policy in self.policies:
                planes = policy(planes)
            if self.rotation:
                planes = _pick(planes, *self._rotated(rows, columns, batch))
        else:
            if self.rotation:  # the last of the steps in one, hence traced back first
                rows, columns = self._rotated(rows, columns, batch)
            planes = _pick(planes, *crop.sources(rows, columns))
        if self.cutout:
            planes = planes * ~self._square(batch, height, width)[:, None].to(planes.device)
        return planes.permute(0, 2, 3, 1)

    def _crop(self, batch: int, height: int, width: int) -> '_Crop':
        top, left = (_draw_integers(-self.pad, self.pad, batch) for _ in range(2))
        mirrored, upside_down = _happens(self.hflip, batch), _happens(self.vflip, batch)
        return _Crop(top, left, mirrored, upside_down, height, width)

    def _rotated(self, rows: torch.Tensor, columns: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = rows.shape[1], columns.shape[2]
        angle = torch.deg2rad((2 * torch.rand(batch, 1, 1, dtype=torch.float64) - 1) * self.rotation)
        y, x = rows + 0.5 - height / 2, columns + 0.5 - width / 2
        cos, sin = angle.cos(), angle.sin()
        return ((sin * x + cos * y + height / 2).floor().long(), (cos * x - sin * y + width / 2).floor().long())

    def _square(self, batch: int, height: int, width: int) -> torch.Tensor:
        top, left = (_draw_integers(0, size - 1, batch) - self.cutout // 2 for size in (height, width))
        rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
        return ((rows >= top) & (rows < top + self.cutout)) & ((columns >= left) & (columns < left + self.cutout))


@dataclass(frozen=True)
class _Crop:
    """Of the padded image, flipped; the draws are [B, 1, 1]."""

    top: torch.Tensor
    left: torch.Tensor
    mirrored: torch.Tensor
    upside_down: torch.Tensor
    height: int
    width: int

    def sources(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns before crop and flips; what is beyond the image stays beyond."""
        inside = (rows >= 0) & (rows < self.height), (columns >= 0) & (columns < self.width)
        rows = torch.where(self.upside_down, self.height - 1 - rows, rows) + self.top
        columns = torch.where(self.mirrored, self.width - 1 - columns, columns) + self.left
        return torch.where(inside[0], rows, -1), torch.where(inside[1], columns, -1)


def _pick(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] of the pixels at rows and columns, drawn on the CPU; black outside."""
    return pick(images, rows.to(images.device), columns.to(images.device))


def _draw_integers(low: int, high: int, batch: int) -> torch.Tensor:
    """[B, 1, 1], both ends included."""
    return torch.randint(low, high + 1, (batch, 1, 1))


def _happens(probability: float, batch: int) -> torch.Tensor:
    """[B, 1, 1], True with the probability."""
    return torch.rand(batch, 1, 1) < probability


class MemoryImages(ArraySamples):
    """Images of one size in memory that loaders take and augment by the batch."""


class BatchedImages(Dataset):
    """What a `MemoryLoader` reads of `MemoryImages`.

    Args:
        samples: The images.
        augment: Applied to each batch; None leaves the images as they are.
        device: Where the images are kept.
        other_views: What is applied to the same images for each further view of them.
    """

    def __init__(
            self,
            samples: MemoryImages,
            augment: BatchAugment | None = None,
            device: torch.device | str = 'cpu',
            other_views: Sequence[BatchAugment | None] = (),
    ) -> None:
        self.images = torch.from_numpy(samples.images).to(device)
        self.targets = torch.from_numpy(samples.targets).to(device)
        self.views = (augment, *other_views)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """All views of a batch: uint8 [views, B, 3, H, W] and int64 [B]."""
        index = torch.tensor(indices, device=self.images.device)
        images = self.images.index_select(0, index)
        views = [images if augment is None else augment(images) for augment in self.views]
        return torch.stack([view.permute(0, 3, 1, 2) for view in views]).contiguous(), self.targets[index]


class MemoryLoader(DataLoader):
    """Batches of `BatchedImages`, on their device.

    Where there are policies, whose many small steps take longer to start than to run, several batches are augmented at
    once. An epoch then depends on nothing else than before: the sampler and torch's global generator.

    A batch of B has view v of its image b at v B + b, and B targets.

    Args:
        dataset: The images.
        settings: Of torch's `DataLoader`.
    """

    dataset: BatchedImages

    def __init__(self, dataset: BatchedImages, **settings: Any) -> None:
        super().__init__(dataset, num_workers=0, **settings)
        rows = (self.batch_size or 1) * len(dataset.views)
        slow = any(augment is not None and augment.policies for augment in dataset.views)
        self.ahead = max(1, BLOCK // rows) if slow else 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # type: ignore[override]
        batches = iter(self.batch_sampler)  # type: ignore[arg-type]
        while block := list(islice(batches, self.ahead)):
            sizes = [len(batch) for batch in block]
            views, targets = self.dataset.__getitems__([index for batch in block for index in batch])
            for batch, target in zip(views.split(sizes, dim=1), targets.split(sizes), strict=True):
                yield batch.flatten(0, 1), target


def batch_augment(defaults: DataDefaults, augment: AugmentSettings) -> BatchAugment | None:
    """What `create_transform` would do with images of the input's size, for whole batches.

    None where it takes single images: timm's random resized crops, those of large images, AugMix, 3-Augment, timm's
    blur, levels of classes.

    Raises:
        InputError: As `create_transform`.
    """
    if augment.no_aug:
        return BatchAugment()
    settings: dict[str, Any] = {}
    policies: list[Policy] = []
    for step in create_transform(defaults, is_training=True, augment=augment).transforms:
        match step:
            case transforms.Resize() | timm_transforms.MaybePILToTensor():
                pass  # of the size that it has; the tensor is there
            case transforms.RandomCrop():
                settings['pad'] = step.padding
            case transforms.RandomResizedCrop() if _is_small(step):
                settings['resized'] = ResizedCrop(tuple(step.scale), tuple(step.ratio), step.interpolation.value)
            case transforms.RandomHorizontalFlip():
                settings['hflip'] = step.p
            case transforms.RandomVerticalFlip():
                settings['vflip'] = step.p
            case transforms.RandomRotation():
                settings['rotation'] = step.degrees[1]
            case Cutout():
                settings['cutout'] = step.size
            case _:
                policy = batch_policy(step, defaults.input_size[1:])
                if policy is None:
                    return None
                policies.append(policy)
    return BatchAugment(**settings, policies=tuple(policies))


def _is_small(crop: transforms.RandomResizedCrop) -> bool:
    """Whether a batch of such crops is fast in one process; large ones are for several."""
    return max(crop.size) <= LARGEST_RESIZED and crop.interpolation.value in FILTERS


def keep_in_memory(
        dataset: Dataset,
        defaults: DataDefaults,
        augment: AugmentSettings,
        wanted: bool | None = None,
        num_workers: int = 0,
        other_views: AugmentSettings | None = None,
) -> Dataset:
    """Small images read once for all epochs and augmented in batches, where nothing else changes by that.

    Args:
        dataset: Of images in files or memory.
        defaults: Input format.
        augment: Training augmentation; checked when the loader is built.
        wanted: False leaves the dataset as it is. None does so where batches cannot be augmented, the images are not
            of the very size of the input, or they take more than `MEMORY_LIMIT`; True makes this an error.
        num_workers: Processes that read.
        other_views: Training augmentation of further views of each image; None is that of the first.

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
    elif defaults.input_size[0] != 3:
        problem = 'that is for RGB pictures'
    elif None in (batch_augment(defaults, each) for each in (augment, other_views or augment)):
        problem = ('the augmentation takes one image at a time (random resized crops, --aa augmix or 3a, --curriculum '
                   'and --gaussian-blur-prob do)')
    elif not wanted and len(dataset) * height * width * 3 > MEMORY_LIMIT:
        return dataset
    else:
        images = dataset.images if isinstance(dataset, ArraySamples) else _read(dataset, (height, width), num_workers)
        if images is not None and images.shape[1:3] == (height, width):
            kept = MemoryImages(images, dataset.targets)
            kept.source = None if isinstance(dataset, ArraySamples) else dataset
            return kept
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

"""Loaders that give normalised batches on the device, the same ones whether or not a run was interrupted."""
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from nbn_timm.data.batched import BatchedImages, MemoryImages, MemoryLoader, batch_augment
from nbn_timm.data.class_strength import LevelledImages
from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.decoders import PILLOW, FileTransform, FileViews, decoding_transform
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.part import WHOLE, Part
from nbn_timm.data.settings import AugmentSettings, LoaderSettings
from nbn_timm.data.shard_stream import EpochDraw, EvalReading, ShardStream, TrainReading
from nbn_timm.data.timm_datasets import giving_bytes
from nbn_timm.data.transforms import Views, create_transform, set_transform
from nbn_timm.errors import InputError


def epoch_seed(seed: int, epoch: int, rank: int = 0, begin: int = 0) -> int:
    """A 63-bit seed that differs for every (seed, epoch, rank) and beginning of a `Part`, neighbours included."""
    numbers = (seed, epoch, rank, begin) if begin else (seed, epoch, rank)
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class TrainLoader(PrefetchLoader):
    """timm's `PrefetchLoader` whose epochs are functions of (seed, epoch, rank, number of workers) alone.

    `set_epoch` must be called before each epoch. Augmentation in workers is then reproducible; without workers, and
    for random erasing, it draws from the global generators of `random`, `numpy` and `torch`, which the training loop
    reseeds (with `epoch_seed`) when an epoch starts.

    Batches are [B, channels, H, W], float32 unless told otherwise, and int64 [B], or with several views of each image
    [views, B, channels, H, W] and [B].
    """

    def __init__(self, loader: DataLoader, seed: int, rank: int, views: int = 1, **kwargs: Any) -> None:
        super().__init__(loader, **kwargs)
        self.seed = seed
        self.rank = rank
        self.views = views

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, targets in super().__iter__():
            if self.views > 1:
                images = images.unflatten(0, (self.views, -1))
                targets = targets[:images.shape[1]]
            yield images, targets

    def set_epoch(self, epoch: int, part: Part = WHOLE) -> None:
        """Make the next iteration that of `epoch`, or of a part of it; the length stays that of the whole."""
        self.loader.generator.manual_seed(epoch_seed(self.seed, epoch, self.rank, part.begin))
        for source in (self.loader.sampler, self.loader.dataset):
            if hasattr(source, 'part'):
                source.part = part.images(self.loader.batch_size or 1)
            if hasattr(source, 'set_epoch'):
                source.set_epoch(epoch)

    @property
    def has_parts(self) -> bool:
        """Whether an epoch can be had in parts; a stream of timm comes in an order of its own."""
        return any(hasattr(source, 'part') for source in (self.loader.sampler, self.loader.dataset))


def create_train_loader(
        dataset: Dataset,
        sampler: Sampler | None,
        *,
        batch_size: int,
        defaults: DataDefaults,
        augment: AugmentSettings | None = None,
        num_workers: int = LoaderSettings.workers,
        device: torch.device | str = 'cpu',
        seed: int = 0,
        rank: int = 0,
        drop_last: bool | None = None,
        pin_memory: bool = False,
        collate_fn: Callable[[list], Any] | None = None,
        views: int = 1,
        other_views: AugmentSettings | None = None,
        transform: Callable[[Any], Any] | None = None,
        dtype: torch.dtype | None = None,
        decoder: str = PILLOW,
) -> TrainLoader:
    """Build the training loader; sets `dataset.transform`.

    Args:
        dataset: Training images; `MemoryImages` are augmented by the batch, on the device, without workers.
        sampler: Yields this rank's indices, equally many on every rank; a `ShardStream` takes the draws of an
            `EpochSampler`, other streamed (iterable) datasets take None.
        batch_size: Images per batch and rank.
        defaults: Input format and published augmentation.
        augment: Departures from the published augmentation.
        num_workers: Loading processes; they are started anew each epoch, which is what makes an epoch reproducible.
        device: Where the batches go.
        seed: Of the run.
        rank: Of this process.
        drop_last: Drop the last, smaller batch. None keeps it, as the NBN release does, unless it would hold a single
            image, from which batch normalisation of logits cannot compute a variance. It follows from the sampler's
            length, so all ranks agree.
        pin_memory: For faster copies to a GPU.
        collate_fn: `timm.data.FastCollateMixup` mixes on the CPU; it takes one view alone. None is `collate`.
        views: How often each image is augmented, each time by draws of its own.
        other_views: Augmentation of all views but the first; None is that of the first. Random erasing, which happens
            on the device, is that of the first for all.
        transform: PIL image to uint8 tensor, in the place of all augmentation; images are then taken one at a time.
        dtype: Of the batches; None is float32.
        decoder: What reads random resized crops of image files, see `nbn_timm.data.decoders`.

    Raises:
        InputError: No batch would be left, or the decoder cannot be had for these images.
    """
    augment = augment or AugmentSettings()
    augments = [augment, *[other_views or augment] * (views - 1)]
    taken = _train_transform(defaults, augments, decoder) if transform is None else (
        Views([transform] * views) if views > 1 else transform)
    set_transform(dataset, taken, defaults)
    if isinstance(taken, FileTransform):
        dataset = _encoded(dataset, taken, decoder)
    drops = _drops_last(sampler, batch_size) if drop_last is None else drop_last
    if isinstance(dataset, ShardStream):
        dataset = _train_reading(dataset, sampler, batch_size, drops, num_workers)
    batches = _batches(None if isinstance(dataset, TrainReading) else sampler, batch_size, drops)
    loader: DataLoader
    in_batches = [None if transform else batch_augment(defaults, each) for each in augments]
    if isinstance(dataset, MemoryImages) and None not in in_batches:
        loader = MemoryLoader(BatchedImages(dataset, in_batches[0], device, in_batches[1:]), **batches)
    else:
        loader = DataLoader(dataset, **batches, **_loading(dataset, num_workers, pin_memory, collate_fn or collate))
    if sampler is not None and not len(loader):
        raise InputError(
            f'{len(sampler)} training images per process give no batch of {batch_size}: '  # type: ignore[arg-type]
            'use a smaller --batch-size or more images')
    erasing = dict(re_prob=0.0 if augment.no_aug else augment.reprob, re_mode=augment.remode, re_count=augment.recount)
    return TrainLoader(loader, seed, rank, views, **_on_device(defaults, device, dtype), **erasing)


def create_eval_loader(
        dataset: Dataset,
        *,
        batch_size: int,
        defaults: DataDefaults,
        num_workers: int = LoaderSettings.workers,
        device: torch.device | str = 'cpu',
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        dtype: torch.dtype | None = None,
        transform: Callable[[Any], Any] | None = None,
        views: int = 1,
) -> PrefetchLoader:
    """Build an evaluation loader over all images in order; sets `dataset.transform`.

    With several processes timm's `OrderedDistributedSampler` pads the ranks to equal length;
    `timm.task.evaluation_sample_limit(loader)` says how many samples of this rank are not padding. A `ShardStream` is
    divided without padding; other streams are refused there, see `check_divisible`.

    Args:
        dataset: Images to evaluate.
        batch_size: Images per batch and rank.
        defaults: Input format.
        num_workers: Loading processes.
        device: Where the batches go, [B, channels, H, W] and int64 [B].
        rank: Of this process.
        world_size: Number of processes.
        pin_memory: For faster copies to a GPU.
        dtype: Of the images; None is float32.
        transform: PIL image to uint8 tensor, in the place of the evaluation's own.
        views: That it gives of an image, one behind the other in the channels.

    Raises:
        InputError: The images cannot be divided among so many processes.
    """
    check_divisible(dataset, world_size)
    set_transform(dataset, transform or create_transform(defaults), defaults)
    if isinstance(dataset, ShardStream):
        dataset = EvalReading(dataset, batch_size, num_workers, rank, world_size)
    distributed = world_size > 1 and not isinstance(dataset, IterableDataset)
    sampler = OrderedDistributedSampler(dataset, num_replicas=world_size, rank=rank) if distributed else None
    batches = _batches(sampler, batch_size)
    size = defaults.input_size[1:]
    loader: DataLoader
    whole = transform is None and defaults.crop_pct == 1
    if isinstance(dataset, MemoryImages) and whole and dataset.images.shape[1:3] == size:
        loader = MemoryLoader(BatchedImages(dataset, device=device), **batches)
    else:
        loader = DataLoader(dataset, **batches, **_loading(dataset, num_workers, pin_memory, collate))
    return PrefetchLoader(loader, **_on_device(defaults, device, dtype, views))


def check_divisible(dataset: Dataset, world_size: int) -> None:
    """Refuse to evaluate what several processes cannot divide so that each image is counted once.

    timm's readers of streams repeat images there until all processes have equally many, and which ones is not told.

    Raises:
        InputError: It is such a stream.
    """
    if world_size > 1 and isinstance(dataset, IterableDataset) and not isinstance(dataset, ShardStream):
        raise InputError(
            f'{world_size} processes cannot evaluate a stream of timm (hfids/, tfds/) exactly, as its reader repeats '
            "images: evaluate with one process (in a training: give --val-split '' --test-split ''), or write "
            'the images as tar shards and give --dataset wds/')


def collate(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's `fast_collate`, uint8, and its like for pictures that are float tensors, as those of `bands` are."""
    first = samples[0][0]
    views = first if isinstance(first, tuple) else (first,)
    if not (isinstance(views[0], torch.Tensor) and views[0].is_floating_point()):
        return fast_collate(samples)
    by_view = zip(*(image if isinstance(image, tuple) else (image,) for image, _ in samples), strict=True)
    images = torch.stack([image for view in by_view for image in view])
    return images, torch.from_numpy(np.array([label for _, label in samples] * len(views)))


def _train_transform(
        defaults: DataDefaults,
        augments: Sequence[AugmentSettings],
        decoder: str,
) -> Callable[[Any], Any]:
    """What is done to an image, once for each of some augmentations."""
    pipelines = [create_transform(defaults, is_training=True, augment=each) for each in augments]
    if decoder == PILLOW:
        return Views(pipelines) if len(pipelines) > 1 else pipelines[0]
    if defaults.input_size[0] != 3:
        raise InputError(f'--decoder {decoder} gives RGB images, and --in-chans asks for others: leave one of them out')
    transforms = [decoding_transform(pipeline, decoder) for pipeline in pipelines]
    return FileViews(transforms) if len(transforms) > 1 else transforms[0]


def _encoded(dataset: Dataset, transform: FileTransform, decoder: str) -> Dataset:
    """The dataset as one that gives a transform its pictures encoded, where it has them so.

    Raises:
        InputError: It has not.
    """
    samples = dataset.samples if isinstance(dataset, LevelledImages) else dataset
    if isinstance(samples, ImageSamples | ShardStream):
        return dataset
    encoded = giving_bytes(samples, transform)
    if encoded is None:
        raise InputError(f'--decoder {decoder} reads image files, and these images come otherwise: leave it out')
    return encoded


def _train_reading(
        stream: ShardStream,
        sampler: Sampler | None,
        batch_size: int,
        drop_last: bool,
        num_workers: int,
) -> TrainReading:
    if not isinstance(sampler, EpochDraw):
        raise InputError('shards are read from beginning to end, and here single pictures are asked for: give the '
                         'pictures as class folders or lists')
    return TrainReading(stream, sampler, batch_size, drop_last, num_workers)


def _drops_last(sampler: Sampler | None, batch_size: int) -> bool:
    """Whether the last batch cannot be trained on; unknowable, hence yes, for a stream."""
    return sampler is None or (batch_size > 1 and len(sampler) % batch_size == 1)  # type: ignore[arg-type]


def _batches(sampler: Sampler | None, batch_size: int, drop_last: bool = False) -> dict[str, Any]:
    """What every `DataLoader` here is told of its batches.

    The generator is an own one: the worker seeds are drawn from it, and iterating leaves the global one alone.
    """
    return dict(sampler=sampler, batch_size=batch_size, drop_last=drop_last, generator=torch.Generator())


def _on_device(
        defaults: DataDefaults,
        device: torch.device | str,
        dtype: torch.dtype | None,
        views: int = 1,
) -> dict[str, Any]:
    """What timm's `PrefetchLoader` does with the uint8 batches."""
    return dict(mean=defaults.mean * views, std=defaults.std * views, channels=defaults.input_size[0] * views,
                device=torch.device(device), img_dtype=dtype)


def _loading(
        dataset: Dataset,
        num_workers: int,
        pin_memory: bool,
        collate_fn: Callable[[list], Any],
) -> dict[str, Any]:
    if isinstance(dataset, IterableDataset) and hasattr(dataset, 'set_loader_cfg'):
        dataset.set_loader_cfg(num_workers=num_workers)
    return dict(num_workers=num_workers, pin_memory=pin_memory, collate_fn=collate_fn)

"""Image transforms up to uint8 tensors; normalisation and random erasing happen on the device, in the loader."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.data
from timm.data import str_to_interp_mode
from torchvision import transforms

from nbn_timm.data.defaults import DataDefaults


@dataclass(frozen=True)
class AugmentSettings:
    """Training augmentation by timm's flags; None is the benchmark's published value."""

    no_aug: bool = False  # resize and centre crop only
    scale: tuple[float, float] | None = None  # area range of the random resized crop; timm's 0.08 to 1
    ratio: tuple[float, float] | None = None  # aspect range of the random resized crop; timm's 3/4 to 4/3
    hflip: float | None = None  # probability
    vflip: float = 0.0  # probability
    color_jitter: float | None = None  # strength; 0 for none
    color_jitter_prob: float | None = None  # None jitters every image
    aa: str | None = None  # timm's auto-augment policy, e.g. 'rand-m9-mstd0.5'; switches jitter off
    interpolation: str | None = None  # timm's name or 'random'
    reprob: float = 0.0  # random erasing: probability
    remode: str = 'pixel'  # random erasing: 'const', 'rand' or 'pixel'
    recount: int = 1  # random erasing: rectangles per image


def create_transform(
        defaults: DataDefaults,
        is_training: bool = False,
        augment: AugmentSettings | None = None,
) -> Callable[[Any], Any]:
    """The transform of a split: PIL image to uint8 tensor [3, H, W].

    Everything is timm's own pipeline; for small images ('cifar', 'digits') its random resized crop gives way to
    zero padding by an eighth of the size and a random crop (4 pixels for 32x32).

    Args:
        defaults: Input format and published augmentation.
        is_training: With random augmentation.
        augment: Departures from the published augmentation; ignored in evaluation.
    """
    augment = augment or AugmentSettings()
    jitter = defaults.color_jitter if augment.color_jitter is None else augment.color_jitter
    pipeline = timm.data.create_transform(
        defaults.input_size,
        is_training=is_training,
        no_aug=augment.no_aug,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=_hflip(defaults, augment),
        vflip=augment.vflip,
        color_jitter=jitter or None,  # type: ignore[arg-type]  # timm's annotation omits the None that it handles
        color_jitter_prob=augment.color_jitter_prob,
        auto_augment=augment.aa,
        interpolation=augment.interpolation or defaults.interpolation if is_training else defaults.interpolation,
        mean=defaults.mean,
        std=defaults.std,
        crop_pct=defaults.crop_pct,
        use_prefetcher=True,
    )
    if is_training and not augment.no_aug and defaults.train_transform != 'imagenet':
        pipeline.transforms[:1] = _pad_and_crop(defaults)
    return pipeline


def _pad_and_crop(defaults: DataDefaults) -> list[Callable[[Any], Any]]:
    height, width = defaults.input_size[1:]
    return [
        transforms.Resize(min(height, width), interpolation=str_to_interp_mode(defaults.interpolation)),
        transforms.RandomCrop((height, width), padding=min(height, width) // 8),
    ]


def _hflip(defaults: DataDefaults, augment: AugmentSettings) -> float:
    if augment.hflip is not None:
        return augment.hflip
    return 0.0 if defaults.train_transform == 'digits' else 0.5

"""Image transforms up to uint8 tensors; normalisation and random erasing happen on the device, in the loader."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.data
from timm.data import str_to_interp_mode
from torchvision import transforms

from nbn_timm.data.defaults import DataDefaults
from nbn_timm.errors import InputError, nearest

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # timm's names


@dataclass(frozen=True)
class AugmentSettings:
    """Training augmentation by timm's flags; None is the benchmark's published value."""

    no_aug: bool = False  # resize and centre crop only
    scale: tuple[float, float] | None = None  # area range of the random resized crop; timm's 0.08 to 1
    ratio: tuple[float, float] | None = None  # aspect range of the random resized crop; timm's 3/4 to 4/3
    hflip: float | None = None  # probability
    vflip: float = 0.0  # probability
    rotation: float = 0.0  # greatest angle in degrees, either way; the corners turn black
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

    Raises:
        InputError: An impossible format, interpolation, crop range or auto-augment policy.
    """
    augment = augment or AugmentSettings()
    interpolation = defaults.interpolation
    if is_training:
        interpolation = augment.interpolation or interpolation
        _check_range('--scale', augment.scale, 1)
        _check_range('--ratio', augment.ratio)
    _check_format(defaults, interpolation, is_training)
    try:
        pipeline = _timm_transform(defaults, is_training, augment, interpolation)
    except (AssertionError, ValueError) as error:
        if not (is_training and augment.aa):
            raise
        raise InputError(f"--aa '{augment.aa}' is no policy of timm ({error}): give one such as rand-m9-mstd0.5, "
                         'augmix-m5-w4-d2, original-mstd0.5 or v0') from error
    if is_training and not augment.no_aug and defaults.train_transform != 'imagenet':
        if augment.scale or augment.ratio or interpolation == 'random':
            raise InputError('--scale, --ratio and --train-interpolation random belong to random resized crops, but '
                             f'images of {defaults.input_size[1]} pixels are padded and cropped: leave them out')
        pipeline.transforms[:1] = _pad_and_crop(defaults, interpolation)
    if is_training and augment.rotation and not augment.no_aug:
        # Before the conversion to a tensor, which is last.
        pipeline.transforms.insert(-1, transforms.RandomRotation(augment.rotation))
    return pipeline


def _timm_transform(
        defaults: DataDefaults,
        is_training: bool,
        augment: AugmentSettings,
        interpolation: str,
) -> transforms.Compose:
    jitter = defaults.color_jitter if augment.color_jitter is None else augment.color_jitter
    return timm.data.create_transform(
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
        interpolation=interpolation,
        mean=defaults.mean,
        std=defaults.std,
        crop_pct=defaults.crop_pct,
        use_prefetcher=True,
    )


def _check_range(flag: str, limits: tuple[float, float] | None, highest: float = float('inf')) -> None:
    if limits is not None and not 0 < limits[0] <= limits[1] <= highest:
        below = f', at most {highest:g}' if highest < float('inf') else ''
        raise InputError(f'{flag} {limits[0]:g} {limits[1]:g} is no range: '
                         f'give the smaller number first, both above 0{below}')


def _check_format(defaults: DataDefaults, interpolation: str, is_training: bool) -> None:
    names = (*INTERPOLATIONS, 'random') if is_training else INTERPOLATIONS
    if interpolation not in names:
        raise InputError(f"unknown interpolation '{interpolation}': "
                         f"give one of {', '.join(names)}{nearest(interpolation, names)}")
    channels = defaults.input_size[0]
    for name, values in (('mean', defaults.mean), ('std', defaults.std)):
        if len(values) not in (1, channels):
            raise InputError(f'the {name} has {len(values)} numbers and the images have {channels} channels: '
                             'give one number for each channel, or one for all')


def _pad_and_crop(defaults: DataDefaults, interpolation: str) -> list[Callable[[Any], Any]]:
    height, width = defaults.input_size[1:]
    return [
        transforms.Resize(min(height, width), interpolation=str_to_interp_mode(interpolation)),
        transforms.RandomCrop((height, width), padding=min(height, width) // 8),
    ]


def _hflip(defaults: DataDefaults, augment: AugmentSettings) -> float:
    if augment.hflip is not None:
        return augment.hflip
    return 0.0 if defaults.train_transform == 'digits' else 0.5

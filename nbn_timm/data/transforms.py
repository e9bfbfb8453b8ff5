"""Image transforms up to uint8 tensors; normalisation and random erasing happen on the device, in the loader."""
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm.data
from timm.data import str_to_interp_mode
from torchvision import transforms

from nbn_timm.data.bands import INTERPOLATIONS as of_bands
from nbn_timm.data.bands import MOST_OF_PILLOW, Clip
from nbn_timm.data.class_strength import ClassStrength
from nbn_timm.data.cutout import Cutout
from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.defaults import BORDER, CENTER, SQUASH, DataDefaults
from nbn_timm.data.pictures import mode_of
from nbn_timm.data.settings import AugmentSettings
from nbn_timm.data.simclr import simclr_transform
from nbn_timm.data.train_transforms import TRAIN_TRANSFORMS
from nbn_timm.errors import InputError, nearest

CIFAR10_POLICY = 'cifar10'  # of AutoAugment; torchvision has it, timm the ImageNet ones
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # timm's names


class ToMode:
    """PIL images of another library's data set in one of Pillow's modes."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, image: Any) -> Any:
        return image if image.mode == self.mode else image.convert(self.mode)


def set_transform(dataset: Any, transform: Callable[[Any], Any], defaults: DataDefaults) -> None:
    """Let a data set give its pictures in the channels of an input format, and what a transform makes of them."""
    dataset.transform = transform
    if defaults.input_size[0] > MOST_OF_PILLOW and not isinstance(dataset, ImageSamples):
        raise InputError(f'pictures of {defaults.input_size[0]} channels are read from files of class folders, lists '
                         'and CSV files, and these come otherwise: give --in-chans 3, or such files')
    if hasattr(dataset, 'mode'):
        dataset.mode = mode_of(defaults.input_size[0])


class Views:
    """Several independently augmented versions of an image, as a tuple.

    Args:
        transforms: PIL image to tensor, one for each version.
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, image: Any) -> tuple[Any, ...]:
        return tuple(transform(image) for transform in self.transforms)


def create_transform(
        defaults: DataDefaults,
        is_training: bool = False,
        augment: AugmentSettings | None = None,
) -> transforms.Compose:
    """The transform of a split: PIL image to uint8 tensor [channels, H, W].

    Everything is timm's own pipeline; its random resized crop gives way to what `TRAIN_TRANSFORMS` has instead.

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
        interpolation = augment.train_interpolation or interpolation
        if augment.force_color_jitter and not augment.aa:
            raise InputError('--force-color-jitter keeps the colour jitter beside an --aa policy, and there is none: '
                             'leave it out')
        _check_range('--scale', augment.area, 1)
        _check_range('--ratio', augment.aspect)
    _check_format(defaults, interpolation, is_training)
    bands = defaults.input_size[0] > MOST_OF_PILLOW
    if bands:
        defaults = replace(defaults, color_jitter=None)
    for flag, given, of_colours in (
            ('--aa', augment.aa, True), ('--grayscale-prob', augment.grayscale_prob, True),
            ('--simclr', augment.simclr, True), ('--curriculum', augment.curriculum, True),
            ('--color-jitter', bands and augment.color_jitter, True),
            ('--cutout', bands and augment.cutout, False)):
        if is_training and not augment.no_aug and given and defaults.input_size[0] != 3:
            what = 'changes the colours of RGB pictures' if of_colours else 'is for pictures of up to 4 channels'
            raise InputError(f'{flag} {what}, and these have {defaults.input_size[0]} channels: leave it out')
    if is_training and augment.simclr and not augment.no_aug:
        if interpolation == 'random':
            raise InputError('--train-interpolation random is not for the crops of --simclr: give one of '
                             f"{', '.join(INTERPOLATIONS)}, or leave it out")
        return simclr_transform(defaults.input_size[1:], augment.area, augment.aspect, _hflip(defaults, augment),
                                augment.blur, augment.train_interpolation or 'bilinear')
    try:
        pipeline = _timm_transform(defaults, is_training, augment, interpolation)
    except (AssertionError, ValueError) as error:
        if not (is_training and augment.aa):
            raise
        raise InputError(f"--aa '{augment.aa}' is no policy ({error}): give cifar10, or one of timm's such as "
                         'rand-m9-mstd0.5, augmix-m5-w4-d2, original-mstd0.5 or v0') from error
    height, width = defaults.input_size[1:]
    mode = None if interpolation == 'random' else str_to_interp_mode(interpolation)
    crop = TRAIN_TRANSFORMS.find(defaults.train_transform)().crop(height, width, mode)
    resized = augment.area or augment.aspect  # who gives these asks for random resized crops
    if is_training and not augment.no_aug and crop is not None and not resized:
        if interpolation == 'random':
            raise InputError(f'--train-interpolation random belongs to random resized crops, but images of '
                             f'{defaults.input_size[1]} pixels are padded and cropped: leave it out, or ask for them '
                             'with --scale')
        pipeline.transforms[:1] = crop
    if is_training and not augment.no_aug:
        # The conversion to a tensor is last, and timm's policy, if there is one, stands before it.
        if augment.force_color_jitter:
            behind = sum(map(bool, (augment.grayscale_prob, augment.gaussian_blur_prob)))
            position = (-1 if augment.aa == CIFAR10_POLICY else -2) - behind
            pipeline.transforms.insert(position, _jitter(defaults, augment))
        pipeline.transforms[-1:-1] = _beyond_timm(defaults, augment)
    if bands:
        pipeline.transforms.append(Clip())
    elif defaults.input_size[0] != 3:
        pipeline.transforms.insert(0, ToMode(mode_of(defaults.input_size[0])))
    return pipeline


def _timm_transform(
        defaults: DataDefaults,
        is_training: bool,
        augment: AugmentSettings,
        interpolation: str,
) -> transforms.Compose:
    own_policy = augment.aa == CIFAR10_POLICY
    jitter = None if own_policy or augment.force_color_jitter else _jitter_strength(defaults, augment)
    return timm.data.create_transform(
        defaults.input_size,
        is_training=is_training,
        no_aug=augment.no_aug,
        scale=augment.area,
        ratio=augment.aspect,
        hflip=_hflip(defaults, augment),
        vflip=augment.vflip,
        color_jitter=jitter or None,  # type: ignore[arg-type]  # timm's annotation omits the None that it handles
        color_jitter_prob=augment.color_jitter_prob,
        grayscale_prob=augment.grayscale_prob,
        gaussian_blur_prob=augment.gaussian_blur_prob,
        auto_augment=None if own_policy else augment.aa,
        interpolation=interpolation,
        mean=defaults.mean,
        std=defaults.std,
        crop_pct=defaults.crop_pct,
        crop_mode=defaults.crop_mode,
        use_prefetcher=True,
    )


def _hflip(defaults: DataDefaults, augment: AugmentSettings) -> float:
    return TRAIN_TRANSFORMS.find(defaults.train_transform).hflip if augment.hflip is None else augment.hflip


def _beyond_timm(defaults: DataDefaults, augment: AugmentSettings) -> list[Callable[[Any], Any]]:
    """What timm has not, in the order in which the published recipes apply it."""
    steps: list[Callable[[Any], Any]] = []
    if augment.aa == CIFAR10_POLICY:
        # Areas without pixels become the mean colour, as in AutoAugment's own code and in timm's policies.
        channels, mean = defaults.input_size[0], defaults.mean
        fill = [float(round(255 * value)) for value in (mean if len(mean) > 1 else mean * channels)]
        steps.append(transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=fill))
    if augment.curriculum:
        steps.append(ClassStrength())
    if augment.rotation:
        steps.append(transforms.RandomRotation(augment.rotation))
    if augment.cutout:
        steps.append(Cutout(augment.cutout))
    return steps


def _jitter_strength(defaults: DataDefaults, augment: AugmentSettings) -> float | None:
    return defaults.color_jitter if augment.color_jitter is None else augment.color_jitter


def _jitter(defaults: DataDefaults, augment: AugmentSettings) -> Callable[[Any], Any]:
    """The colour jitter that timm leaves out beside a policy."""
    strength = _jitter_strength(defaults, augment)
    if not strength:
        raise InputError('--force-color-jitter keeps a colour jitter that these images do not have: give its strength '
                         'with --color-jitter, or leave it out')
    jitter = transforms.ColorJitter(strength, strength, strength)
    prob = augment.color_jitter_prob
    return jitter if prob is None else transforms.RandomApply([jitter], prob)


def _check_range(flag: str, limits: tuple[float, float] | None, highest: float = float('inf')) -> None:
    if limits is not None and not 0 < limits[0] <= limits[1] <= highest:
        below = f', at most {highest:g}' if highest < float('inf') else ''
        raise InputError(f'{flag} {limits[0]:g} {limits[1]:g} is no range: '
                         f'give the smaller number first, both above 0{below}')


def _check_format(defaults: DataDefaults, interpolation: str, is_training: bool) -> None:
    known = of_bands if defaults.input_size[0] > MOST_OF_PILLOW else INTERPOLATIONS
    names = (*known, 'random') if is_training else known
    if interpolation not in names:
        raise InputError(f"unknown interpolation '{interpolation}'{' of such pictures' * (known is of_bands)}: "
                         f"give one of {', '.join(names)}{nearest(interpolation, names)}")
    channels = defaults.input_size[0]
    if channels > MOST_OF_PILLOW and defaults.crop_mode == BORDER:
        raise InputError(f'borders are for pictures of up to {MOST_OF_PILLOW} channels, and these have {channels}: '
                         f'give --crop-mode {CENTER} or {SQUASH}')
    for name, values in (('mean', defaults.mean), ('std', defaults.std)):
        if len(values) not in (1, channels):
            raise InputError(f'the {name} has {len(values)} numbers and the images have {channels} channels: '
                             'give one number for each channel, or one for all')

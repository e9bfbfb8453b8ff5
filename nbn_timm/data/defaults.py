"""Input formats and training transforms, as benchmarks publish them."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from nbn_timm.data.bands import MOST_OF_PILLOW
from nbn_timm.data.settings import InputSettings
from nbn_timm.data.train_transforms import PadAndCrop, ResizedCrop
from nbn_timm.errors import InputError
from nbn_timm.settings import fields_of

INPUT_FORMAT = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')  # of evaluation, by timm's names
CENTER, SQUASH, BORDER = 'center', 'squash', 'border'  # how evaluation brings an image to the size, by timm's names
SMALL_IMAGE = 64  # up to this size training pads and crops (CIFAR) instead of taking a random resized crop


@dataclass(frozen=True)
class DataDefaults:
    """How a benchmark's images are read, as its papers do.

    Attributes:
        input_size: (channels, height, width).
        mean, std: Of pixels in [0, 1].
        interpolation: timm's name of the resampling filter.
        crop_pct: Share of the resized image that the evaluation's centre crop keeps.
        crop_mode: `CENTER` keeps the middle of an image, `SQUASH` all of it, without its ratio, `BORDER` all of it,
            with its ratio and borders.
        train_transform: How training brings an image to that size, a name in `TRAIN_TRANSFORMS`.
        color_jitter: Strength of brightness, contrast and saturation jitter; None for none.
        published: False where no benchmark prescribes the format (a user's own images), so that the model may.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = 'bilinear'
    crop_pct: float = 0.875
    crop_mode: str = CENTER
    train_transform: str = ResizedCrop.name
    color_jitter: float | None = 0.4
    published: bool = True

    def override(
            self,
            input_size: Sequence[int] | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
            interpolation: str | None = None,
            crop_pct: float | None = None,
            crop_mode: str | None = None,
    ) -> 'DataDefaults':
        """A copy with the given values in place of the published ones; None keeps a value."""
        given: dict[str, Any] = dict(interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
        given |= {
            name: None if value is None else tuple(value)
            for name, value in dict(input_size=input_size, mean=mean, std=std).items()
        }
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def as_trained(self, settings: InputSettings) -> 'DataDefaults':
        """These defaults with what flags or the record of a training say; `img_size` is of square images.

        Where they change the number of channels, a mean and std that are not given become their mean over the channels,
        as in timm.

        Raises:
            InputError: They are so for more than four channels.
        """
        size = (settings.img_size, settings.img_size) if settings.img_size else self.input_size[1:]
        changed = self.override(input_size=(settings.in_chans or self.input_size[0], *size))
        changed = changed.override(**{name: getattr(settings, name) for name in (*INPUT_FORMAT, 'crop_mode')})
        channels = changed.input_size[0]
        adapted: dict[str, Any] = {
            name: (sum(values) / len(values),) * channels for name in ('mean', 'std')
            if getattr(settings, name) is None and len(values := getattr(changed, name)) not in (1, channels)}
        if adapted and channels > MOST_OF_PILLOW:  # which have little to do with those of RGB
            raise InputError(f'of {channels} channels no mean and std are known: give --mean and --std with {channels} '
                             'numbers each')
        return changed.override(**adapted)

    def input_format(self) -> dict[str, Any]:
        """What evaluation depends on, by timm's names."""
        squashed = {} if self.crop_mode == CENTER else {'crop_mode': self.crop_mode}
        return {**{name: getattr(self, name) for name in INPUT_FORMAT}, **squashed}

    def for_model(self, pretrained_cfg: Mapping[str, Any]) -> 'DataDefaults':
        """These defaults if they are published, else the input format that the model was made for.

        Args:
            pretrained_cfg: timm's `model.pretrained_cfg`, which may be of a config.json.

        Raises:
            InputError: See `check_input_format`.
        """
        if self.published:
            return self
        check_input_format(pretrained_cfg)
        resolved = self.override(**{name: pretrained_cfg.get(name) for name in (*INPUT_FORMAT, 'crop_mode')})
        small = max(resolved.input_size[1:]) <= SMALL_IMAGE
        return replace(resolved, train_transform=PadAndCrop.name, color_jitter=None) if small else resolved


OWN_IMAGES = DataDefaults(published=False)


def check_input_format(pretrained_cfg: Mapping[str, Any]) -> None:
    """Refuse a format that no images can be brought to, as a config.json may have it.

    Raises:
        InputError: A value is none that the flags of `InputSettings` take, or mean and std are not of the channels.
    """
    has = "the model's pretrained_cfg, as config.json holds it, has"
    for one in fields_of(InputSettings):
        if one.name in (*INPUT_FORMAT, 'crop_mode'):
            value = pretrained_cfg.get(one.name)
            one.check(value, f'{has} {one.name} {value!r}')
    channels = (pretrained_cfg.get('input_size') or OWN_IMAGES.input_size)[0]
    for name in ('mean', 'std'):
        number = len(pretrained_cfg.get(name) or (0,))
        if number not in (1, channels):
            raise InputError(f'{has} {number} numbers as the {name} of {channels} channels: give one for each, or one '
                             'for all')

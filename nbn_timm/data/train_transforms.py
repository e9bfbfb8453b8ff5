"""How a training image is brought to the size of the input, by name; a benchmark can register its own in its file."""
from collections.abc import Callable
from typing import Any, ClassVar

from torchvision import transforms
from torchvision.transforms import InterpolationMode

from nbn_timm.registry import Registry

Step = Callable[[Any], Any]


class TrainTransform:
    """Base of all: timm's random resized crop.

    Attributes:
        name: That `DataDefaults.train_transform` chooses it by.
        words: What it does, for people, with the place of the size.
        hflip: Probability of a horizontal flip.
        resizes: Also pictures that have the size of the input.
    """

    name: ClassVar[str]
    words: ClassVar[str] = 'random resized crop{size}'
    hflip: ClassVar[float] = 0.5
    resizes: ClassVar[bool] = True

    def crop(self, height: int, width: int, interpolation: InterpolationMode | None) -> list[Step] | None:
        """Steps from a picture to the size of the input; None for timm's random resized crop.

        The interpolation is None if it is to be random, which only that can do: then what is given here is refused.
        """
        return None

    def in_words(self, size: int | None = None) -> str:
        """What it does, for people; with the size of the input, if one is given."""
        return self.words.format(size='' if size is None else f' {size}') + (', flip' if self.hflip else '')


TRAIN_TRANSFORMS: Registry[TrainTransform] = Registry('train_transform')


def register_train_transform(name: str) -> Callable[[type[TrainTransform]], type[TrainTransform]]:
    """Class decorator: make a `TrainTransform` available under a name."""
    def register(transform: type[TrainTransform]) -> type[TrainTransform]:
        transform.name = name
        return TRAIN_TRANSFORMS.register(name)(transform)
    return register


@register_train_transform('imagenet')
class ResizedCrop(TrainTransform):
    """Random resized crop and flip, as for ImageNet."""


@register_train_transform('cifar')
class PadAndCrop(TrainTransform):
    """Zero padding by an eighth of the size, a random crop (4 pixels for 32x32) and a flip, as for CIFAR."""

    words = 'pad by an eighth, random crop{size}'
    resizes = False

    def crop(self, height: int, width: int, interpolation: InterpolationMode | None) -> list[Step]:
        """Of pictures of another size the shorter side is resized first."""
        return [
            transforms.Resize(min(height, width), interpolation=interpolation),  # type: ignore[arg-type]
            transforms.RandomCrop((height, width), padding=min(height, width) // 8),
        ]

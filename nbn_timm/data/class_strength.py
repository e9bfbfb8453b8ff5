"""CUDA's augmentation: pictures of a class are changed by as many operations, and as strongly, as its level says.

Source: Ahn et al., "CUDA: Curriculum of Data Augmentation for Long-tailed Recognition", ICLR 2023, and its authors'
code (sumyeongahn/CUDA_LTR, commit f4c8d35, `cifar/aug/cuda.py`). `nbn_timm.training.curriculum` moves the
levels.
"""
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import Dataset

from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.decoders import DecodedCrop
from nbn_timm.settings import PROBABILITY, Limits, Settings, only_with, setting

TOP_LEVEL = 10
_STRENGTHS = 30  # a level is so manieth of the way from the weakest to the strongest


@dataclass(frozen=True)
class CurriculumSettings(Settings):
    """A curriculum of augmentation for each class."""

    title = 'curriculum of augmentation'
    of_training = True

    curriculum_prob: float = setting(0.5, 'that a picture is changed as strongly as the level of its class says',
                                     limits=PROBABILITY, metavar='P', effect=only_with('curriculum'))
    curriculum_trials: int = setting(
        10, 'before each epoch a class of level L is tried on N (l + 1) pictures of each level l from 0 to L',
        limits=Limits(1, 1000), effect=only_with('curriculum'))
    curriculum_accept: float = setting(
        0.6, 'it rises by one level where more than this share is right at each of these, and else falls by one',
        limits=PROBABILITY, metavar='SHARE', effect=only_with('curriculum'))


Key = int | tuple[int, int]  # index of a picture, or that and a level


def _filtered(kernel: Any) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, _: image.filter(kernel)


def _enhanced(what: Any) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, value: what(image).enhance(value)


def _moved(*coefficients: float) -> Callable[[Image.Image, float], Image.Image]:
    """An affine map by the coefficients, of which those that are not of the identity count values, either way."""
    def move(image: Image.Image, value: float) -> Image.Image:
        value = _either_way(value)
        matrix = tuple(one + value * factor for one, factor in zip((1, 0, 0, 0, 1, 0), coefficients, strict=True))
        return image.transform(image.size, Image.Transform.AFFINE, matrix)
    return move


def _either_way(value: float) -> float:
    return -value if random.random() > 0.5 else value


def _enlarged(image: Image.Image, value: float) -> Image.Image:
    """The middle of the picture in `value` times its size."""
    width, height = int(image.width * value), int(image.height * value)
    left, top = width // 2 - image.width // 2, height // 2 - image.height // 2
    large = image.resize((width, height), Image.Resampling.LANCZOS)
    return large.crop((left, top, left + image.width, top + image.height))


def _brighter_then_solarized(image: Image.Image, value: float) -> Image.Image:
    pixels = np.clip(np.asarray(image).astype(int) + value, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(pixels), 128)


# Each with its weakest and its strongest value; a third of the way is the most that the highest level takes.
OPERATIONS: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, float], ...] = (
    (lambda image, _: ImageOps.flip(image), 0, 1),
    (lambda image, _: ImageOps.mirror(image), 0, 1),
    (_filtered(ImageFilter.EDGE_ENHANCE), 0, 1),
    (_filtered(ImageFilter.DETAIL), 0, 1),
    (_filtered(ImageFilter.SMOOTH), 0, 1),
    (lambda image, _: ImageOps.autocontrast(image), 0, 1),
    (lambda image, _: ImageOps.equalize(image), 0, 1),
    (lambda image, _: ImageOps.invert(image), 0, 1),
    (lambda image, value: image.filter(ImageFilter.GaussianBlur(value)), 0, 2),
    (_enlarged, 1, 1.5),
    (lambda image, value: image.rotate(_either_way(value)), 0, 30),
    (lambda image, value: ImageOps.posterize(image, max(1, int(value))), 0, 4),
    (lambda image, value: ImageOps.solarize(image, value), 0, 256),  # type: ignore[arg-type]  # takes fractions too
    (_brighter_then_solarized, 0, 110),
    (_enhanced(ImageEnhance.Color), 0.1, 1.9),
    (_enhanced(ImageEnhance.Contrast), 0.1, 1.9),
    (_enhanced(ImageEnhance.Brightness), 0.1, 1.9),
    (_enhanced(ImageEnhance.Sharpness), 0.1, 1.9),
    (_moved(0, 1, 0, 0, 0, 0), 0, 0.3),
    (_moved(0, 0, 0, 1, 0, 0), 0, 0.3),
    (_moved(0, 0, 1, 0, 0, 0), 0, 100),
    (_moved(0, 0, 0, 0, 0, 1), 0, 100),
)


class ClassStrength:
    """A step of a pipeline: as many of the operations, drawn with replacement, as `level` says, all of its strength.

    `LevelledImages` sets the level before each picture; without, it is 0, which leaves a picture as it is.
    """

    def __init__(self) -> None:
        self.level = 0

    def __call__(self, image: Image.Image) -> Image.Image:
        strength = self.level / _STRENGTHS
        for operation, weakest, strongest in random.choices(OPERATIONS, k=self.level):
            image = operation(image, strength * (strongest - weakest) + weakest)
        return image


class LevelledImages(Dataset):
    """Labelled images whose `ClassStrength` steps have the level of the image's class, or 0.

    The key of an image is its index; (index, level) gives it with that level for certain.

    Args:
        samples: The images, whose transform this sets.
        num_classes: C.
        prob: That an image has the level of its class.

    Attributes:
        levels: Of the classes, int64 [C]; copies share it, and it may be written at any time.
    """

    def __init__(self, samples: LabelledImages, num_classes: int, prob: float) -> None:
        self.samples = samples
        self.prob = prob
        self.levels = np.zeros(num_classes, np.int64)
        self.steps: tuple[ClassStrength, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> np.ndarray:
        """Labels, int64 [N]."""
        return self.samples.targets

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """PIL image to what is returned."""
        return self.samples.transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any]) -> None:
        self.samples.transform = transform
        self.steps = tuple(_steps_of(transform))

    def __getitem__(self, key: Key) -> tuple[Any, Any]:
        if isinstance(key, tuple):
            index, level = key
        else:
            index, level = key, 0
            if random.random() < self.prob:
                level = int(self.levels[self.samples.target(index)])
        for step in self.steps:
            step.level = level
        return self.samples[index]


def _steps_of(transform: Any) -> Iterator[ClassStrength]:
    """The steps in a transform, or in what it is made of."""
    if isinstance(transform, ClassStrength):
        yield transform
    parts = (transform.pipeline,) if isinstance(transform, DecodedCrop) else getattr(transform, 'transforms', ())
    for part in parts:
        yield from _steps_of(part)

"""Handwritten digits that come with scikit-learn: real images for a first run without any download."""
from functools import cache

import numpy as np
from PIL import Image

from nbn_timm.data.dataset import ArraySamples
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.train_transforms import PadAndCrop, register_train_transform
from nbn_timm.datasets.benchmark import register_benchmark
from nbn_timm.datasets.drawn_benchmark import DrawnBenchmark
from nbn_timm.errors import InputError

TRAIN, VAL, TEST = 140, 14, 20  # images per class; the rarest digit has 174
SIZE = 32


@register_train_transform('digits')
class PadAndCropUnflipped(PadAndCrop):
    """As for CIFAR, without the flip, which makes another digit."""

    hflip = 0.0


@register_benchmark('digits_lt')
class DigitsLT(DrawnBenchmark):
    """Ten digits with 140 to 9 images: the quick start's dataset, which compares nothing."""

    title = "long-tailed handwritten digits (scikit-learn's)"
    num_classes = 10
    home = 'https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits'
    images = 'nothing, they come with scikit-learn'
    terms = 'CC BY 4.0'
    factor = 15.0  # 140 images of the digit 0 down to 9 of the digit 9: 2 many-, 5 medium-, 3 few-shot classes
    largest = TRAIN
    held_out = {'val': 10 * VAL, 'test': 10 * TEST}
    needs_folder = False
    zoo = 'resnet20_nbn'
    defaults = DataDefaults(
        input_size=(3, SIZE, SIZE),
        mean=(0.306, 0.306, 0.306),
        std=(0.324, 0.324, 0.324),
        crop_pct=1.0,
        train_transform='digits',
        color_jitter=None,
    )

    def load(self, settings: DataSettings, part: str) -> tuple[ArraySamples, tuple[str, ...]]:
        return load_digits_splits()[part], self.class_names()

    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(10)))

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return frozenset()


@cache
def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 [N, 32, 32, 3], and their labels.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            'the digits_lt dataset needs scikit-learn, which is not installed: pip install scikit-learn') from error
    digits = load_digits()
    return np.stack([_enlarge(image) for image in digits.images]), digits.target


def load_digits_splits() -> dict[str, ArraySamples]:
    """The 8x8 digits of UCI's optical recognition test set as 32x32 RGB images, in three balanced splits.

    Images are assigned by a fixed permutation of each class: 140 per class to 'train', 14 to 'val', 20 to 'test'.

    Raises:
        InputError: scikit-learn is not installed.
    """
    images, targets = load_digit_images()
    everything = ArraySamples(images, targets)
    random = np.random.RandomState(0)
    shuffled = [random.permutation(np.flatnonzero(targets == label)) for label in range(10)]
    borders = {'train': (0, TRAIN), 'val': (TRAIN, TRAIN + VAL), 'test': (TRAIN + VAL, TRAIN + VAL + TEST)}
    return {
        split: everything.select(np.concatenate([indices[first:last] for indices in shuffled]))
        for split, (first, last) in borders.items()
    }


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """8x8 grey levels of 0 to 16 to uint8 [32, 32, 3]."""
    grey = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert('RGB'))

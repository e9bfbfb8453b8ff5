"""Handwritten digits that come with scikit-learn: real images for a first run without any download."""
import numpy as np
from PIL import Image

from nbn_timm.data.dataset import ArraySamples
from nbn_timm.errors import InputError

DIGITS_FACTOR = 15.0  # 140 images of the digit 0 down to 9 of the digit 9: 2 many-, 5 medium-, 3 few-shot classes
TRAIN, VAL, TEST = 140, 14, 20  # images per class; the rarest digit has 174
SIZE = 32


def load_digits_splits() -> dict[str, ArraySamples]:
    """The 8x8 digits of UCI's optical recognition test set as 32x32 RGB images, in three balanced splits.

    Images are assigned by a fixed permutation of each class: 140 per class to 'train', 14 to 'val', 20 to 'test'.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            'the digits_lt dataset needs scikit-learn, which is not installed: pip install scikit-learn') from error
    digits = load_digits()
    everything = ArraySamples(np.stack([_enlarge(image) for image in digits.images]), digits.target)
    random = np.random.RandomState(0)
    shuffled = [random.permutation(np.flatnonzero(digits.target == label)) for label in range(10)]
    borders = {'train': (0, TRAIN), 'val': (TRAIN, TRAIN + VAL), 'test': (TRAIN + VAL, TRAIN + VAL + TEST)}
    return {
        split: everything.select(np.concatenate([indices[first:last] for indices in shuffled]))
        for split, (first, last) in borders.items()
    }


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """8x8 grey levels of 0 to 16 to uint8 [32, 32, 3]."""
    grey = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert('RGB'))

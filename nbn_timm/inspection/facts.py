"""What one look at a picture tells, and the pass over all pictures of a collection."""
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from nbn_timm.data.bands import stretched
from nbn_timm.data.dataset import ImageSamples, LabelledImages
from nbn_timm.data.pictures import orientation_of, read_picture
from nbn_timm.errors import InputError

GREY_SIDE = 16  # pixels of `PictureFacts.grey`
_HASH_SIDE, _FREQUENCIES = 32, 8
_PICTURES_PER_BATCH = 16


class PictureFacts(NamedTuple):
    """What is kept of a picture; of one that cannot be read only `fault` and `size`.

    Attributes:
        fault: Why training would stop at it, in a sentence; None for a sound picture.
        size: Bytes of the file; 0 in memory.
        format, mode: Pillow's, as stored, or of `data.bands`; '' in memory.
        width, height: Pixels, as stored.
        orientation: Of EXIF, 1 to 8; 1 is upright.
        pages: Of a TIFF file, of which the first is read.
        content: Digest of the upright pixels as they are trained on, and of their shape: equal for the same picture in
            other files or formats.
        hash: Perceptual, 64 bits, see `perceptual_hash`.
        grey: The picture shrunk to 16 x 16 bytes of grey.
        moments: Of `data.bands`: means of the values and of their squares in [0, 1], channel by channel.
    """

    fault: str | None = None
    size: int = 0
    format: str = ''
    mode: str = ''
    width: int = 0
    height: int = 0
    orientation: int = 1
    pages: int = 1
    content: bytes = b''
    hash: int = 0
    grey: bytes = b''
    moments: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


def facts_of_file(path: str, mode: str = 'RGB') -> PictureFacts:
    """Look at a picture file, as training would read it in a mode of `pictures.MODES` or `bands`."""
    stored: dict[str, Any] = {}

    def note(image: Image.Image) -> None:
        stored.update(format=image.format or '', mode=image.mode, width=image.width, height=image.height,
                      orientation=orientation_of(image), pages=_pages(image))

    size = os.path.getsize(path) if os.path.isfile(path) else 0
    try:
        with warnings.catch_warnings(), _unlogged('tifffile'):
            warnings.simplefilter('ignore')  # of Pillow, about metadata and very large pictures
            picture = read_picture(path, mode, look=note)
    except InputError as error:
        return PictureFacts(str(error), size)
    if isinstance(picture, torch.Tensor):
        stored = {'format': 'NumPy' if path.lower().endswith('.npy') else 'TIFF', 'mode': mode}
        return _seen_bands(picture.numpy())._replace(size=size, **stored)
    return _seen(picture)._replace(size=size, **stored)


def facts_of_picture(picture: Image.Image) -> PictureFacts:
    """Look at a picture in memory, of a mode of `pictures.MODES`."""
    return _seen(picture)


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Without what a library logs of a damaged file, beside the error that it raises."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _pages(image: Image.Image) -> int:
    try:
        return getattr(image, 'n_frames', 1) if image.format == 'TIFF' else 1
    except Exception:  # damaged pages after the first, whose reader raises nearly anything, spoil no pixel
        return 1


def _seen(picture: Image.Image) -> PictureFacts:
    return _looked(picture.convert('L'), picture.tobytes())


def _seen_bands(picture: np.ndarray) -> PictureFacts:
    """Of float32 [channels, height, width], 0 to 255; what it looks like is the mean of its channels, stretched."""
    mean = picture.mean(axis=0)
    grey = Image.fromarray(stretched(mean, *np.percentile(mean, (1, 99)).tolist()))
    values = picture.astype(np.float64) / 255
    moments = (tuple(values.mean(axis=(1, 2)).tolist()), tuple(np.square(values).mean(axis=(1, 2)).tolist()))
    return _looked(grey, picture.tobytes())._replace(moments=moments)


def _looked(grey: Image.Image, pixels: bytes) -> PictureFacts:
    digest = hashlib.blake2b(f'{grey.size}'.encode(), digest_size=16)
    digest.update(pixels)
    small = grey.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS)
    tiny = small.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX)
    return PictureFacts(width=grey.width, height=grey.height, content=digest.digest(),
                        hash=perceptual_hash(np.asarray(small)), grey=tiny.tobytes())


def perceptual_hash(grey: np.ndarray) -> int:
    """The 64 bits of pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).

    Bit by bit, row by row, whether a low frequency of the cosine transform lies above their median: equal to the phash
    of the library imagehash, whose dependencies (SciPy, PyWavelets) this does without.

    Args:
        grey: uint8 [32, 32].
    """
    cosines = _cosines()
    low = cosines @ grey.astype(np.float64) @ cosines.T
    bits = np.packbits((low > np.median(low)).ravel())
    return int.from_bytes(bits.tobytes(), 'big')


@cache
def _cosines() -> np.ndarray:
    """The first rows of the cosine transform of type II, [8, 32]."""
    frequency, place = np.arange(_FREQUENCIES)[:, None], np.arange(_HASH_SIDE)
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * _HASH_SIDE))


class _Looks(Dataset):
    """`PictureFacts` of the pictures of several datasets, one after the other."""

    def __init__(self, datasets: Sequence[LabelledImages]) -> None:
        self.datasets = datasets
        self.ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> PictureFacts:
        number = int(np.searchsorted(self.ends, index, side='right'))
        dataset, index = self.datasets[number], index - (int(self.ends[number - 1]) if number else 0)
        if isinstance(dataset, ImageSamples):
            return facts_of_file(dataset.path(index), dataset.mode)
        return facts_of_picture(dataset.image(index))


def look_at_all(datasets: Sequence[LabelledImages], workers: int) -> Iterator[PictureFacts]:
    """`PictureFacts` of all pictures in order, looked at by so many processes beside this one; 0 for none."""
    looks = _Looks(datasets)
    if not len(looks):
        return
    workers = workers if len(looks) > workers * _PICTURES_PER_BATCH else 0  # starting them takes a second
    for batch in DataLoader(looks, batch_size=_PICTURES_PER_BATCH, num_workers=workers, collate_fn=list):
        yield from batch

"""What one look at a picture tells, and the pass over all pictures of a collection."""
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

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
        format, mode: Pillow's; '' in memory.
        width, height: Pixels, as stored.
        orientation: Of EXIF, 1 to 8; 1 is upright.
        content: Digest of the upright RGB pixels and their shape: equal for the same picture in other files or formats.
        hash: Perceptual, 64 bits, see `perceptual_hash`.
        grey: The picture shrunk to 16 x 16 bytes of grey.
    """

    fault: str | None = None
    size: int = 0
    format: str = ''
    mode: str = ''
    width: int = 0
    height: int = 0
    orientation: int = 1
    content: bytes = b''
    hash: int = 0
    grey: bytes = b''


def facts_of_file(path: str) -> PictureFacts:
    """Look at a picture file, as training would read it."""
    stored: dict[str, Any] = {}

    def note(image: Image.Image) -> None:
        stored.update(format=image.format or '', mode=image.mode, width=image.width, height=image.height,
                      orientation=orientation_of(image))

    size = os.path.getsize(path) if os.path.isfile(path) else 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of Pillow, about metadata and very large pictures
            picture = read_picture(path, look=note)
    except InputError as error:
        return PictureFacts(str(error), size)
    return _seen(picture)._replace(size=size, **stored)


def facts_of_picture(picture: Image.Image) -> PictureFacts:
    """Look at a picture in memory, RGB."""
    return _seen(picture)._replace(width=picture.width, height=picture.height)


def _seen(picture: Image.Image) -> PictureFacts:
    digest = hashlib.blake2b(f'{picture.size}'.encode(), digest_size=16)
    digest.update(picture.tobytes())
    small = picture.convert('L').resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS)
    grey = small.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX)
    return PictureFacts(content=digest.digest(), hash=perceptual_hash(np.asarray(small)), grey=grey.tobytes())


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
            return facts_of_file(dataset.path(index))
        return facts_of_picture(dataset.image(index))


def look_at_all(datasets: Sequence[LabelledImages], workers: int) -> Iterator[PictureFacts]:
    """`PictureFacts` of all pictures in order, looked at by so many processes beside this one; 0 for none."""
    looks = _Looks(datasets)
    if not len(looks):
        return
    workers = workers if len(looks) > workers * _PICTURES_PER_BATCH else 0  # starting them takes a second
    for batch in DataLoader(looks, batch_size=_PICTURES_PER_BATCH, num_workers=workers, collate_fn=list):
        yield from batch

"""Pictures of more than four channels, as multispectral cameras and satellites take them: files of them as tensors.

Pillow has no such pictures. They are float32 [channels, height, width], 0 to 255 as those of 8 bits are, so that values
of 16 bits keep their steps and everything after the reading is the same.
"""
import importlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nbn_timm.errors import InputError, in_words, quoted
from nbn_timm.files import open_regular

MOST_OF_PILLOW = 4  # channels
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic')  # that there are for tensors, by timm's names
_MODE = re.compile(r'(\d+) bands')
_TIFF, _NUMPY = ('.tif', '.tiff'), '.npy'
_WHITE = {'uint8': 255, 'uint16': 65535}


def mode_of_bands(channels: int) -> str:
    """In place of a mode of Pillow's."""
    return f'{channels} bands'


def bands_of(mode: str) -> int | None:
    """The channels of a mode of `mode_of_bands`; None of one of Pillow's."""
    found = _MODE.fullmatch(mode)
    return int(found[1]) if found else None


def may_hold_bands(path: str) -> bool:
    """Whether a file is of a kind that can have more than four channels, by its name."""
    return Path(path).suffix.lower() in (*_TIFF, _NUMPY)


def require_readers(paths: Iterable[str]) -> None:
    """Refuse files that cannot be read here, all of them for one reason.

    Raises:
        InputError: There are TIFF files, and no tifffile.
    """
    if any(Path(path).suffix.lower() in _TIFF for path in paths):
        _tifffile()


def read_bands(path: str, channels: int) -> torch.Tensor:
    """The picture in a TIFF file, of several samples a pixel or of a page each, or in a NumPy file.

    Args:
        path: The file.
        channels: That it must have, as its first or its last dimension.

    Returns:
        float32 [channels, height, width], 0 to 255: 65535 of 16 bits and 1 of floating numbers are 255.

    Raises:
        InputError: It is missing, damaged, of another kind, number of channels or type of numbers, or TIFF files cannot
            be read here.
    """
    what, suffix = f'image {quoted(path)}', Path(path).suffix.lower()
    if not may_hold_bands(path):
        raise InputError(f'{what} is no file of {channels} channels: give TIFF or NumPy (.npy) files, or --in-chans '
                         f'1 to {MOST_OF_PILLOW}')
    reader = _tifffile().imread if suffix in _TIFF else np.load
    try:
        with open_regular(path) as file:
            values = np.asarray(reader(io.BytesIO(file.read())))
    except FileNotFoundError as error:
        raise InputError(f'{what} is missing: check the image root (--data-dir) or remove the line from the list'
                         ) from error
    except Exception as error:  # damaged files make readers raise nearly anything
        reason = in_words(error)
        raise InputError(f'{what} cannot be read ({reason}): replace the file by an intact copy') from error
    return _scaled(_channels_first(values, channels, what), what)


def shown(image: torch.Tensor) -> Image.Image:
    """The first three channels as red, green and blue, from the darkest to the brightest value, for people."""
    first = image[:3].numpy()
    return Image.fromarray(stretched(first, float(first.min()), float(first.max())).transpose(1, 2, 0))


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of any shape as bytes, of which `low` and below is black and `high` and above is white."""
    return np.uint8(((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255))


class Clip:
    """Values back to 0 to 255, which bicubic resampling leaves."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.clamp(0, 255)


def _channels_first(values: np.ndarray, channels: int, what: str) -> np.ndarray:
    places = [axis for axis in (0, 2) if values.ndim == 3 and values.shape[axis] == channels]
    if not places:
        raise InputError(f'{what} has the shape {" x ".join(map(str, values.shape))}, and --in-chans asks for '
                         f'{channels} channels: give that number, as the first or the last dimension')
    if len(places) == 2:
        raise InputError(f'{what} has the shape {" x ".join(map(str, values.shape))}, in which the {channels} channels '
                         'may be the first dimension or the last: give pictures of another height or width')
    return values if places[0] == 0 else values.transpose(2, 0, 1)


def _scaled(values: np.ndarray, what: str) -> torch.Tensor:
    white = _WHITE.get(values.dtype.name)  # whatever the order of bytes
    if white is None and not (np.issubdtype(values.dtype, np.floating) and values.size
                              and 0 <= values.min() and values.max() <= 1):
        raise InputError(f'{what} has values of type {values.dtype}, of which it is not known which is white: give '
                         'uint8, uint16, or floating numbers from 0 to 1')
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)) * (255 / (white or 1))


def _tifffile() -> Any:
    try:
        return importlib.import_module('tifffile')
    except ImportError as error:
        raise InputError("a TIFF file of more than four channels needs tifffile, which is not installed: pip install "
                         "'nbn_timm[multispectral]', or give NumPy files") from error

"""Faster ways from a JPEG file to a random resized crop of it, for training.

Pillow decodes the whole picture and resamples the crop. Of libjpeg-turbo the crop alone can be had, at half, a quarter
or an eighth of its size where it is that much larger than the input, for a fraction of the time that colours and the
inverse transform take (the Huffman codes above the crop must be read all the same). torch resamples bytes as Pillow
does, to one step of 255, in a third of its time. Which crop is drawn does not depend on the decoder.

What these decoders are not for goes to Pillow: other formats than JPEG, CMYK, pictures that EXIF turns, files without
their end, and those with damage in the part that is decoded.
"""
import ctypes
import ctypes.util
import importlib.util
import io
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from nbn_timm.data.pictures import orientation_of, read_picture
from nbn_timm.errors import InputError
from nbn_timm.files import open_regular
from nbn_timm.registry import Registry

PILLOW = 'pillow'
_SHRINKS = (8, 4, 2)  # libjpeg-turbo has vector code for these; 7/8 to 5/8 take longer than the full size
_BY_TORCH = {InterpolationMode.BILINEAR: 'bilinear', InterpolationMode.BICUBIC: 'bicubic'}
_BY_PILLOW = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
    InterpolationMode.BOX: Image.Resampling.BOX,
    InterpolationMode.HAMMING: Image.Resampling.HAMMING,
    InterpolationMode.LANCZOS: Image.Resampling.LANCZOS,
}
_APP1, _PIXELS_FOLLOW, _FILL = 0xE1, 0xDA, 0xFF  # second bytes of marks in a JPEG file
_END = b'\xff\xd9'
_ON_TENSORS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip, MaybePILToTensor)  # alike on both


class Box(NamedTuple):
    """A part of a picture in pixels, as timm draws it."""

    top: int
    left: int
    height: int
    width: int

    def shrunken(self, shrink: int) -> 'Box':
        """The pixels of the shrunken picture that the part touches."""
        top, left = self.top // shrink, self.left // shrink
        return Box(top, left, -(-(self.top + self.height) // shrink) - top,
                   -(-(self.left + self.width) // shrink) - left)


class CannotDecode(Exception):
    """These bytes are not for this decoder."""


class Decoder(ABC):
    """Reads parts of JPEG pictures; an instance may go to another process.

    Attributes:
        name: That `--decoder` chooses it by.
        package: That it needs, by its name for pip.
    """

    name: ClassVar[str]
    package: ClassVar[str]

    def __init__(self) -> None:
        if not self.available():
            raise InputError(f'--decoder {self.name} needs {self.package}, which is not installed: '
                             f'pip install {self.package}, or leave it out')

    @classmethod
    @abstractmethod
    def available(cls) -> bool:
        """Whether what it needs is installed."""

    @abstractmethod
    def size(self, data: bytes) -> tuple[int, int]:
        """Height and width of a grey or RGB picture.

        Raises:
            CannotDecode: It is no such picture.
        """

    @abstractmethod
    def part(self, data: bytes, box: Box, shrink: int) -> np.ndarray:
        """A part of the picture whose `size` was asked for last, uint8 [height, width, 3].

        Args:
            data: The whole file.
            box: In pixels of the shrunken picture.
            shrink: 1, 2, 4 or 8, by which both sides are divided, and rounded up.

        Raises:
            CannotDecode: The file is damaged, or of a kind that was not foreseen.
        """


DECODERS: Registry[Decoder] = Registry('decoder')


def decoder_names() -> tuple[str, ...]:
    """What `--decoder` takes."""
    return PILLOW, *DECODERS


@DECODERS.register('turbojpeg')
class TurboJpeg(Decoder):
    """The crop alone, by the C interface of TurboJPEG 3, the first with cropping.

    The library is that of the system, where it is new enough, or the one inside of the wheel `turbojpeg`, whose own
    Python module cannot crop. `PyTurboJPEG` has a Python module of the same name, and uses that of the system.
    """

    name = 'turbojpeg'
    package = 'turbojpeg'

    _DECOMPRESS = 1  # of TJINIT
    _SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLOURS = 4, 5, 6, 7, 8  # of TJPARAM
    _RGB = 0  # of TJPF
    _RGB_YCBCR_GREY = (0, 1, 2)  # of TJCS; the others are CMYK and YCCK
    _UNIT_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # of TJSAMP: pixels of what is decoded at once
    _own = threading.local()  # a handle is for one thread

    @classmethod
    def available(cls) -> bool:
        return _turbojpeg() is not None

    def size(self, data: bytes) -> tuple[int, int]:
        library, handle = self._library()
        if library.tj3DecompressHeader(handle, data, len(data)):
            raise CannotDecode
        if (library.tj3Get(handle, self._COLOURS) not in self._RGB_YCBCR_GREY
                or library.tj3Get(handle, self._PRECISION) != 8
                or not 0 <= library.tj3Get(handle, self._SUBSAMPLING) < len(self._UNIT_WIDTHS)):
            raise CannotDecode
        return library.tj3Get(handle, self._HEIGHT), library.tj3Get(handle, self._WIDTH)

    def part(self, data: bytes, box: Box, shrink: int) -> np.ndarray:
        library, handle = self._library()
        unit = self._UNIT_WIDTHS[library.tj3Get(handle, self._SUBSAMPLING)] // shrink
        extra = box.left % unit  # a part begins with a whole unit
        pixels = np.empty((box.height, extra + box.width, 3), np.uint8)
        region = _Region(box.left - extra, box.top, extra + box.width, box.height)
        if (library.tj3SetScalingFactor(handle, _Fraction(1, shrink))
                or library.tj3SetCroppingRegion(handle, region)
                or library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, self._RGB)):
            raise CannotDecode  # or a warning, such as of a file that ends early
        return pixels[:, extra:]

    def _library(self) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
        library = _turbojpeg()
        assert library is not None
        if not hasattr(self._own, 'handle'):
            self._own.handle = ctypes.c_void_p(library.tj3Init(self._DECOMPRESS))
        return library, self._own.handle


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ('x', 'y', 'w', 'h')]


class _Fraction(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ('numerator', 'denominator')]


@cache
def _turbojpeg() -> ctypes.CDLL | None:
    """TurboJPEG 3 with its functions declared."""
    for path in (ctypes.util.find_library('turbojpeg'), *_inside_of_wheel()):
        try:
            library = ctypes.CDLL(path) if path else None
        except OSError:
            continue
        if library is None or not hasattr(library, 'tj3SetCroppingRegion'):
            continue
        handle, data, size, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
        library.tj3Init.argtypes, library.tj3Init.restype = [number], handle
        library.tj3Get.argtypes = [handle, number]
        library.tj3DecompressHeader.argtypes = [handle, data, size]
        library.tj3SetScalingFactor.argtypes = [handle, _Fraction]
        library.tj3SetCroppingRegion.argtypes = [handle, _Region]
        library.tj3Decompress8.argtypes = [handle, data, size, handle, number, number]
        return library
    return None


def _inside_of_wheel() -> list[str]:
    """The shared library that the wheel `turbojpeg` brings, wherever its repair tool has put it."""
    try:
        files = metadata.files('turbojpeg') or []
    except metadata.PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files if file.name.startswith('libturbojpeg') or file.suffix == '.dll']


@DECODERS.register('simplejpeg')
class SimpleJpeg(Decoder):
    """The whole picture by simplejpeg, which brings libjpeg-turbo along for every platform and cannot crop."""

    name = 'simplejpeg'
    package = 'simplejpeg'

    @classmethod
    def available(cls) -> bool:
        return importlib.util.find_spec('simplejpeg') is not None

    def size(self, data: bytes) -> tuple[int, int]:
        import simplejpeg
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise CannotDecode from error
        if colours not in ('RGB', 'YCbCr', 'Gray'):
            raise CannotDecode
        self._size = height, width
        return height, width

    def part(self, data: bytes, box: Box, shrink: int) -> np.ndarray:
        import simplejpeg
        height, width = (-(-side // shrink) for side in self._size)
        try:
            pixels = simplejpeg.decode_jpeg(data, 'RGB', min_height=height, min_width=width)
        except ValueError as error:
            raise CannotDecode from error
        if pixels.shape[:2] != (height, width):
            raise CannotDecode
        return pixels[box.top:box.top + box.height, box.left:box.left + box.width]


# A transform of files ------------------------------------------------------------------------------------------------

class FileTransform(ABC):
    """A transform that can also begin with a picture's file, or with its bytes."""

    @abstractmethod
    def __call__(self, image: Image.Image) -> Any:
        """What becomes of a picture."""

    @abstractmethod
    def of_bytes(self, data: bytes, picture: Callable[[], Image.Image]) -> Any:
        """What becomes of an encoded picture.

        Args:
            data: The whole file.
            picture: Decodes it otherwise, where the transform cannot.
        """

    def of_file(self, path: str) -> Any:
        """What becomes of the picture in a file.

        Raises:
            InputError: It cannot be read.
        """
        try:
            with open_regular(path) as file:
                data = file.read()
        except OSError:
            return self(read_picture(path))
        return self.of_bytes(data, partial(read_picture, path))


class DecodedCrop(FileTransform):
    """A training transform whose random resized crop is cut out in decoding.

    Args:
        pipeline: A `RandomResizedCropAndInterpolation`, and what follows.
        decoder: For the files that it is for; all others, and pictures that are no files, go through the pipeline.
    """

    def __init__(self, pipeline: transforms.Compose, decoder: Decoder) -> None:
        self.pipeline = pipeline
        self.decoder = decoder
        self.crop, *self.rest = pipeline.transforms
        self.on_tensors = all(isinstance(step, _ON_TENSORS) for step in self.rest)

    def __call__(self, image: Image.Image) -> Any:
        return self.pipeline(image)

    def of_bytes(self, data: bytes, picture: Callable[[], Image.Image]) -> Any:
        try:
            image: Any = decoded_crop(self.decoder, data, self.crop)
        except CannotDecode:
            return self.pipeline(picture())
        if not self.on_tensors:
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
        for step in self.rest:
            image = step(image)
        return image


class FileViews(FileTransform):
    """Several versions of a picture, each decoded for itself; see `Views`.

    Args:
        transforms: One for each version.
    """

    def __init__(self, transforms: Sequence[FileTransform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, image: Image.Image) -> tuple[Any, ...]:
        return tuple(transform(image) for transform in self.transforms)

    def of_bytes(self, data: bytes, picture: Callable[[], Image.Image]) -> tuple[Any, ...]:
        return tuple(transform.of_bytes(data, picture) for transform in self.transforms)


def decoding_transform(pipeline: transforms.Compose, decoder: str) -> FileTransform:
    """The training transform with another decoder than Pillow.

    Raises:
        InputError: The decoder is not installed, or the transform begins with something else than a random resized
            crop, which needs the whole picture.
    """
    if not isinstance(pipeline.transforms[0], RandomResizedCropAndInterpolation):
        raise InputError(f'--decoder {decoder} cuts out random resized crops, and these training images are brought to '
                         'size otherwise: leave it out')
    return DecodedCrop(pipeline, DECODERS.find(decoder)())


def decoded_crop(decoder: Decoder, data: bytes, crop: RandomResizedCropAndInterpolation) -> torch.Tensor:
    """A random resized crop of a JPEG file, uint8 [3, H, W], as `crop` draws it.

    Raises:
        CannotDecode: The file is not for the decoder. The random generator is then as it was, so that Pillow's way
            draws the same crop.
    """
    height, width = decoder.size(data)
    if height * width > (Image.MAX_IMAGE_PIXELS or float('inf')) or not _is_upright_and_whole(data):
        raise CannotDecode
    before = random.getstate()
    box = Box(*crop.get_params(_OfSize(width, height), crop.scale, crop.ratio))
    modes = crop.interpolation
    mode = random.choice(modes) if isinstance(modes, tuple | list) else modes
    try:
        return resized_part(decoder, data, box, tuple(crop.size), mode)
    except CannotDecode:
        random.setstate(before)
        raise


class _OfSize(Image.Image):
    """A picture that has a size and no pixels, which is all that timm asks to draw a crop."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._size = width, height


def resized_part(
        decoder: Decoder,
        data: bytes,
        box: Box,
        size: tuple[int, int],
        mode: InterpolationMode,
) -> torch.Tensor:
    """A part of a JPEG file, resampled to a height and width, uint8 [3, H, W]; `decoder.size` was asked before.

    The part is decoded at the smallest scale at which it is not smaller than that.

    Raises:
        CannotDecode: The file is not for the decoder, or the part is empty, as timm draws it from one or two pixels.
    """
    if not box.height or not box.width:
        raise CannotDecode
    shrink = shrink_of(box, size)
    inner = box.shrunken(shrink)
    pixels = decoder.part(data, inner, shrink)
    if shrink == 1 and mode in _BY_TORCH:
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(image, size=size, mode=_BY_TORCH[mode], antialias=True)[0]
    # Pillow takes a part that begins inside of a shrunken pixel.
    top, left = box.top / shrink - inner.top, box.left / shrink - inner.left
    corners = left, top, left + box.width / shrink, top + box.height / shrink
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], _BY_PILLOW[mode], corners)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def shrink_of(box: Box, size: tuple[int, int]) -> int:
    """By how much a part is decoded smaller, where it is not to become smaller than a height and width."""
    room = min(box.height // size[0], box.width // size[1])
    return next((shrink for shrink in _SHRINKS if shrink <= room), 1)


def _is_upright_and_whole(data: bytes) -> bool:
    """Whether a JPEG file has its end, and does not say that its picture is to be turned, by EXIF or XMP.

    Whoever stops decoding at the lower end of a crop does not see that the file is cut below. The mark of the end
    cannot stand among the codes of pixels; what follows it, as in files of several pictures, is of no concern.
    """
    start = 2  # after the mark of JPEG; then segments follow, each with a mark of two bytes and its length
    while (mark := data[start:start + 2]).startswith(b'\xff') and len(mark) == 2:
        kind = mark[1]
        if kind == _PIXELS_FOLLOW:
            return data.rfind(_END, start) >= 0
        if kind == _FILL:
            start += 1
            continue
        end = start + 2 + int.from_bytes(data[start + 2:start + 4], 'big')
        if kind == _APP1 and (data.startswith(b'Exif', start + 4) or b'Orientation' in data[start:end]):
            with Image.open(io.BytesIO(data)) as image:
                if orientation_of(image) != 1:
                    return False
        start = end
    return False

"""Picture files: which files are some, where they lie in and below a folder, and their pixels as RGB."""
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from nbn_timm.data.bands import bands_of, may_hold_bands, mode_of_bands, read_bands
from nbn_timm.errors import InputError, in_words, quoted
from nbn_timm.files import open_regular

# What Pillow lists as readable and has no pixels without another program: MPEG is only recognised, EPS is a program.
_NO_PICTURES = ('MPEG', 'EPS')
_ARCHIVE_LEFTOVERS = '__MACOSX'  # the folder of resource forks in archives that macOS made

# Kinds of what is left out, see `LeftOut`.
HIDDEN, LINK_BACK = 'hidden file{s} or folder{s}', 'link{s} to a folder that counts already'
_KINDS_TOLD = 8

_KIN = ('JPEG', 'MPO')  # cameras write several JPEG pictures into one file and call it a JPEG

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO = 0


@cache
def picture_extensions() -> frozenset[str]:
    """File name extensions, in lower case and with their dot, of the formats that this Pillow reads."""
    Image.init()

    def readable(format_name: str) -> bool:
        factory = Image.OPEN[format_name][0] if format_name in Image.OPEN else None
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return factory is not None and not stub and format_name not in _NO_PICTURES

    return frozenset(extension for extension, name in Image.registered_extensions().items() if readable(name))


def extensions_of(format_name: str) -> frozenset[str]:
    """File name extensions of one of Pillow's formats, in lower case and with their dot; of JPEG those of its kin."""
    Image.init()
    kin = _KIN if format_name in _KIN else (format_name,)
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in kin)


def is_picture(name: str) -> bool:
    """Whether a file of that name is taken for a picture, by its extension."""
    return os.path.splitext(name)[1].lower() in picture_extensions()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's: hidden, or left by an archive program."""
    return name.startswith('.') or name == _ARCHIVE_LEFTOVERS


def natural_order(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key that puts '2.png' before '10.png', as timm's does, and always has an order: then by the name itself."""
    parts = re.split(r'(\d+)', name.lower())
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


# Reading -----------------------------------------------------------------------------------------------------------

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # of Pillow, by channels


def mode_of(channels: int) -> str:
    """Pillow's mode of pictures of so many channels: grey, grey with alpha, RGB, RGBA; of more see `bands`."""
    return MODES[channels] if channels in MODES else mode_of_bands(channels)


def read_picture(
        path: str,
        mode: str = 'RGB',
        look: Callable[[Image.Image], None] | None = None,
) -> Any:
    """The picture in a file, upright and in a mode of `MODES`; of several frames the first. Of `bands` a tensor.

    Args:
        path: The file.
        mode: Of the picture that comes back.
        look: Is shown the picture as it is stored, before its pixels are read.

    Raises:
        InputError: The file is missing, damaged or no picture, or its values have no known range.
    """
    if (channels := bands_of(mode)) is not None:
        return read_bands(path, channels)
    try:
        with open_regular(path) as file, Image.open(file) as image:
            if look is not None:
                look(image)
            return to_mode(image, mode, f'image {quoted(path)}')
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f'image {quoted(path)} is missing: check the image root (--data-dir) or remove the line from '
                         'the list') from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        reason = reason_unreadable(error)
        if isinstance(error, UnidentifiedImageError):
            if os.path.getsize(path) == 0:
                reason = 'the file is empty'
            elif may_hold_bands(path):
                reason += ', and one of more than four channels needs --in-chans'
        raise InputError(
            f'image {quoted(path)} cannot be read ({reason}): replace the file by an '
            'intact copy; nbn-check DIR names all damaged files at once') from error


def to_rgb(image: Image.Image, what: str = 'the image') -> Image.Image:
    """`to_mode` for RGB."""
    return to_mode(image, 'RGB', what)


def to_mode(image: Image.Image, mode: str, what: str = 'the image') -> Image.Image:
    """A picture of any of Pillow's modes as 8-bit values of one, turned as its EXIF orientation says.

    Transparency is dropped, as everybody's loaders do, unless the mode has an alpha channel, which is opaque where the
    picture has none. 16-bit grey is scaled so that 65535 becomes 255.

    Args:
        image: As `Image.open` gives it.
        mode: One of `MODES`.
        what: Its name, for the sentence.

    Raises:
        InputError: It has 32-bit values, of which nobody knows which is white.
    """
    image.load()
    turn = _UPRIGHT.get(orientation_of(image))
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        image = _eight_bits(image)
    elif image.mode in ('I', 'F'):
        raise InputError(f"{what} has 32-bit values (mode '{image.mode}'), of which it is not known which is white: "
                         'save it with 8 or 16 bits')
    if 'A' not in mode:
        image.info.pop('transparency', None)  # Pillow would warn that it is lost
    image = image.convert(mode) if 'A' not in mode else image.convert('RGBA').convert(mode)
    return image if turn is None else image.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 to 8; 1 is upright, and holds where nothing else is said."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        return orientation if orientation in _UPRIGHT else 1
    except Exception:  # damaged EXIF data, whose reader raises nearly anything, spoil no pixel
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey."""
    tags = getattr(image, 'tag_v2', {})  # of TIFF
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    white = 2 ** min(bits, 16) - 1  # 65535, or 4095 of 12 bits
    grey = np.rint(np.asarray(image).astype(np.float64) * (255 / white)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey)


def reason_unreadable(error: Exception) -> str:
    """Why Pillow could not read a file, in words without its path."""
    if isinstance(error, UnidentifiedImageError):
        return 'it is no picture that Pillow knows'
    reason = error.strerror if isinstance(error, OSError) and error.strerror else in_words(error)
    return ' '.join(reason.split()) or type(error).__name__


# Finding -----------------------------------------------------------------------------------------------------------

class LeftOut:
    """Files and folders that a search did not take, counted by kind."""

    def __init__(self) -> None:
        self.number: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, name: str) -> None:
        """Count one; `kind` says what it is, with {s} where there is an s in the plural."""
        self.number[kind] += 1
        self._first.setdefault(kind, name)

    def add_file(self, name: str) -> None:
        """Count a file that is no picture."""
        extension = os.path.splitext(name)[1].lower()
        self.add(f'{quoted(extension)[1:-1]} file{{s}}' if extension else 'file{s} without extension', name)

    def notes(self, place: str) -> list[str]:
        """One sentence, if there is anything to tell."""
        most = self.number.most_common(_KINDS_TOLD)
        kinds = [f'{number:,} ' + kind.replace('{s}', '' if number == 1 else 's')
                 + f' ({"such as " if number > 1 else ""}{quoted(self._first[kind])})' for kind, number in most]
        if others := self.number.total() - sum(number for _, number in most):
            kinds.append(f'{others:,} of other kinds')
        return [f'left out of {place}: {", ".join(kinds)}'] if kinds else []


class PictureSearch:
    """Pictures in and below folders: each once, in natural order, a folder's files before its subfolders.

    Hidden files and folders are left out. Links are followed when everything else has been found, so that what lies
    in a folder belongs to it, and a link to it from elsewhere is left out; and so is one to a folder above.

    Args:
        top: A folder that no link may lead back to.
    """

    def __init__(self, top: str | None = None) -> None:
        self.left_out = LeftOut()
        self._tops = [] if top is None else [os.path.realpath(top)]
        self._entered = set(self._tops)
        self._taken: set[str] = set()  # files that links led to

    def below(self, folders: Sequence[str]) -> list[list[str]]:
        """The pictures of each of some folders, which must be different ones.

        Raises:
            InputError: A folder cannot be read.
        """
        roots = [os.path.realpath(folder) for folder in folders]
        self._entered.update(roots)
        self._tops += roots
        links: list[tuple[int, str]] = []
        found = [self._walk(folder, root, index, links)
                 for index, (folder, root) in enumerate(zip(folders, roots, strict=True))]
        to_files = []
        while links:
            index, link = links.pop(0)
            target = os.path.realpath(link)
            if not os.path.isdir(link):
                to_files.append((index, link, target))
            elif target in self._entered or self._is_above(target):
                self.left_out.add(LINK_BACK, link)
            else:
                self._entered.add(target)
                found[index] += self._walk(link, target, index, links)
        for index, link, target in to_files:
            if self._takes(link, target):
                found[index].append(link)
        return found

    def _walk(self, folder: str, real: str, index: int, links: list[tuple[int, str]]) -> list[str]:
        """Pictures below a folder; links are put off, with the index of the folder that they belong to."""
        files = []
        stack = [(folder, real)]
        while stack:
            folder, real = stack.pop()
            subfolders = []
            for entry in sorted_entries(folder):
                inner = os.path.join(real, entry.name)
                if is_hidden(entry.name):
                    self.left_out.add(HIDDEN, entry.name)
                elif entry.is_symlink():
                    links.append((index, entry.path))
                elif entry.is_dir():
                    if inner in self._entered:
                        self.left_out.add('folder{s} of another class', entry.path)
                    else:
                        self._entered.add(inner)
                        subfolders.append((entry.path, inner))
                elif not is_picture(entry.name):
                    self.left_out.add_file(entry.name)
                elif not entry.is_file():
                    self.left_out.add('pipe{s} or device{s}', entry.name)
                else:
                    files.append(entry.path)
            stack += reversed(subfolders)
        return files

    def _takes(self, link: str, target: str) -> bool:
        """Whether a link leads to a picture that has not been found otherwise."""
        name = os.path.basename(target)
        if not is_picture(os.path.basename(link)):
            self.left_out.add_file(link)
        elif not os.path.isfile(target):
            self.left_out.add('broken link{s}', link)
        elif target in self._taken or (
                os.path.dirname(target) in self._entered and is_picture(name) and not is_hidden(name)):
            self.left_out.add('link{s} to a picture that counts already', link)
        else:
            self._taken.add(target)
            return True
        return False

    def _is_above(self, target: str) -> bool:
        """Whether a folder holds one of those that are searched, so that a link to it leads back."""
        below = os.path.join(target, '')
        return any(folder.startswith(below) for folder in self._tops)


def sorted_entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, in natural order.

    Raises:
        InputError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: natural_order(entry.name))
    except OSError as error:
        raise InputError(f'folder {quoted(folder)} cannot be read ({error.strerror}): correct its permissions or leave '
                         'it out') from error


@dataclass(frozen=True)
class FoundImages:
    """Image files in a stable order, and a sentence for each folder in which others lay beside them."""

    files: tuple[str, ...]
    notes: tuple[str, ...]


def find_images(paths: Sequence[str | os.PathLike[str]]) -> FoundImages:
    """The files among `paths` as they are, in their order, and in place of a folder the pictures in and below it.

    In folders a picture is told by its file name extension, see `PictureSearch`. Files named one by one are taken
    whatever they are called, also those that do not exist: whoever reads them will find out.

    Raises:
        InputError: A folder cannot be read.
    """
    files: list[str] = []
    notes: list[str] = []
    for path in [os.fspath(path) for path in paths]:
        if os.path.isdir(path):
            search = PictureSearch()
            files += search.below([path])[0]
            notes += search.left_out.notes(quoted(path))
        else:
            files.append(path)
    return FoundImages(tuple(files), tuple(notes))

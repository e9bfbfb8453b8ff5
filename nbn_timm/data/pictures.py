"""Image files that nobody has labelled: finding them, and reading those that can be read."""
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import get_img_extensions
from timm.utils import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from nbn_timm.data.dataset import ImageSamples
from nbn_timm.errors import InputError


@dataclass(frozen=True)
class FoundImages:
    """Image files, in a stable order, and how many others lay in the folders beside them."""

    files: tuple[str, ...]
    skipped: int


def find_images(paths: Sequence[str | os.PathLike[str]]) -> FoundImages:
    """The files among `paths` as they are, in their order, and in place of a folder the images in and below it.

    In folders an image is told by its file name extension, and what begins with a dot is none (file managers keep
    thumbnails under such names); they are read in natural order ('2.png' before '10.png'), a folder's files before
    its subfolders. Files named one by one are taken whatever they are called, also those that do not exist: whoever
    reads them will find out.

    Raises:
        InputError: A folder cannot be read.
    """
    files: list[str] = []
    skipped = 0
    for path in [os.fspath(path) for path in paths]:
        if not os.path.isdir(path):
            files.append(path)
            continue
        for file in _files_below(path, set()):
            name = os.path.basename(file).lower()
            if name.endswith((*IMG_EXTENSIONS, *get_img_extensions())) and not name.startswith('.'):
                files.append(file)
            else:
                skipped += 1
    return FoundImages(tuple(files), skipped)


def _files_below(folder: str, entered: set[str]) -> Iterator[str]:
    """All files in natural order; links to folders are followed, but none is entered twice."""
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: (natural_key(entry.name), entry.name))
    except OSError as error:
        raise InputError(f"folder '{folder}' cannot be read ({error.strerror}): correct its permissions or leave it "
                         'out') from error
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith('.'):
            yield from _files_below(entry.path, entered)


class UnlabelledImages(ImageSamples):
    """Images in files, each with its position among them; -1 - position, and a black image, if it cannot be read.

    So one broken file does not end a pass over many; `fault` says what is wrong with it.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(files, range(len(files)))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return super().__getitem__(index)
        except InputError:
            assert self.transform is not None
            return self.transform(Image.new('RGB', (1, 1))), -1 - index

    def fault(self, index: int) -> str:
        """What is wrong with a file that could not be read, in a sentence."""
        path = self.path(index)
        if not os.path.exists(path):
            return f"there is no file or folder '{path}': check the path"
        try:
            self.image(index)
        except InputError as error:
            return str(error)
        return f"image '{path}' could not be read the first time, but now it can: predict it again"

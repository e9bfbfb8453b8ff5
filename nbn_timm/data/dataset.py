"""Map-style image datasets that never hide a broken sample."""
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from typing_extensions import Self

from nbn_timm.errors import InputError

Transform = Callable[[Image.Image], Any]


class LabelledImages(Dataset, ABC):
    """Images with integer labels; `transform` turns a PIL RGB image into what `__getitem__` returns.

    Attributes:
        targets: Labels, int64 [N].
        transform: May be replaced at any time; None returns the PIL image.
    """

    def __init__(self, targets: Sequence[int] | np.ndarray, transform: Transform | None = None) -> None:
        self.targets = np.asarray(targets, dtype=np.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image at `index`, RGB, before any transform."""

    @abstractmethod
    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The dataset of the samples at `indices`, in that order, with the same transform."""


class ImageSamples(LabelledImages):
    """Images in files.

    timm's `ImageDataset` replaces a sample that fails to load by its neighbour, which would falsify an evaluation
    without a trace; here it is an error.

    Args:
        paths: Image files, one per label.
        targets: Labels, [N].
        transform: See `LabelledImages`.
        root: Folder that relative paths are relative to.
    """

    def __init__(
            self,
            paths: Sequence[str] | np.ndarray,
            targets: Sequence[int] | np.ndarray,
            transform: Transform | None = None,
            root: str | os.PathLike[str] = '',
    ) -> None:
        super().__init__(targets, transform)
        # Bytes, not str objects: an array has no per-element reference count that forked workers would write to.
        encoded = [os.fsencode(path) for path in paths]
        self._paths: np.ndarray = np.array(encoded, dtype=bytes)
        self.root = os.fspath(root)
        if len(self._paths) != len(self.targets):
            raise InputError(
                f'{len(self._paths)} image paths have {len(self.targets)} labels: give one label per image')

    def path(self, index: int) -> str:
        """File of the image at `index`."""
        return os.path.join(self.root, os.fsdecode(self._paths[index].item()))

    def image(self, index: int) -> Image.Image:
        """Load the image at `index` as RGB.

        Raises:
            InputError: The file is missing, truncated or no image.
        """
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return image.convert('RGB')
        except FileNotFoundError as error:
            raise InputError(
                f"image '{path}' is missing: check the image root (--data-dir) or remove the line from the list"
            ) from error
        except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(
                f"image '{path}' cannot be read ({_one_line(error)}): replace the file by an intact copy") from error

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        chosen = np.asarray(indices, dtype=np.int64)
        paths = [os.fsdecode(path) for path in self._paths[chosen].tolist()]
        return type(self)(paths, self.targets[chosen], self.transform, self.root)


class ArraySamples(LabelledImages):
    """Images in memory.

    Args:
        images: uint8 [N, H, W, 3].
        targets: Labels, [N].
        transform: See `LabelledImages`.
    """

    def __init__(
            self,
            images: np.ndarray,
            targets: Sequence[int] | np.ndarray,
            transform: Transform | None = None,
    ) -> None:
        super().__init__(targets, transform)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(self.targets):
            raise InputError(
                f'images in memory are {images.dtype} {list(images.shape)} for {len(self.targets)} labels: '
                'give uint8 [N, H, W, 3] with one label each')
        self.images = images

    def image(self, index: int) -> Image.Image:
        """The image at `index`, RGB, before any transform."""
        return Image.fromarray(self.images[index])

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        chosen = np.asarray(indices, dtype=np.int64)
        return type(self)(self.images[chosen], self.targets[chosen], self.transform)


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__

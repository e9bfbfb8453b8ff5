"""Map-style image datasets that never hide a broken sample."""
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from typing_extensions import Self

from nbn_timm.data.bands import bands_of, shown
from nbn_timm.data.decoders import FileTransform
from nbn_timm.data.label_sets import as_targets, is_label_sets
from nbn_timm.data.pictures import read_picture
from nbn_timm.errors import InputError, quoted

Transform = Callable[[Image.Image], Any]


class LabelledImages(Dataset, ABC):
    """Images with their targets; `transform` turns a PIL image into what `__getitem__` returns.

    Attributes:
        targets: Labels, int64 [N], or label sets, uint8 [N, C], see `nbn_timm.data.label_sets`.
        mode: Of the PIL images, one of `pictures.MODES`, or of `bands`, which are tensors; may be replaced at any time.
        transform: May be replaced at any time; None returns the PIL image.
    """

    def __init__(self, targets: Sequence[int] | np.ndarray, transform: Transform | None = None) -> None:
        self.targets = as_targets(targets)
        self.transform = transform
        self.mode = 'RGB'

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), self.target(index)

    @property
    def label_sets(self) -> bool:
        """Whether an image can be of several classes."""
        return is_label_sets(self.targets)

    def target(self, index: int) -> int | np.ndarray:
        """The label of the image at `index`, or its label set, uint8 [C]."""
        return self.targets[index] if self.label_sets else int(self.targets[index])

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image at `index`, in `mode`, before any transform."""

    @abstractmethod
    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The dataset of the samples at `indices`, in that order, with the same transform."""


class ImageSamples(LabelledImages):
    """Images in files.

    timm's `ImageDataset` replaces a sample that fails to load by its neighbour, which would falsify an evaluation
    without a trace; here it is an error.

    Args:
        paths: Image files, one per label.
        targets: Labels, [N], or label sets, [N, C].
        transform: See `LabelledImages`; a `FileTransform` is given the files.
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
        # One string of bytes, not str objects: these have reference counts that forked workers would write to. And no
        # array of strings: there each takes as much as the longest.
        encoded = [os.fsencode(path) for path in paths]
        self._paths = b''.join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.root = os.fspath(root)
        if len(encoded) != len(self.targets):
            raise InputError(
                f'{len(encoded)} image paths have {len(self.targets)} labels: give one label per image')

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if isinstance(self.transform, FileTransform):
            return self.transform.of_file(self.path(index)), self.target(index)
        return super().__getitem__(index)

    def path(self, index: int) -> str:
        """File of the image at `index`."""
        return os.path.join(self.root, os.fsdecode(self._path(range(len(self))[index])))

    def stored_paths(self) -> Iterator[bytes]:
        """The paths of all images as they were given, encoded; millions take a moment."""
        begin = 0
        for end in self._ends.tolist():
            yield self._paths[begin:end]
            begin = end

    def image(self, index: int) -> Any:
        """Load the image at `index`.

        Raises:
            InputError: The file is missing, truncated or no image.
        """
        return read_picture(self.path(index), self.mode)

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        chosen = np.asarray(indices, dtype=np.int64)
        paths = [os.fsdecode(self._path(index)) for index in np.arange(len(self))[chosen].tolist()]
        return type(self)(paths, self.targets[chosen], self.transform, self.root)

    def _path(self, index: int) -> bytes:
        begin = self._ends[index - 1] if index else 0
        return self._paths[begin:self._ends[index]]


def picture_names(dataset: Any, number: int) -> list[str]:
    """Files of the pictures of a split; of those that are in no files of their own, the position, from 0."""
    if isinstance(dataset, ImageSamples):
        return [dataset.path(index) for index in range(number)]
    filenames = getattr(dataset, 'filenames', None)  # of timm's datasets
    if filenames is None or isinstance(dataset, IterableDataset):
        return [str(index) for index in range(number)]
    try:
        return [str(name) for name in filenames(absolute=True)][:number]
    except (TypeError, NotImplementedError, AssertionError):  # the reader has none
        return [str(index) for index in range(number)]


def pictures_digest(dataset: Any) -> str | None:
    """SHA-256 in hexadecimal over the pictures of a split and their targets, in their order.

    It goes by what is in the files, whatever they are called and wherever they lie.

    Returns:
        None where the pictures have no files of their own and do not lie in memory: streams, and datasets of timm.

    Raises:
        InputError: A file cannot be read.
    """
    if isinstance(dataset, ArraySamples) and dataset.source is not None:
        return pictures_digest(dataset.source)
    digest = hashlib.sha256()
    if isinstance(dataset, ArraySamples):
        digest.update(f'{dataset.images.shape}'.encode())
        digest.update(dataset.images.tobytes())
    elif isinstance(dataset, ImageSamples):
        for index in range(len(dataset)):
            try:
                with open(dataset.path(index), 'rb') as file:
                    content = file.read()
            except OSError as error:
                raise InputError(f'the image {quoted(dataset.path(index))} cannot be read ({error.strerror}): mend it, '
                                 'or take it out of the data') from error
            digest.update(f'{len(content)} '.encode())
            digest.update(content)
    else:
        return None
    digest.update(dataset.targets.tobytes())
    return digest.hexdigest()


def picture(dataset: Any, index: int) -> Image.Image:
    """The picture at `index` of a split that can be indexed, before any transform, for people."""
    if isinstance(dataset, LabelledImages):
        image = dataset.image(index)
        return shown(image) if isinstance(image, torch.Tensor) else image
    transform, dataset.transform = dataset.transform, None
    try:
        return dataset[index][0]
    finally:
        dataset.transform = transform


class ArraySamples(LabelledImages):
    """Images in memory.

    Args:
        images: uint8 [N, H, W, 3].
        targets: Labels, [N].
        transform: See `LabelledImages`.

    Attributes:
        source: Whose images these are, where they were read into memory; its pictures are told by their files.
    """

    source: LabelledImages | None = None

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
        """The image at `index`, in `mode`, before any transform."""
        image = Image.fromarray(self.images[index])
        return image if self.mode == 'RGB' else image.convert(self.mode)

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        chosen = np.asarray(indices, dtype=np.int64)
        return type(self)(self.images[chosen], self.targets[chosen], self.transform)


class UnlabelledImages(ImageSamples):
    """Images in files, each with its position among them; -1 - position, and a black image, if it cannot be read.

    So one broken file does not end a pass over many; `fault` says what is wrong with it.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(files, range(len(files)))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            return super().__getitem__(index)
        except InputError:
            assert self.transform is not None
            channels = bands_of(self.mode)
            blank: Any = Image.new(self.mode, (1, 1)) if channels is None else torch.zeros(channels, 1, 1)
            return self.transform(blank), -1 - index

    def fault(self, index: int) -> str:
        """What is wrong with a file that could not be read, in a sentence."""
        path = self.path(index)
        if not os.path.exists(path):
            return f'there is no file or folder {quoted(path)}: check the path'
        try:
            self.image(index)
        except InputError as error:
            return str(error)
        return f'image {quoted(path)} could not be read the first time, but now it can: predict it again'

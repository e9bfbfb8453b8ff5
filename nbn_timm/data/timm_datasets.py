"""timm's own dataset types (torchvision, Hugging Face, TFDS): their labels, names and parts."""
import io
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import Dataset, Subset

from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.decoders import FileTransform
from nbn_timm.data.pictures import reason_unreadable
from nbn_timm.errors import InputError, in_words

TIMM_TYPES = ('torch/', 'hfds/', 'hfids/', 'tfds/')
STREAMED_TYPES = ('hfids/', 'tfds/')


def open_timm_dataset(name: str, split: str, **settings: Any) -> Dataset:
    """Open a split with `timm.data.create_dataset`, which takes the `settings`.

    Raises:
        InputError: timm, or the library that it calls, refuses.
    """
    try:
        return timm.data.create_dataset(name, split=split, **settings)
    except (RuntimeError, OSError, AssertionError, ImportError, ValueError) as error:
        reason = in_words(error)
        raise InputError(
            f"timm cannot open split '{split}' of dataset '{name}' ({reason}): "
            'check its name and --data-dir, or give --download') from error


def dataset_targets(dataset: Dataset) -> np.ndarray | None:
    """Targets of a map-style dataset, or None where only reading all images would tell.

    They are labels, int64 [N], or label sets of this package's own datasets, uint8 [N, C].
    """
    if isinstance(dataset, LabelledImages):
        return dataset.targets
    reader = getattr(dataset, 'reader', None)
    targets: Any = getattr(dataset, 'targets', None)
    if targets is None and reader is not None and hasattr(reader, 'iter_targets'):
        targets = list(reader.iter_targets())
    if targets is None:
        return None
    labels = np.asarray(targets)
    return labels.astype(np.int64) if labels.ndim == 1 else None


def class_names(dataset: Dataset) -> tuple[str, ...] | None:
    """Class names in label order, where the dataset knows them."""
    names: Sequence[Any] | None = getattr(dataset, 'classes', None)
    if names is None:
        class_to_idx = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or {}
        names = sorted(class_to_idx, key=lambda name: class_to_idx[name])
    return tuple(map(str, names)) or None


class SelectedSamples(Subset):
    """A part of another library's dataset; unlike a plain `Subset` it passes a new transform on."""

    def __init__(self, dataset: Dataset, indices: np.ndarray, targets: np.ndarray) -> None:
        super().__init__(dataset, indices.tolist())
        self.targets = targets[indices]

    @property
    def transform(self) -> Any:
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]


def giving_bytes(dataset: Any, transform: FileTransform) -> Dataset | None:
    """A copy of a timm dataset whose transform takes encoded pictures; None of a dataset that decodes by itself."""
    inner = dataset.dataset if isinstance(dataset, SelectedSamples) else dataset
    if not isinstance(inner, timm.data.ImageDataset):
        return None
    inner = copy(inner)
    inner.load_bytes, inner.transform = True, partial(_of_bytes, transform)
    if not isinstance(dataset, SelectedSamples):
        return inner
    selected = copy(dataset)
    selected.dataset = inner
    return selected


def _of_bytes(transform: FileTransform, data: bytes) -> Any:
    return transform.of_bytes(data, partial(_decoded, data))


def _decoded(data: bytes) -> Image.Image:
    """A picture as timm decodes it, which leaves EXIF alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert('RGB')
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise InputError(f'a training image of this dataset cannot be read ({reason_unreadable(error)}): leave out '
                         '--decoder, with which timm takes its neighbour, or replace the image') from error


def part_of(dataset: Any, indices: np.ndarray) -> Any:
    """Some images of a dataset, this package's or another's, in the order of the indices."""
    if isinstance(dataset, LabelledImages):
        return dataset.select(indices)
    return SelectedSamples(dataset, indices, np.asarray(dataset_targets(dataset)))

"""The pictures of a report: thumbnails from the data, with what the network said below them."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from torch.utils.data import IterableDataset

from nbn_timm.data.dataset import ImageSamples, picture
from nbn_timm.errors import InputError
from nbn_timm.pages import thumbnail
from nbn_timm.report.run import ClassRow, FinishedRun

PICTURES, PICTURES_OF_PAIR = 12, 4  # of a gallery, and in a cell of a table


@dataclass(frozen=True)
class Shown:
    """A picture with lines below it, as the macro `pictures` takes it."""

    uri: str | None
    alt: str
    lines: list[str]


class Gallery:
    """Thumbnails of the pictures of a split.

    Args:
        dataset: The split; None, a stream or one with other labels gives no thumbnails.
        evaluated: The targets that the predictions are of, which must be those of the split.
    """

    def __init__(self, dataset: Any, evaluated: np.ndarray) -> None:
        self.dataset = dataset
        self.reason: str | None = None
        targets = getattr(dataset, 'targets', None)
        if dataset is None:
            self.reason = 'the data are not at hand'
        elif isinstance(dataset, IterableDataset):
            self.reason = 'the data are a stream, whose pictures cannot be asked for'
        elif targets is not None and not np.array_equal(targets, evaluated):
            self.reason = 'the data are not those that were evaluated'
        if self.reason is not None:
            self.dataset = None

    def uri(self, index: int) -> str | None:
        """A data URI; None where the picture cannot be had."""
        if self.dataset is None:
            return None
        try:
            return thumbnail(picture(self.dataset, index))
        except (InputError, OSError):
            return None

    def name(self, index: int) -> str:
        """Its file, or its number in the split."""
        if isinstance(self.dataset, ImageSamples):
            return os.path.basename(self.dataset.path(index))
        return f'picture {index:,}'

    def row(self, indices: Sequence[int]) -> Markup:
        """Some thumbnails side by side, for a cell of a table."""
        images = [Markup('<img class="thumb" src="{}" alt="{}" title="{}">').format(uri, self.name(index),
                                                                                   self.name(index))
                  for index in indices if (uri := self.uri(index)) is not None]
        return Markup('<div class="thumbs">{}</div>').format(Markup('').join(images)) if images else Markup('–')


def told(run: FinishedRun, gallery: Gallery, index: int) -> Shown:
    """A picture with its label and what it was told to be."""
    predictions = run.predictions
    assert predictions is not None
    label, guess = run.classes[predictions.labels[index]], run.classes[predictions.predicted[index]]
    right = float(np.exp(predictions.label_log_probability[index]))
    return Shown(gallery.uri(index), f'{gallery.name(index)}, a picture of {label.name}', [
        f'told: {guess.name}, {percent(float(predictions.confidence[index]))}',
        f'is: {label.name}, {percent(right)}', known_images(label), gallery.name(index)])


def percent(share: float) -> str:
    """A probability for people: never 100 % or 0 % unless it is."""
    if 0 < share < 0.001:
        return '<0.1 %'
    return '>99.9 %' if 0.999 < share < 1 else f'{100 * share:.1f} %'


def known_images(row: ClassRow) -> str:
    """How many training images a class had."""
    return 'training images not known' if row.train_images is None else (
        f'of {row.train_images:,} training image{"" if row.train_images == 1 else "s"}')

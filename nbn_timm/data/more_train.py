"""Further training pictures beside those of a dataset, such as a second stage has made."""
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nbn_timm.data.dataset import ArraySamples, ImageSamples
from nbn_timm.data.pictures import read_picture
from nbn_timm.data.splits import Splits
from nbn_timm.data.tables import read_table
from nbn_timm.errors import InputError, nearest, quoted
from nbn_timm.settings import Settings, setting


@dataclass(frozen=True)
class MoreTrainSettings(Settings):
    """Training pictures beside those of the dataset."""

    title = 'further training pictures'
    of_training = True

    more_train: str | None = setting(
        None, 'CSV file with the columns file and label, paths relative to it: training pictures that are drawn beside '
        "the dataset's and not counted, such as --stage cam_sampling makes", metavar='FILE', is_file=True)


def with_more_pictures(settings: MoreTrainSettings, splits: Splits) -> Splits:
    """The splits with further pictures behind those of the training split; the counts of the classes stay.

    Raises:
        InputError: The file or a picture of it is not as it should be, or the dataset takes none.
    """
    if settings.more_train is None:
        return splits
    train, classes = splits.train, splits.classes
    if classes is None or not isinstance(train, ArraySamples | ImageSamples):
        raise InputError('--more-train puts pictures beside those of a benchmark, of class folders, lists or CSV '
                         'files, and this dataset has its own form: leave it out')
    table = read_table(settings.more_train, ('file', 'label'))
    labels = {name: label for label, name in enumerate(classes.names)}
    for name, line in zip(table.columns['label'], table.lines, strict=True):
        if name not in labels:
            raise InputError(f'line {line} of {table.what} has the class {quoted(name)}, which the dataset has not: '
                             f'correct it{nearest(name, labels)}')
    root = Path(settings.more_train).resolve().parent
    paths = [str(root / name) for name in table.columns['file']]
    targets = np.concatenate([train.targets, [labels[name] for name in table.columns['label']]]).astype(np.int64)
    more = _array_samples(train, paths, targets) if isinstance(train, ArraySamples) else ImageSamples(
        [*(os.path.abspath(train.path(index)) for index in range(len(train))), *paths], targets, train.transform)
    note = (f'{len(paths):,} further training pictures of {settings.more_train} are drawn beside the others and not '
            'counted')
    return replace(splits, train=more, train_targets=targets, notes=[*splits.notes, note])


def _array_samples(train: ArraySamples, paths: list[str], targets: np.ndarray) -> ArraySamples:
    """Images in memory and pictures of their size behind them."""
    pictures = [np.asarray(read_picture(path, 'RGB')) for path in paths]
    size = train.images.shape[1:]
    odd = next((path for path, image in zip(paths, pictures, strict=True) if image.shape != size), None)
    if odd is not None:
        raise InputError(f'picture {quoted(odd)} of --more-train has not the {size[1]}x{size[0]} pixels of the '
                         'dataset: make it of that size')
    return ArraySamples(np.concatenate([train.images, *(image[None] for image in pictures)]), targets, train.transform)

"""The datasets by name: what `--dataset` can say is one class in one file of this folder."""
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from nbn_timm.data.class_names import CODES, ClassNames
from nbn_timm.data.classes import ClassCounts, read_counts
from nbn_timm.data.defaults import OWN_IMAGES, DataDefaults
from nbn_timm.data.label_sets import is_label_sets
from nbn_timm.data.settings import OF_THE_DRAW, OF_THE_SPLIT, DataSettings
from nbn_timm.data.shift import ClassShift, shifted_indices
from nbn_timm.data.splits import PARTS, SHOT_LIMITS, Known, Source, Splits, assemble
from nbn_timm.data.timm_datasets import dataset_targets, part_of
from nbn_timm.data.val_split import SplitFile
from nbn_timm.errors import InputError
from nbn_timm.registry import Registry
from nbn_timm.settings import fields_of

NamedT = TypeVar('NamedT', bound='NamedDataset')

LISTS = frozenset({'train_list', 'val_list', 'test_list'})
CSVS = frozenset({'train_csv', 'val_csv', 'test_csv'})


class NamedDataset(ABC):
    """A dataset that `--dataset` names.

    Attributes:
        name: What it was asked for by; of a registered prefix such as 'hfds/', all of the name.
        hint: What the name stands for, where it does not say so itself.
        defaults: Published input format and augmentation.
        num_classes: None where the images tell.
        factor: The imbalance factor of the draw unless another is asked for; None draws nothing.
        shot_limits: Many-shot classes have more training images than the first, few-shot ones less than the second.
        needs_folder: It is read from a data folder.
    """

    hint: ClassVar[str] = ''
    defaults: ClassVar[DataDefaults] = OWN_IMAGES
    num_classes: ClassVar[int | None] = None
    factor: ClassVar[float | None] = None
    shot_limits: ClassVar[tuple[int, int]] = SHOT_LIMITS
    needs_folder: ClassVar[bool] = True

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        """Read the splits as they are, before any draw.

        Args:
            settings: What to read; `num_classes` is the published one where there is one.
            parts: The splits that are needed, of 'train', 'val' and 'test'.
            count: Read the training split even if it is not among them, provided that it can be found.

        Raises:
            InputError: A part is missing or malformed.
        """

    @abstractmethod
    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        """Those fields of `DataSettings` that `read` takes account of, given the others."""

    def published_test(self, settings: DataSettings, shift: ClassShift) -> np.ndarray | None:
        """Indices of the test images of a shifted test that is published as a list, in order; None if there is none."""
        return None

    def validates(self, settings: DataSettings) -> bool | None:
        """Whether there is a validation split; None where only the data tell."""
        return None

    def label_sets(self, settings: DataSettings) -> bool:
        """Whether an image can be of several classes, see `nbn_timm.data.label_sets`."""
        return False

    def names_beside(self, settings: DataSettings) -> ClassNames | None:
        """What a file beside the images calls classes; None if there is none."""
        return None

    def splits_files(self, settings: DataSettings) -> bool:
        """Whether its training images are files that --val-fraction can divide."""
        return False

    def drawn_factor(self, settings: DataSettings) -> float | None:
        """The imbalance factor of the draw, None if nothing is drawn."""
        return self.factor if settings.imbalance_factor is None else settings.imbalance_factor

    def used_settings(self, settings: DataSettings) -> frozenset[str]:
        """The fields of `DataSettings` that have an effect on this dataset, given the others."""
        used = self.own_settings(settings) | {
            'dataset', 'num_classes', 'class_counts', 'class_names', 'imbalance_factor', 'test_distribution'}
        if self.drawn_factor(settings) is not None:
            used |= OF_THE_DRAW
        return used | OF_THE_SPLIT if self.splits_files(settings) else used


DATASETS: Registry[NamedDataset] = Registry('dataset')  # a name that ends in '/' is the prefix of many


def register_dataset(name: str) -> Callable[[type[NamedT]], type[NamedT]]:
    """Class decorator: make a `NamedDataset` available as `--dataset name`; 'name/' stands for all 'name/...'."""
    return DATASETS.register(name)


def find_dataset(name: str) -> NamedDataset:
    """The dataset of that name.

    Raises:
        InputError: There is none.
    """
    prefix = f'{name.lower().partition("/")[0]}/'
    return DATASETS.find(prefix if prefix in DATASETS and '/' in name else name)(name)


HOW_TO_GIVE_ONE = 'give --dataset folder for a folder of pictures per class below --data-dir, list for --train-list, ' \
                  'csv for --train-csv, or the name of a benchmark, which --help lists'


def dataset_choices() -> str:
    """What can be given as `--dataset`, in words for people."""
    return ', '.join(f'{name}{"..." * name.endswith("/")}' + (f' ({known.hint})' if known.hint else '')
                     for name, known in sorted(DATASETS.items(), key=lambda item: (bool(item[1].hint), item[0])))


def create_splits(
        settings: DataSettings,
        parts: Collection[str] = PARTS,
        known: Known | None = None,
        label_sets: bool = False,
) -> Splits:
    """Build the splits of a dataset and count its training images.

    Args:
        settings: What to read.
        parts: The splits to build, of 'train', 'val' and 'test'. The training split is counted even if it is not
            among them, provided that it can be found.
        known: Classes of a finished network, by which the labels are numbered.
        label_sets: The caller takes images of several classes too.

    Raises:
        InputError: The dataset is unknown, a part of it is missing or malformed, the class numbers disagree, or the
            test is to have a distribution that there is not; or its images can be of several classes, which the caller
            does not take.
    """
    dataset = find_dataset(settings.dataset)
    if not label_sets and dataset.label_sets(settings):
        raise InputError(f'an image of {settings.dataset} can be of several classes here, which this command does not '
                         'take: use nbn-train, nbn-validate, nbn-predict, nbn-check or nbn-report')
    settings.shift()  # refused before anything is read
    given = read_counts(settings.class_counts) if settings.class_counts else None
    settings = replace(settings, num_classes=known_number(dataset, settings))
    divided = settings.split_file if dataset.splits_files(settings) else None
    source = dataset.read(settings, {*parts, 'train'} if divided else parts, given is None)
    if divided:
        SplitFile.read(divided, data_root(source.datasets.get('train'), settings)).divide(source, settings.data_dir)
    return assemble(settings, parts, source, dataset.defaults, given, known, dataset.drawn_factor(settings),
                    dataset.shot_limits, names_of(settings, source.names or ()))


def names_of(settings: DataSettings, codes: Sequence[str]) -> ClassNames | None:
    """What classes are called: by the file that is given, else by one beside the images that has some of them.

    Raises:
        InputError: The file that is given is none.
    """
    if settings.class_names == CODES:
        return None
    if settings.class_names:
        return ClassNames.read(settings.class_names)
    beside = find_dataset(settings.dataset).names_beside(settings)
    return beside if beside is not None and beside.called(codes) else None


def draws_validation(settings: DataSettings) -> bool:
    """Whether the validation split is, or is to be, a part of the training pictures."""
    asked = settings.val_fraction is not None or settings.split_file is not None
    return asked and bool(settings.dataset) and find_dataset(settings.dataset).splits_files(settings)


def has_validation(settings: DataSettings) -> bool | None:
    """Whether there is a validation split; None where only the data tell."""
    return draws_validation(settings) or find_dataset(settings.dataset).validates(settings)


def data_root(samples: Any, settings: DataSettings) -> str:
    """The folder that paths of a split file are relative to."""
    return getattr(samples, 'root', '') or settings.data_dir or ''


def shifted_test(
        settings: DataSettings,
        test: Dataset,
        class_counts: ClassCounts | None,
        shift: ClassShift,
        published: bool = True,
) -> tuple[np.ndarray, str]:
    """The images of a test set that a shifted test has, and in words where their choice is from.

    Args:
        settings: Of the data.
        test: The whole test set.
        class_counts: Training images per class, which rank the classes where no list is published.
        shift: The distribution.
        published: Take the list that is published for the benchmark, if there is one.

    Raises:
        InputError: It cannot be told which images these are.
    """
    listed = find_dataset(settings.dataset).published_test(settings, shift) if published else None
    if listed is not None:
        return listed, "SADE's list"
    targets = dataset_targets(test)
    if targets is not None and is_label_sets(targets):
        raise InputError(f'an image of {settings.dataset} can be of several classes here, so no class distribution of '
                         'the test can be chosen: leave out --test-distribution and --test-agnostic')
    if targets is None:
        raise InputError(f'the labels of the test images of {settings.dataset} are not known beforehand, so there is '
                         'no part of them to choose: leave out --test-distribution and --test-agnostic')
    if class_counts is None:
        raise InputError(f'which classes are frequent in the test {shift} follows from the training images per class, '
                         'which are not known: give --class-counts FILE')
    return shifted_indices(targets, class_counts, shift), "by SADE's rule for CIFAR"


def with_shifted_test(settings: DataSettings, splits: Splits, class_counts: ClassCounts | None) -> Splits:
    """The splits with the part of the test split that `--test-distribution` asks for.

    Raises:
        InputError: See `shifted_test`.
    """
    shift, test = settings.shift(), splits.test
    if shift is None or test is None:
        return splits
    if isinstance(test, IterableDataset):
        raise InputError(f'{settings.dataset} is a stream, of which no part can be taken: leave out '
                         '--test-distribution (--test-agnostic of nbn-validate needs no part)')
    indices, source = shifted_test(settings, test, class_counts, shift)
    part = part_of(test, indices)
    note = f'the test is {len(indices):,} of the {len(test):,} test images, {shift}, {source}'  # type: ignore[arg-type]
    return replace(splits, test=part, notes=[*splits.notes, note])


def reason_unused(name: str, settings: DataSettings) -> str | None:
    """Why a field of `DataSettings` has no effect on the dataset that they name; None where it has one, or is none."""
    if not settings.dataset or name not in {declared.name for declared in fields_of(DataSettings)}:
        return None
    used = find_dataset(settings.dataset).used_settings(settings)
    if name in OF_THE_SPLIT and name not in used:
        return f'is for pictures in files, and --dataset {settings.dataset} has none here'
    lists = ' with list files' if settings.lists and not name.endswith('_list') else ''
    return None if name in used else f'has no effect on --dataset {settings.dataset}{lists}'


def prescribes_format(name: str) -> bool:
    """Whether the images of a dataset have a published format."""
    return find_dataset(name).defaults.published


def image_root(settings: DataSettings) -> Path:
    """The data folder.

    Raises:
        InputError: It was not given, or is neither there nor to be filled.
    """
    if not settings.data_dir:
        raise InputError(f'the dataset {settings.dataset} needs a folder: give --data-dir')
    if not os.path.isdir(settings.data_dir) and not settings.download:
        raise InputError(f"the data folder '{settings.data_dir}' does not exist: correct --data-dir")
    return Path(settings.data_dir)


def known_number(dataset: NamedDataset, settings: DataSettings) -> int | None:
    """The number of classes where the benchmark or the settings tell it; they must agree."""
    published = dataset.num_classes
    if published and settings.num_classes not in (None, published):
        raise InputError(
            f'{settings.dataset} has {published} classes, not {settings.num_classes}: remove --num-classes')
    return published or settings.num_classes

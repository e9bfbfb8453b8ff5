"""From the name of a benchmark to its splits, class counts and published defaults."""
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from nbn_timm.data.benchmarks import LIST_BENCHMARKS, ListBenchmark
from nbn_timm.data.cifar_lt import CIFAR_CLASSES, CIFAR_FACTOR, load_cifar
from nbn_timm.data.classes import Classes
from nbn_timm.data.dataset import ImageSamples, LabelledImages
from nbn_timm.data.defaults import CIFAR_LT, DIGITS_LT, OWN_IMAGES, DataDefaults
from nbn_timm.data.digits import DIGITS_FACTOR, load_digits_splits
from nbn_timm.data.folders import SPLIT_FOLDERS, find_split_folder, read_class_folders
from nbn_timm.data.lists import ImageList, read_image_list
from nbn_timm.data.longtail import draw_long_tail
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.timm_datasets import (
    STREAMED_TYPES,
    TIMM_TYPES,
    SelectedSamples,
    class_names,
    dataset_targets,
    open_timm_dataset,
)
from nbn_timm.errors import InputError, nearest

PARTS = ('train', 'val', 'test')
DATASETS = ('digits_lt', *CIFAR_CLASSES, *LIST_BENCHMARKS, 'list', 'folder')


@dataclass
class Splits:
    """A dataset, ready for the loaders.

    Attributes:
        train, val, test: None where the dataset has no such split or it was not asked for. A dataset without `val`
            has nothing to select a model on: its last epoch is reported.
        train_targets: Labels of the training split, int64 [N], for samplers; None where only reading it would tell.
        classes: Names and, where the training split can be counted or a file was given, training images per class;
            None if nothing is known.
        defaults: Published input format and augmentation.
        num_classes: None where it cannot be known without reading all images.
        notes: What a person should know about the data, one sentence each.
    """

    train: Dataset | None
    val: Dataset | None
    test: Dataset | None
    classes: Classes | None
    defaults: DataDefaults
    num_classes: int | None = None
    train_targets: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def class_counts(self) -> Classes | None:
        """The classes, if their training images are known."""
        return self.classes if self.classes is not None and self.classes.counts is not None else None


def create_splits(settings: DataSettings, parts: Collection[str] = PARTS) -> Splits:
    """Build the splits of a dataset and count its training images.

    Args:
        settings: What to read.
        parts: The splits to build, of 'train', 'val' and 'test'. The training split is counted even if it is not
            among them, provided that it can be found.

    Raises:
        InputError: The dataset is unknown, a part of it is missing or malformed, or the class numbers disagree.
    """
    read = _reader(settings.dataset, bool(settings.lists))
    given = Classes.from_file(settings.class_counts_file) if settings.class_counts_file else None
    settings = replace(settings, num_classes=_known_classes(settings, given))
    source = read(settings, parts, given is None)
    return _assemble(settings, parts, given, source)


@dataclass
class _Source:
    """What a reader found: splits by name, class names, and the imbalance factor that holds unless one is given."""

    datasets: dict[str, Any]
    names: tuple[str, ...] | None
    defaults: DataDefaults
    notes: list[str] = field(default_factory=list)
    factor: float | None = None


# Settings, the parts to build, and whether to look for the training split even if it is not among them.
_Reader = Callable[[DataSettings, Collection[str], bool], _Source]


def _reader(dataset: str, from_lists: bool) -> _Reader:
    if dataset == 'digits_lt':
        return _read_digits
    if dataset in CIFAR_CLASSES and not from_lists:
        return _read_cifar
    if dataset in CIFAR_CLASSES or dataset in LIST_BENCHMARKS or dataset == 'list':
        return _read_lists
    if dataset == 'folder':
        return _read_folders
    if dataset.lower().startswith(TIMM_TYPES):
        return _read_timm
    raise InputError(
        f"unknown dataset '{dataset}' (there are {', '.join(DATASETS)}, and timm's {', '.join(TIMM_TYPES)}...)"
        f'{nearest(dataset, DATASETS)}')


def _read_digits(settings: DataSettings, parts: Collection[str], count: bool) -> _Source:
    return _Source(load_digits_splits(), tuple(map(str, range(10))), DIGITS_LT, factor=DIGITS_FACTOR)


def _read_cifar(settings: DataSettings, parts: Collection[str], count: bool) -> _Source:
    data_dir = _data_dir(settings)
    train, names = load_cifar(settings.dataset, data_dir, train=True, download=settings.download)
    datasets = {'train': train}
    if 'test' in parts:
        datasets['test'], _ = load_cifar(settings.dataset, data_dir, train=False)
    return _Source(datasets, names, CIFAR_LT, factor=CIFAR_FACTOR)


def _read_lists(settings: DataSettings, parts: Collection[str], count: bool) -> _Source:
    benchmark = LIST_BENCHMARKS.get(settings.dataset)
    data_dir = _data_dir(settings)
    num_classes = settings.num_classes
    lists: dict[str, ImageList] = {}
    notes: list[str] = []
    for part in PARTS:  # the training list first, because it may settle the class number
        wanted = part in parts or (part == 'train' and count)
        path = _find_list(settings, data_dir, part, benchmark, required=part in parts) if wanted else None
        if path is None:
            continue
        lists[part] = read_image_list(path, num_classes)
        notes += lists[part].notes
        if part == 'train' and num_classes is None:
            num_classes = int(lists['train'].targets.max()) + 1
    datasets = {part: ImageSamples(rows.paths, rows.targets, root=data_dir) for part, rows in lists.items()}
    names = _names_from_folders(lists['train'], num_classes) if 'train' in lists and num_classes else None
    if settings.dataset in CIFAR_CLASSES:
        notes.append(
            f"the images of {settings.dataset} come from list files, not from LDAM's draw: say so beside any number")
        return _Source(datasets, names, CIFAR_LT, notes)
    return _Source(datasets, names, benchmark.defaults if benchmark else OWN_IMAGES, notes)


def _read_folders(settings: DataSettings, parts: Collection[str], count: bool) -> _Source:
    data_dir = _data_dir(settings)
    datasets: dict[str, ImageSamples] = {}
    names: tuple[str, ...] | None = None
    notes: list[str] = []
    for part in PARTS:  # the training split first, because its folders name the classes
        folder = find_split_folder(data_dir, part) if part in parts or part == 'train' else None
        if folder is not None:
            read = read_class_folders(folder, names, training=part == 'train' and part in parts)
            names = read.names
            notes += read.notes
            if read.samples is not None:
                datasets[part] = read.samples
        elif part == 'train' and part in parts:
            raise InputError(f"'{data_dir}' has no folder 'train': put the images as train/<class>/<image>")
    if not set(datasets) & set(parts):
        wanted = [name for part in parts for name in SPLIT_FOLDERS[part]]
        raise InputError(
            f"'{data_dir}' has no folder {' or '.join(wanted)}: put the images as {wanted[0]}/<class>/<image>")
    if 'train' not in datasets:
        notes.append(f"'{data_dir}' has no training split, so the classes are the folders that are there")
    return _Source(datasets, names, OWN_IMAGES, notes)


def _read_timm(settings: DataSettings, parts: Collection[str], count: bool) -> _Source:
    split_names = {'train': settings.train_split, 'val': settings.val_split, 'test': settings.test_split}
    countable = count and not settings.dataset.lower().startswith(STREAMED_TYPES)
    datasets: dict[str, Dataset] = {}
    for part, split in split_names.items():
        if not split or not (part in parts or (part == 'train' and countable)):
            continue
        try:
            datasets[part] = open_timm_dataset(
                settings.dataset,
                split,
                root=settings.data_dir,
                is_training=part == 'train',
                download=settings.download,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
        except InputError:
            if part in parts:
                raise
    names = next((class_names(dataset) for dataset in datasets.values()), None)
    return _Source(datasets, names, OWN_IMAGES)


def _assemble(
        settings: DataSettings,
        parts: Collection[str],
        given: Classes | None,
        source: _Source,
) -> Splits:
    """Draw the long tail, count it, and keep the parts that were asked for."""
    train = source.datasets.get('train')
    targets = None if train is None else dataset_targets(train)
    num_classes = settings.num_classes or (len(source.names) if source.names else None)
    if num_classes is None and targets is not None:
        num_classes = int(targets.max()) + 1
    description, notes = f'train split of {settings.dataset}', list(source.notes)

    factor = source.factor if settings.imbalance_factor is None else settings.imbalance_factor
    if factor is not None and train is not None:
        if targets is None or num_classes is None:
            raise InputError(
                f'{settings.dataset} cannot be made long-tailed because its labels are not known beforehand: '
                'remove --imbalance-factor')
        indices = draw_long_tail(targets, num_classes, factor, settings.imbalance_profile, settings.imbalance_seed)
        owned = isinstance(train, LabelledImages)
        train = train.select(indices) if owned else SelectedSamples(train, indices, targets)
        targets = targets[indices]
        description += f' ({settings.imbalance_profile} profile, imbalance factor {factor:g})'
        notes.append(
            f'the training split is a draw of {len(indices):,} images: {settings.imbalance_profile} profile, '
            f'imbalance factor {factor:g}, seed {settings.imbalance_seed}')

    measured = None
    if targets is not None:
        fitting = source.names if source.names and len(source.names) == num_classes else None
        measured = Classes.from_targets(targets, fitting, description, num_classes)
    counts = given or measured
    if counts is None and 'train' in parts:
        notes.append('the training images per class are unknown: give them as a file where they are needed')
    if 'val' in parts and 'val' not in source.datasets:
        notes.append(
            f'{settings.dataset} has no validation split: no best epoch is selected, the last one is reported')
    return Splits(
        train=train if 'train' in parts else None,
        val=source.datasets.get('val') if 'val' in parts else None,
        test=source.datasets.get('test') if 'test' in parts else None,
        classes=counts,
        defaults=source.defaults,
        num_classes=num_classes,
        train_targets=targets,
        notes=notes,
    )


def _data_dir(settings: DataSettings) -> Path:
    if not settings.data_dir:
        raise InputError(f'the dataset {settings.dataset} needs a folder: give --data-dir')
    if not os.path.isdir(settings.data_dir) and not settings.download:
        raise InputError(f"the data folder '{settings.data_dir}' does not exist: correct --data-dir")
    return Path(settings.data_dir)


def _find_list(
        settings: DataSettings,
        data_dir: Path,
        part: str,
        benchmark: ListBenchmark | None,
        required: bool,
) -> Path | None:
    """The list file of a split, or None where the dataset has none (or its training list is not needed)."""
    given = settings.lists.get(part)
    if given:
        candidates = (Path(given), data_dir / given, data_dir / 'lists' / given)
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise InputError(
                f"the list file '{given}' is neither there nor in '{data_dir}' or its folder 'lists': "
                f'correct --{part}-list')
        return found
    published = benchmark.list_of(part) if benchmark else None
    if published is not None:
        found = published.find(data_dir)
        if found is None and required:
            raise InputError(
                f"'{published.name}' is neither in '{data_dir}' nor in its folder 'lists': "
                f'run nbn-prepare {settings.dataset} --data-dir {data_dir}, or give --{part}-list')
        return found
    if required and part == 'train':
        raise InputError(f'the dataset {settings.dataset} needs a training list: give --train-list')
    return None


def _names_from_folders(rows: ImageList, num_classes: int) -> tuple[str, ...] | None:
    """Class names, of a class without images its number; None if the folders do not tell the classes apart."""
    names = rows.folder_names()
    return None if names is None else tuple(names.get(label, str(label)) for label in range(num_classes))


def _known_classes(settings: DataSettings, given: Classes | None) -> int | None:
    """The number of classes where the benchmark, the settings or the given counts tell it; they must agree."""
    published = {'digits_lt': 10, 'cifar10_lt': 10, 'cifar100_lt': 100}.get(settings.dataset)
    if settings.dataset in LIST_BENCHMARKS:
        published = LIST_BENCHMARKS[settings.dataset].num_classes
    if published and settings.num_classes not in (None, published):
        raise InputError(
            f'{settings.dataset} has {published} classes, not {settings.num_classes}: remove --num-classes')
    expected = published or settings.num_classes
    if given and expected not in (None, given.num_classes):
        raise InputError(
            f'{given.source} counts {given.num_classes} classes but {settings.dataset} has {expected}: '
            'give the counts of this dataset')
    return expected or (given.num_classes if given else None)

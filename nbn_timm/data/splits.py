"""The splits of a dataset: from what a reader found to what the loaders take."""
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from nbn_timm.data.class_names import ClassNames, renamed
from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, Classes, GivenCounts, label_names
from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.label_sets import images_per_class, is_label_sets, spread
from nbn_timm.data.longtail import draw_long_tail
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.timm_datasets import SelectedSamples, dataset_targets
from nbn_timm.errors import InputError, quoted

PARTS = ('train', 'val', 'test')
SHOT_LIMITS = (MANY_ABOVE, FEW_BELOW)  # many: more training images than the first; few: fewer than the second


@dataclass
class Source:
    """What a reader found: the splits by name, the class names in label order, and what a person should know."""

    datasets: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    folders: Mapping[str, int] = field(default_factory=dict)  # of lists without a training list: labels by folder
    groups: Sequence[str] | None = None  # of the training images, '' for none: what a draw of a split keeps together


@dataclass
class Splits:
    """A dataset, ready for the loaders.

    Attributes:
        train, val, test: None where the dataset has no such split or it was not asked for. A dataset without `val`
            has nothing to select a model on: its last epoch is reported.
        train_targets: Labels of the training split, int64 [N], or label sets, uint8 [N, C], for samplers; None where
            only reading it would tell.
        classes: Names and, where the training split can be counted or a file was given, training images per class;
            None if nothing is known.
        defaults: Published input format and augmentation.
        num_classes: None where it cannot be known without reading all images.
        notes: What a person should know about the data, one sentence each.
        shot_limits: The benchmark's limits of many and few, as `ClassCounts.shot_split` takes them.
    """

    train: Dataset | None
    val: Dataset | None
    test: Dataset | None
    classes: Classes | None
    defaults: DataDefaults
    num_classes: int | None = None
    train_targets: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    shot_limits: tuple[int, int] = SHOT_LIMITS

    @property
    def label_sets(self) -> bool:
        """Whether an image can be of several classes."""
        return self.classes is not None and self.classes.label_sets

    @property
    def class_counts(self) -> Classes | None:
        """The classes, if their training images are known."""
        return self.classes if self.classes is not None and self.classes.counts is not None else None


def by_position(network: str, classes: Classes | None) -> list[str]:
    """What is to be said of a network that records no classes, beside data whose classes have names."""
    if classes is None or not classes.named:
        return []
    return [f'{network} records no class names, so the labels of the data are taken as its own, by position']


@dataclass(frozen=True)
class Known:
    """The classes of a finished network that the data are for.

    Attributes:
        classes: In the order of the network's outputs.
        whose: In words, such as "checkpoint 'last.pth.tar'".
        binding: The data may have no others; else these are told, and the data keep an order of their own.
    """

    classes: Classes
    whose: str
    binding: bool = True


def assemble(
        settings: DataSettings,
        parts: Collection[str],
        source: Source,
        defaults: DataDefaults,
        given: GivenCounts | None = None,
        known: Known | None = None,
        factor: float | None = None,
        shot_limits: tuple[int, int] = SHOT_LIMITS,
        class_names: ClassNames | None = None,
) -> Splits:
    """Draw the long tail, count it, and keep the parts that were asked for.

    Args:
        settings: As they were asked for, with the number of classes where that is known.
        parts: The splits to keep.
        source: What was read.
        defaults: Published input format and augmentation.
        given: Training images per class in place of what is counted.
        known: Classes whose order the labels take.
        factor: Imbalance factor of the draw; None draws nothing.
        shot_limits: See `Splits`.
        class_names: What the classes are called, those of `given` and `known` as well.

    Raises:
        InputError: A long tail is to be drawn from labels that are not known; or `class_names` has none of the classes;
            or images can be of several classes and
            those of the known network cannot, or the other way round.
    """
    datasets = dict(source.datasets)
    train = datasets.get('train')
    targets = None if train is None else dataset_targets(train)
    num_classes = settings.num_classes or (len(source.names) if source.names else None)
    if num_classes is None and targets is not None:
        num_classes = targets.shape[1] if is_label_sets(targets) else int(targets.max()) + 1
    label_sets = any(isinstance(part, LabelledImages) and part.label_sets for part in datasets.values())
    read = ['train'] if train is not None else [part for part in PARTS if part in datasets]
    description = ' and '.join([f'{part} split' for part in read] or ['classes']) + f' of {settings.dataset}'
    notes = list(source.notes)

    if factor is not None and train is not None:
        datasets['train'], targets = _drawn(settings, train, targets, num_classes, factor)
        drawn = f'{settings.imbalance_profile} profile, imbalance factor {factor:g}'
        description += f' ({drawn})'
        notes.append(f'the training split is a draw of {len(targets):,} images: {drawn}, seed '
                     f'{settings.imbalance_seed}')
    if class_names is not None:
        source, called = _called(source, class_names, num_classes, settings.dataset)
        notes.append(class_names.note(called))
        known = known and replace(known, classes=renamed(known.classes, called))
        given = given and given.renamed(called)
    if known is not None:
        _refuse_another_kind(known, label_sets, settings.dataset)
        source = _named_by_folders(source, known, notes)
    # The names that the data have are matched with the known ones, however many classes there are to be.
    own = len(source.names) if known is not None and known.binding and source.names else num_classes
    classes = _classes(source, targets, own, description)
    if known is not None:
        other_number = not known.binding and settings.num_classes not in (None, known.classes.num_classes)
        if not other_number:  # else they are learned anew
            classes, targets = _as_known(known, classes, datasets, targets, description, notes)
        num_classes = classes.num_classes if classes else num_classes
    if given is not None:
        classes, told = given.of(classes)
        notes += told
        num_classes = num_classes or classes.num_classes
    if label_sets and classes is not None:
        classes, targets = _with_all_classes(classes, datasets, targets)
    notes += _missing(settings, parts, datasets, classes)
    notes += _without_pictures(parts, datasets, classes)
    kept = {part: datasets.get(part) if part in parts else None for part in PARTS}
    return Splits(**kept, classes=classes, defaults=defaults, num_classes=num_classes, train_targets=targets,
                  notes=notes, shot_limits=shot_limits)


def _called(
        source: Source,
        class_names: ClassNames,
        num_classes: int | None,
        dataset: str,
) -> tuple[Source, dict[str, str]]:
    """The source with other names, and these by what it calls the classes, which is numbers where it has no names."""
    codes = source.names or _names_of_folders(source)
    if codes is None and num_classes is None:
        raise InputError(f'how many classes {dataset} has is not known beforehand, so --class-names cannot name them: '
                         'give --num-classes')
    called = class_names.required(codes or label_names(num_classes or 0))
    return replace(source, names=tuple(called.values())), called


def _refuse_another_kind(known: Known, label_sets: bool, dataset: str) -> None:
    if known.binding and known.classes.label_sets != label_sets:
        kinds = ('one class for an image', 'a set of classes')
        raise InputError(f'{known.whose} gives {kinds[known.classes.label_sets]}, and {dataset} has '
                         f'{kinds[label_sets]} here: give data of its kind, or another network')


def _with_all_classes(
        classes: Classes,
        datasets: dict[str, Any],
        targets: np.ndarray | None,
) -> tuple[Classes, np.ndarray | None]:
    """Classes of label sets, and the training sets of all of them; the sets in `datasets` change in place."""
    number = classes.num_classes
    for part, dataset in datasets.items():
        if dataset.targets.shape[1] < number:
            datasets[part] = dataset.select(np.arange(len(dataset)))
            datasets[part].targets = spread(dataset.targets, range(dataset.targets.shape[1]), number)
    return replace(classes, label_sets=True), None if targets is None else datasets['train'].targets


def _missing(
        settings: DataSettings,
        parts: Collection[str],
        datasets: Mapping[str, Any],
        classes: Classes | None,
) -> list[str]:
    """What a run will have to do without, one sentence each."""
    missing = []
    if (classes is None or classes.counts is None) and 'train' in parts:
        missing.append('the training images per class are unknown: give them as a file where they are needed')
    if 'val' in parts and 'val' not in datasets:
        missing.append(
            f'{settings.dataset} has no validation split: no best epoch is selected, the last one is reported')
    return missing


def _without_pictures(parts: Collection[str], datasets: Mapping[str, Any], classes: Classes | None) -> list[str]:
    """Classes that an evaluation will say nothing of, one sentence for each split."""
    told = []
    for part in ('val', 'test'):
        images = datasets.get(part) if part in parts else None
        if classes is None or not isinstance(images, LabelledImages):
            continue
        there = set(np.flatnonzero(images_per_class(images.targets)).tolist())
        if absent := [quoted(name) for label, name in enumerate(classes.names) if label not in there]:
            some = ', '.join(absent[:3]) + (', ...' if len(absent) > 3 else '')
            told.append(f'classes without a picture in the {part} split: {len(absent):,} of {classes.num_classes:,} '
                        f'({some})')
    return told


def _drawn(
        settings: DataSettings,
        train: Any,
        targets: np.ndarray | None,
        num_classes: int | None,
        factor: float,
) -> tuple[Any, np.ndarray]:
    """The images and labels of a long-tailed draw from the training split."""
    if targets is not None and is_label_sets(targets):
        raise InputError(f'an image of {settings.dataset} can be of several classes here, of which no long tail is '
                         'drawn: remove --imbalance-factor')
    if targets is None or num_classes is None:
        raise InputError(f'{settings.dataset} cannot be made long-tailed because its labels are not known beforehand: '
                         'remove --imbalance-factor')
    if isinstance(train, IterableDataset):
        raise InputError(f'{settings.dataset} is a stream, of which no part can be taken: remove --imbalance-factor')
    indices = draw_long_tail(targets, num_classes, factor, settings.imbalance_profile, settings.imbalance_seed)
    owned = isinstance(train, LabelledImages)
    return (train.select(indices) if owned else SelectedSamples(train, indices, targets)), targets[indices]


def _classes(
        source: Source,
        targets: np.ndarray | None,
        num_classes: int | None,
        description: str,
) -> Classes | None:
    """The classes in the order of the data's own labels; beyond the names that the data have they are numbers."""
    names = source.names
    if names and num_classes is not None:
        if len(names) > num_classes:
            odd = ', '.join(f"'{name}'" for name in names[num_classes:][:3])
            raise InputError(f'the data have {len(names)} classes and --num-classes is {num_classes}, so there is no '
                             f'place for {odd}: give --num-classes {len(names)}, or leave it out')
        names = (*names, *label_names(num_classes)[len(names):])
    if targets is not None:
        return Classes.from_targets(targets, names, description, num_classes)
    if num_classes is None:
        return None
    return Classes(None, names or label_names(num_classes), description)


def _named_by_folders(source: Source, known: Known, notes: list[str]) -> Source:
    """Lists without a training list are numbered by their folders' names, where the known classes have all of these."""
    if source.names or not source.folders or not known.classes.named:
        return source
    if not set(source.folders) <= set(known.classes.names):
        notes.append(f'the folders of the lists are not called as the classes of {known.whose}')
        return source
    return replace(source, names=_names_of_folders(source))


def _names_of_folders(source: Source) -> tuple[str, ...] | None:
    """The folders of lists in label order, of a class without one its number; None if there are none."""
    if not source.folders:
        return None
    names = {label: name for name, label in source.folders.items()}
    return tuple(names.get(label, str(label)) for label in range(max(names) + 1))


def _as_known(
        known: Known,
        classes: Classes | None,
        datasets: dict[str, Any],
        targets: np.ndarray | None,
        description: str,
        notes: list[str],
) -> tuple[Classes | None, np.ndarray | None]:
    """The classes and training labels in the order of the known classes; the labels of `datasets` change in place."""
    if classes is None:
        if known.classes.named:
            notes.append(f'the data tell no class names, so their labels are taken as those of {known.whose}')
        return known.classes, targets
    matching = known.classes.match(classes, classes.source, known.whose)
    if matching.only_theirs and not known.binding:
        odd = ', '.join(f"'{name}'" for name in matching.only_theirs[:3])
        notes.append(f'{known.whose} does not know the classes {odd} of the data, which are learned anew')
        return classes, targets
    matching.require_theirs()
    notes += matching.notes
    if matching.reordered:
        notes.append(f'the classes take the order that they have in {known.whose}')
        for part, dataset in datasets.items():
            if not isinstance(dataset, LabelledImages):
                raise InputError(f'the classes of the data have another order than those of {known.whose}, and a '
                                 'dataset type of timm cannot be relabelled: give the images as class folders or lists')
            relabelled = dataset.select(np.arange(len(dataset)))
            relabelled.targets = matching.relabel(dataset.targets)
            datasets[part] = relabelled
    if targets is None:
        return Classes(None, known.classes.names, description), None
    targets = matching.relabel(targets)
    if matching.only_ours:
        absent = ', '.join(f"'{name}'" for name in matching.only_ours[:3])
        more = ', ...' if len(matching.only_ours) > 3 else ''
        notes.append(f'{len(matching.only_ours)} classes of {known.whose} have no training image here: {absent}{more}')
    names = known.classes.names if known.classes.named or not classes.named else classes.names
    return Classes.from_targets(targets, names, description, known.classes.num_classes), targets

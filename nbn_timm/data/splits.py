"""The splits of a dataset: from what a reader found to what the loaders take."""
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from nbn_timm.data.class_counts import FEW_BELOW, MANY_ABOVE, ClassCounts
from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.longtail import draw_long_tail
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.timm_datasets import SelectedSamples, dataset_targets
from nbn_timm.errors import InputError

PARTS = ('train', 'val', 'test')
SHOT_LIMITS = (MANY_ABOVE, FEW_BELOW)  # many: more training images than the first; few: fewer than the second


@dataclass
class Source:
    """What a reader found: the splits by name, the class names in label order, and what a person should know."""

    datasets: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Splits:
    """A dataset, ready for the loaders.

    Attributes:
        train, val, test: None where the dataset has no such split or it was not asked for. A dataset without `val`
            has nothing to select a model on: its last epoch is reported.
        train_targets: Labels of the training split, int64 [N], for samplers; None where only reading it would tell.
        class_counts: None where the training split cannot be counted and no file was given.
        defaults: Published input format and augmentation.
        num_classes: None where it cannot be known without reading all images.
        notes: What a person should know about the data, one sentence each.
        shot_limits: The benchmark's limits of many and few, as `ClassCounts.shot_split` takes them.
    """

    train: Dataset | None
    val: Dataset | None
    test: Dataset | None
    class_counts: ClassCounts | None
    defaults: DataDefaults
    num_classes: int | None = None
    train_targets: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    shot_limits: tuple[int, int] = SHOT_LIMITS


def assemble(
        settings: DataSettings,
        parts: Collection[str],
        source: Source,
        defaults: DataDefaults,
        given: ClassCounts | None = None,
        factor: float | None = None,
        shot_limits: tuple[int, int] = SHOT_LIMITS,
) -> Splits:
    """Draw the long tail, count it, and keep the parts that were asked for.

    Args:
        settings: As they were asked for, with the number of classes where that is known.
        parts: The splits to keep.
        source: What was read.
        defaults: Published input format and augmentation.
        given: Training images per class in place of what is counted.
        factor: Imbalance factor of the draw; None draws nothing.
        shot_limits: See `Splits`.

    Raises:
        InputError: A long tail is to be drawn from labels that are not known.
    """
    train = source.datasets.get('train')
    targets = None if train is None else dataset_targets(train)
    num_classes = settings.num_classes or (len(source.names) if source.names else None)
    if num_classes is None and targets is not None:
        num_classes = int(targets.max()) + 1
    description, notes = f'train split of {settings.dataset}', list(source.notes)

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
        measured = ClassCounts.from_targets(targets, fitting, description, num_classes)
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
        class_counts=counts,
        defaults=defaults,
        num_classes=num_classes,
        train_targets=targets,
        notes=notes,
        shot_limits=shot_limits,
    )

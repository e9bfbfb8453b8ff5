"""Pictures of several classes: a target that is a set of labels.

The targets of a data set are either labels, int64 [N], or label sets, uint8 [N, C] with 1 where an image is of a class;
an image may be of no class. What must tell these apart asks here, or `Classes.label_sets`.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np


def is_label_sets(targets: Any) -> bool:
    """Whether targets, an array or a tensor, are label sets and not labels."""
    return targets.ndim == 2


def as_targets(targets: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Labels as int64 [N], label sets as uint8 [N, C]."""
    array = np.asarray(targets)
    return array.astype(np.uint8) if is_label_sets(array) else array.astype(np.int64)


def label_sets(members: Sequence[Sequence[int]], num_classes: int) -> np.ndarray:
    """Label sets, uint8 [N, C], from the labels of each image."""
    sets = np.zeros((len(members), num_classes), dtype=np.uint8)
    for row, labels in zip(sets, members, strict=True):
        row[list(labels)] = 1
    return sets


def images_per_class(targets: np.ndarray, num_classes: int = 0) -> np.ndarray:
    """How many images are of each class, int64 [C]; of labels, C is `num_classes` or the largest label plus one."""
    if is_label_sets(targets):
        return targets.sum(axis=0, dtype=np.int64)
    return np.bincount(targets, minlength=num_classes)


def labels_of(target: Any) -> tuple[int, ...]:
    """The labels of one image, from its target."""
    return tuple(np.flatnonzero(target).tolist()) if np.ndim(target) else (int(target),)


def spread(sets: np.ndarray, labels: Sequence[int], num_classes: int) -> np.ndarray:
    """Label sets of other classes, uint8 [N, num_classes]; a class of no image takes no part.

    Args:
        sets: uint8 [N, C].
        labels: The new label of each of the C classes, -1 for one that is not among the others.
        num_classes: Of the others.
    """
    kept = np.asarray(labels) >= 0
    moved = np.zeros((len(sets), num_classes), dtype=np.uint8)
    moved[:, np.asarray(labels)[kept]] = sets[:, kept]
    return moved

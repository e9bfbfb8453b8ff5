"""The images of a training set by class, in arrays that samplers index."""
from dataclasses import dataclass

import numpy as np

from nbn_timm.data.label_sets import is_label_sets


@dataclass(frozen=True)
class ClassGroups:
    """Image indices grouped by class; a class without images has no group, and an image of several is in several.

    Attributes:
        images: All image indices, group by group and in dataset order within one, int64; [N] where each image is of one
            class.
        labels: Class of each group, ascending, int64 [G].
        first: Where each group begins in `images`, int64 [G].
        counts: Images of each group, at least 1, int64 [G].
    """

    images: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_targets(cls, targets: np.ndarray) -> 'ClassGroups':
        """Group the labels [N] of a training set, or its label sets [N, C]."""
        if is_label_sets(targets):
            of_all, images = np.nonzero(targets.T)
            labels, counts = np.unique(of_all, return_counts=True)
            return cls(images, labels, np.cumsum(counts) - counts, counts)
        if targets.size and targets.min() >= 0 and targets.max() < 2 ** 16:  # which NumPy sorts and counts fastest
            images = np.argsort(targets.astype(np.uint16), kind='stable')
            of_all = np.bincount(targets)
            labels = np.flatnonzero(of_all)
            counts = of_all[labels]
        else:
            images = np.argsort(targets, kind='stable')
            labels, counts = np.unique(targets, return_counts=True)
        return cls(images, labels, np.cumsum(counts) - counts, counts)

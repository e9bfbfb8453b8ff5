"""Long-tailed draws from a dataset: how many images each class keeps, and which."""
from collections.abc import Sequence

import numpy as np

from nbn_timm.errors import InputError, nearest

PROFILES = ('exp', 'step')


def profile_counts(num_classes: int, largest: int, factor: float, profile: str = PROFILES[0]) -> list[int]:
    """Images per class, head first, of a long tail.

    'exp' gives class i of C int(largest * mu^(i / (C - 1))) images and 'step' gives the first C // 2 classes `largest`
    and the rest int(largest * mu), with mu = 1 / factor: Cui et al., "Class-Balanced Loss", CVPR 2019, and Cao et al.,
    "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss" (LDAM), NeurIPS 2019. No class gets
    less than one image.

    Args:
        num_classes: C.
        largest: Images of the largest class.
        factor: Largest over smallest class, at least 1.
        profile: 'exp' or 'step'.

    Raises:
        InputError: The factor is below 1 or the profile unknown.
    """
    if not 1 <= factor < float('inf'):
        raise InputError(f'the imbalance factor {factor:g} is not a number from 1: give largest over smallest class')
    if profile not in PROFILES:
        raise InputError(
            f"unknown imbalance profile '{profile}' (there are {', '.join(PROFILES)}){nearest(profile, PROFILES)}")
    mu = 1 / factor
    if profile == 'exp':
        counts = [int(largest * mu ** (label / max(num_classes - 1.0, 1.0))) for label in range(num_classes)]
    else:
        head = num_classes // 2
        counts = [int(largest)] * head + [int(largest * mu)] * (num_classes - head)
    return [max(count, 1) for count in counts]


def draw_long_tail(
        targets: Sequence[int] | np.ndarray,
        num_classes: int,
        factor: float,
        profile: str = PROFILES[0],
        seed: int = 0,
) -> np.ndarray:
    """Choose the images that make a dataset long-tailed, by LDAM's rule.

    The largest class sets `largest` of `profile_counts`, label 0 is the head. For each class in label order its
    indices are shuffled by one numpy `RandomState(seed)` and the first n_c kept; a class with fewer images keeps
    them all. On CIFAR with seed 0 these are the published CIFAR-LT images in the published order.

    Args:
        targets: Labels, [N].
        num_classes: Number of classes.
        factor: Largest over smallest class.
        profile: 'exp' or 'step'.
        seed: Of the draw; numpy's global generator is not touched.

    Returns:
        Indices into `targets`, int64, grouped by class in label order.

    Raises:
        InputError: See `profile_counts`.
    """
    targets = np.asarray(targets)
    largest = int(np.bincount(targets, minlength=num_classes).max())
    return draw_by_counts(targets, profile_counts(num_classes, largest, factor, profile), seed)


def draw_by_counts(targets: np.ndarray, counts: Sequence[int], seed: int = 0) -> np.ndarray:
    """Choose so many images of each class, by LDAM's rule.

    For each class in label order its indices are shuffled by one numpy `RandomState(seed)`, and the first ones kept.

    Args:
        targets: Labels, [N].
        counts: Images of each class; a class that has fewer keeps them all.
        seed: Of the draw.

    Returns:
        Indices into `targets`, int64, grouped by class in label order.
    """
    random = np.random.RandomState(seed)
    chosen = []
    for label, count in enumerate(counts):
        indices = np.where(targets == label)[0]
        random.shuffle(indices)
        chosen.append(indices[:count])
    return np.concatenate(chosen).astype(np.int64)

"""Pictures that can be of several classes: how many they are of, and which classes come together."""
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LEAST_PICTURES = 3  # of a class that is said never to come without another; of fewer it is chance


class Pair(NamedTuple):
    """Two classes that pictures are of at once.

    Attributes:
        rarer, other: Labels; the first class has no more pictures than the second.
        pictures: Of both.
        of_rarer, of_other: Pictures of each.
    """

    rarer: int
    other: int
    pictures: int
    of_rarer: int
    of_other: int


def labels_per_picture(sets: np.ndarray) -> dict[str, Any]:
    """Mean and largest number of labels of a picture, and how many pictures have none; label sets [N, C]."""
    numbers = sets.sum(axis=1, dtype=np.int64)
    return {'mean': round(float(numbers.mean()), 4) if len(numbers) else None, 'most': int(numbers.max(initial=0)),
            'none': int((numbers == 0).sum())}


def together(sets: np.ndarray) -> np.ndarray:
    """Pictures by two classes that they are of, int64 [C, C], from label sets [N, C]; the diagonal is of each class."""
    wide = sets.astype(np.float64)  # exact up to 2^53, and a product that BLAS computes
    return (wide.T @ wide).astype(np.int64)


def common_pairs(sets: np.ndarray) -> list[Pair]:
    """All pairs of classes that a picture is of at once, those of most pictures first; label sets [N, C]."""
    counts = together(sets)
    own = np.diag(counts)
    one, other = np.nonzero(np.triu(counts, 1))
    order = np.argsort(-counts[one, other], kind='stable')
    pairs = ((a, b) if own[a] <= own[b] else (b, a) for a, b in zip(one[order].tolist(), other[order].tolist(),
                                                                     strict=True))
    return [Pair(a, b, int(counts[a, b]), int(own[a]), int(own[b])) for a, b in pairs]


def never_apart(sets: np.ndarray) -> list[tuple[int, int]]:
    """Classes of `LEAST_PICTURES` or more, all of whose pictures are of a certain other class too: (class, other)."""
    counts = together(sets)
    own = np.diag(counts)
    only_with = (counts == own[:, None]) & (own >= LEAST_PICTURES)[:, None] & ~np.eye(len(own), dtype=bool)
    return [(int(one), int(other)) for one, other in zip(*np.nonzero(only_with), strict=True)]


def pairs_as_data(pairs: Sequence[Pair], names: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs as plain data for JSON."""
    return [{'classes': [names[pair.rarer], names[pair.other]], 'pictures': pair.pictures,
             'of_each': [pair.of_rarer, pair.of_other]} for pair in pairs]

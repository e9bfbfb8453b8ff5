"""Training images per class: measured once, where the training set is built, and passed on as one object."""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbn_timm.data.lists import read_image_list
from nbn_timm.errors import InputError

MANY_ABOVE, FEW_BELOW = 100, 20


@dataclass(frozen=True)
class ShotSplit:
    """Class indices by number of training images, the field's way to report long-tailed accuracy."""

    many: tuple[int, ...]  # more than `many_above` training images
    medium: tuple[int, ...]  # few_below to many_above, both included
    few: tuple[int, ...]  # less than `few_below`
    many_above: int
    few_below: int

    def items(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The three splits as (name, class indices), from head to tail."""
        return ('many', self.many), ('medium', self.medium), ('few', self.few)


@dataclass(frozen=True)
class ClassCounts:
    """Training images per class.

    Attributes:
        counts: Training images per class, index = label.
        names: Class names, of the same length.
        source: Where the counts come from, in words for people.

    Raises:
        InputError: There is no class, a count is negative, or names and counts differ in length.
    """

    counts: tuple[int, ...]
    names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0 or not sum(self.counts):
            raise InputError(
                f'the class counts of {self.source} are empty or negative: give one count of training images per class')
        if len(self.names) != len(self.counts):
            raise InputError(
                f'{self.source} has {len(self.counts)} class counts but {len(self.names)} names: '
                'give one name per class')

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def imbalance_factor(self) -> float:
        """Images of the largest class over those of the smallest class that has any."""
        return max(self.counts) / min(count for count in self.counts if count)

    def tensor(self) -> torch.Tensor:
        """Counts as float64 [C]."""
        return torch.tensor(self.counts, dtype=torch.float64)

    def prior(self) -> torch.Tensor:
        """Share of each class in the training set, float64 [C], summing to 1."""
        return self.tensor() / self.total

    def shot_split(self, many: int = MANY_ABOVE, few: int = FEW_BELOW) -> ShotSplit:
        """Split the classes into many (count > `many`), few (count < `few`) and medium (the rest).

        Thresholds of Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, in the strict
        reading that the later codebases share (exactly 100 or exactly 20 images is medium).

        Raises:
            InputError: `few` lies above `many`.
        """
        if few > many:
            raise InputError(f'the few-shot threshold {few} lies above the many-shot threshold {many}: swap them')
        counts = np.asarray(self.counts)
        return ShotSplit(
            many=tuple(np.flatnonzero(counts > many).tolist()),
            medium=tuple(np.flatnonzero((counts <= many) & (counts >= few)).tolist()),
            few=tuple(np.flatnonzero(counts < few).tolist()),
            many_above=many,
            few_below=few,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints; `from_dict` reads it back."""
        return {'counts': list(self.counts), 'names': list(self.names), 'source': self.source}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> 'ClassCounts':
        """Read what `to_dict` wrote.

        Raises:
            InputError: `data` is not of that form.
        """
        source = data.get('source') if isinstance(data, dict) else None
        return _from_record(data, source or 'a record without a source')

    @classmethod
    def from_targets(
            cls,
            targets: Sequence[int] | np.ndarray,
            names: Sequence[str] | None,
            source: str,
            num_classes: int | None = None,
    ) -> 'ClassCounts':
        """Count the labels of a training set.

        Args:
            targets: One label per training image.
            names: Class names; None names the classes '0', '1', ...
            source: Where the labels come from, in words for people.
            num_classes: Length of the result; None means the number of names, else the largest label plus one.

        Raises:
            InputError: There is no label, or one lies outside the classes.
        """
        labels = np.asarray(targets, dtype=np.int64)
        if not labels.size:
            raise InputError(f'{source} has no images: check the list or folder that it was read from')
        size = num_classes or (len(names) if names is not None else int(labels.max()) + 1)
        if labels.min() < 0 or labels.max() >= size:
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise InputError(
                f'label {wrong} of {source} is out of range for {size} classes: correct the label or the class number')
        counts = tuple(np.bincount(labels, minlength=size).tolist())
        return cls(counts, tuple(names) if names is not None else _default_names(size), source)

    @classmethod
    def from_file(cls, path: str | Path) -> 'ClassCounts':
        """Read counts from a file.

        Known forms are JSON as `{"counts": [...], "names": [...]}` (names may be missing), as a list of counts, as
        `{"0": count, "1": count, ...}` (labels) or `{name: count}` (labels in the order of the file), and a list
        file of `path label` lines, which is counted.

        Raises:
            InputError: The file is missing or of none of these forms.
        """
        path = Path(path)
        source = f"file '{path}'"
        try:
            text = path.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the class counts file '{path}' cannot be read ({_reason(error)}): "
                'give a JSON file of counts or a training list') from error
        if path.suffix == '.json' or text.lstrip()[:1] in ('{', '['):
            return _from_json(text, source)
        return cls.from_targets(read_image_list(path).targets, None, source)


def _from_json(text: str, source: str) -> ClassCounts:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f'{source} is no valid JSON ({error}): give class counts as a list or an object') from error
    if isinstance(data, dict) and not isinstance(data.get('counts'), list):
        data = _from_mapping(data)
    elif not isinstance(data, dict):
        data = {'counts': data}
    return _from_record(data, source)


def _from_record(data: dict[str, Any], source: str) -> ClassCounts:
    """Read `{'counts': [...], 'names': [...]}`, where names may be missing."""
    try:
        counts = _whole_numbers(data['counts'])
        return ClassCounts(counts, tuple(map(str, data.get('names') or _default_names(len(counts)))), source)
    except (KeyError, TypeError) as error:
        raise InputError(
            f'{source} cannot be read as class counts ({error}): give a list of counts, {{"name": count, ...}} or '
            '{"counts": [...], "names": [...]}') from error


def _from_mapping(counts: dict[str, Any]) -> dict[str, Any]:
    """`{label or name: count}` in the form of `ClassCounts.to_dict`; only labels may leave classes out."""
    if not all(name.isdecimal() for name in counts):
        return {'counts': list(counts.values()), 'names': list(counts)}
    by_label = {int(label): count for label, count in counts.items()}
    return {'counts': [by_label.get(label, 0) for label in range(max(by_label, default=-1) + 1)]}


def _whole_numbers(values: Sequence[Any]) -> tuple[int, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
            raise TypeError(f'{value!r} is no whole number')
    return tuple(int(value) for value in values)


def _default_names(num_classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(num_classes)))


def _reason(error: Exception) -> str:
    return getattr(error, 'strerror', None) or str(error)

"""The classes: their names in label order and their training images, measured once and passed on as one value.

Where two sets of classes meet (data and a checkpoint, a file of counts and the data, a teacher and its student) they
are matched by `Classes.match` and nowhere else: by name, and by position only where one side knows no name.
"""
import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbn_timm.data.label_sets import images_per_class, is_label_sets, spread
from nbn_timm.data.lists import MAX_CLASSES, ImageList, read_image_list, too_many
from nbn_timm.errors import InputError, in_words, nearest, quoted
from nbn_timm.files import open_regular

# Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019.
MANY_ABOVE, FEW_BELOW = 100, 20

RENAME = 'rename or remove what is odd, or call classes otherwise with --class-names (FILE, or none)'
_MAX_COUNT = 2**53  # up to here float64 has every whole number


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
class Classes:
    """The classes of a data set or of a network.

    Attributes:
        counts: Training images per class, index = label; None where they are not known. What cannot do without takes
            `train_images`.
        names: Class names in label order; a class of which only the label is known has its number for a name.
        source: Where they come from, in words for people.
        label_sets: An image can be of several of them, or of none.
        images: Training images where `label_sets`, which the counts do not add up to; None where they are not known.

    Raises:
        InputError: There is no class, a count is negative, or names and counts differ in length.
    """

    counts: tuple[int, ...] | None
    names: tuple[str, ...]
    source: str
    label_sets: bool = False
    images: int | None = None

    def __post_init__(self) -> None:
        if self.counts is None:
            if not self.names:
                raise InputError(f'{self.source} has no classes: give one at least')
            return
        if not self.counts or min(self.counts) < 0 or not sum(self.counts):
            raise InputError(
                f'the class counts of {self.source} are empty or negative: give one count of training images per class')
        if len(self.names) != len(self.counts):
            raise InputError(
                f'{self.source} has {len(self.counts)} class counts but {len(self.names)} names: '
                'give one name per class')

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def named(self) -> bool:
        """Whether the classes have names beyond their numbers."""
        return self.names != label_names(len(self.names))

    @property
    def train_images(self) -> tuple[int, ...]:
        """Training images per class.

        Raises:
            InputError: They are not known.
        """
        if self.counts is None:
            raise InputError(f'the training images per class of {self.source} are not known: '
                             'give them with --class-counts FILE')
        return self.counts

    @property
    def total(self) -> int:
        """Training images.

        Raises:
            InputError: They are not known.
        """
        if not self.label_sets:
            return sum(self.train_images)
        if self.images is None:
            raise InputError(f'how many training images {self.source} has is not known, since an image can be of '
                             'several classes: give the training split')
        return self.images

    @property
    def imbalance_factor(self) -> float:
        """Images of the largest class over those of the smallest class that has any."""
        return max(self.train_images) / min(count for count in self.train_images if count)

    def tensor(self) -> torch.Tensor:
        """Training images per class as float64 [C]."""
        return torch.tensor(self.train_images, dtype=torch.float64)

    def prior(self) -> torch.Tensor:
        """Share of each class in the training set, float64 [C], summing to 1 where an image is of one class."""
        return self.tensor() / self.total

    def shot_split(self, many: int = MANY_ABOVE, few: int = FEW_BELOW) -> ShotSplit:
        """Split the classes into many (count > `many`), few (count < `few`) and medium (the rest).

        In the strict reading that the later codebases share: exactly 100 or exactly 20 images is medium.

        Raises:
            InputError: `few` lies above `many`, or the training images are not known.
        """
        if few > many:
            raise InputError(f'the few-shot threshold {few} lies above the many-shot threshold {many}: swap them')
        counts = np.asarray(self.train_images)
        return ShotSplit(
            many=tuple(np.flatnonzero(counts > many).tolist()),
            medium=tuple(np.flatnonzero((counts <= many) & (counts >= few)).tolist()),
            few=tuple(np.flatnonzero(counts < few).tolist()),
            many_above=many,
            few_below=few,
        )

    def match(self, theirs: 'Classes', what: str, here: str | None = None) -> 'Matching':
        """Where another set of classes stands among these.

        Names are compared letter by letter. A name that is the class's own label is none: a class that has no name on
        one side stands where the class of that label stands on the other.

        Args:
            theirs: The other classes; they may be fewer.
            what: Whose they are, in words for sentences, such as "checkpoint 'last.pth.tar'".
            here: Whose these classes are; default `source`.

        Raises:
            InputError: The order differs, and a name occurs twice.
        """
        here = here or self.source
        if self.names == theirs.names:
            return Matching(self, theirs, here, what, tuple(range(self.num_classes)), 0)
        for classes, whose in ((self, here), (theirs, what)):
            if len(set(classes.names)) < classes.num_classes:
                twice = next(name for name in classes.names if classes.names.count(name) > 1)
                raise InputError(f'two classes of {whose} are called {quoted(twice)}, so they cannot be matched by '
                                 f'name with those of {what if classes is self else here}: rename one')
        label_of = {name: label for label, name in enumerate(self.names)}
        labels = [label_of.get(name, -1) for name in theirs.names]
        taken = set(labels)
        by_position = 0
        for label, (name, mine) in enumerate(zip(theirs.names, self.names, strict=False)):
            if labels[label] < 0 and label not in taken and str(label) in (name, mine):
                labels[label] = label
                by_position += 1
        return Matching(self, theirs, here, what, tuple(labels), by_position)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints; `from_dict` reads it back."""
        of_sets = {'label_sets': True, 'images': self.images} if self.label_sets else {}
        return {'counts': None if self.counts is None else list(self.counts), 'names': list(self.names),
                'source': self.source, **of_sets}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> 'Classes':
        """Read what `to_dict` wrote; 'counts' or 'names' may be null or missing, but not both.

        Raises:
            InputError: `data` is not of that form.
        """
        source = data.get('source') if isinstance(data, dict) else None
        return _from_record(data, str(source or 'a record without a source'))

    @classmethod
    def from_targets(
            cls,
            targets: Sequence[int] | np.ndarray,
            names: Sequence[str] | None,
            source: str,
            num_classes: int | None = None,
    ) -> 'Classes':
        """Count the labels of a training set.

        Args:
            targets: One label per training image, or label sets.
            names: Class names; None names the classes '0', '1', ...
            source: Where the labels come from, in words for people.
            num_classes: Length of the result; None means the number of names, else the largest label plus one.

        Raises:
            InputError: There is no label, or one lies outside the classes.
        """
        labels = np.asarray(targets)
        if not labels.size:
            raise InputError(f'{source} has no images: check the list or folder that it was read from')
        if is_label_sets(labels):
            counts = images_per_class(labels).tolist()
            counts += [0] * ((num_classes or 0) - len(counts))
            return cls(tuple(counts), tuple(names) if names is not None else label_names(len(counts)), source, True,
                       len(labels))
        labels = labels.astype(np.int64)
        size = num_classes or (len(names) if names is not None else int(labels.max()) + 1)
        if labels.min() < 0 or labels.max() >= size:
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise InputError(
                f'label {wrong} of {source} is out of range for {size} classes: correct the label or the class number')
        if size > MAX_CLASSES:
            raise InputError(too_many(size - 1, source))
        counts = tuple(np.bincount(labels, minlength=size).tolist())
        return cls(counts, tuple(names) if names is not None else label_names(size), source)

    @classmethod
    def from_file(cls, path: str | Path, known: 'Classes | None' = None) -> 'Classes':
        """Training images per class from a file; see `read_counts`, which also gives what is to be told."""
        return read_counts(path).of(known)[0]


ClassCounts = Classes  # the name of versions in which only classes with counts were known


@dataclass(frozen=True)
class Matching:
    """Where classes (`theirs`) stand among others (`ours`); `Classes.match` makes it.

    Attributes:
        ours, theirs: The two sets of classes.
        here, what: Whose they are, in words.
        labels: For each class of theirs its label in ours, -1 where it is not among them.
        by_position: So many of them were matched by position, because one side has no name for them.
    """

    ours: Classes
    theirs: Classes
    here: str
    what: str
    labels: tuple[int, ...]
    by_position: int

    @property
    def reordered(self) -> bool:
        """Whether a class has another label in ours than in theirs (or none)."""
        return self.labels != tuple(range(len(self.labels)))

    @cached_property
    def only_theirs(self) -> tuple[str, ...]:
        """Names of the classes of theirs that are not among ours."""
        return tuple(name for name, label in zip(self.theirs.names, self.labels, strict=True) if label < 0)

    @cached_property
    def only_ours(self) -> tuple[str, ...]:
        """Names of the classes of ours that are not among theirs."""
        found = set(self.labels)
        return tuple(name for label, name in enumerate(self.ours.names) if label not in found)

    @property
    def notes(self) -> list[str]:
        """What a person should know: a sentence if classes were matched by position."""
        if not self.by_position:
            return []
        number = self.theirs.num_classes
        how_many = 'the classes' if self.by_position == number else f'{self.by_position:,} of {number:,} classes'
        return [f'{how_many} of {self.what} are matched with those of {self.here} by position, because one side has '
                'only numbers for them']

    def require_theirs(self) -> None:
        """Refuse a class of theirs that is not among ours.

        Raises:
            InputError: There is one.
        """
        if self.only_theirs:
            raise InputError(_odd(self.only_theirs, self.what, self.here, self.only_ours))

    def require_same(self, remedy: str = RENAME) -> None:
        """Refuse a class that is on one side only.

        Args:
            remedy: For a class that theirs lacks.

        Raises:
            InputError: There is one.
        """
        self.require_theirs()
        if self.only_ours:
            raise InputError(_odd(self.only_ours, self.here, self.what, self.only_theirs, remedy))

    def relabel(self, targets: np.ndarray) -> np.ndarray:
        """Labels of theirs as labels of ours, int64 [N], or label sets uint8 [N, C].

        Raises:
            InputError: A label is of a class that is not among ours.
        """
        if is_label_sets(targets):
            if targets[:, np.asarray(self.labels) < 0].any():
                self.require_theirs()
            return spread(targets, self.labels, self.ours.num_classes)
        labels = np.asarray(self.labels, dtype=np.int64)[targets]
        if labels.size and labels.min() < 0:
            self.require_theirs()
        return labels


def label_names(num_classes: int) -> tuple[str, ...]:
    """What classes are called that have no names: '0', '1', ..."""
    return tuple(map(str, range(num_classes)))


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ by capitals, blanks, dashes and underscores only, as of one class in two folders."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r'[\s_-]+', '', unicodedata.normalize('NFKC', name)).casefold(), []).append(name)
    return [group for key, group in groups.items() if key and len(group) > 1]


@dataclass(frozen=True)
class GivenCounts:
    """Training images per class as a file gives them; which is which is clear only beside the known classes.

    Attributes:
        source: The file, in words.
        by_name: Counts by name, in the order of the file; None where it has no names.
        by_label: Counts by label; None where it has only names. Keys in digits may be names or labels.
        partial_names, partial_labels: A class that is missing has no images; else each must be there.
    """

    source: str
    by_name: Mapping[str, int] | None = None
    by_label: Mapping[int, int] | None = None
    partial_names: bool = False
    partial_labels: bool = False

    def renamed(self, called: Mapping[str, str]) -> 'GivenCounts':
        """The counts of classes that are called otherwise."""
        if self.by_name is None:
            return self
        return replace(self, by_name={called.get(name, name): count for name, count in self.by_name.items()})

    def of(self, known: Classes | None) -> tuple[Classes, list[str]]:
        """The counts in the order of the known classes, and what a person should be told of it.

        Args:
            known: The classes of the data or of the network; None if nothing is known of them.

        Raises:
            InputError: The file has classes that are not known, or lacks some.
        """
        classes, notes = self._of(known)
        if known is not None and known.label_sets:
            classes = replace(classes, label_sets=True, images=known.images)
        return classes, notes

    def _of(self, known: Classes | None) -> tuple[Classes, list[str]]:
        if self.by_label is None:
            assert self.by_name is not None
            if known is not None:
                return self._match(known, self.by_name)
            return Classes(tuple(self.by_name.values()), tuple(self.by_name), self.source), [
                f'the classes have no names but those of {self.source}, so they are numbered in its order']
        if known is not None and known.named and self.by_name and not set(self.by_name).isdisjoint(known.names):
            return self._match(known, self.by_name)
        return self._number(known, self.by_label)

    def _match(self, known: Classes, by_name: Mapping[str, int]) -> tuple[Classes, list[str]]:
        matching = known.match(Classes(None, tuple(by_name), self.source), self.source)
        if self.partial_names:
            matching.require_theirs()
        else:
            matching.require_same('add what is missing, with its number')
        counts, names = [0] * known.num_classes, list(known.names)
        for label, (name, count) in zip(matching.labels, by_name.items(), strict=True):
            counts[label] = count
            if not known.named:
                names[label] = name
        return Classes(tuple(counts), tuple(names), self.source), matching.notes

    def _number(self, known: Classes | None, by_label: Mapping[int, int]) -> tuple[Classes, list[str]]:
        largest = max(by_label)
        if largest >= MAX_CLASSES:
            raise InputError(too_many(largest, self.source))
        size = known.num_classes if known else largest + 1
        if largest >= size or (not self.partial_labels and largest + 1 < size):
            assert known is not None
            raise InputError(f'{self.source} counts {largest + 1} classes but {known.source} has {size}: '
                             'give the counts of these classes')
        counts = tuple(by_label.get(label, 0) for label in range(size))
        notes = [f'{self.source} gives training images by label, which are matched with the classes of {known.source} '
                 'by position'] if known and known.named else []
        return Classes(counts, known.names if known else label_names(size), self.source), notes


def read_counts(path: str | Path, shares: bool = False) -> GivenCounts:
    """Read training images per class from a file.

    Known forms are JSON as `{"counts": [...], "names": [...]}` (names may be missing), as a list of counts, as
    `{"0": count, "1": count, ...}` (labels, of which some may be missing) or `{name: count}` in any order, and a list
    file of `path label` lines, which is counted.

    Args:
        path: The file.
        shares: The numbers may be fractions, of which the proportions matter alone. They come as whole numbers. A
            table of `name,number` lines is known as well, perhaps below a line of headings.

    Raises:
        InputError: The file is missing or of none of these forms.
    """
    path = Path(path)
    source = f'file {quoted(str(path))}'
    try:
        with open_regular(path) as file:
            content = file.read()
        if path.suffix == '.json' or content.lstrip(b'\xef\xbb\xbf \t\r\n')[:1] in (b'{', b'['):
            return _from_json(content.decode('utf-8-sig'), source, shares)
        table = _read_table(content.decode('utf-8-sig'), source) if shares else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'the class counts {source} cannot be read ({getattr(error, "strerror", None) or error}): '
            'give a JSON file of counts or a training list') from error
    if table is not None:
        return _from_json(json.dumps(table), source, shares)
    try:
        return _from_list(read_image_list(path), source)
    except InputError as error:
        raise InputError(f'{error}; or give a number per class, as JSON {{"name": number, ...}} or in a table of '
                         '`name,number` lines' if shares else str(error)) from error


def _read_table(text: str, source: str) -> dict[str, float] | None:
    """Numbers by name from lines of `name,number`; None if it is no such table."""
    rows = [row for row in csv.reader(text.splitlines()) if row]
    try:
        if rows and len(rows[0]) == 2 and not _is_number(rows[0][1]):
            rows = rows[1:]
        numbers = [(name.strip(), float(number)) for name, number in rows]
    except (ValueError, csv.Error):
        return None
    return _unique(numbers, source) if numbers else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_json(text: str, source: str, shares: bool) -> GivenCounts:
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, source))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        reason = 'it is nested too deeply' if isinstance(error, RecursionError) else in_words(error)
        raise InputError(f'{source} is no valid JSON ({reason}): give class counts as a list or an object') from error
    if shares:
        data = _whole_shares(data)
    if isinstance(data, dict) and not isinstance(data.get('counts'), list):
        data, names = {'counts': list(data.values()), 'names': list(data)}, set(data)
        classes = _from_record(data, source)
        labels = all(_LABEL.fullmatch(name) for name in names)
        by_name = dict(zip(classes.names, classes.train_images, strict=True))
        return GivenCounts(source, by_name, {int(name): count for name, count in by_name.items()} if labels else None,
                           partial_labels=True)
    classes = _from_record(data if isinstance(data, dict) else {'counts': data}, source)
    if not classes.named:
        return GivenCounts(source, by_label=dict(enumerate(classes.train_images)))
    by_name = _unique(list(zip(classes.names, classes.train_images, strict=True)), source)
    return GivenCounts(source, by_name)


def _whole_shares(data: Any) -> Any:
    """What a file of shares holds, fractions in it as whole numbers of the same proportions."""
    if isinstance(data, dict) and isinstance(data.get('counts'), list):
        return {**data, 'counts': _whole_shares(data['counts'])}
    values = list(data.values()) if isinstance(data, dict) else data
    numbers = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT for value in values)
    if not numbers or not any(values) or all(value == int(value) for value in values):
        return data
    whole = [max(round(value / max(values) * _SHARES), 1) if value else 0 for value in values]
    return dict(zip(data, whole, strict=True)) if isinstance(data, dict) else whole


def _from_list(rows: ImageList, source: str) -> GivenCounts:
    """The images of a training list, counted by label and, where its folders tell the classes apart, by name."""
    labels, counts = (array.tolist() for array in np.unique(rows.targets, return_counts=True))
    folders = rows.folder_names()
    by_name = {folders[label]: count for label, count in zip(labels, counts, strict=True)} if folders else None
    return GivenCounts(source, by_name, dict(zip(labels, counts, strict=True)), partial_names=True, partial_labels=True)


def _from_record(data: Any, source: str) -> Classes:
    """Read `{'counts': [...], 'names': [...]}`, of which one may be null or missing."""
    try:
        counts, names = data.get('counts'), data.get('names')
        if counts is None and not names:
            raise KeyError('counts')
        if isinstance(names, str):
            raise TypeError('names are no list')
        strange = [type(name).__name__ for name in names or () if not isinstance(name, str | int | float)]
        if strange:
            raise TypeError(f'a {strange[0]} is no name of a class')
        numbers = None if counts is None else _whole_numbers(counts)
        images = data.get('images')
        of_sets = data.get('label_sets') is True
        return Classes(numbers, tuple(map(str, names or label_names(len(numbers or ())))), source, of_sets,
                       _whole_numbers([images])[0] if of_sets and images is not None else None)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f'{source} cannot be read as class counts ({in_words(error)}): give a list of counts, '
            '{"name": count, ...} or {"counts": [...], "names": [...]}') from error


_SHARES = 10 ** 12  # the largest of shares as a whole number
_LABEL = re.compile('0|[1-9][0-9]{0,999}')


def _unique(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in data if names.count(name) > 1)
        raise InputError(f'{source} has {quoted(twice)} twice: give each class once')
    return data


def _whole_numbers(values: Sequence[Any]) -> tuple[int, ...]:
    if isinstance(values, str | bytes | Mapping):
        raise TypeError('counts are no list of numbers')
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not (
                abs(value) <= _MAX_COUNT and value == int(value)):
            raise TypeError(f'{str(value)[:40]!r} is no number of images')
    return tuple(int(value) for value in values)


def _odd(odd: Sequence[str], whose: str, among: str, others: Sequence[str], remedy: str = RENAME) -> str:
    """The sentence about classes that are on one side only."""
    shown = ', '.join(map(quoted, odd[:3])) + (f' and {len(odd) - 3:,} more' if len(odd) > 3 else '')
    subject = f'class {shown} of {whose} is' if len(odd) == 1 else f'classes {shown} of {whose} are'
    return f'{subject} not among the classes of {among}: {remedy}{nearest(odd[0], others)}'

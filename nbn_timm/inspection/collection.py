"""What is looked at: the pictures of all splits with their classes, read so that every fault is found."""
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from nbn_timm.data.bands import bands_of, require_readers
from nbn_timm.data.classes import label_names
from nbn_timm.data.dataset import ImageSamples, LabelledImages, picture
from nbn_timm.data.folders import class_pictures, find_split_folder, is_plain
from nbn_timm.data.label_sets import images_per_class, is_label_sets, labels_of
from nbn_timm.data.pictures import mode_of, natural_order
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import PARTS, SHOT_LIMITS, Source
from nbn_timm.data.val_split import SplitFile, picture_key
from nbn_timm.datasets import create_splits, find_dataset, names_of
from nbn_timm.errors import InputError

ALL = 'all'  # the one split of a folder that has no splits
BETWEEN, NO_CLASS = '; ', 'no class'  # names of the classes of one picture, and what stands for none


@dataclass
class Collection:
    """Pictures by split, and what their places alone tell.

    Attributes:
        what: The collection, in words.
        splits: Pictures by split, labelled by position in `names`; their targets are labels or label sets.
        names: All classes, those of the training split first.
        trained: How many of them the training split names; the others are only in other splits.
        unlabelled: Splits whose pictures have no labels.
        root: Folder that names of pictures are told below.
        notes: What was left out and the like, one sentence each.
        shot_limits: Of many and few.
        folders: Of the classes, where a file names these otherwise.
    """

    what: str
    splits: dict[str, LabelledImages]
    names: tuple[str, ...]
    trained: int
    unlabelled: tuple[str, ...] = ()
    root: str = ''
    notes: list[str] = field(default_factory=list)
    shot_limits: tuple[int, int] = SHOT_LIMITS
    folders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = [len(images) for images in self.splits.values()]
        self.parts = np.repeat(np.arange(len(sizes)), sizes)  # position of the split of each picture
        targets = [images.targets for images in self.splits.values()]
        self.targets = np.concatenate(targets) if sizes else np.zeros(0, int)
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def label_sets(self) -> bool:
        """Whether a picture can be of several classes."""
        return is_label_sets(self.targets)

    @property
    def counted(self) -> str:
        """The split whose pictures are counted as training pictures."""
        return ALL if ALL in self.splits else 'train'

    def part(self, index: int) -> str:
        """Name of the split of a picture."""
        return list(self.splits)[self.parts[index]]

    def class_name(self, index: int) -> str:
        """Name of the class of a picture; of several classes all names, of none `NO_CLASS`."""
        return BETWEEN.join(self.names[label] for label in labels_of(self.targets[index])) or NO_CLASS

    def found_as(self, label: int) -> str:
        """A class for whoever has to find it: its name, with its folder where that is called otherwise."""
        name, folder = self.names[label], self.folders[label] if self.folders else None
        return name if folder in (None, name) or name.endswith(f'({folder})') else f'{name} ({folder})'

    def path(self, index: int) -> str | None:
        """File of a picture; None in memory."""
        images = self.splits[self.part(index)]
        return images.path(index - self._start(index)) if isinstance(images, ImageSamples) else None

    def name(self, index: int) -> str:
        """A picture for people: its path below the collection's folder, or its number in its split."""
        path = self.path(index)
        if path is None:
            return f'{self.part(index)} picture {index - self._start(index)}'
        return picture_key(path, self.root)

    def picture(self, index: int) -> Image.Image:
        """The picture itself, for people.

        Raises:
            InputError: It cannot be read.
        """
        return picture(self.splits[self.part(index)], index - self._start(index))

    def read_as(self, channels: int) -> None:
        """Have pictures read as ones of so many channels, as a training on these would read them.

        Raises:
            InputError: They are in memory, and have others; or files of so many channels cannot be read here.
        """
        mode = mode_of(channels)
        if bands_of(mode) is not None:
            if not all(isinstance(images, ImageSamples) for images in self.splits.values()):
                raise InputError(f'the pictures of {self.what} have three channels: leave out --in-chans {channels}')
            require_readers(path for index in range(len(self)) if (path := self.path(index)) is not None)
        for images in self.splits.values():
            images.mode = mode

    def counts(self, part: str) -> np.ndarray:
        """Pictures per class of a split, int64 [C]."""
        return images_per_class(self.splits[part].targets, len(self.names))

    def _start(self, index: int) -> int:
        return int(self._starts[self.parts[index]])


def collect(settings: DataSettings) -> Collection:
    """Find the pictures that these settings name.

    Class folders are read with all their faults. What else cannot be read is refused with the first one, as training
    does.

    Raises:
        InputError: There is nothing to look at, or it cannot be read.
    """
    if settings.dataset == 'folder':
        return _folders(settings)
    dataset = find_dataset(settings.dataset)
    data = replace(settings, val_fraction=None, val_groups=None, group_column=None, class_counts=None)
    splits = create_splits(data, _parts(data), label_sets=True)
    found = {part: images for part in PARTS if (images := getattr(splits, part)) is not None}
    foreign = next((part for part, images in found.items() if not isinstance(images, LabelledImages)), None)
    if foreign is not None:
        raise InputError(f'the pictures of {settings.dataset} are read by timm, which does not say where they lie: '
                         'give them as class folders, a list or a CSV file')
    if not found:
        raise InputError(f'the dataset {settings.dataset} has no pictures here: give a folder, or a list of them')
    names = splits.classes.names if splits.classes else label_names(splits.num_classes or 1)
    known = ' no validation split', 'without a picture in the'  # which are findings
    notes = [note for note in splits.notes if not any(told in note for told in known)]
    root = next((images.root for images in found.values() if isinstance(images, ImageSamples)), '')
    return Collection(f'{settings.dataset} ({settings.data_dir or "in memory"})', found, names, len(names),
                      root=root or settings.data_dir or '', notes=notes, shot_limits=dataset.shot_limits)


def _parts(settings: DataSettings) -> tuple[str, ...]:
    """The splits that can be read; of lists only those that were given."""
    given = {**settings.lists, **settings.csvs}
    if not given or settings.train_csv or settings.split_file:  # a training file may hold all splits
        return PARTS
    return tuple(part for part in PARTS if part in given)


def _folders(settings: DataSettings) -> Collection:
    """Class folders, in folders of splits or without these."""
    if not settings.data_dir or not Path(settings.data_dir).is_dir():
        raise InputError(f"the folder '{settings.data_dir}' does not exist: correct its name" if settings.data_dir else
                         'there is nothing to look at: give a folder, or --dataset')
    data_dir = Path(settings.data_dir)
    folders = {part: folder for part in PARTS if (folder := find_split_folder(data_dir, part)) is not None}
    if not folders and is_plain(data_dir):
        folders = {ALL: data_dir}
    if not folders:
        raise InputError(f"'{data_dir}' has neither class folders with pictures nor folders train, val or test: put "
                         'the pictures as train/<class>/<picture>')
    found: dict[str, Mapping[str, list[str]]] = {}
    names: dict[str, None] = {}
    unlabelled, notes, trained = [], [], 0
    for part, folder in folders.items():
        there = class_pictures(folder, tuple(names) or None)
        notes += there.notes
        if there.unlabelled:
            unlabelled.append(part)
            continue
        found[part] = there.by_class
        names.update(dict.fromkeys(there.by_class))
        trained = trained or len(names)
    label_of = {name: label for label, name in enumerate(names)}
    splits: dict[str, LabelledImages] = {}
    for part, by_class in found.items():
        pictures = sorted(((path, label_of[name]) for name, paths in by_class.items() for path in paths),
                          key=lambda picture: natural_order(picture[0]))
        splits[part] = ImageSamples([path for path, _ in pictures], [label for _, label in pictures])
    if settings.split_file and 'train' in splits:
        divided = Source(dict(splits))
        SplitFile.read(settings.split_file, str(data_dir)).divide(divided, str(data_dir))
        splits = {part: divided.datasets[part] for part in PARTS if part in divided.datasets}
        notes += divided.notes
    codes = tuple(names)
    file = names_of(settings, codes)
    if file is None:
        return Collection(str(data_dir), splits, codes, trained, tuple(unlabelled), str(data_dir), notes)
    called = file.required(codes)
    return Collection(str(data_dir), splits, tuple(called.values()), trained, tuple(unlabelled), str(data_dir),
                      [*notes, file.note(called)], folders=codes)

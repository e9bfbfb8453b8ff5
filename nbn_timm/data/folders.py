"""Class folders: `<split>/<class>/...`, with the pictures of a class anywhere in and below its folder."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.pictures import (
    HIDDEN,
    LINK_BACK,
    PictureSearch,
    is_hidden,
    is_picture,
    natural_order,
    sorted_entries,
)
from nbn_timm.errors import InputError, nearest, quoted
from nbn_timm.files import open_regular

SPLIT_FOLDERS = {'train': ('train',), 'val': ('val', 'valid', 'validation', 'dev'), 'test': ('test',)}

# As Tiny-ImageNet's archive has them: pictures of all classes in one folder, which a file of names labels.
_ONE_HEAP, _ANNOTATIONS = 'images', 'val_annotations.txt'


@dataclass(frozen=True)
class FolderSplit:
    """A split that was read from class folders.

    Attributes:
        samples: The pictures; None if the split has pictures and no labels for them.
        names: Class names in label order: those that were given, else those of the folders.
        notes: What a person should know, one sentence each.
    """

    samples: ImageSamples | None
    names: tuple[str, ...]
    notes: tuple[str, ...]


def find_split_folder(data_dir: Path, split: str) -> Path | None:
    """Folder of a split ('train', 'val' or 'test'), or None.

    Raises:
        InputError: There are two.
    """
    found = [data_dir / name for name in SPLIT_FOLDERS[split] if (data_dir / name).is_dir()]
    if len(found) > 1:
        there = ' and '.join(quoted(folder.name) for folder in found)
        raise InputError(f'{quoted(str(data_dir))} has the folders {there}, which mean the same split: '
                         'keep one of these names')
    return found[0] if found else None


def read_class_folders(folder: Path, names: Sequence[str] | None = None, training: bool = False) -> FolderSplit:
    """Read a split.

    The folders directly below that of the split are the classes, labelled in natural order of their names ('9' before
    '10'), and where that says nothing ('7', '07') in the order of their letters; so the order is the same everywhere.
    What `PictureSearch` leaves out, and pictures beside the class folders, are told in a note. Tiny-ImageNet's
    `val/images` is labelled by the `val_annotations.txt` beside it.

    Args:
        folder: Folder of the split.
        names: Classes of the training split, whose labels this split shares; None takes the folders found.
        training: The split is to be trained on, so it must have two classes at least and pictures of each.

    Raises:
        InputError: There are no pictures in class folders, a class that the training split does not have, or two
            classes that are the same folder; see also `training`.
    """
    there = class_pictures(folder, names)
    notes = there.notes
    if there.unlabelled or not any(there.by_class.values()):
        if names is None or not there.unlabelled:
            raise InputError(f'folder {quoted(str(folder))} has no images in class folders'
                             + (f', all are in one folder {_ONE_HEAP!r}' if there.heap else '')
                             + f': put them as {folder.name}/<class>/<image>' + _said(notes))
        notes.append(f'the pictures of {quoted(str(folder))} have no labels, so they are not scored')
        return FolderSplit(None, tuple(names), tuple(notes))
    if training:
        _refuse_untrainable(folder, there.by_class, notes)
    return _labelled(folder, there.by_class, names or tuple(there.by_class), notes)


@dataclass(frozen=True)
class ClassPictures:
    """What lies in the folder of a split.

    Attributes:
        by_class: Files by class, the classes in natural order; a class may have none.
        notes: What was left out, one sentence each.
        unlabelled: There are pictures, of which nothing tells the class.
        heap: All of these are in one folder 'images'.
    """

    by_class: dict[str, list[str]]
    notes: list[str]
    unlabelled: bool = False
    heap: bool = False


def class_pictures(folder: Path, names: Sequence[str] | None = None) -> ClassPictures:
    """Find the pictures of a split, and refuse nothing that a person may be told of; see `read_class_folders`.

    Args:
        folder: Folder of the split.
        names: Classes of the training split.

    Raises:
        InputError: A folder or the file of labels cannot be read, or two classes are the same folder.
    """
    search = PictureSearch(str(folder))
    classes = _class_folders(folder, search)
    found = dict(zip(classes, search.below(list(classes.values())), strict=True))
    heap = [name for name in found if found[name]] == [_ONE_HEAP] and _ONE_HEAP not in (names or ())
    notes = search.left_out.notes(quoted(str(folder)))
    if heap and (folder / _ANNOTATIONS).is_file():
        return _annotated(folder, found[_ONE_HEAP], notes, names)
    alone = search.left_out.number[_STRAY] > 0 and not any(found.values())
    return ClassPictures(found, notes, heap or alone, heap)


def is_plain(data_dir: Path) -> bool:
    """Whether a folder has class folders in place of splits: no folder of a split, and pictures in all of its folders.

    Pictures that lie deeper only may be those of splits by other names, so they do not make a folder a class.
    """
    if any((data_dir / name).is_dir() for names in SPLIT_FOLDERS.values() for name in names):
        return False
    folders = [entry.path for entry in sorted_entries(str(data_dir)) if entry.is_dir() and not is_hidden(entry.name)]
    return len(folders) > 1 and all(
        any(is_picture(entry.name) for entry in sorted_entries(folder)) for folder in folders)


_STRAY = 'picture{s} beside the class folders'


def _class_folders(folder: Path, search: PictureSearch) -> dict[str, str]:
    """The class folders by name, in label order."""
    classes: dict[str, str] = {}
    named: dict[str, str] = {}  # by real path
    top = os.path.realpath(folder)
    for entry in sorted_entries(str(folder)):
        if is_hidden(entry.name):
            search.left_out.add(HIDDEN, entry.name)
        elif os.path.isdir(entry.path):
            real = os.path.realpath(entry.path)
            if os.path.join(top, '').startswith(os.path.join(real, '')):
                search.left_out.add(LINK_BACK, entry.name)
            elif named.setdefault(real, entry.name) != entry.name:
                raise InputError(f'the class folders {quoted(named[real])} and {quoted(entry.name)} of '
                                 f'{quoted(str(folder))} are one folder by a link: remove one of them')
            else:
                classes[entry.name] = entry.path
        elif is_picture(entry.name):
            search.left_out.add(_STRAY, entry.name)
        elif entry.name != _ANNOTATIONS:
            search.left_out.add_file(entry.name)
    return classes


def _refuse_untrainable(folder: Path, found: dict[str, list[str]], notes: list[str]) -> None:
    """Refuse a class without pictures, and a single class, on which any network is right."""
    empty = next((name for name in found if not found[name]), None)
    if empty is not None:
        raise InputError(f'class folder {quoted(empty)} of {quoted(str(folder))} has no pictures: add some in a format '
                         f'that Pillow reads, or remove the folder{_said(notes)}')
    if len(found) == 1:
        raise InputError(f'folder {quoted(str(folder))} has one class folder only, {quoted(next(iter(found)))}: '
                         f'put the pictures of two classes or more as {folder.name}/<class>/<image>')


def _said(notes: Sequence[str]) -> str:
    return f' ({"; ".join(notes)})' if notes else ''


def _labelled(folder: Path, by_class: dict[str, list[str]], names: Sequence[str], notes: list[str]) -> FolderSplit:
    """The split of pictures by class name, in natural order of the paths."""
    label_of = {name: label for label, name in enumerate(names)}
    strange = next((name for name in by_class if by_class[name] and name not in label_of), None)
    if strange is not None:
        raise InputError(
            f'class {quoted(strange)} of {quoted(str(folder))} is not among the {len(names)} classes of the training '
            f'split: rename or remove it{nearest(strange, names)}')
    found = sorted(((path, name) for name in by_class for path in by_class[name]),
                   key=lambda picture: natural_order(picture[0]))
    samples = ImageSamples([path for path, _ in found], [label_of[name] for _, name in found])
    return FolderSplit(samples, tuple(names), tuple(notes))


def _annotated(
        folder: Path,
        pictures: list[str],
        notes: list[str],
        names: Sequence[str] | None,
) -> ClassPictures:
    """Pictures in one folder that are labelled by lines of name, class and a box; those of other classes are left out.

    A part of the training classes is taken by removing folders, and nobody cuts the archive's own file of labels to it.
    """
    annotations = folder / _ANNOTATIONS
    what = f'file {quoted(str(annotations))}'
    try:
        with open_regular(annotations) as file:
            rows = [line.split() for line in file.read().decode('utf-8', errors='surrogateescape').splitlines()]
    except OSError as error:
        raise InputError(f'{what} cannot be read ({error.strerror}): correct its permissions') from error
    class_of = {row[0]: row[1] for row in rows if len(row) > 1}
    path_of = {os.path.basename(path): path for path in pictures}
    known = None if names is None else set(names)
    foreign = {} if known is None else {name: of for name, of in class_of.items() if of not in known}
    if 0 < len(foreign) < len(class_of):
        classes = len(set(foreign.values()))
        class_of = {name: class_of[name] for name in class_of if name not in foreign}
        notes.append(f'{len(foreign):,} pictures of {quoted(str(folder))} are left out: they are of {classes:,} '
                     f'class{"es" * (classes != 1)} that the training split does not have')
    missing = next((name for name in class_of if name not in path_of), None)
    if missing is not None:
        raise InputError(f'{what} labels {quoted(missing)}, which is not in folder {_ONE_HEAP!r} beside it: '
                         'unpack the archive again')
    if unlabelled := len(path_of.keys() - class_of.keys() - foreign.keys()):
        notes.append(f'pictures of {quoted(str(folder))} that are not in {_ANNOTATIONS} are left out: {unlabelled:,}')
    if not class_of:
        raise InputError(f'{what} labels no picture: unpack the archive again')
    by_class: dict[str, list[str]] = {name: [] for name in sorted(set(class_of.values()), key=natural_order)}
    for name, class_name in class_of.items():
        by_class[class_name].append(path_of[name])
    return ClassPictures(by_class, notes)

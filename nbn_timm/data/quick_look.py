"""What is wrong with the data as far as it shows without reading a picture: a line or two before a training."""
import os
from collections.abc import Callable

from nbn_timm.data.classes import look_alikes
from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.grouping import same_files
from nbn_timm.data.label_sets import labels_of
from nbn_timm.data.splits import PARTS, Splits
from nbn_timm.errors import quoted

COMPARED_FILES = 20_000  # of more, no contents are compared: their sizes alone would take long on a network disk
_SHOW_ALL = 'nbn-check shows all'


def quick_look(splits: Splits) -> list[str]:
    """Class names that are nearly equal, pictures in two splits or under two classes; one sentence each.

    Paths are compared always, contents (by size, then by bytes) up to `COMPARED_FILES` files.
    """
    names = splits.classes.names if splits.classes is not None else ()
    notes = [f'the classes {" and ".join(map(quoted, group))} differ by capitals, blanks and dashes only: put them '
             'together if they are one' for group in look_alikes(names)[:1]]
    files = {part: images for part in PARTS if isinstance(images := getattr(splits, part), ImageSamples)}
    found = _same_paths(files)
    if not found and sum(map(len, files.values())) <= COMPARED_FILES:
        found = _same_contents(files, 'with different labels' if splits.label_sets else 'under two classes')
    return notes + found


def _same_paths(files: dict[str, ImageSamples]) -> list[str]:
    """Whether the same files are in two splits."""
    train = files.get('train')
    notes = []
    for part, images in files.items():
        if train is None or part == 'train' or images.root != train.root:
            continue
        there = set(images.stored_paths())
        if both := [path for path in train.stored_paths() if path in there]:
            notes.append(f'files in train and {part} alike: {len(both):,}, such as {quoted(os.fsdecode(both[0]))}, so '
                         f'the accuracy will be too high ({_SHOW_ALL})')
    return notes


def _same_contents(files: dict[str, ImageSamples], two_classes: str) -> list[str]:
    """Whether files of the same bytes are in two splits, or under two classes, which is told in these words."""
    where = [(part, index) for part, images in files.items() for index in range(len(images))]
    labels = [labels_of(files[part].targets[index]) for part, index in where]
    paths = [files[part].path(index) for part, index in where]
    groups = [group for group in same_files(paths) if len({paths[position] for position in group}) > 1]
    notes = []
    kinds: list[tuple[Callable[[int], object], str, str]] = [
        (lambda position: where[position][0], 'in two splits', ', so accuracies will be too high'),
        (lambda position: labels[position], two_classes, '')]
    for differing, what, so in kinds:
        found = [group for group in groups if len({differing(position) for position in group}) > 1]
        if found:
            first = found[0]
            other = next(position for position in first if differing(position) != differing(first[0]))
            times = 'once' if len(found) == 1 else f'{len(found):,} times'
            notes.append(f'the same picture {what}: {times}, such as {quoted(paths[first[0]])} = '
                         f'{quoted(paths[other])}{so} ({_SHOW_ALL})')
    return notes

"""Whether all entries of an annotation file can be used, found out before anything is trained."""
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from nbn_timm.errors import InputError, one_line, quoted

BANDS = {'r': 'rare', 'c': 'common', 'f': 'frequent'}
FARTHEST = 100_000  # pixels from the corner of a picture; polygons far beyond any picture take all memory
_LARGEST_ID = 2 ** 63 - 1  # that the evaluation can hold
_LONGEST_VALUE = 60  # letters of a wrong value that a sentence repeats
_SINGULAR = {'categories': 'category', 'images': 'image', 'annotations': 'annotation'}
_WHOLE = 'give a whole number from 0 on'

Entry = Mapping[str, Any]


def check_annotations(path: Path, content: Mapping[str, Any], masks: bool) -> None:
    """Look at each category, image and annotation of a file.

    Args:
        path: Of the file, for the sentence.
        content: With a list of each of the three.
        masks: The annotations must have masks.

    Raises:
        InputError: An entry is damaged, is there twice, or contradicts another.
    """
    def image_fault(image: Entry) -> str | None:
        return _size_fault(image) or _file_fault(image) or _searched_fault(image, categories)

    def annotation_fault(one: Entry) -> str | None:
        return (_place_fault(one, images, categories) or _crowd_fault(one)
                or _box_fault(one, images[one['image_id']])
                or (_mask_fault(one, images[one['image_id']]) if masks else None))

    categories = _by_id(path, content, 'categories', _category_fault)
    images = _by_id(path, content, 'images', image_fault)
    _by_id(path, content, 'annotations', annotation_fault)
    _check_all_or_none(path, content, 'categories', 'frequency')
    _check_all_or_none(path, content, 'images', 'neg_category_ids')


def refusal(path: Path, kind: str, number: int, entry: Any, fault: str) -> InputError:
    """The error about an entry.

    Args:
        path: Of the file.
        kind: 'categories', 'images' or 'annotations'.
        number: Of the entry in its list, from 0 on, which names it if it has no id.
        entry: It.
        fault: What it has or is, and the remedy.
    """
    named = isinstance(entry, Mapping) and _is_id(entry.get('id'))
    name = f'{_SINGULAR[kind]} {entry["id"]}' if named else f'entry {number + 1} of the {kind}'
    return InputError(f'{name} in {quoted(str(path))} {fault}')


def _by_id(path: Path, content: Mapping[str, Any], kind: str, fault_of: Callable[[Entry], str | None]
           ) -> dict[int, Entry]:
    """The entries of a list by their ids, each of which has been looked at."""
    found: dict[int, Entry] = {}
    for number, entry in enumerate(content[kind]):
        fault = _id_fault(entry, found) or fault_of(entry)
        if fault:
            raise refusal(path, kind, number, entry, fault)
        found[entry['id']] = entry
    return found


def _check_all_or_none(path: Path, content: Mapping[str, Any], kind: str, key: str) -> None:
    having = [key in entry for entry in content[kind]]
    if any(having) and not all(having):
        number = having.index(False)
        raise refusal(path, kind, number, content[kind][number],
                      f'has no {key}, and others have: give it to all or to none')


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_id(value: Any) -> bool:
    return _is_whole(value, 0, _LARGEST_ID)


def _is_coordinate(value: Any) -> bool:
    """Whether a value is a number of pixels; NaN and infinity are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -FARTHEST <= value <= FARTHEST


def _shown(value: Any) -> str:
    """A value as it is in the file, cut short."""
    text = one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST_VALUE else f'{text[:_LONGEST_VALUE]}...'


def _has(entry: Entry, key: str) -> str:
    """What an entry has under a key, in words."""
    return f'has the {key} {_shown(entry[key])}' if key in entry else f'has no {key}'


def _id_fault(entry: Any, before: Collection[int]) -> str | None:
    if not isinstance(entry, Mapping):
        return f'is {_shown(entry)} and no object: correct it or take it out'
    if not _is_id(entry.get('id')):
        return f'{_has(entry, "id")}: {_WHOLE}'
    return 'is there twice: give each an id of its own' if entry['id'] in before else None


def _category_fault(category: Entry) -> str | None:
    if not isinstance(category.get('name', ''), str):
        return f'{_has(category, "name")}: give a word'
    if 'frequency' in category and category['frequency'] not in list(BANDS):
        return f"{_has(category, 'frequency')}: give 'r', 'c' or 'f', or take it out of all to have it counted"
    return None


def _size_fault(image: Entry) -> str | None:
    for key in ('width', 'height'):
        if not _is_whole(image.get(key), 1, FARTHEST):
            return f'{_has(image, key)}: give the pixels, a whole number from 1 to {FARTHEST:,}'
    return None


def _file_fault(image: Entry) -> str | None:
    key = 'file_name' if image.get('file_name') or 'coco_url' not in image else 'coco_url'
    value = image.get(key)
    return None if isinstance(value, str) and value else f'{_has(image, key)}: give the file below --image-dir'


def _searched_fault(image: Entry, categories: Collection[int]) -> str | None:
    for key in ('neg_category_ids', 'not_exhaustive_category_ids'):
        ids = image.get(key, [])
        if not isinstance(ids, list) or not all(map(_is_id, ids)):
            return f'{_has(image, key)}: give a list of category ids'
        if unknown := set(ids).difference(categories):
            return f'names category {min(unknown)} in its {key}, which the file lacks: take a complete file'
    return None


def _place_fault(one: Entry, images: Collection[int], categories: Collection[int]) -> str | None:
    for key, known in (('image_id', images), ('category_id', categories)):
        if not _is_id(one.get(key)):
            return f'{_has(one, key)}: {_WHOLE}'
        if one[key] not in known:
            return f'{_has(one, key)}, which the file lacks: take a complete file'
    return None


def _crowd_fault(one: Entry) -> str | None:
    return None if one.get('iscrowd', 0) in (0, 1) else f'{_has(one, "iscrowd")}: give 0 or 1, or take it out'


def _box_fault(one: Entry, image: Entry) -> str | None:
    box, remedy = one.get('bbox'), 'give [left, top, width, height] in pixels'
    if 'bbox' not in one:
        return f'has no bbox: {remedy}'
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)):
        return f'{_has(one, "bbox")}, which is not four numbers of at most {FARTHEST:,}: {remedy}'
    if min(box[2:]) < 0:
        return f'{_has(one, "bbox")} with a negative side: {remedy}'
    if is_learnable(box) and min(clipped(box, image)[2:]) <= 0:
        return (f'{_has(one, "bbox")} outside of its image of {image["width"]} x {image["height"]} pixels: correct it '
                'or take the annotation out')
    return None


def is_learnable(box: list[float]) -> bool:
    """Whether a box has at least a pixel on each side; COCO's own files hold a few that have less."""
    return min(box[2:]) >= 1


def clipped(box: list[float], image: Entry) -> list[float]:
    """The part of a box [left, top, width, height] that is in its image; the box itself where that is all of it."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    if left >= 0 and top >= 0 and right <= image['width'] and bottom <= image['height']:
        return box
    left, right = (min(max(side, 0), image['width']) for side in (left, right))
    top, bottom = (min(max(side, 0), image['height']) for side in (top, bottom))
    return [left, top, right - left, bottom - top]


def _mask_fault(one: Entry, image: Entry) -> str | None:
    """What is wrong with the polygons or run lengths of an annotation."""
    shape = one.get('segmentation')
    if not shape:
        return 'has no segmentation: give --no-masks to learn boxes alone'
    good = _are_runs(shape, image) if isinstance(shape, dict) else _are_polygons(shape)
    return None if good else (
        f'{_has(one, "segmentation")}, which is neither polygons [[x, y, x, y, x, y, ...], ...] in pixels nor run '
        f'lengths of the size [{image["height"]}, {image["width"]}]: correct it, or give --no-masks to learn boxes '
        'alone')


def _are_polygons(shape: Any) -> bool:
    return isinstance(shape, list) and all(map(_is_polygon, shape))


def _is_polygon(value: Any) -> bool:
    try:
        points = np.array(value)
    except ValueError:  # lists of several lengths
        return False
    return (points.ndim == 1 and points.dtype.kind in 'if' and len(points) >= 6 and len(points) % 2 == 0
            and -FARTHEST <= points.min() and points.max() <= FARTHEST)


def _are_runs(shape: dict[str, Any], image: Entry) -> bool:
    height, width = image['height'], image['width']
    counts = shape.get('counts')
    if shape.get('size') != [height, width] or not isinstance(counts, str | list):
        return False
    if isinstance(counts, list):
        return all(_is_whole(count, 0, height * width) for count in counts) and sum(counts) == height * width
    try:
        rle.decode(shape)
    except Exception:  # the library tells damaged text by errors of several kinds
        return False
    return True

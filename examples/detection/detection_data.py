"""Pictures with boxes and masks, from annotations in the form of LVIS or COCO."""
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from annotation_check import BANDS, check_annotations, clipped, is_learnable, refusal
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from nbn_timm.data.label_sets import label_sets
from nbn_timm.data.pictures import reason_unreadable, to_rgb
from nbn_timm.errors import InputError, quoted
from nbn_timm.files import open_regular, read_json_object

RARE, COMMON = 10, 100  # training images that a rare and a common class have at most, in LVIS


@dataclass(frozen=True)
class Annotations:
    """The content of an annotation file.

    Attributes:
        path: Of the file.
        content: The object in it.
    """

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path, masks: bool = False) -> 'Annotations':
        """Read a file, look at all that is in it, and clip its boxes to their images.

        Args:
            path: Of the file.
            masks: The annotations must have masks.

        Raises:
            InputError: It is not there, holds something else, or has a wrong entry.
        """
        remedy = 'give a JSON file in the form of LVIS or COCO'
        content = read_json_object(path, f"the annotation file '{path}'", remedy)
        for key in ('images', 'annotations', 'categories'):
            if not isinstance(content.get(key), list) or not content[key] and key != 'annotations':
                raise InputError(f"the annotation file '{path}' has no list of {key}: {remedy}")
        check_annotations(Path(path), content, masks)
        images = {image['id']: image for image in content['images']}
        for one in content['annotations']:
            one['bbox'] = clipped(one['bbox'], images[one['image_id']])
        return cls(Path(path), content)

    def check_files(self, folder: Path) -> None:
        """Look whether all images are there.

        Raises:
            InputError: One is not.
        """
        for index, image in enumerate(self.content['images']):
            path = self.image_path(folder, index)
            if not os.path.isfile(path):  # False too for what no file can be called
                raise refusal(self.path, 'images', index, image,
                              f'is the file {quoted(str(path))}, which is missing: check --image-dir')

    @cached_property
    def categories(self) -> list[dict[str, Any]]:
        """The categories by their ids; the first has label 1, since 0 is the background."""
        return sorted(self.content['categories'], key=lambda category: category['id'])

    @cached_property
    def labels(self) -> dict[int, int]:
        """Label of each category id."""
        return {category['id']: label for label, category in enumerate(self.categories, 1)}

    @cached_property
    def objects(self) -> list[list[dict[str, Any]]]:
        """The annotations of each image that can be learned from: no crowds, and no boxes of less than a pixel."""
        of_image: dict[int, list[dict[str, Any]]] = {image['id']: [] for image in self.content['images']}
        for one in self.content['annotations']:
            if not one.get('iscrowd') and is_learnable(one['bbox']):
                of_image[one['image_id']].append(one)
        return list(of_image.values())

    @cached_property
    def label_sets(self) -> np.ndarray:
        """The classes of each image, uint8 [N, C], without the background."""
        members = [sorted({self.labels[one['category_id']] - 1 for one in objects}) for objects in self.objects]
        return label_sets(members, len(self.categories))

    @cached_property
    def image_counts(self) -> np.ndarray:
        """Images that each class is in, int64 [C]."""
        return self.label_sets.sum(axis=0, dtype=np.int64)

    @property
    def federated(self) -> bool:
        """Whether an image names the classes that it was searched for, as LVIS does; else it was searched for all."""
        return 'neg_category_ids' in self.content['images'][0]

    @cached_property
    def searched(self) -> dict[int, set[int]]:
        """The category ids that each image of a federated set was searched for, by image id."""
        found = {image['id']: set(image['neg_category_ids']) for image in self.content['images']}
        for one in self.content['annotations']:
            found[one['image_id']].add(one['category_id'])
        return found

    def image_path(self, folder: Path, index: int) -> Path:
        """Where an image lies: below the folder by its file name, or by the end of its address, as in LVIS."""
        image = self.content['images'][index]
        return folder / (image.get('file_name') or '/'.join(image['coco_url'].split('/')[-2:]))


def frequency_of(image_count: int) -> str:
    """LVIS's letter for a class: r up to 10 training images, c up to 100, f above."""
    return 'r' if image_count <= RARE else 'c' if image_count <= COMMON else 'f'


def class_frequencies(train: Annotations, val: Annotations) -> list[str]:
    """The letter of each class, from the file if it has them, as LVIS's do, and else by the training images.

    Raises:
        InputError: The two files have other categories.
    """
    for here, there in zip_longest(train.categories, val.categories, fillvalue={}):
        if _id_and_name(here) != _id_and_name(there):
            raise InputError(f'{quoted(str(train.path))} and {quoted(str(val.path))} have other categories '
                             f'({_in_words(here)}, and {_in_words(there)}): give two files of one data set')
    given = [category.get('frequency') for category in val.categories]
    if all(letter in BANDS for letter in given):
        return [str(letter) for letter in given]
    return [frequency_of(int(count)) for count in train.image_counts]


def _id_and_name(category: Mapping[str, Any]) -> tuple[Any, Any]:
    return category.get('id'), category.get('name')


def _in_words(category: Mapping[str, Any]) -> str:
    if not category:
        return 'none in its place'
    return f'{category["id"]} is {quoted(category["name"])}' if 'name' in category else f'{category["id"]} has no name'


class DetectionImages(Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    """Images, float [3, H, W] from 0 to 1, with their boxes, labels and, if asked for, masks, in torchvision's form.

    Args:
        annotations: Of the images.
        folder: Where these are.
        masks: Give masks too.
        hflip: Probability of a mirror image, drawn from torch's generator.
    """

    def __init__(self, annotations: Annotations, folder: Path, masks: bool, hflip: float = 0.0) -> None:
        self.annotations = annotations
        self.folder = folder
        self.masks = masks
        self.hflip = hflip

    def __len__(self) -> int:
        return len(self.annotations.objects)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        objects = self.annotations.objects[index]
        image = pil_to_tensor(self._read(index)).float() / 255
        left, top, width, height = torch.tensor([one['bbox'] for one in objects]).float().reshape(-1, 4).unbind(1)
        target = {'boxes': torch.stack([left, top, left + width, top + height], 1),
                  'labels': torch.tensor([self.annotations.labels[one['category_id']] for one in objects]).long()}
        if self.masks:
            target['masks'] = torch.from_numpy(decode_masks(objects, image.shape[1], image.shape[2]))
        return mirrored(image, target) if torch.rand(()) < self.hflip else (image, target)


    def _read(self, index: int) -> Image.Image:
        """An image, which must have the size that the annotations say, since boxes beyond its pixels end torchvision.

        Raises:
            InputError: It is missing, damaged or of another size.
        """
        path, image = self.annotations.image_path(self.folder, index), self.annotations.content['images'][index]
        picture = read_image(path)
        width, height = picture.size
        if (width, height) != (image['width'], image['height']):
            raise refusal(self.annotations.path, 'images', index, image,
                          f'has {image["width"]} x {image["height"]} pixels, and the file {quoted(str(path))}, turned '
                          f'upright, {width} x {height}: correct the size and the boxes, or take the right image')
        return picture


def read_image(path: Path) -> Image.Image:
    """An image as 8-bit RGB, turned upright; 16-bit grey is scaled to 8 bits.

    Raises:
        InputError: It is missing, damaged, or has values of no known range.
    """
    try:
        with open_regular(path) as file, Image.open(file) as image:
            return to_rgb(image, f'the image {quoted(str(path))}')
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f'the image {quoted(str(path))} is missing: check --image-dir') from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise InputError(f'the image {quoted(str(path))} cannot be read ({reason_unreadable(error)}): replace it by an '
                         'intact copy') from error


def decode_masks(objects: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """Masks uint8 [N, height, width] of annotations with polygons or run lengths."""
    masks = np.zeros((len(objects), height, width), np.uint8)
    for mask, one in zip(masks, objects, strict=True):
        mask[:] = rle.decode(rle.segmToRle(one['segmentation'], width, height))
    return masks


def mirrored(image: torch.Tensor, target: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image and its target with left and right exchanged."""
    left, top, right, bottom = target['boxes'].unbind(1)
    other = {'boxes': torch.stack([image.shape[2] - right, top, image.shape[2] - left, bottom], 1)}
    if 'masks' in target:
        other['masks'] = target['masks'].flip(2)
    return image.flip(2), target | other


def as_lists(batch: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A batch of images of any size and their targets."""
    images, targets = zip(*batch, strict=True)
    return images, targets


def count_frequencies(frequencies: Sequence[str]) -> str:
    """How many classes are rare, common and frequent, in words."""
    counts = Counter(frequencies)
    return ', '.join(f'{counts[letter]} {name}' for letter, name in BANDS.items())

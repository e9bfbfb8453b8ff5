"""Pictures with boxes and masks, from annotations in the form of LVIS or COCO."""
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from nbn_timm.data.label_sets import label_sets
from nbn_timm.data.pictures import reason_unreadable
from nbn_timm.errors import InputError
from nbn_timm.files import read_json_object

RARE, COMMON = 10, 100  # training images that a rare and a common class have at most, in LVIS
BANDS = {'r': 'rare', 'c': 'common', 'f': 'frequent'}


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
    def read(cls, path: str | Path) -> 'Annotations':
        """Read a file.

        Raises:
            InputError: It is not there, or holds something else.
        """
        remedy = 'give a JSON file in the form of LVIS or COCO'
        content = read_json_object(path, f"the annotation file '{path}'", remedy)
        for key in ('images', 'annotations', 'categories'):
            if not isinstance(content.get(key), list) or not content[key] and key != 'annotations':
                raise InputError(f"the annotation file '{path}' has no list of {key}: {remedy}")
        return cls(Path(path), content)

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
        """The annotations of each image that can be learned from: no crowds, and no boxes of less than a pixel.

        Raises:
            InputError: An annotation is of an image or a category that is not there.
        """
        of_image: dict[int, list[dict[str, Any]]] = {image['id']: [] for image in self.content['images']}
        for one in self.content['annotations']:
            if one['image_id'] not in of_image or one['category_id'] not in self.labels:
                raise InputError(f"annotation {one['id']} of '{self.path}' is of image {one['image_id']} and category "
                                 f"{one['category_id']}, and the file lacks one of these: take a complete file")
            if not one.get('iscrowd') and min(one['bbox'][2:]) >= 1:
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
    if train.labels != val.labels:
        raise InputError(f"'{train.path}' and '{val.path}' have other category ids: give two files of one data set")
    given = [category.get('frequency') for category in val.categories]
    if all(letter in BANDS for letter in given):
        return [str(letter) for letter in given]
    return [frequency_of(int(count)) for count in train.image_counts]


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
        path, objects = self.annotations.image_path(self.folder, index), self.annotations.objects[index]
        try:
            image = pil_to_tensor(Image.open(path).convert('RGB')).float() / 255
        except FileNotFoundError as error:
            raise InputError(f"the image '{path}' is missing: check --image-dir") from error
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"the image '{path}' cannot be read ({reason_unreadable(error)}): replace it by an "
                             'intact copy') from error
        left, top, width, height = torch.tensor([one['bbox'] for one in objects]).float().reshape(-1, 4).unbind(1)
        target = {'boxes': torch.stack([left, top, left + width, top + height], 1),
                  'labels': torch.tensor([self.annotations.labels[one['category_id']] for one in objects]).long()}
        if self.masks:
            target['masks'] = torch.from_numpy(decode_masks(objects, image.shape[1], image.shape[2]))
        return mirrored(image, target) if torch.rand(()) < self.hflip else (image, target)


def decode_masks(objects: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """Masks uint8 [N, height, width] of annotations with polygons or run lengths.

    Raises:
        InputError: An annotation has neither.
    """
    masks = np.zeros((len(objects), height, width), np.uint8)
    for mask, one in zip(masks, objects, strict=True):
        if not one.get('segmentation'):
            raise InputError(f"annotation {one['id']} has no segmentation: give --no-masks to learn boxes alone")
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

"""CAM-based sampling (Zhang et al., "Bag of Tricks for Long-Tailed Visual Recognition with Deep Convolutional Neural
Networks", AAAI 2021): further pictures of rare classes, in which the object, found by the class activation map of a
first network, is moved.
"""
import csv
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.layers import SelectAdaptivePool2d
from torch import nn

from nbn_timm.data.dataset import LabelledImages
from nbn_timm.errors import InputError
from nbn_timm.key_values import check_number
from nbn_timm.second_stages.classifier import linear_classifiers, linear_form
from nbn_timm.second_stages.second_stage import FLAG, FitData, FitReport, FittedSecondStage, register_second_stage

FOREGROUND = 0.75  # of the mean of a map; what is below belongs to the background
LIST = 'generated.csv'  # in the run's folder


@register_second_stage('cam_sampling')
class CamSampling(FittedSecondStage):
    """Make pictures that fill rare classes up; the network stays as it is.

    A class of n images gets n_max + n_min - n pictures. Each is made of one of its images, drawn evenly: the class
    activation map for its label, stretched over the image, is the foreground where it reaches 3/4 of its mean. A copy
    of the image is flipped, turned by -45 to 44 degrees and scaled by 0.8 to 1.19 about the middle of the foreground,
    or shifted so that its box stays inside, each in a third of the cases, and laid over the image where the
    foreground was or is now. The pictures and `generated.csv` are in the folder of the run; `--more-train` takes them.

    Source: the authors' code (zhangyongshun/BagofTricks-LT, commit ce7859a). Two things are otherwise. Maps are of
    images under the evaluation transform, where theirs are of randomly cropped and flipped ones, laid over the whole
    image all the same. And the box of the foreground reaches to its last row and column, where theirs ends at the
    second, so that their shifts can leave the image. With several experts their maps are added.

    Args:
        most: A class with so many images gets no pictures, and none gets more; None sets no limit. The authors have
            100 for ImageNet-LT and no limit for CIFAR.

    Raises:
        InputError: A setting out of range.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        if most is not None:
            check_number('--stage cam_sampling', FLAG, 'most', most, low=1, whole=True)

    def fit(self, model: nn.Module, data: FitData) -> FitReport:
        """Compute the maps in a pass over the training images; the pictures are made when they are asked for."""
        train, counts, targets = data.splits.train, data.splits.class_counts, data.splits.train_targets
        if not isinstance(train, LabelledImages) or counts is None or targets is None:
            raise InputError('--stage cam_sampling takes training images one by one and counts them by class, which '
                             'this dataset does not allow: use a benchmark, class folders, lists or CSV files')
        missing = pictures_per_class(np.bincount(targets, minlength=counts.num_classes), self.most)
        heat = _activation_maps(model, data)
        labels = np.repeat(np.arange(len(missing)), missing)
        names = [f'generated/{number:06d}.png' for number in range(len(labels))]
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(
            [('file', 'label'), *((name, counts.names[label]) for name, label in zip(names, labels, strict=True))])
        images_of = {label: np.flatnonzero(targets == label) for label in set(labels.tolist())}

        def pictures() -> Iterator[tuple[str, bytes]]:
            rng = np.random.default_rng(data.seed)
            for name, label in zip(names, labels.tolist(), strict=True):
                index = int(rng.choice(images_of[label]))
                yield name, _png(move_foreground(np.array(train.image(index).convert('RGB')), heat[index], rng))

        return FitReport([f'cam_sampling  {len(labels):,} pictures of {int((missing > 0).sum()):,} classes, listed in '
                          f'{LIST}: give it as --more-train'], {LIST: text.getvalue()}, pictures())


def pictures_per_class(counts: np.ndarray, most: int | None) -> np.ndarray:
    """How many pictures each class gets, n_max + n_min - n and none for a class without images, int64 [C]."""
    there = counts > 0
    wanted = np.where(there, counts[there].max() + counts[there].min() - counts, 0)
    return wanted if most is None else np.where(counts >= most, 0, np.minimum(wanted, most))


def _activation_maps(model: nn.Module, data: FitData) -> list[np.ndarray]:
    """The class activation map of every training image for its label, uint8 [h, w] from 0 to 255."""
    poolings = [module for module in model.modules() if isinstance(module, SelectAdaptivePool2d)]
    weight = torch.cat([linear_form(part)[0] for part in linear_classifiers(model, 'cam_sampling').values()], dim=1)
    if not poolings:
        raise InputError(f'{type(model).__name__} pools no maps before its classifier, so that there are no class '
                         'activation maps: use a convolutional network')
    assert data.splits.train is not None
    maps: list[np.ndarray] = []
    for (features,), target in data.classifier_inputs(model, poolings[-1:], data.splits.train):
        if features.ndim != 4 or features.shape[1] != weight.shape[1]:
            raise InputError(f'the classifier of {type(model).__name__} is not on the mean of its maps, so that there '
                             'are no class activation maps: use a network with average pooling')
        heat = torch.einsum('bfhw,bf->bhw', features, weight[target].to(features.dtype))
        heat = heat - heat.amin(dim=(1, 2), keepdim=True)
        heat = heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
        maps += list((255 * heat).to(torch.uint8).cpu().numpy())
    if data.distributed:  # rank r has images r, r + w, ...
        of_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_rank, maps)
        maps = [of_rank[index % len(of_rank)][index // len(of_rank)] for index in range(sum(map(len, of_rank)))]
    return maps


def move_foreground(image: np.ndarray, heat: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image whose foreground is flipped, turned and scaled, or shifted, uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3].
        heat: Its class activation map, uint8 [h, w].
        rng: Draws which of the three it is, and how far.
    """
    height, width = image.shape[:2]
    heat = stretch(heat, height, width)
    rows, columns = np.nonzero(foreground(heat))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    kind = rng.integers(3)
    if kind == 0:
        matrix = rotation((left + right) / 2, (top + bottom) / 2, float(rng.integers(-45, 45)),
                          float(rng.integers(80, 120)) / 100)
    elif kind == 1:
        matrix = np.array([[1, 0, rng.integers(-left, width - right)], [0, 1, rng.integers(-top, height - bottom)]])
    else:
        matrix = np.array([[-1, 0, width - 1], [0, 1, 0]])
    return paste(image, heat, matrix)


def paste(image: np.ndarray, heat: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """An image with its moved copy where the foreground was or is now, where it is not black, uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3].
        heat: Its class activation map, uint8 [H, W].
        matrix: Of the movement, from places (x, y, 1) to places (x, y), [2, 3].
    """
    kept = foreground(heat)
    region = kept | (warp(np.where(kept, heat, 0).astype(np.uint8), matrix) > 0)
    copy = warp(image, matrix) * region[:, :, None]
    return np.where(copy > 0, copy, image)


def foreground(heat: np.ndarray) -> np.ndarray:
    """Where a class activation map reaches 3/4 of its mean, bool [H, W]."""
    return heat >= FOREGROUND * heat.mean()


def stretch(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """A class activation map in the size of its image, by bilinear interpolation, uint8 [H, W]."""
    values = torch.from_numpy(heat)[None, None].double()
    return F.interpolate(values, (height, width), mode='bilinear')[0, 0].round().to(torch.uint8).numpy()


def rotation(x: float, y: float, degrees: float, scale: float) -> np.ndarray:
    """The matrix [2, 3] that turns anticlockwise about a place and scales."""
    cosine, sine = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return np.array([[cosine, sine, (1 - cosine) * x - sine * y], [-sine, cosine, sine * x + (1 - cosine) * y]])


def warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """An image moved by a matrix [2, 3], by bilinear interpolation, black where nothing came from; uint8 as given."""
    height, width = image.shape[:2]
    back = torch.from_numpy(np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2].astype(np.float64))
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64),
                          indexing='ij')
    places = torch.stack([x, y, torch.ones_like(x)], dim=2) @ back.T
    grid = 2 * places / torch.tensor([max(width - 1, 1), max(height - 1, 1)]) - 1
    values = torch.from_numpy(np.ascontiguousarray(image)).double().reshape(height, width, -1).permute(2, 0, 1)
    moved = F.grid_sample(values[None], grid[None], padding_mode='zeros', align_corners=True)[0]
    return moved.permute(1, 2, 0).round().to(torch.uint8).reshape(image.shape).numpy()


def _png(image: np.ndarray) -> bytes:
    """An image as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, 'PNG')
    return content.getvalue()

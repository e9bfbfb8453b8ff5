"""The images that an exported file is checked with."""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nbn_timm.data import DataDefaults, DataSettings, ImageSamples
from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.pictures import find_images
from nbn_timm.data.transforms import create_transform, set_transform
from nbn_timm.datasets import create_splits, find_dataset
from nbn_timm.errors import InputError

__all__ = ['CheckImages', 'folder_images', 'generated_images', 'training_data_images']


@dataclass(frozen=True)
class CheckImages:
    """Images of a network's input size.

    Attributes:
        pixels: uint8 [N, 3, H, W].
        source: Where they come from, in words for people.
        real: They are photographs or whatever the network is for, and not generated.
    """

    pixels: torch.Tensor
    source: str
    real: bool


def folder_images(folder: str | Path, count: int, input_format: DataDefaults) -> CheckImages:
    """Images of a folder and its subfolders, evenly spaced in their order, under the evaluation transform.

    Raises:
        InputError: The folder has no images, or one cannot be read.
    """
    paths = find_images([folder]).files if Path(folder).is_dir() else ()
    if not paths:
        raise InputError(f"'{folder}' is no folder with images: give one, with or without subfolders, or leave out "
                         '--images')
    source = f"folder '{Path(folder).resolve().name}'"
    return _of_dataset(ImageSamples(paths, [0] * len(paths)), count, input_format, source)


def training_data_images(data: DataSettings, count: int, input_format: DataDefaults) -> CheckImages:
    """Test images of the data that a network was trained on.

    Args:
        data: As recorded.
        count: Of the images wanted.
        input_format: Of the network.

    Raises:
        InputError: The data are not recorded, or not there.
    """
    if not data.dataset:
        raise InputError('the data that the network was trained on are not recorded: give --images DIR')
    if find_dataset(data.dataset).needs_folder and not data.data_dir:
        raise InputError(f'where the images of {data.dataset} lie is not recorded: give --images DIR')
    test = create_splits(
        replace(data, train_list=None, split_file=None, class_counts=None, download=False), ('test',),
        label_sets=True).test
    if not isinstance(test, LabelledImages):
        raise InputError(f'the test images of {data.dataset} are not at hand: give --images DIR')
    return _of_dataset(test, count, input_format, f'the test split of {data.dataset}')


def generated_images(count: int, input_format: DataDefaults) -> CheckImages:
    """Smooth random images from a fixed seed, for where no real ones are at hand."""
    channels, height, width = input_format.input_size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode='bicubic', align_corners=False)
    return CheckImages((255 * smooth).round().clamp(0, 255).to(torch.uint8), 'generated from seed 0', False)


def pixels_of(dataset: LabelledImages, indices: np.ndarray, input_format: DataDefaults) -> torch.Tensor:
    """Images under the evaluation transform, uint8 [N, 3, H, W]; sets `dataset.transform`."""
    set_transform(dataset, create_transform(input_format), input_format)
    return torch.stack([torch.as_tensor(np.asarray(dataset[index][0])) for index in indices.tolist()])


def _of_dataset(dataset: LabelledImages, count: int, input_format: DataDefaults, source: str) -> CheckImages:
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int))
    return CheckImages(pixels_of(dataset, chosen, input_format), source, True)

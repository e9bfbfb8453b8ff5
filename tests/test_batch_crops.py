"""Resized crops and contrastive views of whole batches, against Pillow's pixels and torchvision's draws."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from formats import CIFAR_LT, IMAGENET_LT
from PIL import Image
from test_batch_ops import pictures
from test_batched import homogeneity, noise
from torchvision import transforms

from nbn_timm.data import AugmentSettings, MemoryImages, create_transform, keep_in_memory
from nbn_timm.data.batch_crops import ResizedCrop, resized
from nbn_timm.data.batched import batch_augment

THIRDS = (3 / 4, 4 / 3)


def planes(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize('height, width', [(32, 32), (27, 40), (5, 3)])
@pytest.mark.parametrize('interpolation, mode', [
    ('bilinear', Image.Resampling.BILINEAR), ('bicubic', Image.Resampling.BICUBIC)])
def test_enlarged_pixels_are_pils(height, width, interpolation, mode):
    images = np.random.default_rng(0).integers(0, 256, (200, height, width, 3), np.uint8)
    torch.manual_seed(0)
    boxes = ResizedCrop((0.02, 1.0), (0.5, 2.0)).draw(200, height, width)
    boxes[0] = torch.tensor([0, 0, height, width])
    wanted = []
    for image, (top, left, high, wide) in zip(images, boxes.tolist(), strict=True):
        crop = Image.fromarray(image).crop((left, top, left + wide, top + high))
        wanted.append(np.asarray(crop.resize((width, height), mode)))
    ours = resized(planes(images), boxes, interpolation).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, np.stack(wanted))
    assert np.array_equal(ours[0], images[0])


@pytest.mark.parametrize('size, scale, ratio', [
    ((32, 32), (0.08, 1.0), THIRDS), ((32, 32), (0.9, 1.0), (0.5, 2.0)), ((20, 32), (0.3, 0.5), THIRDS)])
def test_boxes_are_drawn_as_torchvisions(size, scale, ratio):
    count = 4000
    torch.manual_seed(3)
    ours = ResizedCrop(scale, ratio).draw(count, *size)
    image = torch.zeros(3, *size)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio))
                           for _ in range(count)])
    assert (ours >= torch.tensor([0, 0, 1, 1])).all() and (ours[:, :2] + ours[:, 2:] <= torch.tensor(size)).all()
    for column in range(4):
        tallies = [Counter(draws[:, column].tolist()) for draws in (ours, theirs)]
        often = {value for value, seen in sum(tallies, Counter()).items() if seen > 20}
        merged = [Counter({**{value: tally[value] for value in often},
                           -1: 1 + sum(seen for value, seen in tally.items() if value not in often)})
                  for tally in tallies]
        assert homogeneity(*merged) < 4, column
    free = (torch.tensor(size) - ours[:, 2:]).clamp(min=1)
    share = ours[:, :2] / free
    assert abs(float(share[:, 0].mean()) - float((theirs[:, 0] / (size[0] - theirs[:, 2]).clamp(min=1)).mean())) < 0.03


@pytest.mark.parametrize('size, ratio', [((32, 10), THIRDS), ((10, 32), THIRDS), ((32, 32), (2.0, 2.0))])
def test_where_no_box_fits_it_is_the_greatest_in_the_middle(size, ratio):
    theirs = transforms.RandomResizedCrop.get_params(torch.zeros(3, *size), [1.0, 1.0], list(ratio))
    assert ResizedCrop((1.0, 1.0), ratio).draw(3, *size).tolist() == [list(theirs)] * 3


def test_views_of_simclr_are_its_steps_in_their_order():
    augment = AugmentSettings(simclr=True, scale=(0.2, 1.0), blur=0.5, hflip=0.3)
    ours = batch_augment(CIFAR_LT, augment)
    assert ours.resized == ResizedCrop((0.2, 1.0), THIRDS, 'bilinear')
    assert (ours.pad, ours.hflip, ours.vflip, ours.rotation, ours.cutout) == (0, 0.3, 0.0, 0.0, 0)
    assert [(type(policy.policies[0]).__name__, policy.probability) for policy in ours.policies] == [
        ('ColorJitter', 0.8), ('Drawn', 0.2), ('Drawn', 0.5)]
    bicubic = AugmentSettings(simclr=True, train_interpolation='bicubic')
    assert batch_augment(CIFAR_LT, bicubic).resized.interpolation == 'bicubic'
    assert batch_augment(CIFAR_LT, AugmentSettings(simclr=True, train_interpolation='lanczos')) is None
    assert batch_augment(IMAGENET_LT, augment) is None  # large images are for several processes
    images = MemoryImages(noise(4), np.arange(4))
    assert isinstance(keep_in_memory(images, CIFAR_LT, augment, wanted=True), MemoryImages)


def test_views_of_simclr_look_like_those_of_single_images():
    """Grey pictures, roughness, brightness and colour, over many draws of one picture."""
    augment = AugmentSettings(simclr=True, scale=(0.2, 1.0), blur=0.5)
    picture, count = pictures(2)[1], 1500
    torch.manual_seed(0)
    transform = create_transform(CIFAR_LT, is_training=True, augment=augment)
    single = torch.stack([transform(Image.fromarray(picture)) for _ in range(count)])
    batch = batch_augment(CIFAR_LT, augment)(torch.from_numpy(np.repeat(picture[None], count, 0))).permute(0, 3, 1, 2)
    grey = [(views == views[:, :1]).flatten(1).all(1).float().mean() for views in (single, batch)]
    assert abs(grey[0] - grey[1]) < 4 * math.sqrt(2 * 0.2 * 0.8 / count) and 0.15 < grey[1] < 0.25
    for measure in (lambda views: views.diff(dim=3).abs().flatten(1).mean(1),
                    lambda views: views.flatten(1).mean(1), lambda views: views.flatten(1).std(1),
                    lambda views: (views[:, 0] - views[:, 2]).flatten(1).mean(1)):
        theirs, mine = (np.sort(measure(views.float()).numpy()) for views in (single, batch))
        grid = np.union1d(theirs, mine)
        apart = np.abs(np.searchsorted(theirs, grid, 'right') - np.searchsorted(mine, grid, 'right')).max() / count
        assert apart < 2 * math.sqrt(2 / count)  # Kolmogorov and Smirnov

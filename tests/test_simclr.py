"""SimCLR's augmentation of small images: what it does, and how often."""
import numpy as np
import pytest
import torch
from formats import CIFAR_LT
from PIL import Image
from test_batched import noise
from test_train_run import MODEL, data_flags, images  # noqa: F401

import nbn_timm.cli.train as train
from nbn_timm.data import AugmentSettings, MemoryImages, create_transform, keep_in_memory
from nbn_timm.errors import InputError


def drawn(augment: AugmentSettings, image: Image.Image, count: int) -> torch.Tensor:
    transform = create_transform(CIFAR_LT, is_training=True, augment=augment)
    torch.manual_seed(0)
    return torch.stack([torch.as_tensor(np.asarray(transform(image))) for _ in range(count)])


def test_a_fifth_of_the_pictures_is_grey_and_four_fifths_are_jittered():
    picture = Image.fromarray(np.full((32, 32, 3), (200, 100, 50), np.uint8))
    pixels = drawn(AugmentSettings(simclr=True), picture, 600)[:, :, 0, 0].int()
    grey = ((pixels[:, 0] == pixels[:, 1]) & (pixels[:, 1] == pixels[:, 2])).float().mean()
    same = (pixels == torch.tensor([200, 100, 50])).all(1).float().mean()
    assert grey.item() == pytest.approx(0.2, abs=0.05)
    assert same.item() == pytest.approx(0.2 * 0.8, abs=0.05)


@pytest.mark.parametrize('scale, least', [(None, 0.08), ((0.5, 1.0), 0.5)])
def test_the_crop_has_an_area_in_the_range(scale, least):
    """Of a ramp from left to right, the part that is seen is a share of the whole; its height has to be added."""
    ramp = np.repeat(np.arange(32, dtype=np.uint8)[None, :, None] * 8, 32, axis=0).repeat(3, axis=2)
    ramp[..., 1] = ramp[..., 1].T
    pixels = drawn(AugmentSettings(simclr=True, hflip=0.0, scale=scale), Image.fromarray(ramp), 400).float()
    spread = pixels.flatten(2).amax(2) - pixels.flatten(2).amin(2)
    kept = (spread[:, 2] / 8 + 1) * (spread[:, 1] / 8 + 1) / 1024  # of pictures that are neither grey nor jittered
    plain = (pixels[:, 0] == pixels[:, 2]).flatten(1).all(1) & ~(pixels[:, 0] == pixels[:, 1]).flatten(1).all(1)
    assert plain.sum() > 20 and kept[plain].min() > least - 0.1 and kept[plain].max() < 1.05


def test_blur_takes_away_what_is_fine():
    picture = Image.fromarray(noise(1)[0])
    rough = [drawn(AugmentSettings(simclr=True, scale=(1, 1), ratio=(1, 1), blur=blur), picture, 60).float().diff(
        dim=3).abs().mean() for blur in (0.0, 1.0)]
    assert rough[1] < 0.7 * rough[0]


def test_other_views_have_it_and_the_first_keeps_its_own():
    augment = AugmentSettings(aa='cifar10', cutout=16, other_views={'simclr': True, 'scale': [0.2, 1.0]})
    assert augment.of_other_views().simclr and augment.of_other_views().area == (0.2, 1.0) and not augment.simclr
    samples = keep_in_memory(MemoryImages(noise(4), np.arange(4)), CIFAR_LT, augment, None, 0, augment.of_other_views())
    assert len(samples) == 4


@pytest.mark.parametrize('flags, message', [
    (['--simclr', '--cutout', '4'], '--cutout has no effect with --simclr'),
    (['--simclr', '--aa', 'cifar10'], '--aa has no effect with --simclr'),
    (['--blur', '0.5'], '--blur has no effect without --simclr'),
    (['--simclr', '--grayscale-prob', '0.2'], '--grayscale-prob has no effect with --simclr'),
    (['--simclr', '--gaussian-blur-prob', '0.2'], '--gaussian-blur-prob has no effect with --simclr'),
    (['--simclr', '--in-chans', '1'], '--simclr changes the colours of RGB pictures'),
    (['--simclr', '--train-interpolation', 'random'], 'random is not for the crops of --simclr'),
    (['--simclr', '--scale', '0.9', '0.5'], '--scale 0.9 0.5 is no range'),
])
def test_wrong_combinations_are_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *MODEL, '--epochs', '1', '-b', '4', '--output', str(tmp_path), *flags])

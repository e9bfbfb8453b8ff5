"""Images in memory, augmented by the batch, against the pipeline that takes one image at a time."""
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import CIFAR_LT, DIGITS_LT, IMAGENET_LT
from PIL import Image
from torch.utils.data import SequentialSampler
from torchvision.transforms import functional as tvf

from nbn_timm.cli.train import parse_train
from nbn_timm.data import (
    ArraySamples,
    AugmentSettings,
    ImageSamples,
    MemoryImages,
    Splits,
    create_eval_loader,
    create_train_loader,
    create_transform,
    epoch_seed,
    keep_in_memory,
)
from nbn_timm.data import batched as batched_module
from nbn_timm.data.batched import BatchAugment, BatchedImages, MemoryLoader, batch_augment
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.errors import InputError
from nbn_timm.samplers import create_sampler
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.distributed import World
from nbn_timm.training.plan import Plan

NONE = AugmentSettings()


def noise(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def addresses():
    """An image whose pixels say where they stand: row and column, counted from 1."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(1, 33)[:, None], np.arange(1, 33)[None, :]
    return image


def crop_of(image):
    """(top, left, mirrored) that the augmented `addresses` tell; the centre is never padding."""
    row, column, right = int(image[16, 16, 0]), int(image[16, 16, 1]), int(image[16, 17, 1])
    mirrored = right < column
    return row - 17, (column - 16 if mirrored else column - 17), mirrored


def homogeneity(first, second):
    """Chi-square statistic of two samples of categories against one distribution, in standard deviations."""
    categories = sorted(set(first) | set(second))
    table = np.array([[sample[category] for category in categories] for sample in (first, second)], float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = len(categories) - 1
    return (((table - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize('defaults', [CIFAR_LT, DIGITS_LT], ids=['cifar', 'digits'])
def test_crops_and_flips_are_distributed_as_one_image_at_a_time(defaults):
    torch.manual_seed(1)
    count = 8000
    one_at_a_time, picture = create_transform(defaults, is_training=True), Image.fromarray(addresses())
    single = Counter(crop_of(np.asarray(one_at_a_time(picture)).transpose(1, 2, 0)) for _ in range(count))
    images = torch.from_numpy(addresses()).expand(count, -1, -1, -1)
    batch = Counter(crop_of(image) for image in batch_augment(defaults, NONE)(images).numpy())
    flips = [False] if defaults is DIGITS_LT else [False, True]
    everything = {(top, left, flip) for top in range(-4, 5) for left in range(-4, 5) for flip in flips}
    assert set(batch) == set(single) == everything
    assert homogeneity(single, batch) < 4
    assert homogeneity(batch, Counter({category: count // len(everything) for category in everything})) < 4


def test_every_pixel_is_that_of_padding_crop_and_flip():
    images, augment = noise(64), BatchAugment(pad=4, hflip=0.5)
    torch.manual_seed(0)
    out = augment(torch.from_numpy(images)).numpy()
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for index in range(64):
        crops = [padded[index, top:top + 32, left:left + 32][:, ::step]
                 for top in range(9) for left in range(9) for step in (1, -1)]
        assert sum(np.array_equal(out[index], crop) for crop in crops) == 1


def known_draws(monkeypatch, top, left, hflip, vflip, turn, cut):
    """Let `BatchAugment` draw these for each image."""
    integers = iter([top, left, *cut])
    monkeypatch.setattr(batched_module, '_draw_integers', lambda *_: torch.tensor(next(integers))[:, None, None])
    happens = iter([hflip, vflip])
    monkeypatch.setattr(batched_module, '_happens', lambda *_: torch.tensor(next(happens))[:, None, None])
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: (torch.tensor(turn).double()[:, None, None] + 1) / 2)


@pytest.mark.parametrize('size', [32, 27])
def test_the_whole_chain_is_that_of_pil_for_the_same_draws(monkeypatch, size):
    count, random = 40, np.random.default_rng(3)
    images, pad = noise(count, size), size // 8
    top, left = random.integers(-pad, pad + 1, (2, count)).tolist()
    hflip, vflip = (random.random((2, count)) < 0.5).tolist()
    turn, cut = random.uniform(-1, 1, count).tolist(), random.integers(0, size, (2, count)).tolist()
    known_draws(monkeypatch, top, left, hflip, vflip, turn, cut)
    out = BatchAugment(pad, 0.5, 0.5, 30, 9)(torch.from_numpy(images)).numpy()
    same = []
    for index in range(count):
        image = tvf.pad(Image.fromarray(images[index]), pad)
        image = tvf.crop(image, top[index] + pad, left[index] + pad, size, size)
        image = tvf.hflip(image) if hflip[index] else image
        image = tvf.vflip(image) if vflip[index] else image
        image = image.rotate(30 * turn[index])  # torchvision's rotation of a picture
        y, x = cut[0][index] - 4, cut[1][index] - 4
        image.paste(0, (x, y, x + 9, y + 9))
        same.append((np.asarray(image) == out[index]).all(-1).mean())
    # PIL turns in fixed point, so that a source on the border of two pixels may be the other one.
    assert min(same) > 0.99 and np.mean(same) > 0.999


def test_policies_come_after_the_flips_and_before_rotation_and_cutout(monkeypatch):
    images = noise(3)
    known_draws(monkeypatch, [4, 0, -4], [0, 4, 0], [False, True, True], [False, False, True], [0, 0.5, 0.2],
                [[0, 10, 20], [0, 10, 20]])

    def inverted(planes):
        return 255 - planes

    out = BatchAugment(4, 0.5, 0.5, 30, 8, (inverted,))(torch.from_numpy(images)).numpy()
    for index, (top, left, hflip, vflip, turn, y) in enumerate([
            (4, 0, False, False, 0, 0), (0, 4, True, False, 0.5, 10), (-4, 0, True, True, 0.2, 20)]):
        image = tvf.crop(tvf.pad(Image.fromarray(images[index]), 4), top + 4, left + 4, 32, 32)
        image = tvf.hflip(image) if hflip else image
        image = tvf.invert(tvf.vflip(image) if vflip else image).rotate(30 * turn)
        image.paste(0, (y - 4, y - 4, y + 4, y + 4))
        assert (np.asarray(image) == out[index]).all(-1).mean() > 0.99


def test_angles_and_squares_are_drawn_evenly():
    torch.manual_seed(0)
    count = 4000
    white = torch.full((count, 32, 32, 3), 255, dtype=torch.uint8)
    holes = (BatchAugment(cutout=8)(white)[..., 0] == 0).float().mean(0)
    # A square covers pixel p if its centre is one of up to 8 rows and 8 columns.
    covering = torch.tensor([min(p + 4, 31) - max(p - 3, 0) + 1 for p in range(32)]) / 32
    assert torch.allclose(holes, covering[:, None] * covering[None, :], atol=5 * 0.25 / math.sqrt(count))
    rows = torch.arange(32, dtype=torch.uint8)[:, None, None].expand(count, 32, 32, 3)
    turned = BatchAugment(rotation=40)(rows)[:, 16, 26, 0].int() - 16  # 10.5 pixels right of the centre
    angles = torch.rad2deg(torch.asin((turned + 0.5 - 0.5) / 10.5))
    assert abs(angles.mean()) < 5 * 23 / math.sqrt(count) + 1
    assert abs(angles.std() - 80 / math.sqrt(12)) < 2


def test_evaluation_is_the_same_to_the_bit():
    images, labels = noise(13), np.arange(13) % 5
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        both = [list(create_eval_loader(kind(images, labels), batch_size=4, defaults=CIFAR_LT, num_workers=0, rank=rank,
                                        world_size=world_size)) for kind in (ArraySamples, MemoryImages)]
        for (image, label), (image_in_memory, label_in_memory) in zip(*both, strict=True):
            assert torch.equal(image, image_in_memory) and torch.equal(label, label_in_memory)


def test_a_resized_evaluation_goes_one_image_at_a_time():
    images = MemoryImages(noise(3), [0, 1, 2])
    larger = CIFAR_LT.override(input_size=(3, 40, 40))
    (batch, _), = create_eval_loader(images, batch_size=3, defaults=larger, num_workers=0)
    assert batch.shape == (3, 3, 40, 40)
    (batch, _), = create_eval_loader(images, batch_size=3, defaults=CIFAR_LT.override(crop_pct=0.5), num_workers=0)
    (wanted, _), = create_eval_loader(ArraySamples(noise(3), [0, 1, 2]), batch_size=3,
                                      defaults=CIFAR_LT.override(crop_pct=0.5), num_workers=0)
    assert torch.equal(batch, wanted)


def test_without_augmentation_training_batches_are_the_images():
    images, labels = noise(10), np.arange(10)
    loader = create_train_loader(MemoryImages(images, labels), SequentialSampler(images), batch_size=4,
                                 defaults=CIFAR_LT, augment=AugmentSettings(no_aug=True))
    loader.set_epoch(0)
    seen = torch.cat([batch for batch, _ in loader])
    plain = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (CIFAR_LT.mean, CIFAR_LT.std))
    assert torch.allclose(seen, (plain - mean) / std, atol=1e-5)
    assert torch.cat([label for _, label in loader]).tolist() == labels.tolist()


def test_random_erasing_goes_on_top():
    images = MemoryImages(noise(64), np.zeros(64))
    loader = create_train_loader(images, SequentialSampler(images), batch_size=64, defaults=CIFAR_LT,
                                 augment=AugmentSettings(reprob=1, remode='const', hflip=0))
    loader.set_epoch(0)
    (batch, _), = loader
    assert (batch == 0).all(1).flatten(1).any(1).all()


def test_random_erasing_takes_the_same_rectangles_either_way():
    erased = []
    for kind in (ArraySamples, MemoryImages):
        images = kind(np.full((200, 32, 32, 3), 200, np.uint8), np.zeros(200))
        loader = create_train_loader(images, SequentialSampler(images), batch_size=64, defaults=CIFAR_LT, num_workers=0,
                                     augment=AugmentSettings(reprob=0.4, remode='const', aa='cifar10'))
        loader.set_epoch(0)
        random.seed(3)
        erased.append(torch.cat([(batch == 0).all(1) for batch, _ in loader]))
    assert torch.equal(*erased)
    assert 0.25 < erased[0].flatten(1).any(1).float().mean() < 0.55


POLICIES = {
    'autoaugment': AugmentSettings(aa='cifar10', cutout=16),
    'randaugment': AugmentSettings(aa='rand-m9-mstd0.5', rotation=10),
    'timm': AugmentSettings(aa='original-mstd0.5'),
    'jitter': AugmentSettings(color_jitter=0.4, color_jitter_prob=0.8),
    'both': AugmentSettings(aa='cifar10', color_jitter=0.4, force_color_jitter=True),
}


@pytest.mark.parametrize('augment', POLICIES.values(), ids=POLICIES)
def test_policies_run_in_memory_in_the_order_of_single_images(augment):
    steps = [type(step).__name__ for step in create_transform(CIFAR_LT, True, augment).transforms]
    ours = batch_augment(CIFAR_LT, augment)
    names = [type(policy).__name__ for policy in ours.policies]
    known = {'ColorJitter': 'ColorJitter', 'RandomApply': 'SometimesApply', 'AutoAugment': 'AutoAugment',
             'RandAugment': 'TimmOperations'}
    wanted = [known[step] for step in steps if step in known]
    assert names == [name if augment.aa != 'original-mstd0.5' else 'TimmOperations' for name in wanted] and wanted
    assert (ours.pad, ours.hflip, ours.rotation, ours.cutout) == (4, 0.5, augment.rotation, augment.cutout)


def epoch_of(loader, epoch):
    """As the training loop begins it."""
    torch.manual_seed(epoch_seed(7, epoch))
    loader.set_epoch(epoch)
    return [(images.clone(), targets.clone()) for images, targets in loader]


@pytest.mark.parametrize('augment', POLICIES.values(), ids=POLICIES)
def test_an_epoch_with_policies_can_be_repeated(augment, monkeypatch):
    monkeypatch.setattr(batched_module, 'BLOCK', 24)  # three batches
    labels = np.arange(67)

    def loader():
        images = MemoryImages(noise(67), labels)
        sampler = create_sampler('instance_balanced', labels, seed=7)
        return create_train_loader(images, sampler, batch_size=8, defaults=CIFAR_LT, augment=augment, seed=7)

    whole, resumed = loader(), loader()
    first, second = epoch_of(whole, 0), epoch_of(whole, 1)
    assert [len(images) for images, _ in first] == [8] * 8 + [3] and len(whole) == 9
    assert sorted(torch.cat([target for _, target in first]).tolist()) == labels.tolist()
    for (images, targets), (again, targets_again) in zip(second, epoch_of(resumed, 1), strict=True):
        assert torch.equal(images, again) and torch.equal(targets, targets_again)
    assert not torch.equal(first[0][0], second[0][0])


def test_batches_of_a_block_have_the_images_of_their_labels(monkeypatch):
    monkeypatch.setattr(batched_module, 'BLOCK', 10)
    grey = np.full((23, 32, 32, 3), np.arange(23)[:, None, None, None] * 10, np.uint8)
    images = MemoryImages(grey, np.arange(23))

    def unchanged(planes):
        return planes

    loader = MemoryLoader(BatchedImages(images, BatchAugment(policies=(unchanged,))), batch_size=4,
                          sampler=list(range(22, -1, -1)), drop_last=True)
    assert loader.ahead == 2 and len(loader) == 5
    batches = list(loader)
    assert [target.tolist() for _, target in batches] == [list(range(22 - 4 * b, 18 - 4 * b, -1)) for b in range(5)]
    for pixels, target in batches:
        assert (pixels == 10 * target[:, None, None, None]).all()


@pytest.mark.parametrize('kind', [ArraySamples, MemoryImages])
def test_views_are_augmented_one_by_one_and_share_a_label(kind):
    images = kind(noise(10), np.arange(10))
    loader = create_train_loader(images, SequentialSampler(images), batch_size=4, defaults=CIFAR_LT, num_workers=0,
                                 augment=AugmentSettings(aa='cifar10', reprob=0.1), views=2)
    loader.set_epoch(0)
    batches = list(loader)
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(2, 4, 3, 32, 32)] * 2 + [(2, 2, 3, 32, 32)]
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(10))
    assert not torch.equal(batches[0][0][0], batches[0][0][1])


@pytest.mark.parametrize('kind', [ArraySamples, MemoryImages])
def test_views_of_an_image_are_of_that_image(kind):
    images = kind(noise(5), np.arange(5))
    loader = create_train_loader(images, SequentialSampler(images), batch_size=2, defaults=CIFAR_LT, num_workers=0,
                                 augment=AugmentSettings(no_aug=True), views=3)
    loader.set_epoch(0)
    for pixels, targets in loader:
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in (CIFAR_LT.mean, CIFAR_LT.std))
        plain = (torch.from_numpy(images.images[targets.numpy()]).permute(0, 3, 1, 2) - mean) / std
        assert torch.allclose(pixels, plain.expand(3, -1, -1, -1, -1), atol=1e-5)


def save(folder, count=6, size=32):
    paths = []
    for index, image in enumerate(noise(count, size)):
        Image.fromarray(image).save(folder / f'{index}.png')
        paths.append(f'{index}.png')
    return ImageSamples(paths, list(range(count)), root=folder)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_files_are_read_once_in_order(tmp_path, num_workers):
    kept = keep_in_memory(save(tmp_path), CIFAR_LT, NONE, num_workers=num_workers)
    assert isinstance(kept, MemoryImages)
    assert np.array_equal(kept.images, noise(6)) and kept.targets.tolist() == list(range(6))


def test_what_batches_cannot_do_goes_one_image_at_a_time(tmp_path, monkeypatch):
    samples = save(tmp_path)
    cases = [
        (samples, CIFAR_LT, AugmentSettings(aa='augmix-m5-w4-d2'), 'takes one image at a time'),
        (samples, CIFAR_LT, AugmentSettings(aa='rand-m9-t3a'), 'takes one image at a time'),
        (samples, IMAGENET_LT, NONE, 'takes one image at a time'),
        (samples, OWN_IMAGES.override(input_size=(3, 32, 32)), NONE, 'takes one image at a time'),
        (samples, CIFAR_LT.override(input_size=(3, 64, 64)), NONE, 'not all images are of 64x64'),
        (ArraySamples(noise(2, 28), [0, 1]), CIFAR_LT, NONE, 'not all images are of 32x32'),
        ([0, 1], CIFAR_LT, NONE, 'reads them itself'),
    ]
    for dataset, defaults, augment, reason in cases:
        assert keep_in_memory(dataset, defaults, augment) is dataset
        with pytest.raises(InputError, match=f'--in-memory.*{reason}'):
            keep_in_memory(dataset, defaults, augment, wanted=True)
    assert keep_in_memory(samples, CIFAR_LT, NONE, wanted=False) is samples
    monkeypatch.setattr(batched_module, 'MEMORY_LIMIT', 6 * 32 * 32 * 3 - 1)
    assert keep_in_memory(samples, CIFAR_LT, NONE) is samples
    assert isinstance(keep_in_memory(samples, CIFAR_LT, NONE, wanted=True), MemoryImages)


def test_a_broken_file_is_named_before_the_first_epoch(tmp_path):
    samples = save(tmp_path)
    (tmp_path / '3.png').write_bytes(b'no picture')
    with pytest.raises(InputError, match='3.png'):
        keep_in_memory(samples, CIFAR_LT, NONE)


def small_images_kept(splits: Splits, *flags: str) -> Splits:
    settings = parse_train(['--dataset', 'cifar100_lt', '--model', 'resnet20', '--workers', '0', *flags])
    plan = Plan(settings, World(torch.device('cpu')), Path(), BatchPlan(8, 1, 8), splits, CIFAR_LT, 3)
    return plan.with_small_images_in_memory().splits


@pytest.mark.parametrize(('flags', 'train', 'test'), [
    ([], True, False), (['--watch-test'], True, True), (['--in-memory'], True, False),
    (['--no-in-memory', '--watch-test'], False, False), (['--aa', 'augmix', '--watch-test'], False, False),
    (['--aa', 'cifar10', '--watch-test'], True, True)])
def test_which_splits_a_run_keeps(tmp_path, flags, train, test):
    kept = small_images_kept(Splits(save(tmp_path), None, save(tmp_path), None, CIFAR_LT), *flags)
    assert (isinstance(kept.train, MemoryImages), isinstance(kept.test, MemoryImages)) == (train, test)


def test_a_run_is_told_why_its_images_cannot_be_kept(tmp_path):
    with pytest.raises(InputError, match='--in-memory cannot be had.*one image at a time'):
        small_images_kept(Splits(save(tmp_path), None, None, None, CIFAR_LT), '--in-memory', '--aa', 'augmix')

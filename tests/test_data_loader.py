"""Transforms and loaders."""
import random

import numpy as np
import pytest
import timm
import torch
from formats import CIFAR_LT, DIGITS_LT, IMAGENET_LT, INAT18
from PIL import Image
from timm.task.evaluator import evaluation_sample_limit
from torch.utils.data import RandomSampler, SequentialSampler
from torchvision import transforms as tv

from nbn_timm.data import (
    ArraySamples,
    AugmentSettings,
    DataDefaults,
    ImageSamples,
    create_eval_loader,
    create_train_loader,
    create_transform,
    epoch_seed,
)
from nbn_timm.data.batched import batch_augment
from nbn_timm.data.cutout import Cutout
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.data.transforms import INTERPOLATIONS
from nbn_timm.errors import InputError


def make_samples(count=13, size=32):
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return ArraySamples(images, np.arange(count))


class EpochSampler(torch.utils.data.Sampler):
    """Another permutation each epoch."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(np.random.default_rng(self.epoch).permutation(self.count).tolist())


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_train_loader(seed=0, rank=0, num_workers=0):
    augment = AugmentSettings(color_jitter=0.4, aa='rand-m9-mstd0.5', reprob=0.5)
    return create_train_loader(
        make_samples(), EpochSampler(13), batch_size=5, defaults=CIFAR_LT, augment=augment, num_workers=num_workers,
        seed=seed, rank=rank)


def run_epoch(loader, epoch):
    """One epoch as a training loop runs it: the global generators are reseeded when it starts."""
    loader.set_epoch(epoch)
    seed_everything(epoch_seed(loader.seed, epoch, loader.rank))
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


@pytest.mark.parametrize('num_workers', [0, 2])
def test_an_epoch_depends_on_its_number_alone(num_workers):
    whole = make_train_loader(num_workers=num_workers)
    epochs = [run_epoch(whole, epoch) for epoch in range(3)]
    seed_everything(99)  # a resumed process comes with another history
    images, targets = run_epoch(make_train_loader(num_workers=num_workers), 2)
    assert torch.equal(targets, epochs[2][1])
    assert torch.equal(images, epochs[2][0])
    order = targets.argsort()
    assert not torch.equal(images[order], epochs[1][0][epochs[1][1].argsort()]), 'augmentation repeats itself'


@pytest.mark.parametrize('other', [dict(seed=1), dict(rank=1)])
def test_seed_and_rank_change_the_augmentation(other):
    images, targets = run_epoch(make_train_loader(num_workers=1), 0)
    changed, same_targets = run_epoch(make_train_loader(num_workers=1, **other), 0)
    assert torch.equal(targets, same_targets)
    assert not torch.equal(images, changed)


def test_iterating_leaves_the_global_generator_alone():
    loader = create_eval_loader(make_samples(), batch_size=5, defaults=CIFAR_LT, num_workers=0)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    list(loader)
    assert torch.equal(torch.rand(2), expected)


def test_epoch_seeds_differ():
    seeds = {epoch_seed(seed, epoch, rank) for seed in range(5) for epoch in range(20) for rank in range(5)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize('count, batch_size, drop_last, sizes', [
    (13, 5, None, [5, 5, 3]),
    (11, 5, None, [5, 5]),  # a last batch of one image is dropped
    (11, 5, False, [5, 5, 1]),
    (13, 5, True, [5, 5]),
    (3, 1, None, [1, 1, 1]),
    (3, 5, None, [3]),
])
def test_last_batch(count, batch_size, drop_last, sizes):
    samples = make_samples(count)
    loader = create_train_loader(
        samples, SequentialSampler(samples), batch_size=batch_size, defaults=CIFAR_LT, num_workers=0,
        drop_last=drop_last)
    loader.set_epoch(0)
    assert [len(targets) for _, targets in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize('count, drop_last', [(1, None), (4, True)])
def test_no_batch_left_is_an_error(count, drop_last):
    samples = make_samples(count)
    with pytest.raises(InputError, match='no batch of 5.*--batch-size'):
        create_train_loader(
            samples, SequentialSampler(samples), batch_size=5, defaults=CIFAR_LT, num_workers=0, drop_last=drop_last)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_eval_loader_normalises_like_torchvision(num_workers):
    samples = make_samples()
    loader = create_eval_loader(samples, batch_size=5, defaults=CIFAR_LT, num_workers=num_workers)
    batches = list(loader)
    expected = tv.Compose([tv.ToTensor(), tv.Normalize(CIFAR_LT.mean, CIFAR_LT.std)])
    torch.testing.assert_close(
        torch.cat([images for images, _ in batches]),
        torch.stack([expected(samples.image(index)) for index in range(len(samples))]), rtol=0, atol=1e-5)
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(13))


@pytest.mark.parametrize('world_size', [2, 3, 5])
def test_ranks_see_every_image_once_within_their_limits(world_size):
    seen, batches = [], set()
    for rank in range(world_size):
        loader = create_eval_loader(
            make_samples(), batch_size=2, defaults=CIFAR_LT, num_workers=0, rank=rank, world_size=world_size)
        targets = torch.cat([targets for _, targets in loader]).tolist()
        seen += targets[:evaluation_sample_limit(loader)]
        batches.add(len(loader))
    assert sorted(seen) == list(range(13))
    assert len(batches) == 1


@pytest.mark.parametrize('defaults', [IMAGENET_LT, INAT18])
def test_imagenet_evaluation_is_resize_256_and_centre_crop_224(defaults):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    image = Image.fromarray(pixels).resize((500, 300), Image.Resampling.BICUBIC)
    expected = tv.Compose([tv.Resize(256), tv.CenterCrop(224), tv.PILToTensor()])
    result = create_transform(defaults)(image)
    assert result.dtype == torch.uint8
    assert torch.equal(result, expected(image))


def stages(transform):
    return {type(stage).__name__: stage for stage in transform.transforms}


def test_published_training_transforms():
    imagenet = stages(create_transform(IMAGENET_LT, is_training=True))
    assert list(imagenet) == [
        'RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', 'ColorJitter', 'MaybePILToTensor']
    assert imagenet['RandomResizedCropAndInterpolation'].scale == (0.08, 1.0)
    assert imagenet['RandomResizedCropAndInterpolation'].interpolation == tv.InterpolationMode.BILINEAR
    jitter = imagenet['ColorJitter']
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.6, 1.4),) * 3
    assert jitter.hue is None
    assert 'ColorJitter' not in stages(create_transform(INAT18, is_training=True))

    cifar = stages(create_transform(CIFAR_LT, is_training=True))
    assert list(cifar) == ['Resize', 'RandomCrop', 'RandomHorizontalFlip', 'MaybePILToTensor']
    assert (cifar['RandomCrop'].padding, cifar['RandomCrop'].size) == (4, (32, 32))
    assert cifar['RandomHorizontalFlip'].p == 0.5
    assert 'RandomHorizontalFlip' not in stages(create_transform(DIGITS_LT, is_training=True))


def test_cifar_crops_are_windows_of_the_zero_padded_image():
    image = make_samples(1).image(0)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    windows = {padded[top:top + 32, left:left + 32].tobytes() for top in range(9) for left in range(9)}
    transform = create_transform(CIFAR_LT, is_training=True, augment=AugmentSettings(hflip=0.0))
    seed_everything(0)
    crops = {transform(image).permute(1, 2, 0).numpy().tobytes() for _ in range(50)}
    assert crops <= windows and len(crops) > 20
    assert {transform(image).permute(1, 2, 0).numpy().tobytes() for _ in range(600)} == windows


def test_augmentation_settings_depart_from_the_published_ones():
    image = make_samples(1).image(0)
    whole = create_transform(CIFAR_LT, is_training=True, augment=AugmentSettings(no_aug=True))
    assert torch.equal(whole(image), tv.PILToTensor()(image))

    changed = stages(create_transform(
        IMAGENET_LT, is_training=True,
        augment=AugmentSettings(scale=(0.5, 1.0), ratio=(1.0, 1.0), hflip=0.1, vflip=0.2, color_jitter=0.0,
                                train_interpolation='bicubic')))
    crop = changed['RandomResizedCropAndInterpolation']
    assert (crop.scale, crop.ratio, crop.interpolation) == ((0.5, 1.0), (1.0, 1.0), tv.InterpolationMode.BICUBIC)
    assert (changed['RandomHorizontalFlip'].p, changed['RandomVerticalFlip'].p) == (0.1, 0.2)
    assert 'ColorJitter' not in changed
    with_policy = stages(create_transform(CIFAR_LT, is_training=True, augment=AugmentSettings(aa='rand-m9')))
    assert list(with_policy)[1] == 'RandomCrop' and 'RandAugment' in with_policy
    assert stages(create_transform(IMAGENET_LT, augment=AugmentSettings(aa='rand-m9'))).keys() == {
        'Resize', 'CenterCrop', 'MaybePILToTensor'}


def test_autoaugment_and_cutout_come_in_the_published_order():
    """Crop, flip, policy, square, as balanced softmax and PaCo are trained on CIFAR."""
    transform = create_transform(CIFAR_LT, is_training=True, augment=AugmentSettings(aa='cifar10', cutout=16))
    names = ['Resize', 'RandomCrop', 'RandomHorizontalFlip', 'AutoAugment', 'Cutout', 'MaybePILToTensor']
    assert list(stages(transform)) == names
    policy = stages(transform)['AutoAugment']
    assert policy.policy == tv.AutoAugmentPolicy.CIFAR10
    assert policy.fill == [125.0, 123.0, 114.0]
    image = make_samples(1).image(0)
    assert len({transform(image).numpy().tobytes() for _ in range(100)}) == 100


@pytest.mark.parametrize('policy, name', [('cifar10', 'AutoAugment'), ('rand-n2-m10-mstd0.5', 'RandAugment')])
def test_a_policy_leaves_jitter_out_unless_forced(policy, name):
    """PaCo and its followers jitter, then apply RandAugment."""
    plain = create_transform(IMAGENET_LT, is_training=True, augment=AugmentSettings(aa=policy))
    forced = create_transform(
        IMAGENET_LT, is_training=True, augment=AugmentSettings(aa=policy, force_color_jitter=True, cutout=2))
    crop, flip, tensor = 'RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', 'MaybePILToTensor'
    assert list(stages(plain)) == [crop, flip, name, tensor]
    assert list(stages(forced)) == [crop, flip, 'ColorJitter', name, 'Cutout', tensor]
    published = stages(create_transform(IMAGENET_LT, is_training=True))['ColorJitter']
    assert repr(stages(forced)['ColorJitter']) == repr(published)


@pytest.mark.parametrize('side', [1, 4, 5, 8, 20])
def test_cutout_is_a_black_square_around_any_pixel(side):
    """All windows of the image with a margin, each about equally often; compare DeVries and Taylor's own clipping."""
    height, width = 6, 9
    white = Image.new('RGB', (width, height), (255, 255, 255))
    expected = set()
    for y in range(height):
        for x in range(width):
            pixels = np.full((height, width, 3), 255, np.uint8)
            top, left = y - side // 2, x - side // 2
            pixels[max(top, 0):max(top + side, 0), max(left, 0):max(left + side, 0)] = 0
            expected.add(pixels.tobytes())
    seed_everything(0)
    cut = [np.asarray(Cutout(side)(white)).tobytes() for _ in range(2000)]
    assert set(cut) == expected
    assert np.asarray(white).min() == 255  # the image itself is left alone
    if side == 1:
        counts = [cut.count(one) for one in expected]
        assert max(counts) < 80 and min(counts) > 10  # 37 on average


@pytest.mark.parametrize('mode, count', [('const', 1), ('pixel', 2)])
def test_random_erasing_changes_rectangles_after_normalisation(mode, count):
    samples = make_samples()
    loader = create_train_loader(
        samples, SequentialSampler(samples), batch_size=13, defaults=CIFAR_LT, num_workers=0,
        augment=AugmentSettings(no_aug=False, hflip=0.0, reprob=1.0, remode=mode, recount=count))
    plain = create_train_loader(
        make_samples(), SequentialSampler(samples), batch_size=13, defaults=CIFAR_LT, num_workers=0,
        augment=AugmentSettings(hflip=0.0))
    (erased, _), = run_epoch_batches(loader)
    (whole, _), = run_epoch_batches(plain)
    changed = (erased != whole).any(1)
    assert changed.flatten(1).any(1).float().mean() > 0.5
    assert not changed.all()
    if mode == 'const':
        assert (erased[changed.unsqueeze(1).expand_as(erased)] == 0).all()


def run_epoch_batches(loader):
    loader.set_epoch(0)
    seed_everything(0)
    return list(loader)


def test_broken_image_in_a_worker_is_reported(tmp_path):
    samples = ImageSamples(['gone.png'], [0], root=tmp_path)
    loader = create_eval_loader(samples, batch_size=1, defaults=CIFAR_LT, num_workers=1)
    with pytest.raises(InputError, match=r'gone.png.* is missing'):
        list(loader)


def test_own_images_are_read_as_timm_reads_them():
    """The whole format of evaluation, for models of all kinds: square crops, squashed pictures, borders."""
    names = ['coat_lite_medium_384.in1k', 'deepseek_vit_412m.deepseek_v4_1_flash', *timm.list_pretrained()[::40]]
    cfgs = [timm.get_pretrained_cfg(name) for name in names if name in timm.list_pretrained()]
    assert {'squash', 'center'} <= {cfg.crop_mode for cfg in cfgs}
    for cfg in cfgs:
        theirs = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
        ours = OWN_IMAGES.for_model(cfg.to_dict())
        assert {key: getattr(ours, key) for key in theirs} == theirs, cfg


@pytest.mark.parametrize('mode', ['center', 'squash', 'border'])
def test_pictures_are_brought_to_the_size_as_timm_does(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    format = dict(input_size=(3, 32, 32), crop_mode=mode, crop_pct=0.9)
    ours = create_transform(DataDefaults(**format))(Image.fromarray(pixels))
    theirs = timm.data.create_transform(**format, use_prefetcher=True)(Image.fromarray(pixels))
    assert np.array_equal(ours, theirs)


def test_own_images_take_the_models_input_format():
    cfg = dict(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(1, 2, 3), interpolation='bicubic', crop_pct=1.0)
    adapted = OWN_IMAGES.for_model(cfg)
    assert {key: getattr(adapted, key) for key in cfg} == cfg
    assert (adapted.train_transform, adapted.color_jitter) == ('cifar', None)
    assert OWN_IMAGES.for_model(dict(cfg, input_size=(3, 160, 160))).train_transform == 'imagenet'
    assert INAT18.for_model(cfg) == INAT18
    with pytest.raises(InputError, match='has 2 numbers as the mean of 3 channels: give one for each, or one for all'):
        OWN_IMAGES.for_model(dict(cfg, mean=(0.1, 0.2)))
    assert INAT18.override(input_size=[3, 64, 48], crop_pct=0.9) == DataDefaults(
        input_size=(3, 64, 48), mean=INAT18.mean, std=INAT18.std, crop_pct=0.9, color_jitter=None)


def test_rectangular_and_odd_images_are_fitted(tmp_path):
    defaults = CIFAR_LT.override(input_size=(3, 48, 40))
    for is_training in (True, False):
        transform = create_transform(defaults, is_training=is_training)
        for size in ((32, 32), (100, 37), (20, 90)):
            assert transform(Image.new('RGB', size)).shape == (3, 48, 40)


@pytest.mark.parametrize('name', INTERPOLATIONS)
def test_all_interpolations_are_timms(name):
    for is_training in (True, False):
        transform = create_transform(IMAGENET_LT.override(interpolation=name), is_training)
        assert transform(Image.new('RGB', (300, 280))).shape == (3, 224, 224)


@pytest.mark.parametrize('settings, message', [
    (dict(aa='nonsense'), "--aa 'nonsense' is no policy"),
    (dict(aa='rand-q9'), "--aa 'rand-q9' is no policy"),
    (dict(aa='rand-m9x'), "--aa 'rand-m9x' is no policy"),
    (dict(force_color_jitter=True), '--force-color-jitter keeps .* beside an --aa policy'),
    (dict(force_color_jitter=True, aa='v0', color_jitter=0), '--force-color-jitter .* --color-jitter'),
    (dict(train_interpolation='bicubik'), "unknown interpolation 'bicubik'.*did you mean 'bicubic'"),
    (dict(scale=(2, 0.1)), '--scale 2 0.1 is no range'),
    (dict(scale=(0.5, 1.5)), 'at most 1'),
    (dict(ratio=(2, 1)), '--ratio 2 1 is no range'),
])
@pytest.mark.parametrize('defaults', [IMAGENET_LT, CIFAR_LT])
def test_impossible_augmentation_is_one_sentence(settings, message, defaults):
    with pytest.raises(InputError, match=message) as caught:
        create_transform(defaults, is_training=True, augment=AugmentSettings(**settings))
    assert '\n' not in str(caught.value)
    create_transform(defaults, augment=AugmentSettings(**settings))  # evaluation has no augmentation


def test_numbers_out_of_range_never_come_to_a_transform():
    with pytest.raises(InputError, match="setting 'scale' is 0: give a number above 0"):
        AugmentSettings(scale=(0, 1))


@pytest.mark.parametrize('settings, message', [
    (dict(interpolation='random'), "unknown interpolation 'random'"),
    (dict(mean=(0.5, 0.5)), 'the mean has 2 numbers and the images have 3 channels'),
    (dict(std=(0.5,) * 4), 'the std has 4 numbers'),
])
def test_impossible_input_formats_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        create_transform(IMAGENET_LT.override(**settings))


def test_one_mean_holds_for_all_channels():
    loader, expected = (
        create_eval_loader(make_samples(), batch_size=13, num_workers=0, defaults=CIFAR_LT.override(mean=m, std=s))
        for m, s in (((0.4,), (0.2,)), ((0.4,) * 3, (0.2,) * 3)))
    assert torch.equal(next(iter(loader))[0], next(iter(expected))[0])


def test_mixup_collate_function_is_used():
    from timm.data import FastCollateMixup
    samples = make_samples(4)
    loader = create_train_loader(
        samples, RandomSampler(samples), batch_size=4, defaults=CIFAR_LT, num_workers=0,
        collate_fn=FastCollateMixup(mixup_alpha=1.0, num_classes=4))
    (_, targets), = run_epoch_batches(loader)
    assert targets.shape == (4, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_random_interpolation_is_refused_where_images_are_padded_and_cropped():
    with pytest.raises(InputError, match='padded and cropped.*--scale'):
        create_transform(CIFAR_LT, is_training=True, augment=AugmentSettings(train_interpolation='random'))


@pytest.mark.parametrize('augment', [AugmentSettings(scale=(0.5, 1.0)), AugmentSettings(ratio=(1.0, 1.0))])
def test_a_scale_or_ratio_asks_for_random_resized_crops(augment):
    """As the presets of fine-tuning do, also for images that are padded and cropped otherwise."""
    steps = create_transform(CIFAR_LT, is_training=True, augment=augment).transforms
    assert [type(step).__name__ for step in steps][0] == 'RandomResizedCropAndInterpolation'
    assert not any(isinstance(step, tv.RandomCrop) for step in steps)
    assert batch_augment(CIFAR_LT, augment) is None  # batches in memory take single images then

"""Policies and colour jitter for batches against torchvision's and timm's for single images."""
import math
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from test_batch_ops import pictures
from test_batched import homogeneity
from timm.data import auto_augment as timm_policies
from torchvision import transforms

from nbn_timm.data.batch_ops import OPERATIONS, Warp, operate
from nbn_timm.data.batch_policies import SometimesApply, batch_policy

SIZE = (32, 32)
FILL = [125.0, 123.0, 114.0]
TIMM = dict(img_mean=(125, 123, 114), interpolation=Image.Resampling.BILINEAR)


def policy_of_torchvision(which=transforms.AutoAugmentPolicy.CIFAR10):
    return transforms.AutoAugment(which, fill=FILL)


def planes(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def carried_out(policy, plan, images):
    out = planes(images)
    for operations, arguments in zip(plan[0].unbind(1), plan[1].unbind(1), strict=True):
        out = operate(out, operations, arguments, policy.warp)
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('which', list(transforms.AutoAugmentPolicy))
def test_every_pair_and_sign_gives_torchvisions_picture(monkeypatch, which):
    theirs = policy_of_torchvision(which)
    draws = [(pair, first, second, one, two) for pair, first, second, one, two
             in product(range(25), (0.0, 0.95), (0.0, 0.95), (0, 1), (0, 1))]
    images = pictures(len(draws))
    wanted = []
    for image, (pair, *rest) in zip(images, draws, strict=True):
        params = pair, torch.tensor(rest[:2]), torch.tensor(rest[2:])
        monkeypatch.setattr(transforms.AutoAugment, 'get_params', staticmethod(lambda _, params=params: params))
        wanted.append(np.asarray(theirs(Image.fromarray(image))))
    ours, table = batch_policy(theirs, SIZE), torch.tensor(draws)
    plan = ours.planned(table[:, 0].long(), table[:, 1:3], table[:, 3:].long())
    assert np.array_equal(carried_out(ours, plan, images), np.stack(wanted))


def test_pictures_of_the_cifar_policy_are_as_frequent_as_torchvisions():
    torch.manual_seed(2)
    image, theirs, count = pictures(2)[1], policy_of_torchvision(), 1500
    single = Counter(theirs(Image.fromarray(image)).tobytes() for _ in range(count))
    out = batch_policy(theirs, SIZE)(planes(image[None]).expand(count, -1, -1, -1).clone())
    batch = Counter(each.tobytes() for each in out.permute(0, 2, 3, 1).contiguous().numpy())
    rare = {picture for picture, seen in (single + batch).items() if seen < 12}

    def merged(counts):
        return Counter({**{picture: seen for picture, seen in counts.items() if picture not in rare},
                        b'': sum(counts[picture] for picture in rare)})

    assert len(set(single + batch) - rare) > 30
    assert homogeneity(merged(single), merged(batch)) < 4


def test_jitter_is_torchvisions_for_the_same_draws():
    theirs = transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)
    ours, images = batch_policy(theirs, SIZE), pictures(200)
    torch.manual_seed(0)
    plan = ours.plan(200)
    adjust = dict(brightness=transforms.functional.adjust_brightness, contrast=transforms.functional.adjust_contrast,
                  color=transforms.functional.adjust_saturation, hue=transforms.functional.adjust_hue)
    wanted = []
    for image, operations, factors in zip(images, *(part.tolist() for part in plan), strict=True):
        picture = Image.fromarray(image)
        for operation, factor in zip(operations, factors, strict=True):
            picture = adjust[OPERATIONS[operation]](picture, factor)
        wanted.append(np.asarray(picture))
    assert np.array_equal(carried_out(ours, plan, images), np.stack(wanted))


def test_jitter_draws_are_torchvisions():
    torch.manual_seed(0)
    count = 6000
    theirs = transforms.ColorJitter((0.6, 1.4), (0.2, 1.8), (0.0, 2.0))
    ours = batch_policy(theirs, SIZE)
    operations, factors = ours.plan(count)
    names = np.array(OPERATIONS)[operations.numpy()]
    single = []
    for _ in range(count):
        order, *values = theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)
        single.append([('brightness', 'contrast', 'color')[index] for index in order.tolist() if index < 3])
    assert homogeneity(Counter(map(tuple, names.tolist())), Counter(map(tuple, single))) < 4
    for name, (low, high) in (('brightness', (0.6, 1.4)), ('contrast', (0.2, 1.8)), ('color', (0.0, 2.0))):
        drawn = np.sort((factors.numpy()[names == name] - low) / (high - low))
        assert np.abs(drawn - np.arange(count) / count).max() < 2 / math.sqrt(count)  # Kolmogorov and Smirnov


def test_jitter_of_some_leaves_out_what_is_nought_and_some_images():
    images = planes(pictures(400))
    jitter = batch_policy(transforms.RandomApply([transforms.ColorJitter(0.9)], 0.25), SIZE)
    torch.manual_seed(0)
    changed = (jitter(images) != images).flatten(1).any(1)
    assert isinstance(jitter, SometimesApply) and 60 < changed.sum() < 140
    assert list(jitter.policies[0].ranges) == [OPERATIONS.index('brightness')]
    never = batch_policy(transforms.RandomApply([transforms.ColorJitter(0.9)], 0.0), SIZE)
    assert torch.equal(never(images), images)


@pytest.mark.parametrize('name', timm_policies._RAND_TRANSFORMS + timm_policies._RAND_INCREASING_TRANSFORMS[4:11])
def test_magnitudes_and_signs_are_timms(monkeypatch, name):
    magnitudes = np.linspace(2.5, 9.7, 24)
    images, wanted = pictures(48), []
    signs = np.repeat([1, -1], 24)
    for image, magnitude, sign in zip(images, np.tile(magnitudes, 2), signs, strict=True):
        monkeypatch.setattr(random, 'random', lambda sign=sign: 0.4 if sign > 0 else 0.6)
        operation = timm_policies.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=TIMM)
        wanted.append(np.asarray(operation(Image.fromarray(image))))
    theirs = timm_policies.RandAugment([operation], 1)
    ours, shape = batch_policy(theirs, SIZE), (48, 1)
    plan = ours.planned(torch.zeros(shape).long(), torch.ones(shape).bool(),
                        torch.from_numpy(np.tile(magnitudes, 2)).view(shape), torch.from_numpy(signs).view(shape))
    assert np.array_equal(carried_out(ours, plan, images), np.stack(wanted))


def recorded(policy, count):
    """What timm's policy does to each of `count` images: names and arguments."""
    seen, operations = [], getattr(policy, 'ops', None) or sum(policy.policy, [])
    for operation in operations:
        operation.aug_fn = lambda image, *arguments, name=operation.name, **_: (
            seen[-1].append((name, *arguments)) or image)
    for _ in range(count):
        seen.append([])
        policy(None)
    return seen


@pytest.mark.parametrize(
    'config', ['rand-m5-n3-mstd2-p0.7', 'rand-m9-inc1-mstd101', 'rand-m9-tweights', 'original', 'v0r'])
def test_timms_policies_are_chosen_as_often(config):
    make = timm_policies.rand_augment_transform if config.startswith('rand') else timm_policies.auto_augment_transform
    count = 6000
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    single = recorded(make(config, dict(TIMM)), count)
    ours = batch_policy(make(config, dict(TIMM)), SIZE)
    operations, arguments = ours.plan(count)
    batch = [[OPERATIONS[operation] for operation in row if operation >= 0] for row in operations.tolist()]
    names = {'AutoContrast': 'autocontrast', 'SolarizeAdd': 'solarize_add', 'ShearX': 'shear_x', 'ShearY': 'shear_y',
             'TranslateXRel': 'translate_x', 'TranslateYRel': 'translate_y'}

    def ours_of(name):
        return names.get(name, name.lower().removesuffix('increasing').removesuffix('original'))

    single_names = [[ours_of(name) for name, *_ in row] for row in single]
    for step in range(2):
        assert homogeneity(Counter(row[step] for row in single_names if len(row) > step),
                           Counter(row[step] for row in batch if len(row) > step)) < 4
    assert homogeneity(Counter(map(len, single_names)), Counter(map(len, batch))) < 4
    for name in ('rotate', 'color', 'solarize'):
        theirs = np.sort([values[0] for row in single for key, *values in row if ours_of(key) == name])
        mine = np.sort(arguments[operations == OPERATIONS.index(name)].numpy())
        grid = np.union1d(theirs, mine) + 1e-6
        apart = np.abs(np.searchsorted(theirs, grid) / len(theirs) - np.searchsorted(mine, grid) / len(mine)).max()
        assert apart < 2 * math.sqrt(1 / len(theirs) + 1 / len(mine)), name


@pytest.mark.parametrize('transform', [
    transforms.GaussianBlur(3), transforms.RandomApply([transforms.GaussianBlur(3)]),
    timm_policies.augment_and_mix_transform('augmix-m5-w4-d2', dict(TIMM)),
    timm_policies.rand_augment_transform('rand-m9-t3a', dict(TIMM)),
    timm_policies.rand_augment_transform('rand-m9', dict(img_mean=(0, 0, 0))),
    transforms.AutoAugment(interpolation=transforms.InterpolationMode.BILINEAR)],
    ids=['blur', 'some blur', 'augmix', '3-augment', 'random interpolation', 'bilinear'])
def test_what_is_not_here_is_left_to_single_images(transform):
    assert batch_policy(transform, SIZE) is None


def test_a_policy_leaves_its_images_as_they_were():
    images = planes(pictures(64))
    before = images.clone()
    torch.manual_seed(0)
    out = batch_policy(policy_of_torchvision(), SIZE)(images)
    assert torch.equal(images, before) and not torch.equal(out, before)
    assert batch_policy(policy_of_torchvision(), SIZE).warp == Warp((125, 123, 114))

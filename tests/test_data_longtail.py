"""Long-tailed draws, CIFAR-LT and the digits."""
import builtins
import hashlib
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.datasets import CIFAR10, CIFAR100

from nbn_timm.data import DataSettings
from nbn_timm.data.longtail import draw_long_tail, profile_counts
from nbn_timm.datasets import create_splits
from nbn_timm.datasets.digits_lt import load_digit_images, load_digits_splits
from nbn_timm.errors import InputError

pytestmark = pytest.mark.fast

# The published CIFAR-LT draw (LDAM's rule) on a stand-in for CIFAR's labels: size, first indices, and SHA-256 of all
# indices as little-endian int64.
PUBLISHED_DRAWS = {
    (100, 'exp'): (
        10847, [9318, 25183, 27604, 44165, 46182], 'b1d2f358e79c6a9a07f609cdd66df6458b25944a5f1570ce02846baa026a1810'),
    (10, 'exp'): (
        12406, [3781, 37975, 48211, 45764, 6009], '44f1fa378a4299a199b2e334c0ba2a8a5449986eccd2b7caf0340c8f17e39b89'),
    (10, 'step'): (
        25250, [3781, 37975, 48211, 45764, 6009], 'e390d47f1ce56846b71d8933bdeb211d64b71106a2399d50afe76b4bcc7e5653'),
}


def cifar_like_targets(num_classes):
    return np.random.RandomState(1).permutation(np.repeat(np.arange(num_classes), 50000 // num_classes))


@pytest.mark.parametrize('num_classes, profile', PUBLISHED_DRAWS)
def test_published_draw(num_classes, profile):
    size, first, digest = PUBLISHED_DRAWS[num_classes, profile]
    indices = draw_long_tail(cifar_like_targets(num_classes), num_classes, 100, profile)
    assert len(indices) == size
    assert indices[:5].tolist() == first
    assert hashlib.sha256(indices.astype('<i8').tobytes()).hexdigest() == digest


@pytest.mark.parametrize('num_classes, factor, profile, total, smallest, split', [
    # Totals and splits as published for CIFAR-LT.
    (10, 10, 'exp', 20431, 500, (10, 0, 0)),
    (10, 50, 'exp', 13996, 100, (9, 1, 0)),
    (10, 100, 'exp', 12406, 50, (8, 2, 0)),
    (10, 256, 'exp', 10844, 19, (7, 2, 1)),
    (10, 10, 'step', 27500, 500, (10, 0, 0)),
    (100, 10, 'exp', 19573, 50, (69, 31, 0)),
    (100, 50, 'exp', 12608, 10, (41, 41, 18)),
    (100, 100, 'exp', 10847, 5, (35, 35, 30)),
    (100, 200, 'exp', 9502, 2, (30, 31, 39)),
    (100, 100, 'step', 25250, 5, (50, 0, 50)),
])
def test_published_sizes(num_classes, factor, profile, total, smallest, split):
    counts = np.array(profile_counts(num_classes, 50000 // num_classes, factor, profile))
    assert (counts.sum(), counts.min()) == (total, smallest)
    assert ((counts > 100).sum(), ((counts <= 100) & (counts >= 20)).sum(), (counts < 20).sum()) == split


def test_draw_leaves_the_global_generator_alone():
    np.random.seed(3)
    expected = np.random.rand(3)
    np.random.seed(3)
    draw_long_tail(np.repeat([0, 1], 50), 2, 10)
    assert np.array_equal(np.random.rand(3), expected)


def test_draw_keeps_what_a_small_class_has():
    targets = np.repeat([0, 1, 2], [100, 7, 50])
    indices = draw_long_tail(targets, 3, 4)
    assert np.bincount(targets[indices]).tolist() == [100, 7, 25]
    assert len(set(indices.tolist())) == len(indices)
    assert np.array_equal(indices, draw_long_tail(targets, 3, 4))
    assert not np.array_equal(indices, draw_long_tail(targets, 3, 4, seed=1))


def test_no_class_vanishes_and_factor_1_keeps_all():
    assert min(profile_counts(10, 5, 1000)) == 1
    assert profile_counts(4, 9, 1) == [9, 9, 9, 9]
    assert profile_counts(1, 9, 100) == [9]


@pytest.mark.parametrize('arguments, message', [
    ((10, 100, 0.01), 'factor 0.01'),
    ((10, 100, float('nan')), 'factor nan'),
    ((10, 100, 10, 'expo'), "did you mean 'exp'"),
])
def test_wrong_profiles_are_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        profile_counts(*arguments)


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch):
    """A small data set in CIFAR's file format, whose checksums torchvision is told."""
    random = np.random.RandomState(0)
    for cifar, num_classes, label_key in ((CIFAR10, 10, 'labels'), (CIFAR100, 100, 'fine_labels')):
        folder = tmp_path / cifar.base_folder
        folder.mkdir()

        def write(name, content, folder=folder):
            data = pickle.dumps(content)
            (folder / name).write_bytes(data)
            return hashlib.md5(data).hexdigest()

        for part in ('train_list', 'test_list'):
            checksums = []
            for name, _ in getattr(cifar, part):
                labels = random.permutation(np.repeat(np.arange(num_classes), 5))
                images = random.randint(0, 256, (len(labels), 3072)).astype(np.uint8)
                checksums.append([name, write(name, {'data': images, label_key: labels.tolist()})])
            monkeypatch.setattr(cifar, part, checksums)
        names = {cifar.meta['key']: [f'class{label}' for label in range(num_classes)]}
        monkeypatch.setattr(cifar, 'meta', {**cifar.meta, 'md5': write(cifar.meta['filename'], names)})
    return tmp_path


@pytest.mark.parametrize('name, cifar', [('cifar10_lt', CIFAR10), ('cifar100_lt', CIFAR100)])
def test_cifar_lt_is_a_draw_from_torchvisions_cifar(cifar_dir, name, cifar):
    splits = create_splits(DataSettings(name, str(cifar_dir), imbalance_factor=5))
    everything = cifar(str(cifar_dir))
    indices = draw_long_tail(everything.targets, len(everything.classes), 5)
    assert np.array_equal(splits.train.images, everything.data[indices])
    assert splits.train.targets.tolist() == [everything.targets[index] for index in indices]
    assert splits.class_counts.counts == tuple(np.bincount(splits.train.targets))
    assert splits.class_counts.names == tuple(everything.classes)
    assert np.array_equal(splits.test.images, cifar(str(cifar_dir), train=False).data)
    assert splits.val is None
    assert splits.num_classes == len(everything.classes)
    assert any('no validation split' in note for note in splits.notes)


def test_cifar_lt_default_factor_is_100(cifar_dir):
    splits = create_splits(DataSettings('cifar10_lt', str(cifar_dir)), parts=('train',))
    assert splits.class_counts.counts == tuple(profile_counts(10, 25, 100))
    assert 'imbalance factor 100' in splits.class_counts.source
    assert splits.test is None


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"CIFAR100 is missing.*--download.*cifar-100-python"):
        create_splits(DataSettings('cifar100_lt', str(tmp_path)))
    with pytest.raises(InputError, match='--data-dir'):
        create_splits(DataSettings('cifar10_lt'))


def test_digits_splits_are_disjoint_real_images():
    from sklearn.datasets import load_digits
    splits = load_digits_splits()
    assert {name: np.bincount(split.targets).tolist() for name, split in splits.items()} == {
        'train': [140] * 10, 'val': [14] * 10, 'test': [20] * 10}
    images = np.concatenate([split.images for split in splits.values()])
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8 and images.max() == 255
    # Each is another original of scikit-learn's, enlarged as torch would do it.
    enlarged = functional.interpolate(
        torch.from_numpy(load_digits().images[:, None]) * 255 / 16, size=32, mode='bilinear', align_corners=False)
    distances = torch.cdist(torch.from_numpy(images[..., 0]).flatten(1).double(), enlarged.flatten(1))
    nearest = distances.argmin(1).numpy()
    assert len(set(nearest.tolist())) == len(images) == 1740
    assert distances.min(1).values.max() / 32 < 1  # less than one grey level apart, root mean square
    labels = np.concatenate([split.targets for split in splits.values()])
    assert np.array_equal(load_digits().target[nearest], labels)


def test_digits_lt_has_many_medium_and_few():
    splits = create_splits(DataSettings('digits_lt'))
    again = create_splits(DataSettings('digits_lt'))
    assert splits.class_counts.counts == (140, 103, 76, 56, 42, 31, 23, 17, 12, 9)
    assert [len(classes) for _, classes in splits.class_counts.shot_split().items()] == [2, 5, 3]
    assert np.array_equal(splits.train.images, again.train.images)
    assert (len(splits.val), len(splits.test)) == (140, 200)
    assert create_splits(DataSettings('digits_lt', imbalance_factor=2)).class_counts.imbalance_factor == 2


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.startswith('sklearn'):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    load_digit_images.cache_clear()
    monkeypatch.setattr(builtins, '__import__', refuse)
    with pytest.raises(InputError, match='pip install scikit-learn'):
        load_digits_splits()

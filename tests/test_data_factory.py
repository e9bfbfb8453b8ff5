"""From settings to splits."""
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from formats import CIFAR_LT, IMAGENET_LT, INAT18
from PIL import Image
from torchvision.datasets import MNIST

from nbn_timm.data import DataSettings, create_eval_loader, create_train_loader
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.datasets import ListBenchmark, benchmarks, create_splits, find_dataset
from nbn_timm.errors import InputError
from nbn_timm.training.batch import plan_batch
from nbn_timm.training.distributed import World
from nbn_timm.training.plan import open_training_data
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast


def write_lists(folder, **lists):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in lists.items():
        (folder / f'{name}.txt').write_text(''.join(f'{path} {label}\n' for path, label in rows))


def write_folders(root, **splits):
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new('RGB', (4, 4), (index, 0, 0)).save(root / split / name / f'{index}.png')


TRAIN = [('train/cat/0.jpg', 0), ('train/cat/1.jpg', 0), ('train/big dog/0.jpg', 1)]


def test_list_dataset(tmp_path):
    write_lists(tmp_path / 'lists', a=TRAIN, b=[('x/0.jpg', 1)])
    splits = create_splits(DataSettings('list', str(tmp_path), train_list='a.txt', test_list='lists/b.txt'))
    assert [splits.train.path(index) for index in range(3)] == [str(tmp_path / path) for path, _ in TRAIN]
    assert splits.class_counts.counts == (2, 1)
    assert splits.class_counts.names == ('cat', 'big dog')
    assert splits.train_targets.tolist() == [0, 0, 1]
    assert (splits.val, len(splits.test), splits.num_classes) == (None, 1, 2)
    assert splits.defaults == OWN_IMAGES and not splits.defaults.published
    assert 'no validation split' in ' '.join(splits.notes)


def test_list_is_found_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lists(tmp_path, a=TRAIN)
    (tmp_path / 'images').mkdir()
    assert len(create_splits(DataSettings('list', 'images', train_list='a.txt')).train) == 3
    assert len(create_splits(DataSettings('list', 'images', train_list=str(tmp_path / 'a.txt'))).train) == 3


def test_only_the_parts_asked_for_are_built(tmp_path):
    write_lists(tmp_path, a=TRAIN, b=TRAIN, c=TRAIN)
    settings = DataSettings('list', str(tmp_path), train_list='a.txt', val_list='b.txt', test_list='c.txt')
    splits = create_splits(settings, parts=('test',))
    assert (splits.train, splits.val, len(splits.test)) == (None, None, 3)
    assert splits.class_counts.counts == (2, 1)
    splits = create_splits(DataSettings('list', str(tmp_path), test_list='c.txt'), parts=('test',))
    assert len(splits.test) == 3 and splits.class_counts is None and splits.num_classes is None
    assert not splits.notes  # nobody asked to train, so nobody misses the counts


def test_class_number_holds_for_every_list(tmp_path):
    write_lists(tmp_path, a=TRAIN, b=[('x', 2)])
    settings = dict(dataset='list', data_dir=str(tmp_path), train_list='a.txt', test_list='b.txt')
    with pytest.raises(InputError, match='label 2 in line 1 .*b.txt'):
        create_splits(DataSettings(**settings))
    splits = create_splits(DataSettings(**settings, num_classes=4))
    assert splits.class_counts.counts == (2, 1, 0, 0)
    assert splits.class_counts.names == ('cat', 'big dog', '2', '3')


def test_counts_file_wins(tmp_path):
    write_lists(tmp_path, a=TRAIN)
    (tmp_path / 'counts.json').write_text('[70, 7]')
    settings = dict(dataset='list', data_dir=str(tmp_path), class_counts=str(tmp_path / 'counts.json'))
    splits = create_splits(DataSettings(**settings, train_list='a.txt'))
    assert splits.class_counts.counts == (70, 7) and 'counts.json' in splits.class_counts.source
    (tmp_path / 'counts.json').write_text('[70, 7, 1]')
    with pytest.raises(InputError, match='counts 3 classes but train split of list has 2'):
        create_splits(DataSettings(**settings, train_list='a.txt', num_classes=2))


@pytest.mark.parametrize('name', [name for name, known in benchmarks().items() if isinstance(known, ListBenchmark)])
@pytest.mark.parametrize('folder', ['', 'lists'])
def test_list_benchmarks_find_their_published_lists(tmp_path, name, folder):
    benchmark = find_dataset(name)
    for part in benchmark.lists.values():
        write_lists(tmp_path / folder, **{part.name.removesuffix('.txt'): [('a/x.jpg', 0), ('b/y.jpg', 1)]})
    splits = create_splits(DataSettings(name, str(tmp_path)))
    assert (len(splits.train), len(splits.test), splits.num_classes) == (2, 2, benchmark.num_classes)
    assert splits.class_counts.num_classes == benchmark.num_classes
    assert (splits.val is None) == (name == 'inat18')
    assert splits.defaults == (INAT18 if name == 'inat18' else IMAGENET_LT)


def test_published_statistics():
    assert IMAGENET_LT.mean == (0.485, 0.456, 0.406) and IMAGENET_LT.std == (0.229, 0.224, 0.225)
    assert INAT18.mean == (0.466, 0.471, 0.380) and INAT18.std == (0.195, 0.194, 0.192)
    assert CIFAR_LT.mean == (0.4914, 0.4822, 0.4465) and CIFAR_LT.std == (0.2023, 0.1994, 0.2010)
    assert {defaults.interpolation for defaults in (IMAGENET_LT, INAT18, CIFAR_LT)} == {'bilinear'}
    assert (IMAGENET_LT.crop_pct, INAT18.crop_pct, CIFAR_LT.crop_pct) == (0.875, 0.875, 1.0)


def test_missing_benchmark_list_names_the_command(tmp_path):
    with pytest.raises(InputError, match=f'nbn-prepare places_lt --data-dir {tmp_path}'):
        create_splits(DataSettings('places_lt', str(tmp_path)))


@pytest.mark.parametrize(('given', 'whose'), [
    ({'test_list': 'a.txt'}, 'test split of list'), ({'val_list': 'a.txt'}, 'val split of list'),
    ({'val_list': 'a.txt', 'test_list': 'a.txt'}, 'val split and test split of list'),
    ({'train_list': 'a.txt', 'test_list': 'a.txt'}, 'train split of list')])
def test_a_sentence_names_the_split_that_was_read(given, whose, tmp_path):
    write_lists(tmp_path, a=TRAIN)
    splits = create_splits(DataSettings('list', str(tmp_path), num_classes=2, **given), ('val', 'test'))
    assert splits.classes.source == whose


def test_counts_file_must_cover_the_labels(tmp_path):
    write_folders(tmp_path, train={'a': 1, 'b': 1, 'c': 1})
    (tmp_path / 'counts.json').write_text('[70, 7]')
    with pytest.raises(InputError, match='counts 2 classes but train split of folder has 3'):
        create_splits(DataSettings('folder', str(tmp_path), class_counts=str(tmp_path / 'counts.json')))


def test_cifar_lt_from_list_files(tmp_path):
    write_lists(tmp_path, a=TRAIN)
    splits = create_splits(DataSettings('cifar100_lt', str(tmp_path), train_list='a.txt', test_list='a.txt'))
    assert splits.class_counts.counts == (2, 1) + (0,) * 98
    assert splits.defaults == CIFAR_LT
    assert "not from LDAM's draw" in ' '.join(splits.notes)


def test_any_dataset_can_be_made_long_tailed(tmp_path):
    write_lists(tmp_path, a=[(f'{label}/{index}.jpg', label) for label in range(3) for index in range(16)])
    write_folders(tmp_path, train={'a': 16, 'b': 16, 'c': 16}, test={'c': 1})
    settings = dict(data_dir=str(tmp_path), imbalance_factor=4)
    for kind in (dict(dataset='list', train_list='a.txt'), dict(dataset='folder')):
        splits = create_splits(DataSettings(**settings, **kind))
        assert splits.class_counts.counts == (16, 8, 4)
        assert np.bincount(splits.train.targets).tolist() == [16, 8, 4]
        assert np.array_equal(splits.train_targets, splits.train.targets)
        assert 'imbalance factor 4' in splits.class_counts.source
        other = create_splits(DataSettings(**settings, **kind, imbalance_seed=1))
        assert {splits.train.path(i) for i in range(28)} != {other.train.path(i) for i in range(28)}
        step = create_splits(DataSettings(**settings, **kind, imbalance_profile='step'))
        assert step.class_counts.counts == (16, 4, 4)


def test_folder_dataset(tmp_path):
    write_folders(tmp_path, train={'10': 2, '9': 3}, val={'10': 1}, test={'9': 1, '10': 1})
    splits = create_splits(DataSettings('folder', str(tmp_path)))
    assert splits.class_counts.names == ('9', '10')  # natural order, as timm's folder reader has it
    assert splits.class_counts.counts == (3, 2)
    assert splits.val.targets.tolist() == [1]
    alone = create_splits(DataSettings('folder', str(tmp_path)), parts=('val',))
    assert alone.val.targets.tolist() == [1] and alone.train is None


@pytest.mark.parametrize('settings, message', [
    (dict(dataset='imagenet_lr'), "unknown dataset 'imagenet_lr' .*did you mean 'imagenet_lt'"),
    (dict(dataset='list'), '--data-dir'),
    (dict(dataset='list', data_dir='/nowhere/at/all'), "'/nowhere/at/all' does not exist"),
    (dict(dataset='list', data_dir='.'), '--train-list'),
    (dict(dataset='list', data_dir='.', train_list='no.txt'), "'no.txt'.*--train-list"),
    (dict(dataset='list', data_dir='.', train_list='a.txt', test_list='no.txt'), "'no.txt'.*--test-list"),
    (dict(dataset='folder', data_dir='.'), "no folder 'train'"),
    (dict(dataset='cifar100_lt', data_dir='.', num_classes=10), '100 classes, not 10'),
    (dict(dataset='digits_lt', imbalance_profile='stairs'), "setting 'imbalance_profile' is 'stairs'"),
    (dict(dataset='digits_lt', imbalance_factor=0.5), "'imbalance_factor' is 0.5: give a number at least 1"),
    (dict(dataset='digits_lt', imbalance_factor=0), "'imbalance_factor' is 0: give a number at least 1"),
    (dict(dataset='torch/cifar10', data_dir='.'), "split 'train' of dataset 'torch/cifar10'.*--download"),
    (dict(dataset='torch/nothing', data_dir='.'), 'torch/nothing'),
    (dict(dataset='list', data_dir='.', train_list='a.txt', class_counts='no.json'), 'no.json'),
])
def test_wrong_settings_are_one_sentence(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write_lists(tmp_path, a=TRAIN)
    with pytest.raises(InputError, match=message) as caught:
        create_splits(DataSettings(**settings))
    assert '\n' not in str(caught.value)


@pytest.fixture
def mnist_dir(tmp_path):
    """Twelve training and four test images in MNIST's file format."""
    folder = tmp_path / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for part, count in (('train', 12), ('t10k', 4)):
        for name, magic, shape in (('images-idx3', 0x803, (count, 28, 28)), ('labels-idx1', 0x801, (count,))):
            data = (np.arange(np.prod(shape)).reshape(shape) % (2 if len(shape) == 1 else 256)).astype(np.uint8)
            header = np.array([magic, *shape], dtype='>i4').tobytes()
            (folder / f'{part}-{name}-ubyte').write_bytes(header + data.tobytes())
    return tmp_path


def test_timm_dataset_types_work(mnist_dir):
    splits = create_splits(DataSettings('torch/mnist', str(mnist_dir)))
    assert isinstance(splits.train, MNIST) and isinstance(splits.test, MNIST)
    assert (len(splits.train), len(splits.test), splits.val) == (12, 4, None)
    assert splits.class_counts.counts == (6, 6) + (0,) * 8
    assert splits.class_counts.names == tuple(MNIST.classes)
    drawn = create_splits(DataSettings('torch/mnist', str(mnist_dir), imbalance_factor=3, num_classes=10))
    transformed = drawn.train
    transformed.transform = np.asarray
    assert transformed[0][0].shape == (28, 28)
    assert sum(drawn.class_counts.counts) == len(drawn.train) == len(drawn.train_targets) < 12
    named = create_splits(DataSettings('torch/mnist', str(mnist_dir), val_split='validation', test_split=''))
    assert len(named.val) == 4 and named.test is None


def test_timm_dataset_can_be_evaluated_without_its_training_part(tmp_path):
    write_folders(tmp_path, validation={'a': 2, 'b': 1})
    (tmp_path / 'train').mkdir()
    splits = create_splits(DataSettings('torch/image_folder', str(tmp_path)), parts=('test',))
    assert len(splits.test) == 3 and splits.class_counts is None and splits.num_classes == 2
    with pytest.raises(InputError, match="split 'train'"):
        create_splits(DataSettings('torch/image_folder', str(tmp_path)))


def test_streamed_dataset_reaches_the_loaders(tmp_path, monkeypatch):
    class Streamed(timm.data.IterableImageDataset):
        def __init__(self, part):
            super().__init__('', reader=[(Image.new('RGB', (32, 32), (i, 0, 0)), i % 3) for i in range(7)])
            self.part = part

    opened = []

    def create_dataset(name, split, **settings):
        opened.append((name, split, settings))
        return Streamed(split)

    monkeypatch.setattr(timm.data, 'create_dataset', create_dataset)
    (tmp_path / 'counts.json').write_text(json.dumps({'a': 3, 'b': 2, 'c': 2}))
    settings = DataSettings(
        'hfids/x', str(tmp_path), class_counts=str(tmp_path / 'counts.json'), batch_size=4, seed=5)
    splits = create_splits(settings)
    assert [(split, given['is_training'], given['batch_size'], given['seed']) for _, split, given in opened] == [
        ('train', True, 4, 5), ('validation', False, 4, 5)]
    assert splits.class_counts.names == ('a', 'b', 'c') and splits.train_targets is None
    train = create_train_loader(splits.train, None, batch_size=4, defaults=CIFAR_LT, num_workers=0)
    train.set_epoch(0)
    assert [len(targets) for _, targets in train] == [4]
    test = create_eval_loader(splits.test, batch_size=4, defaults=CIFAR_LT, num_workers=0)
    assert [len(targets) for _, targets in test] == [4, 3]
    with pytest.raises(InputError, match='2 processes cannot evaluate a stream of timm'):  # it repeats images there
        create_eval_loader(splits.test, batch_size=4, defaults=CIFAR_LT, num_workers=0, world_size=2)
    assert create_splits(replace(settings, test_split='')).test is None  # as the sentence advises for a training
    run = TrainSettings.of({**settings.values(), 'model': 'resnet20'})
    monkeypatch.setattr(World, 'barrier', lambda self: None)
    with pytest.raises(InputError, match='2 processes cannot evaluate a stream of timm'):  # before the first epoch
        open_training_data(run, plan_batch(run.batch, 2), World(torch.device('cpu'), size=2))
    with pytest.raises(InputError, match='cannot be made long-tailed'):
        create_splits(DataSettings('hfids/x', str(tmp_path), imbalance_factor=10))

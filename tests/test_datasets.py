"""The room of datasets: one file, one class and one decorator each, and everything else derives from them."""
import ast
import hashlib
import json
import re
import tarfile
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nbn_timm
from nbn_timm.cli import prepare, train
from nbn_timm.config import build_parser
from nbn_timm.data import ClassCounts, DataSettings, create_transform
from nbn_timm.data.longtail import draw_long_tail, profile_counts
from nbn_timm.data.train_transforms import TRAIN_TRANSFORMS
from nbn_timm.datasets import (
    DATASETS,
    NamedDataset,
    benchmarks,
    create_splits,
    dataset_choices,
    describe_draw,
    find_benchmark,
    find_dataset,
)
from nbn_timm.datasets.cub200_lt import Cub200LT
from nbn_timm.datasets.fetching import Archive
from nbn_timm.datasets.tables import formats_table
from nbn_timm.datasets.tiny_imagenet_lt import TinyImageNetLT
from nbn_timm.errors import InputError
from nbn_timm.registry import Registry, import_modules
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast
ROOT = Path(nbn_timm.__file__).parent  # the package, which may be installed elsewhere
CHECKOUT = Path(__file__).parents[1]

STRANGER = '''
"""Patterns of noise, by nobody."""
import numpy as np
from torchvision import transforms

from nbn_timm.data import ArraySamples, DataDefaults
from nbn_timm.data.train_transforms import TrainTransform, register_train_transform
from nbn_timm.datasets import DrawnBenchmark, register_benchmark


@register_train_transform('turned')
class Turned(TrainTransform):
    words = 'a quarter turn, crop{size}'
    hflip = 0.0

    def crop(self, height, width, interpolation):
        return [transforms.RandomRotation((90, 90)), transforms.CenterCrop((height, width))]


@register_benchmark('patterns_lt')
class PatternsLT(DrawnBenchmark):
    title = 'Patterns-LT'
    num_classes = 3
    home = 'https://example.org/patterns'
    terms = 'CC0'
    factor = 4.0
    shot_limits = (12, 6)
    largest = 16
    held_out = {'test': 6}
    needs_folder = False
    defaults = DataDefaults(input_size=(3, 32, 32), crop_pct=1.0, train_transform='turned', color_jitter=None)

    def load(self, settings, part):
        targets = np.repeat(np.arange(3), 16 if part == 'train' else 2)
        images = np.random.default_rng(0).integers(0, 256, (len(targets), 32, 32, 3), dtype=np.uint8)
        return ArraySamples(images, targets), ('dots', 'lines', 'waves')
'''


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A package of one module that has one benchmark."""
    package = tmp_path / 'strangers'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / 'patterns_lt.py').write_text(STRANGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    registries = (DATASETS, TRAIN_TRANSFORMS)
    before = [dict(registry) for registry in registries]
    import_modules('strangers', [str(package)])
    yield 'patterns_lt'
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_a_new_benchmark_is_one_class_and_one_decorator(stranger, tmp_path, capsys):
    """It is read, prepared, trained on and described without a word about it anywhere else."""
    counts = (16, 8, 4)
    splits = create_splits(DataSettings(stranger))
    assert splits.class_counts.counts == counts and splits.class_counts.names == ('dots', 'lines', 'waves')
    assert (splits.num_classes, splits.shot_limits, splits.defaults.input_size) == (3, (12, 6), (3, 32, 32))
    assert stranger in dataset_choices() and stranger in build_parser(TrainSettings, 'nbn-train', '').format_help()

    turned = create_transform(splits.defaults, is_training=True)(Image.fromarray(splits.train.images[0]))
    assert np.array_equal(turned.permute(1, 2, 0), np.rot90(splits.train.images[0]))
    assert '| a quarter turn, crop 32 |' in formats_table()

    prepare.main([stranger, '--data-dir', str(tmp_path), '--imbalance-factor', '2'])
    assert json.loads((tmp_path / f'{stranger}_exp_2.json').read_text())['counts'] == list(profile_counts(3, 16, 2))
    assert '28 training images' not in capsys.readouterr().out

    train.main(['--dataset', stranger, '--model', 'resnet20', '--epochs', '1', '--batch-size', '8', '--workers', '0',
                '--device', 'cpu', '--output', str(tmp_path), '--experiment', 'run'])
    assert json.loads((tmp_path / 'run' / 'test.json').read_text())['num_samples'] == 6

    card = pytest.importorskip('nbn_timm.hub.card')
    data = card._data(splits.class_counts, DataSettings(stranger))
    for part in ('Patterns-LT', 'https://example.org/patterns', 'CC0', 'rule of LDAM', '28 in 3 classes'):
        assert part in data
    assert '| augmentation | a quarter turn, crop |' in card._recipe(
        checkpoint_record(str(tmp_path / 'run' / 'last.pth.tar')))


def test_no_other_file_names_a_benchmark():
    """Names in docstrings are examples for people; code outside the room has none."""
    names = re.compile(rf'(?<![a-z0-9])({"|".join(benchmarks())})(?![a-z0-9])')
    found = []
    for path in sorted(ROOT.rglob('*.py')):
        if path.is_relative_to(ROOT / 'datasets'):
            continue
        tree = ast.parse(path.read_text(encoding='utf-8'))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = {ast.Constant: 'value', ast.Name: 'id', ast.Attribute: 'attr', ast.keyword: 'arg'}.get(type(node))
            value = getattr(node, text) if text else None
            if isinstance(value, str) and id(node) not in prose and names.search(value):
                found.append(f'{path.relative_to(ROOT)}:{getattr(node, "lineno", "")}: {value[:60]}')
    assert not found


@pytest.mark.parametrize('name', DATASETS)
def test_every_dataset_declares_what_it_needs(name):
    known = find_dataset(f'{name}x' if name.endswith('/') else name)
    settings = DataSettings(known.name)
    used = known.used_settings(settings)
    assert used <= {field.name for field in fields(DataSettings)} and {'dataset', 'imbalance_factor'} <= used
    assert ('data_dir' in used) or not known.needs_folder
    assert {'imbalance_profile', 'imbalance_seed'} <= known.used_settings(replace(settings, imbalance_factor=10))
    assert ('imbalance_seed' in used) == (known.factor is not None)


@pytest.mark.parametrize('name', benchmarks())
def test_every_benchmark_is_described(name):
    known = find_benchmark(name)
    module = type(known).__module__
    assert module == f'nbn_timm.datasets.{name}', 'one file each, of the name'
    assert known.title and known.home.startswith('http') and known.images and known.terms
    assert known.defaults.published and not find_dataset('folder').defaults.published
    names = known.class_names()
    assert names is None or len(names) == known.num_classes
    statistics = known.statistics()
    assert sum(statistics.shots) == known.num_classes
    assert statistics.largest >= statistics.train / known.num_classes >= statistics.smallest
    assert describe_draw(DataSettings(name))
    assert describe_draw(DataSettings(name, train_list='a.txt')) == 'list file `a.txt`'


@pytest.mark.parametrize('settings, used, unused', [
    (dict(dataset='folder'), {'data_dir'}, {'train_list', 'download', 'test_split', 'imbalance_profile'}),
    (dict(dataset='list'), {'train_list', 'val_list', 'test_list'}, {'download', 'val_split'}),
    (dict(dataset='imagenet_lt'), {'test_list', 'data_dir'}, {'download', 'imbalance_seed'}),
    (dict(dataset='cifar100_lt'), {'download', 'train_list', 'imbalance_profile'}, {'train_split'}),
    (dict(dataset='cifar100_lt', train_list='a.txt'), {'train_list'}, {'download', 'imbalance_profile'}),
    (dict(dataset='cifar10_lt', test_list='a.txt', imbalance_factor=2.0), {'imbalance_seed'}, {'download'}),
    (dict(dataset='digits_lt'), {'imbalance_profile'}, {'data_dir', 'train_list', 'download'}),
    (dict(dataset='HFDS/user/name'), {'train_split', 'download'}, {'train_list', 'batch_size', 'seed'}),
    (dict(dataset='hfids/x'), {'val_split', 'batch_size', 'seed'}, {'test_list'}),
    (dict(dataset='wds/x'), {'val_split', 'data_dir'}, {'test_list', 'download', 'batch_size'}),
])
def test_settings_without_effect_are_known(settings, used, unused):
    found = find_dataset(settings['dataset']).used_settings(DataSettings(**settings))
    assert used <= found and not unused & found


def test_what_is_not_drawn_takes_no_draw(tmp_path):
    with pytest.raises(InputError, match='places_lt is not drawn'):
        prepare.main(['places_lt', '--data-dir', str(tmp_path), '--imbalance-profile', 'step'])


def test_a_registry_holds_classes_by_name():
    fruit = Registry('fruit')

    @fruit.register('apple')
    class Apple:
        pass

    assert fruit.find('apple') is Apple and list(fruit) == ['apple']
    with pytest.raises(InputError, match=r"unknown fruit 'appel' \(there are apple\); did you mean 'apple'"):
        fruit.find('appel')
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        fruit.register('apple')(Apple)


def test_unknown_datasets_name_the_nearest():
    with pytest.raises(InputError, match=r"unknown dataset 'foo/bar' .*imagenet_lt.*torch/"):
        find_dataset('foo/bar')
    assert find_benchmark('list') is find_benchmark('nothing') is find_benchmark(None) is None
    assert isinstance(find_dataset('hfds/user/name'), NamedDataset)


# The archives, with three and two classes.

def picture(path, seed, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path, 'JPEG')


WNIDS = ['n03', 'n01', 'n02']  # not in alphabetical order, as in the archive


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The layout of tiny-imagenet-200.zip."""
    monkeypatch.setattr(TinyImageNetLT, 'num_classes', 3)
    root = tmp_path / 'tiny-imagenet-200'
    for wnid in WNIDS:
        for index in range(12):
            picture(root / 'train' / wnid / 'images' / f'{wnid}_{index}.JPEG', index)
        (root / 'train' / wnid / f'{wnid}_boxes.txt').write_text('')
    (root / 'train' / 'n01' / 'images' / '._n01_0.JPEG').touch()
    labels = ['n02', 'n03', 'n02', 'n01']
    for index in range(4):
        picture(root / 'val' / 'images' / f'val_{index}.JPEG', index)
    (root / 'val' / 'val_annotations.txt').write_text(
        ''.join(f'val_{index}.JPEG\t{wnid}\t0\t32\t44\t62\n' for index, wnid in enumerate(labels)))
    picture(root / 'test' / 'images' / 'test_0.JPEG', 0)
    (root / 'wnids.txt').write_text('\n'.join(WNIDS) + '\n')
    (root / 'words.txt').write_text('n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tcrane\n')
    return tmp_path


def test_tiny_imagenet_lt_is_drawn_from_the_archive_as_it_is(tiny):
    splits = create_splits(DataSettings('tiny_imagenet_lt', str(tiny)))
    assert splits.class_counts.counts == tuple(profile_counts(3, 12, 100)) == (12, 1, 1)
    assert splits.class_counts.names == ('goldfish, Carassius auratus', 'n02', 'n03')  # two cranes
    assert splits.val is None and splits.test.targets.tolist() == [1, 2, 1, 0]
    assert splits.test.image(3).size == (64, 64)
    files = sorted(f'n02_{index}.JPEG' for index in range(12))  # as torchvision orders them: 0, 1, 10, 11, 2
    everything = np.repeat(np.arange(3), 12)
    kept = draw_long_tail(everything, 3, 100)
    assert splits.train.path(12).endswith(f'train/n02/images/{files[kept[12] - 12]}')
    inside = create_splits(DataSettings('tiny_imagenet_lt', str(tiny / 'tiny-imagenet-200')), ('test',))
    assert len(inside.test) == 4 and inside.class_counts == splits.class_counts


def test_tiny_imagenet_lt_is_scored_without_its_training_images(tiny):
    for path in (tiny / 'tiny-imagenet-200' / 'train').rglob('*.JPEG'):
        path.unlink()
    splits = create_splits(DataSettings('tiny_imagenet_lt', str(tiny)), ('test',))
    assert len(splits.test) == 4 and splits.class_counts is None
    with pytest.raises(InputError, match='train/n01/images.*has no images'):
        create_splits(DataSettings('tiny_imagenet_lt', str(tiny)))


def test_tiny_imagenet_lt_is_prepared_from_its_archive(tiny, tmp_path_factory, monkeypatch, capsys):
    source = tmp_path_factory.mktemp('source')
    with zipfile.ZipFile(source / 'tiny-imagenet-200.zip', 'w') as archive:
        for path in sorted(tiny.rglob('*')):
            archive.write(path, path.relative_to(tiny))
    data_dir = tmp_path_factory.mktemp('data')
    command = ['tiny_imagenet_lt', '--data-dir', str(data_dir), '--source', str(source)]
    with pytest.raises(InputError, match='not the published tiny-imagenet-200.zip'):
        prepare.main(command)
    assert not list(data_dir.iterdir())
    md5 = hashlib.md5((source / 'tiny-imagenet-200.zip').read_bytes()).hexdigest()
    monkeypatch.setattr(TinyImageNetLT, 'archive', replace(TinyImageNetLT.archive, md5=md5))
    prepare.main(command)
    assert {path.name for path in data_dir.iterdir()} == {
        'tiny-imagenet-200', 'tiny-imagenet-200.zip', 'tiny_imagenet_lt_exp_100.json'}
    assert json.loads((data_dir / 'tiny_imagenet_lt_exp_100.json').read_text())['counts'] == [12, 1, 1]
    assert 'test: val/: all 4 images there' in capsys.readouterr().out

    (data_dir / 'tiny-imagenet-200' / 'val' / 'images' / 'val_2.JPEG').unlink()
    with pytest.raises(InputError, match='1 images are missing'):
        prepare.main(command)


@pytest.mark.parametrize('file, text, message', [
    ('wnids.txt', 'n01\n', 'names 1 classes instead of 3'),
    ('val/val_annotations.txt', 'val_0.JPEG\tn99\t0\n', 'no class of wnids.txt'),
    ('val/val_annotations.txt', '', 'no class of wnids.txt'),
])
def test_a_damaged_tiny_imagenet_is_one_sentence(tiny, file, text, message):
    (tiny / 'tiny-imagenet-200' / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        create_splits(DataSettings('tiny_imagenet_lt', str(tiny)))
    assert '\n' not in str(caught.value)


@pytest.fixture
def birds(tmp_path, monkeypatch):
    """The layout of CUB_200_2011.tgz."""
    monkeypatch.setattr(Cub200LT, 'num_classes', 2)
    root = tmp_path / 'CUB_200_2011'
    classes = ['001.Black_footed_Albatross', '002.Laysan_Albatross']
    images = [(f'{classes[index // 6]}/Bird_{index:04}.jpg', index // 6 + 1, int(index % 6 < 4)) for index in range(12)]
    for index, (image, _, _) in enumerate(images):
        picture(root / 'images' / image, index, size=20)
    for name, column in (('images', 0), ('image_class_labels', 1), ('train_test_split', 2)):
        (root / f'{name}.txt').write_text(''.join(f'{i} {row[column]}\n' for i, row in enumerate(images, start=1)))
    (root / 'classes.txt').write_text(''.join(f'{i} {name}\n' for i, name in enumerate(classes, start=1)))
    return tmp_path


def test_cub200_lt_is_drawn_from_the_archive_as_it_is(birds):
    splits = create_splits(DataSettings('cub200_lt', str(birds), imbalance_factor=2))
    assert splits.class_counts.counts == (4, 2)
    assert splits.class_counts.names == ('Black footed Albatross', 'Laysan Albatross')
    assert splits.test.targets.tolist() == [0, 0, 1, 1] and splits.test.path(0).endswith('Bird_0004.jpg')
    assert splits.shot_limits == (20, 5) and splits.test.image(0).size == (20, 20)
    assert create_splits(DataSettings('cub200_lt', str(birds))).class_counts.imbalance_factor == 4  # int(4 / 10) is 1

    (birds / 'CUB_200_2011' / 'train_test_split.txt').write_text('1 1\n')
    with pytest.raises(InputError, match='do not fit together'):
        create_splits(DataSettings('cub200_lt', str(birds)))


def test_a_tar_archive_is_unpacked(birds, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp('data')
    with tarfile.open(data_dir / 'CUB_200_2011.tgz', 'w:gz') as archive:
        archive.add(birds / 'CUB_200_2011', 'CUB_200_2011')
    md5 = hashlib.md5((data_dir / 'CUB_200_2011.tgz').read_bytes()).hexdigest()
    archive = Archive('http://127.0.0.1:9', 'CUB_200_2011.tgz', md5, 'CUB_200_2011', 'images.txt')
    assert archive.obtain(data_dir, None) == data_dir / 'CUB_200_2011'  # what is there already is not fetched
    assert archive.find(data_dir / 'CUB_200_2011') == data_dir / 'CUB_200_2011'
    assert len(list((data_dir / 'CUB_200_2011').rglob('*.jpg'))) == 12


def test_missing_archives_name_the_command(tmp_path):
    with pytest.raises(InputError, match=f'nbn-prepare cub200_lt --data-dir {tmp_path}'):
        create_splits(DataSettings('cub200_lt', str(tmp_path)))


def test_the_tables_of_the_docs_are_as_the_benchmarks_say():
    from nbn_timm.datasets.tables import formats_table, sizes_table, sources_table
    page = (CHECKOUT / 'docs' / 'data.md').read_text(encoding='utf-8')
    for table in (sizes_table(), sources_table(), formats_table()):
        assert table in page, 'run python benchmarks/dataset_tables.py'


def test_counts_of_the_published_draw():
    statistics = find_benchmark('cifar100_lt').statistics()
    assert (statistics.train, statistics.shots) == (10_847, (35, 35, 30))
    assert find_benchmark('cifar10_lt').statistics().train == 12_406
    assert find_benchmark('digits_lt').statistics().train == 509
    assert ClassCounts.from_dict({'counts': profile_counts(200, 500, 100)}).total == 21_549  # counted on the archive

"""Which draw image files of CIFAR have: on a small stand-in for CIFAR, of which draws are made as LDAM's code does."""
import hashlib
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from nbn_timm.cli import prepare
from nbn_timm.data import DataSettings
from nbn_timm.datasets import create_splits, find_benchmark
from nbn_timm.datasets.cifar10_lt import Cifar10LT
from nbn_timm.datasets.cifar_draw import CifarOrder, Files, find_places, judge, labels_sha256, places_sha256
from nbn_timm.errors import InputError

pytestmark = pytest.mark.fast

CLASSES, IMAGES = 10, 20
NAMES = [f'{letter}_class' for letter in 'abcdefghij']


def by_ldam(labels: np.ndarray, factor: float = 10, seed: int = 0) -> list[int]:
    """The places that LDAM's data set keeps: its rule, on numpy's global generator."""
    state = np.random.get_state()
    np.random.seed(seed)
    kept = []
    for label in range(CLASSES):
        places = np.where(labels == label)[0]
        np.random.shuffle(places)
        kept += places[:int(IMAGES * (1 / factor) ** (label / (CLASSES - 1.0)))].tolist()
    np.random.set_state(state)
    return kept


LABELS = np.random.RandomState(5).permutation(np.repeat(np.arange(CLASSES), IMAGES))
DRAWN = by_ldam(LABELS)
ORDER = CifarOrder(CLASSES, IMAGES, labels_sha256(LABELS), {('exp', 10): places_sha256(np.array(DRAWN))})
RANKS = [int(np.sum(LABELS[:place] == LABELS[place])) for place in range(len(LABELS))]
PIXELS = np.random.RandomState(6).randint(0, 256, (len(LABELS), 32, 32, 3)).astype(np.uint8)

# How copies name their files, as functions of the place in CIFAR.
BY_PLACE = {'place': lambda place: f'{place:05d}.png', 'place from 1': lambda place: f'img{place + 1}.png',
            'place first': lambda place: f'{place}_{NAMES[LABELS[place]]}.png'}
BY_RANK = {'rank': lambda place: f'{RANKS[place]:04d}.png', 'rank from 1': lambda place: f'no-{RANKS[place] + 1}.png'}
UNTOLD = {'words': lambda place: f'{hashlib.md5(bytes([place])).hexdigest()}x.png'}


def files_of(naming, places, tmp_path='/nowhere') -> Files:
    return Files(tmp_path, [f'train/{NAMES[LABELS[place]]}/{naming(place)}' for place in places], LABELS[list(places)])


EVERYTHING = np.random.RandomState(7).permutation(len(LABELS)).tolist()
OTHER = by_ldam(LABELS, seed=1)


@pytest.mark.parametrize('naming', [*BY_PLACE.values(), *BY_RANK.values()], ids=[*BY_PLACE, *BY_RANK])
def test_numbers_in_names_tell_the_places(naming):
    places = find_places(files_of(naming, EVERYTHING), ORDER)
    expected = [RANKS[place] for place in EVERYTHING] if places.in_class else EVERYTHING
    assert (places.values - min(places.values)).tolist() == expected
    assert places.in_class == (naming in BY_RANK.values())
    assert find_places(files_of(naming, EVERYTHING[1:]), ORDER) is None  # an image is missing


def test_numbers_in_another_order_tell_nothing():
    """They are those of all images, but the labels are not in CIFAR's order."""
    files = files_of(BY_PLACE['place'], EVERYTHING)
    assert find_places(files, CifarOrder(CLASSES, IMAGES, labels_sha256(LABELS[::-1]), {})) is None
    assert find_places(files_of(UNTOLD['words'], EVERYTHING), ORDER) is None


@pytest.mark.parametrize('name', [*BY_PLACE, *BY_RANK, *UNTOLD])
@pytest.mark.parametrize('whole', [True, False], ids=['all images there', 'only those of the list'])
def test_ldams_draw_is_known_by_the_names(name, whole):
    naming = {**BY_PLACE, **BY_RANK, **UNTOLD}[name]
    verdict = judge(files_of(naming, DRAWN), ORDER, files_of(naming, EVERYTHING if whole else DRAWN))
    assert verdict.published is (True if name in BY_PLACE else None)
    assert ('names cannot prove' in verdict.text) == (name in BY_RANK)
    assert ('nothing here tells' in verdict.text) == (name in UNTOLD)


def test_another_draw_is_told_with_what_it_shares():
    verdict = judge(files_of(BY_PLACE['place'], OTHER), ORDER, files_of(BY_PLACE['place'], EVERYTHING))
    same = len(set(OTHER) & set(DRAWN))
    assert verdict.published is False and f'{same} of {len(DRAWN)} images are in both' in verdict.text
    swapped = [*DRAWN[:-1], next(place for place in EVERYTHING if LABELS[place] == 9 and place not in DRAWN)]
    assert judge(files_of(BY_PLACE['place'], swapped), ORDER, files_of(BY_PLACE['place'], EVERYTHING)
                 ).published is False


def test_a_draw_by_sha1_of_the_names_is_known():
    def digest(place):
        return hashlib.sha1(UNTOLD['words'](place).encode()).digest()

    counts = np.bincount(LABELS[DRAWN])
    first = [place for label in range(CLASSES)
             for place in sorted(np.flatnonzero(LABELS == label).tolist(), key=digest)[:counts[label]]]
    verdict = judge(files_of(UNTOLD['words'], first), ORDER, files_of(UNTOLD['words'], EVERYTHING))
    assert verdict.published is False and 'SHA-1' in verdict.text


@pytest.mark.parametrize('places, text', [(EVERYTHING, 'no draw'), (EVERYTHING[:50], 'no such numbers')])
def test_a_list_that_is_no_long_tail_is_told(places, text):
    assert text in judge(files_of(BY_PLACE['place'], places), ORDER).text


def test_published_digests_are_of_the_published_sizes():
    for name, classes in (('cifar100_lt', 100), ('cifar10_lt', 10)):
        order = find_benchmark(name).order
        assert order.classes == classes and order.classes * order.images == 50000
        assert {('exp', 10), ('exp', 50), ('exp', 100), ('exp', 200)} <= order.draws.keys()
        assert len({*order.draws.values(), order.labels_sha256}) == len(order.draws) + 1


# nbn-prepare ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def cifar(monkeypatch):
    """The stand-in in place of CIFAR-10."""
    monkeypatch.setattr(Cifar10LT, 'order', ORDER)
    monkeypatch.setattr(Cifar10LT, 'factor', 10.0)


def write_images(data_dir, naming, places, pixels=PIXELS):
    for path, place in zip(files_of(naming, places).paths, places, strict=True):
        (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[place]).save(data_dir / path)


def write_originals(folder, kind, monkeypatch):
    folder.mkdir(exist_ok=True)
    if kind == 'Parquet':
        parquet = pytest.importorskip('pyarrow.parquet')
        import pyarrow

        def png(image):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, 'png')
            return stream.getvalue()

        parquet.write_table(pyarrow.table({
            'img': [{'bytes': png(image), 'path': None} for image in PIXELS], 'label': LABELS.tolist()}),
            folder / 'train-00000-of-00001.parquet')
        return
    (folder / CIFAR10.base_folder).mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (folder / CIFAR10.base_folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    rows = PIXELS.transpose(0, 3, 1, 2).reshape(len(LABELS), -1)
    for part in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, part, [
            write(f'{part}_{half}', {'data': rows[half * 100:half * 100 + 100],
                                     'labels': LABELS[half * 100:half * 100 + 100].tolist()}) for half in (0, 1)])
    _, md5 = write(CIFAR10.meta['filename'], {CIFAR10.meta['key']: NAMES})
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': md5})


def written(path) -> list[str]:
    return [line.rsplit(' ', 1)[0] for line in path.read_text().splitlines()]


@pytest.mark.parametrize('kind', ['torchvision', 'Parquet'])
def test_prepare_finds_ldams_draw_by_the_pixels(cifar, tmp_path, monkeypatch, capsys, kind):
    naming = UNTOLD['words']
    pixels = PIXELS.copy()
    write_originals(tmp_path / 'originals', kind, monkeypatch)
    data_dir = tmp_path / 'copy'
    write_images(data_dir, naming, EVERYTHING, pixels)
    (data_dir / 'lists').mkdir()
    for name, places in (('ldams', DRAWN), ('another', OTHER)):
        (data_dir / 'lists' / f'{name}_train.txt').write_text(''.join(
            f'{path} {label}\n' for path, label in zip(files_of(naming, places).paths, LABELS[places], strict=True)))
    prepare.main(['cifar10_lt', '--data-dir', str(data_dir), '--source', str(tmp_path / 'originals')])
    out = capsys.readouterr().out
    assert f"ldams_train.txt: {len(DRAWN)} images, LDAM's draw, by the pixels" in out
    assert f"another draw than LDAM's, by the pixels: {len(set(OTHER) & set(DRAWN))} of {len(DRAWN)}" in out
    assert written(data_dir / 'cifar10_lt_exp_10_train.txt') == files_of(naming, DRAWN).paths

    given = DataSettings('cifar10_lt', str(data_dir), train_list='cifar10_lt_exp_10_train.txt')
    assert any("made: LDAM's draw, by the pixels" in note for note in create_splits(given, ('train',)).notes)
    assert find_benchmark('cifar10_lt').remark(given.train_list) == ''
    with open(data_dir / 'cifar10_lt_exp_10_train.txt', 'a') as file:  # the record is of another list now
        file.write(f'{files_of(naming, [DRAWN[0]]).paths[0]} {LABELS[DRAWN[0]]}\n')
    assert any("not from LDAM's draw" in note for note in create_splits(given, ('train',)).notes)


def test_prepare_says_what_is_not_there(cifar, tmp_path, monkeypatch, capsys):
    write_originals(tmp_path / 'originals', 'torchvision', monkeypatch)
    pixels = PIXELS.copy()
    changed, left_out = DRAWN[3], DRAWN[7]
    pixels[changed] ^= 1  # as JPEG does
    write_images(tmp_path / 'copy', UNTOLD['words'], [place for place in EVERYTHING if place != left_out], pixels)
    (tmp_path / 'copy' / 'my_train.txt').write_text(''.join(
        f'{path} {label}\n' for path, label in zip(
            files_of(UNTOLD['words'], [changed, *OTHER[1:]]).paths, LABELS[[changed, *OTHER[1:]]], strict=True)
        if (tmp_path / 'copy' / path).is_file()))
    prepare.main(['cifar10_lt', '--data-dir', str(tmp_path / 'copy'), '--source', str(tmp_path / 'originals')])
    assert f"2 of {len(DRAWN)} images of LDAM's draw are not among the 199 image files" in capsys.readouterr().out
    assert not list((tmp_path / 'copy').glob('*exp*'))
    prepare.main(['cifar10_lt', '--data-dir', str(tmp_path / 'copy')])
    assert "cannot be made from the 199 image files" in capsys.readouterr().out


@pytest.mark.parametrize('name', [*BY_PLACE, *BY_RANK])
def test_prepare_makes_ldams_draw_by_the_names(cifar, tmp_path, capsys, name):
    naming = {**BY_PLACE, **BY_RANK}[name]
    for path in files_of(naming, EVERYTHING).paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    prepare.main(['cifar10_lt', '--data-dir', str(tmp_path)])
    proven = name in BY_PLACE
    path = tmp_path / f'cifar10_lt_exp_10_train{"" if proven else "_unproven"}.txt'
    assert written(path) == files_of(naming, DRAWN).paths
    record = json.loads(path.with_suffix('.json').read_text())
    assert record['proven'] is proven and record['size'] == len(DRAWN)
    assert ('names cannot prove' in record['draw']) is not proven
    capsys.readouterr()
    prepare.main(['cifar10_lt', '--data-dir', str(tmp_path)])  # judges its own list
    assert f"{path.name}: {len(DRAWN)} images, LDAM's draw" in capsys.readouterr().out


def test_originals_of_another_order_are_refused(cifar, tmp_path, monkeypatch):
    write_originals(tmp_path / 'originals', 'Parquet', monkeypatch)
    write_images(tmp_path / 'copy', UNTOLD['words'], EVERYTHING[:0] + [int(np.flatnonzero(LABELS == label)[0])
                                                                       for label in range(CLASSES)])
    monkeypatch.setattr(Cifar10LT, 'order', CifarOrder(CLASSES, IMAGES, labels_sha256(LABELS[::-1]), {}))
    with pytest.raises(InputError, match="not CIFAR's training images in their order"):
        prepare.main(['cifar10_lt', '--data-dir', str(tmp_path / 'copy'), '--source', str(tmp_path / 'originals')])


def test_report_of_the_draw_says_that_it_is_the_published_one(cifar, tmp_path, monkeypatch, capsys):
    write_originals(tmp_path, 'torchvision', monkeypatch)
    monkeypatch.setattr(CIFAR10, 'download', lambda self: None)
    prepare.main(['cifar10_lt', '--data-dir', str(tmp_path)])
    assert "LDAM's published draw, by its SHA-256" in capsys.readouterr().out
    assert json.loads((tmp_path / 'cifar10_lt_exp_10.json').read_text())['draw'].startswith("LDAM's published draw")
    prepare.main(['cifar10_lt', '--data-dir', str(tmp_path), '--imbalance-factor', '4'])
    assert "LDAM's rule on CIFAR's own order" in capsys.readouterr().out

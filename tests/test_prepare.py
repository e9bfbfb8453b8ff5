"""nbn-prepare, against a server on the loopback address."""
import functools
import hashlib
import http.server
import io
import json
import pickle
import subprocess
import tarfile
import threading

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from nbn_timm.cli import prepare
from nbn_timm.data.longtail import draw_long_tail
from nbn_timm.datasets import DATASETS, ListBenchmark, ListFile, benchmarks
from nbn_timm.datasets.fetching import report_missing
from nbn_timm.datasets.list_benchmark import LISTS_URL
from nbn_timm.errors import InputError

LISTS = {
    'Tiny_train.txt': 'train/cat/0.jpg 0\ntrain/cat/1.jpg 0\ntrain/dog one/0.jpg 1\n',
    'Tiny_test.txt': 'val/cat/9.jpg 0\nval/dog one/9.jpg 1\n',
}


def blob_id(text):
    return subprocess.run(
        ['git', 'hash-object', '--stdin'], input=text, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def tiny(monkeypatch):
    """A benchmark of two short lists."""
    class Tiny(ListBenchmark):
        title = folder = 'Tiny'
        num_classes = 2
        lists = {part: ListFile(f'Tiny_{part}.txt', blob_id(LISTS[f'Tiny_{part}.txt'])) for part in ('train', 'test')}
        images = 'the tiny images'
        home = 'the tiny place'

    monkeypatch.setitem(DATASETS, 'tiny', Tiny)


@pytest.fixture
def server(tmp_path):
    """A folder and the address under which it is served."""
    folder = tmp_path / 'served'
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Handler, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield folder, f'http://127.0.0.1:{running.server_address[1]}'
        running.shutdown()
        thread.join()


def publish(folder):
    (folder / 'Tiny').mkdir(parents=True)
    for name, text in LISTS.items():
        (folder / 'Tiny' / name).write_text(text)


def add_images(data_dir, *names):
    for name in names:
        (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / name).touch()


ALL_IMAGES = [line.rsplit(' ', 1)[0] for text in LISTS.values() for line in text.splitlines()]


def test_lists_are_downloaded_checked_and_kept(tiny, server, tmp_path, capsys):
    folder, address = server
    publish(folder)
    data_dir = tmp_path / 'data'
    add_images(data_dir, *ALL_IMAGES)
    prepare.main(['tiny', '--data-dir', str(data_dir), '--source', address])
    assert {name: (data_dir / name).read_text() for name in LISTS} == LISTS
    assert 'tiny is complete: 5 images' in capsys.readouterr().out

    for name in LISTS:
        (folder / 'Tiny' / name).unlink()
    prepare.main(['tiny', '--data-dir', str(data_dir), '--source', address])
    assert capsys.readouterr().out.count('there already') == 2


def test_missing_images_are_counted_by_folder_and_named(tiny, tmp_path, capsys):
    publish(tmp_path)
    add_images(tmp_path, 'train/cat/0.jpg', 'val/cat/9.jpg', 'val/dog one/9.jpg')
    with pytest.raises(InputError, match='2 of 5 images are missing.*the tiny images from the tiny place'):
        prepare.main(['tiny', '--data-dir', str(tmp_path), '--source', str(tmp_path)])
    out = capsys.readouterr().out
    assert 'train/: 2 of 3 images missing: train/cat/1.jpg, train/dog one/0.jpg' in out
    assert 'val/: all 2 images there' in out


def test_many_missing_images_are_abbreviated(tiny, tmp_path, capsys):
    assert report_missing('x', [f'train/{index}.jpg' for index in range(1200)], tmp_path) == 1200
    assert '1,200 of 1,200 images missing: train/0.jpg, train/1.jpg, train/2.jpg, ...' in capsys.readouterr().out


def test_a_list_that_is_not_the_published_one_is_refused(tiny, server, tmp_path):
    folder, address = server
    publish(folder)
    (folder / 'Tiny' / 'Tiny_test.txt').write_text(LISTS['Tiny_test.txt'] + 'val/cat/8.jpg 0\n')
    data_dir = tmp_path / 'data'
    with pytest.raises(InputError, match='is not the published Tiny_test.txt.*--source'):
        prepare.main(['tiny', '--data-dir', str(data_dir), '--source', address])
    assert [path.name for path in data_dir.iterdir()] == ['Tiny_train.txt']

    (data_dir / 'lists').mkdir()
    (data_dir / 'lists' / 'Tiny_test.txt').write_text('changed 0\n')
    with pytest.raises(InputError, match='lists/Tiny_test.txt.*is not the published.*remove it'):
        prepare.main(['tiny', '--data-dir', str(data_dir), '--source', address])


@pytest.mark.parametrize('reach', ['absent', 'closed', 'folder'])
def test_unreachable_source_is_one_sentence(tiny, server, tmp_path, reach):
    source = {'absent': server[1], 'closed': 'http://127.0.0.1:9', 'folder': str(tmp_path / 'nowhere')}[reach]
    with pytest.raises(InputError, match='Tiny_train.txt.*--source') as caught:
        prepare.main(['tiny', '--data-dir', str(tmp_path / 'data'), '--source', source])
    assert '\n' not in str(caught.value)
    assert not list((tmp_path / 'data').glob('*'))


def test_command_line_exit_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['nbn-prepare', 'places_lt', '--data-dir', str(tmp_path), '--source', '/nowhere'])
    assert prepare.console() == 1
    assert capsys.readouterr().err.startswith('nbn-prepare: error: ')
    with pytest.raises(SystemExit) as caught:
        prepare.main(['imagenet', '--data-dir', '.'])
    assert caught.value.code != 0


def test_published_addresses_are_pinned():
    assert LISTS_URL.endswith('/f162adef63fdf592d0b8a0f6e52bc481fc08785f/data')
    lists = [known.lists for known in benchmarks().values() if isinstance(known, ListBenchmark)]
    ids = [part.blob_id for published in lists for part in published.values()]
    assert len(set(ids)) == len(ids) == 8 and all(len(bytes.fromhex(blob)) == 20 for blob in ids)


@pytest.fixture
def cifar_archive(monkeypatch):
    """A small archive in the format of CIFAR-10, whose checksums torchvision is told."""
    random = np.random.RandomState(0)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w:gz') as archive:
        def add(name, content):
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(f'{CIFAR10.base_folder}/{name}')
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
            return [name, hashlib.md5(data).hexdigest()]

        for part in ('train_list', 'test_list'):
            monkeypatch.setattr(CIFAR10, part, [
                add(name, {'data': random.randint(0, 256, (50, 3072)).astype(np.uint8),
                           'labels': random.permutation(np.repeat(np.arange(10), 5)).tolist()})
                for name, _ in getattr(CIFAR10, part)])
        _, md5 = add(CIFAR10.meta['filename'], {'label_names': [f'class{label}' for label in range(10)]})
        monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': md5})
    monkeypatch.setattr(CIFAR10, 'tgz_md5', hashlib.md5(stream.getvalue()).hexdigest())
    return stream.getvalue()


def test_cifar_is_fetched_and_its_draw_reported(cifar_archive, server, tmp_path, capsys):
    folder, address = server
    (folder / CIFAR10.filename).write_bytes(cifar_archive)
    data_dir = tmp_path / 'data'
    prepare.main(['cifar10_lt', '--data-dir', str(data_dir), '--source', address, '--imbalance-factor', '5'])
    report = json.loads((data_dir / 'cifar10_lt_exp_5.json').read_text())
    targets = CIFAR10(str(data_dir)).targets
    indices = draw_long_tail(targets, 10, 5)
    assert report['counts'] == np.bincount(np.array(targets)[indices]).tolist()
    assert report['size'] == len(indices) == sum(report['counts'])
    assert report['indices_sha256'] == hashlib.sha256(indices.astype('<i8').tobytes()).hexdigest()
    assert f'{len(indices)} training images, 25 to 5 per class' in capsys.readouterr().out

    (folder / CIFAR10.filename).unlink()  # everything is there now
    prepare.main(['cifar10_lt', '--data-dir', str(data_dir), '--source', address, '--imbalance-profile', 'step'])
    assert (data_dir / 'cifar10_lt_step_100.json').is_file()


def test_damaged_cifar_archive_is_refused(cifar_archive, server, tmp_path):
    folder, address = server
    (folder / CIFAR10.filename).write_bytes(cifar_archive[:-1])
    with pytest.raises(InputError, match='MD5 differs'):
        prepare.main(['cifar10_lt', '--data-dir', str(tmp_path / 'data'), '--source', address])
    assert not list((tmp_path / 'data').glob('*'))

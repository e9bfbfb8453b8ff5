"""Small inputs that would take all memory, or wait for ever: each is one sentence at once."""
import http.server
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from nbn_timm.cli import predict, push, train
from nbn_timm.config import config_path, read_config, read_mapping
from nbn_timm.data import DataSettings, read_counts
from nbn_timm.data.lists import read_image_list
from nbn_timm.data.shards import ShardIndex
from nbn_timm.datasets import create_splits, fetching
from nbn_timm.errors import InputError, quoted
from nbn_timm.files import _size, watched
from nbn_timm.models._pretrained import find_weights
from nbn_timm.models.model_folder import read_folder_config, read_weights
from nbn_timm.models.run_folder import source_file
from nbn_timm.trained.opening import open_trained
from nbn_timm.training.log import RunLog
from nbn_timm.training.run_checkpoint import find_resume
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(('text', 'message'), [
    ('a: &a [x, x]\n' + ''.join(f'{name}: &{name} [*a, *a]\n' for name in 'bcdefgh'), 'a config has no aliases'),
    ('lr: ' + '[' * 10_000, 'nested too deeply'), ('loss_kwargs: ' + '{a: ' * 100 + '1' + '}' * 100, 'nested too deep'),
    ('#' * 1_000_001, 'more than 1,000,000 bytes'), ('batch_size: 1' + ':59' * 5000, 'a number of thousands of digits'),
    ('batch_size: ' + '9' * 5000, 'cannot be read as YAML'), ('batch_size: ' + '9' * 50, 'is no whole number')])
def test_a_config_that_blows_up_is_refused(text, message, tmp_path):
    (tmp_path / 'config.yaml').write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_config(train.build_parser(TrainSettings, 'nbn-train', ''), TrainSettings, tmp_path / 'config.yaml')
    assert '\n' not in str(error.value) and len(str(error.value)) < 1000


def test_a_name_that_is_very_long_is_cut_in_a_sentence():
    assert quoted('a' * 100_000 + '.png') == "'" + 'a' * 200 + '...' + 'a' * 196 + ".png'"
    assert quoted('a' * 400) == "'" + 'a' * 400 + "'"


@pytest.mark.parametrize(('lines', 'names'), [
    ('a.png 0\nb/x.png 1\n', None),  # the first has no folder
    ('a.png 0\n/b/x.png 1\n', None),
    ('a/x.png 0\n/b/x.png 1\n', None),  # where one lies from the other depends on where the command runs
    ('r/a/x.png 0\nr/b/x.png 1\n', {0: 'a', 1: 'b'}),
    ('/r/a/x.png 0\n/r/b/x.png 1\n', {0: 'a', 1: 'b'})])
def test_classes_have_the_names_of_folders_where_all_have_some(lines, names, tmp_path):
    (tmp_path / 'list.txt').write_text(lines)
    assert read_image_list(tmp_path / 'list.txt').folder_names() == names


# Pipes, which nobody writes into


@pytest.fixture
def pipe(tmp_path) -> Path:
    os.mkfifo(tmp_path / 'pipe.png')
    return tmp_path / 'pipe.png'


@pytest.fixture
def odd_places(tmp_path, monkeypatch) -> Iterator[dict[str, Path]]:
    """What is there, but is no file."""
    places = {kind: tmp_path / f'a.{kind}' for kind in ('pipe', 'socket', 'folder', 'device')}
    os.mkfifo(places['pipe'])
    places['folder'].mkdir()
    places['device'].symlink_to(os.devnull)
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(places['socket'].name)
        yield places


@pytest.mark.parametrize('asked', [
    ['--dataset', 'list', '--data-dir', '.', '--train-list'], ['--dataset', 'csv', '--data-dir', '.', '--train-csv'],
    ['--config']], ids=lambda asked: asked[-1])
def test_what_is_no_file_is_told_for_what_it_is(odd_places, asked):
    for kind, place in odd_places.items():
        with pytest.raises(InputError, match=f"'{place.name}' is a {kind} and no file: give a file"):
            train.main([*asked, place.name, '--model', 'resnet20', '--device', 'cpu'])


def test_what_is_neither_a_file_nor_a_folder_is_told_for_what_it_is(odd_places):
    del odd_places['folder']
    for kind, place in odd_places.items():
        for look in (source_file, open_trained, lambda name: find_resume(name, Path('runs'))):
            with pytest.raises(InputError, match=f"'.*{place.name}' is a {kind} and no file: give a file or a folder"):
                look(str(place))
        with pytest.raises(InputError, match='no regular file|no class counts|nothing in it|cannot be read'):
            read_counts(place)


def test_a_prediction_leaves_a_pipe_out_of_a_folder_and_names_it_otherwise(pipe, tmp_path, capsys):
    torch.save(timm.create_model('resnet20_nbn', num_classes=2).state_dict(), tmp_path / 'model.pth')
    Image.new('RGB', (8, 8)).save(tmp_path / 'image.png')
    flags = ['--model', str(tmp_path / 'model.pth'), '--device', 'cpu', '-o', str(tmp_path / 'found.txt')]
    with pytest.raises(InputError, match='1 of 2 images could not be read'):
        predict.main([*flags, str(pipe), str(tmp_path / 'image.png')])
    assert 'it is a pipe or a device' in capsys.readouterr().err
    predict.main([*flags, str(tmp_path)])
    assert 'image.png' in (tmp_path / 'found.txt').read_text()
    assert '1 pipe or device' in capsys.readouterr().err


def test_results_and_logs_are_not_read_from_a_pipe(pipe, tmp_path):
    torch.save({'arch': 'resnet20_nbn', 'state_dict': timm.create_model('resnet20_nbn', num_classes=2).state_dict()},
               tmp_path / 'model.pth')
    with pytest.raises(InputError, match='the results file .* cannot be read .*it is a pipe'):
        push.main([str(tmp_path / 'model.pth'), '--output', str(tmp_path / 'out'), '--results-file', str(pipe)])
    for read in (lambda: read_mapping(pipe), lambda: ShardIndex.read(pipe)):  # of nbn-sweep, of shards
        with pytest.raises(InputError, match='it is a pipe'):
            read()
    (tmp_path / 'run').mkdir()
    os.mkfifo(tmp_path / 'run' / 'log.jsonl')
    assert find_resume(None, tmp_path / 'run') is None
    with pytest.raises(InputError, match=r"the log '.*log.jsonl' is no file: remove it"):
        RunLog(tmp_path / 'run')


def test_a_pipe_is_no_file_to_copy(pipe, tmp_path):
    with pytest.raises(InputError, match='cannot be fetched .*pipe'):
        fetching.fetch(str(pipe), tmp_path / 'copy', lambda path: None)


# Servers


class Stalled(http.server.BaseHTTPRequestHandler):
    """Says nothing, or a byte of its headers or of the file now and then."""

    def do_GET(self) -> None:
        with suppress(OSError):  # nobody listens any more
            if self.path.startswith('/slow'):
                self.send_response(200)
                self.end_headers()
            if self.path != '/silent':
                for _ in range(100):
                    self.wfile.write(b'x')
                    self.wfile.flush()
                    time.sleep(0.05)
            time.sleep(2)

    def log_message(self, *args) -> None:
        pass


@pytest.mark.parametrize(('how', 'said'), [
    ('silent', '(timed out|slower than 10 kB/s)'),  # whichever of the two limits a busy machine reaches first
    ('slow', 'slower than 10 kB/s')])
def test_a_server_that_stalls_is_given_up(how, said, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, 'TIMEOUT', 0.3)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Stalled) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=f'cannot be fetched .*{said}.*--source'):
            fetching.fetch(f'http://127.0.0.1:{server.server_port}/{how}', tmp_path / 'file', lambda path: None)
        server.shutdown()
    assert not (tmp_path / 'file').exists()


def test_a_download_is_given_as_long_as_a_slow_connection_needs(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 5))  # seconds
    monkeypatch.setattr('nbn_timm.files.time.monotonic', lambda: next(clock))
    asked, enough = [], threading.Event()

    def size(place: Path) -> int:
        asked.append(place)
        if len(asked) == 5:
            enough.set()
        return 100_000 * len(asked)  # 20 kB/s

    monkeypatch.setattr('nbn_timm.files._size', size)
    assert watched(enough.wait, tmp_path, patience=1.0)
    assert asked == 5 * [tmp_path]


def test_a_download_grows_in_files_and_folders_below(tmp_path):
    (tmp_path / 'below').mkdir()
    for name in ('one', 'below/two'):
        (tmp_path / name).write_bytes(b'x' * 100)
    assert [_size(tmp_path), _size(tmp_path / 'one'), _size(tmp_path / 'none')] == [200, 100, 0]


def test_what_a_download_of_others_raises_is_raised(tmp_path):
    def fail() -> None:
        raise KeyError('of the download')

    with pytest.raises(KeyError, match='of the download'):
        watched(fail, tmp_path, patience=1.0)


def trickle(folder: Path, end: threading.Event) -> Callable[..., None]:
    """A download of others that writes a byte now and then."""
    def download(*args, **kwargs) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        while not end.wait(0.02):
            with open(folder / 'part', 'ab') as file:
                file.write(b'x')
    return download


@pytest.fixture
def end():
    """Ends the downloads that were given up."""
    event = threading.Event()
    yield event
    event.set()


def test_a_hub_that_trickles_is_given_up(tmp_path, monkeypatch, end):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('nbn_timm.models.hub_files._PATIENCE', 0.3)
    monkeypatch.setattr('nbn_timm.models.hub_files.hf_hub_download', trickle(tmp_path / 'models--user--net', end))
    with pytest.raises(InputError, match=r"'hf-hub:user/net' has no config.json .*slower than 10 kB/s"):
        read_folder_config('hf-hub:user/net')
    with pytest.raises(InputError, match=r"the weights of 'hf-hub:user/net' cannot be had .*slower than 10 kB/s"):
        read_weights('hf-hub:user/net')


def test_what_the_hubs_client_raises_is_a_sentence(monkeypatch):
    def fail(*args, **kwargs) -> None:
        raise RuntimeError('a timeout of another library')

    monkeypatch.setattr('nbn_timm.models.hub_files.hf_hub_download', fail)
    with pytest.raises(InputError, match=r"the weights of 'hf-hub:user/net' cannot be had \(a timeout of another"):
        read_weights('hf-hub:user/net')


def test_the_authors_archive_that_trickles_is_given_up(monkeypatch, weights_cache, end):
    gdown = pytest.importorskip('gdown')
    monkeypatch.setattr('nbn_timm.models._pretrained._PATIENCE', 0.3)
    monkeypatch.setattr(gdown, 'download', lambda url, target, quiet: trickle(Path(target).parent, end)())
    with pytest.raises(InputError, match=r'no weights for .*it is slower than 10 kB/s'):
        find_weights('resnext50_nbn.imagenet_lt', 'https://drive.google.com/uc?id=1')


def test_a_mirror_whose_headers_trickle_is_given_up(monkeypatch, weights_cache):
    monkeypatch.setattr('nbn_timm.models._pretrained._PATIENCE', 0.3)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Stalled) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv('NBN_TIMM_WEIGHTS', f'http://127.0.0.1:{server.server_port}/headers')
        with pytest.raises(InputError, match='cannot be had .*slower than 10 kB/s.*NBN_TIMM_WEIGHTS'):
            find_weights('resnet20_nbn.digits_lt')
        server.shutdown()


def test_an_archive_of_torchvision_that_trickles_is_given_up(tmp_path, monkeypatch, end):
    monkeypatch.setattr('nbn_timm.datasets.cifar.TIMEOUT', 0.3)
    monkeypatch.setattr('torchvision.datasets.CIFAR100.download', lambda self: trickle(Path(self.root), end)())
    with pytest.raises(InputError, match='CIFAR100 cannot be downloaded .*slower than 10 kB/s'):
        create_splits(DataSettings('cifar100_lt', str(tmp_path), download=True))


def test_shipped_configs_are_not_listed_where_one_is_near():
    with pytest.raises(InputError) as error:
        config_path('quickstrat')
    assert str(error.value).endswith("none of that name is shipped; did you mean 'quickstart'?")
    with pytest.raises(InputError, match=r"; did you mean ('cifar100?_lt/resnet32\w*'(, | or |\?$)){3}"):
        config_path('cifar100_lt/resnet33')
    with pytest.raises(InputError, match=r': give a file, or one of the \d+ below ') as error:
        config_path('xyzzy' * 500)
    message = str(error.value)
    assert Path(message.split("'")[3], 'quickstart.yaml').is_file() and len(message) < 700

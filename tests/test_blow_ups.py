"""Small inputs that would take all memory, or wait for ever: each is one sentence at once."""
import http.server
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from nbn_timm.cli import predict, push, train
from nbn_timm.config import config_path, read_config, shipped_configs
from nbn_timm.data.lists import read_image_list
from nbn_timm.datasets import fetching
from nbn_timm.errors import InputError, quoted
from nbn_timm.files import copy_download
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
    """Says nothing, or a byte now and then."""

    def do_GET(self) -> None:
        if self.path == '/slow':
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b'x')
                self.wfile.flush()
                time.sleep(0.05)
        time.sleep(2)

    def log_message(self, *args) -> None:
        pass


@pytest.mark.parametrize(('how', 'said'), [('silent', 'timed out'), ('slow', 'slower than 10 kB/s')])
def test_a_server_that_stalls_is_given_up(how, said, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, 'TIMEOUT', 0.3)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Stalled) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=f'cannot be fetched .*{said}.*--source'):
            fetching.fetch(f'http://127.0.0.1:{server.server_port}/{how}', tmp_path / 'file', lambda path: None)
        server.shutdown()
    assert not (tmp_path / 'file').exists()


def test_what_is_slow_for_a_while_and_large_is_copied(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 5))  # seconds
    monkeypatch.setattr('nbn_timm.files.time.monotonic', lambda: next(clock))
    blocks = iter([b'x' * 100_000] * 5 + [b''])

    class Response:
        @staticmethod
        def read1(size: int) -> bytes:
            return next(blocks)

    with open(tmp_path / 'file', 'wb') as file:
        assert copy_download(Response(), file, patience=1.0) == 500_000


def test_downloads_of_others_have_a_time_limit_and_leave_none_behind():
    assert socket.getdefaulttimeout() is None
    with fetching.with_timeout():
        assert socket.getdefaulttimeout() == fetching.TIMEOUT
    assert socket.getdefaulttimeout() is None


def test_shipped_configs_are_not_listed_where_one_is_near():
    with pytest.raises(InputError) as error:
        config_path('quickstrat')
    assert str(error.value).endswith("none of that name is shipped; did you mean 'quickstart'?")
    with pytest.raises(InputError, match=f": give a file, or one of {', '.join(shipped_configs())[:60]}"):
        config_path('xyzzy')

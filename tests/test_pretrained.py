"""Where weights come from, in which order, and what is said when they cannot be had. Servers are on loopback."""
import base64
import copy
import http.server
import json
import os
import pickle
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import released
import timm
import torch
from forks import Ended, run_python
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

import nbn_timm  # noqa: F401
from nbn_timm import InputError
from nbn_timm.files import file_sha256
from nbn_timm.models import _pretrained, resnet_nbn
from nbn_timm.models._pretrained import HubFile, find_weights, shipped_names
from nbn_timm.models.weight_files import DIGEST, save_weights, weights_digest

NAME = 'resnet10_nbn.imagenet_lt'


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(3)
    return timm.create_model('resnet10_nbn').eval()


@pytest.fixture
def server(tmp_path):
    """A file server on loopback: its address, its folder, and the paths that were asked for with its answers."""
    folder = tmp_path / 'served'
    folder.mkdir()
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_request(self, code='-', size='-'):
            requested.append(f'{self.path} {int(code)}')

        def log_error(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}', folder, requested
        httpd.shutdown()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def save_released(model: torch.nn.Module, path: Path, prefix: str = 'module.') -> None:
    weights = released.as_released(model.state_dict())
    torch.save(released.checkpoint(weights, prefix), path)


def test_nothing_to_be_had_is_one_message_with_the_command(weights_cache):
    with pytest.raises(InputError) as error:
        timm.create_model(NAME, pretrained=True)
    message = str(error.value)
    for part in ('NBN_TIMM_WEIGHTS is not set', 'not in the cache', 'Hub', 'authors', 'nbn-convert',
                 f'{NAME}.safetensors', 'pretrained=False'):
        assert part in message
    assert '\n' not in message


@pytest.mark.fast
def test_cache_then_folder_of_the_user(weights_cache, model, tmp_path, monkeypatch):
    weights_cache.mkdir(parents=True)
    save_file(model.state_dict(), weights_cache / f'{NAME}.safetensors')
    assert same_weights(timm.create_model(NAME, pretrained=True), model)
    # A folder that is named wins over the cache.
    other = timm.create_model('resnet10_nbn')
    folder = tmp_path / 'mine'
    folder.mkdir()
    save_file(other.state_dict(), folder / f'{NAME}.safetensors')
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(folder))
    assert same_weights(timm.create_model(NAME, pretrained=True), other)
    # One that lacks the file does not hide it.
    (folder / f'{NAME}.safetensors').unlink()
    assert same_weights(timm.create_model(NAME, pretrained=True), model)


def test_a_folder_with_released_checkpoints_is_searched_by_keys(weights_cache, model, tmp_path, monkeypatch):
    (tmp_path / 'log').mkdir()
    save_released(model, tmp_path / 'log' / 'whatever_best_90epochs.pth.tar')
    torch.save({'weights': torch.ones(3)}, tmp_path / 'log' / 'other.pth')
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path))
    assert same_weights(timm.create_model(NAME, pretrained=True), model)
    save_released(model, tmp_path / 'log' / 'second.pth.tar', prefix='')
    with pytest.raises(InputError, match='several checkpoints'):
        timm.create_model(NAME, pretrained=True)


def test_a_folder_that_does_not_exist_is_an_error(weights_cache, monkeypatch):
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', '/no/such/folder')
    with pytest.raises(InputError, match='no folder'):
        timm.create_model(NAME, pretrained=True)


def test_a_mirror_gives_a_file_once_as_long_as_it_has_the_same(weights_cache, model, server, monkeypatch):
    address, folder, requested = server
    save_file(model.state_dict(), folder / f'{NAME}.safetensors')
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', f'{address}/')
    for _ in range(2):
        assert same_weights(timm.create_model(NAME, pretrained=True), model)
    assert requested == [f'/{NAME}.safetensors 200', f'/{NAME}.safetensors 304']
    with pytest.raises(InputError, match='no weights for.*404.*not in the cache'):  # the other places are tried
        timm.create_model('resnet10_nbn.places_lt', pretrained=True)
    timm.create_model(shipped_names()[0], pretrained=True)
    assert not list(weights_cache.rglob('*.tmp'))


def test_mirrors_of_one_host_do_not_mix(weights_cache, model, server, monkeypatch):
    address, folder, _ = server
    for place, weights in (('first', model), ('second', timm.create_model('resnet10_nbn'))):
        (folder / place).mkdir()
        save_file(weights.state_dict(), folder / place / f'{NAME}.safetensors')
        monkeypatch.setenv('NBN_TIMM_WEIGHTS', f'{address}/{place}')
        assert same_weights(timm.create_model(NAME, pretrained=True), weights)


class Misbehaved(http.server.BaseHTTPRequestHandler):
    """A mirror that answers by the first part of the path."""
    seen: list[str | None] = []

    def do_GET(self) -> None:
        how = self.path.split('/')[1]
        self.seen.append(self.headers.get('Authorization'))
        if how == 'silent':
            time.sleep(3)
        elif how in ('500', '401', '403'):
            self.send_error(int(how))
        elif how == 'page':
            self.answer(b'<html>log in</html>', 19)
        elif how == 'short':
            self.answer(b'half', 1000)
        elif how == 'slow':
            self.answer(b'', 10 ** 6)
            for _ in range(30):
                self.wfile.write(b'x')
                self.wfile.flush()
                time.sleep(0.1)

    def answer(self, content: bytes, length: int) -> None:
        self.send_response(200)
        self.send_header('Content-Length', str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.mark.parametrize(('how', 'said'), [
    ('500', '500'), ('401', '401'), ('403', '403'), ('silent', 'no answer within 1 seconds'),
    ('page', 'something else'),
    ('short', 'broke off after 4 of 1000 bytes'), ('slow', 'slower than 10 kB/s'), ('refused', 'refused')])
def test_a_mirror_that_is_named_serves_or_is_an_error(weights_cache, monkeypatch, how, said):
    """Of weights that the package ships as well, which are not what was asked for."""
    monkeypatch.setattr(_pretrained, '_PATIENCE', 1.0)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Misbehaved) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        port = 9 if how == 'refused' else httpd.server_port
        monkeypatch.setenv('NBN_TIMM_WEIGHTS', f'http://me:s%65cret@127.0.0.1:{port}/{how}')
        name = shipped_names()[0]
        with pytest.raises(InputError, match=f"{name}.safetensors.*{said}.*NBN_TIMM_WEIGHTS") as error:
            timm.create_model(name, pretrained=True)
        httpd.shutdown()
    assert 'cret' not in str(error.value) and '\n' not in str(error.value)
    assert not [path for path in weights_cache.rglob('*') if path.is_file()]
    if how != 'refused':
        assert Misbehaved.seen[-1] == 'Basic ' + base64.b64encode(b'me:secret').decode()


def test_shipped_weights_have_their_digest_and_are_refused_when_damaged(tmp_path, monkeypatch):
    for name in shipped_names():
        path = Path(str(_pretrained.shipped_file(name)))
        assert json.loads(path.with_suffix('.json').read_text())[DIGEST] == weights_digest(load_file(path)), name
        assert _pretrained.weights_record(name)
    name = shipped_names()[0]
    for suffix in ('.safetensors', '.json'):
        (tmp_path / f'{name}{suffix}').write_bytes((_pretrained._SHIPPED / f'{name}{suffix}').read_bytes())
    content = bytearray((tmp_path / f'{name}.safetensors').read_bytes())
    content[-5] ^= 1
    (tmp_path / f'{name}.safetensors').write_bytes(content)
    monkeypatch.setattr(_pretrained, '_SHIPPED', tmp_path)
    with pytest.raises(InputError, match=f'{name}.safetensors.*are damaged: install it again'):
        find_weights(name)


def test_a_record_beside_other_weights_is_not_told(tmp_path, monkeypatch):
    name = shipped_names()[0]
    weights = load_file(str(_pretrained.shipped_file(name)))
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path))
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1}, tmp_path / f'{name}.safetensors')
    record = (_pretrained._SHIPPED / f'{name}.json').read_text()
    (tmp_path / f'{name}.json').write_text(record)
    assert _pretrained.weights_record(name) is None
    save_file(weights, tmp_path / f'{name}.safetensors')
    assert _pretrained.weights_record(name)['test'] == json.loads(record)['test']


@pytest.mark.parametrize('kind', ['zip', 'tar', 'bare'])
def test_the_authors_archive_is_unpacked_recognised_converted_and_cached(weights_cache, model, server, kind, tmp_path):
    address, folder, requested = server
    checkpoint = tmp_path / 'a.pth.tar'
    save_released(model, checkpoint)
    archive = folder / 'download'
    if kind == 'zip':
        with zipfile.ZipFile(archive, 'w') as zip_file:
            zip_file.write(checkpoint, 'log/ImageNet_LT/a.pth.tar')
            zip_file.writestr('log/readme.txt', 'text')
    elif kind == 'tar':
        with tarfile.open(archive, 'w:gz') as tar:
            tar.add(checkpoint, 'log/a.pth.tar')
    else:
        archive.write_bytes(checkpoint.read_bytes())
    url = f'{address}/download'
    path = find_weights(NAME, url)
    assert path.parent == weights_cache and path.name == f'{NAME}.safetensors'
    loaded = timm.create_model('resnet10_nbn')
    loaded.load_state_dict(load_file(path), strict=True)
    assert same_weights(loaded, model)
    # A second name does not fetch the archive again, and the message says what it holds.
    with pytest.raises(InputError, match=f'which holds {NAME}'):
        find_weights('resnet50_nbn.imagenet_lt', url)
    assert requested == ['/download 200']


def test_released_entries_name_the_authors_archive_as_their_url():
    for name in ('resnet50_nbn.imagenet_lt', 'resnext50_nbn_imagenet_lt'):
        assert '1ebEgsvbp00AvKcfa2JQRK8rVoQ6Ab38C' in timm.get_pretrained_cfg(name).url
        assert timm.is_model_pretrained(name)
    assert not timm.is_model_pretrained('resnet101_nbn.imagenet_lt')
    assert resnet_nbn.default_cfgs['resnet50_nbn'].tags[0] == 'imagenet_lt'


def test_a_damaged_archive_leaves_nothing(weights_cache, server):
    address, folder, _ = server
    (folder / 'download').write_bytes(b'<html>quota exceeded</html>')
    with pytest.raises(InputError, match='no checkpoint of a known kind'):
        find_weights(NAME, f'{address}/download')
    archive = folder / 'whole.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(__file__, 'log/a.pth.tar')
    (folder / 'download').write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(InputError, match='came damaged'):
        find_weights(NAME, f'{address}/download')
    assert not [path for path in weights_cache.rglob('*') if path.is_file()]


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub's protocol as downloading one file takes."""
    content = b''

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header('ETag', '"0123456789abcdef"')
        self.send_header('X-Repo-Commit', 'a' * 40)
        self.send_header('Content-Length', str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args) -> None:
        pass


HUB_SCRIPT = '''
import sys, timm, nbn_timm
from nbn_timm.models._pretrained import HUB_FILES, HubFile
HUB_FILES['resnet10_nbn.imagenet_lt'] = HubFile('somebody/some-model', 'model.safetensors', sys.argv[1])
model = timm.create_model('resnet10_nbn_imagenet_lt', pretrained=True)
print(model.fc.weight.double().sum().item())
'''


@pytest.mark.parametrize('digest', ['right', 'wrong'])
def test_hub_file_is_fetched_and_checked(weights_cache, model, tmp_path, digest):
    path = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), path)
    handler = type('Handler', (HubHandler,), {'content': path.read_bytes()})
    sha256 = file_sha256(path) if digest == 'right' else '0' * 64
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        environment = {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{httpd.server_port}',
                       'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_OFFLINE': '0'}
        run = run_python('-c', HUB_SCRIPT, sha256, environment=environment)
        httpd.shutdown()
    if digest == 'right':
        assert float(run.stdout) == pytest.approx(model.fc.weight.double().sum().item(), abs=1e-9), run.stderr
    else:
        assert run.returncode != 0 and 'has SHA-256' in run.stderr and 'instead of 0000' in run.stderr


def test_hub_entries_need_a_digest():
    assert all(len(entry.sha256) == 64 for entry in _pretrained.HUB_FILES.values())
    with pytest.raises(TypeError):
        HubFile('somebody/some-model', 'model.safetensors')


def test_sources_named_by_the_caller_win(weights_cache, model, tmp_path):
    path = tmp_path / 'mine.pth.tar'
    save_released(model, path)
    overlay = dict(file=str(path))
    assert same_weights(timm.create_model('resnet10_nbn', pretrained=True, pretrained_cfg_overlay=overlay), model)
    with pytest.raises(InputError, match='does not exist'):
        timm.create_model('resnet10_nbn', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'no.pth')))


def test_a_file_brings_its_own_number_of_classes(tmp_path):
    source = timm.create_model('resnet10_nbn', num_classes=365)
    save_released(source, tmp_path / 'places.pth.tar')
    overlay = dict(file=str(tmp_path / 'places.pth.tar'))
    for kwargs in ({}, dict(num_classes=365)):
        model = timm.create_model('resnet10_nbn', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        assert same_weights(model, source)


@pytest.mark.parametrize('arch', ['resnet10_nbn', 'resnet10_nbn_lr'])
def test_another_number_of_classes_drops_the_whole_classifier(weights_cache, arch, tmp_path, caplog):
    source = timm.create_model(arch)
    with torch.no_grad():
        source.conv1.weight.fill_(0.25)
        if arch.endswith('_lr'):
            source.fc.bn.running_mean.fill_(5.0)
    save_file(source.state_dict(), tmp_path / f'{arch}.imagenet_lt.safetensors')
    overlay = dict(file=str(tmp_path / f'{arch}.imagenet_lt.safetensors'))
    for kwargs in (dict(num_classes=7), dict(num_classes=0), dict(num_classes=7, in_chans=1)):
        model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        assert (model.conv1.weight == 0.25 * (3 if 'in_chans' in kwargs else 1)).all()
        if arch.endswith('_lr') and kwargs['num_classes']:
            assert not model.fc.bn.running_mean.any()
    features = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert (features.conv1.weight == 0.25).all()
    assert 'Unexpected keys' not in caplog.text


@pytest.mark.parametrize('arch', ['resnet20_nbn_lr', 'resnet10_nbn_lr', 'resnet32_ride_nbn_lr'])
def test_a_forced_new_head_takes_nothing_of_the_old_one(weights_cache, arch, tmp_path):
    source = timm.create_model(arch, num_classes=7)
    with torch.no_grad():
        for name, value in source.state_dict().items():
            if name.startswith('fc.') and value.is_floating_point():
                value.fill_(5.0)
        source.conv1.weight.fill_(0.25)
    path = tmp_path / 'trained.safetensors'
    save_file(source.state_dict(), path)
    # As timm's --pretrained-path gives it: a new classifier also for the file's own number of classes.
    model = timm.create_model(arch, pretrained=True, num_classes=7,
                              pretrained_cfg_overlay=dict(file=str(path), num_classes=-1))
    assert (model.conv1.weight == 0.25).all()
    check_new_heads(model)


RECTIFIED = [arch for arch in timm.list_models('*_nbn_lr') if timm.get_pretrained_cfg(arch) is not None]


@pytest.mark.parametrize('arch', RECTIFIED)
def test_a_forced_new_head_of_every_rectified_network(arch, monkeypatch):
    monkeypatch.setattr(torch.nn.init, 'kaiming_normal_', lambda weight, **kwargs: weight)  # of 60 million weights
    weights = timm.create_model(arch, num_classes=7).state_dict()
    for name, value in weights.items():
        if name.startswith('fc.') and value.is_floating_point():
            value.fill_(5.0)
    first = next(iter(weights))
    weights[first].fill_(0.25)
    model = timm.create_model(arch, pretrained=True, num_classes=7,
                              pretrained_cfg_overlay=dict(state_dict=weights, num_classes=-1))
    assert (model.get_parameter(first) == 0.25).all()
    check_new_heads(model)


def check_new_heads(model: torch.nn.Module) -> None:
    heads = model.fc if isinstance(model.fc, torch.nn.ModuleList) else [model.fc]
    for head in heads:
        assert not head.bn.running_mean.any() and (head.bn.running_var == 1).all()
        assert not (head.weight == 5).any()


@pytest.mark.parametrize('prefix', ['model.', 'student.model.'])
@pytest.mark.parametrize('source', ['file', 'state_dict'])
def test_weights_below_a_prefix_are_the_weights(weights_cache, prefix, source, tmp_path):
    trained = timm.create_model('resnet20_nbn', num_classes=5)
    weights = {prefix + name: value for name, value in trained.state_dict().items()}
    save_file(weights, tmp_path / 'last.safetensors')
    overlay = {source: str(tmp_path / 'last.safetensors') if source == 'file' else weights}
    model = timm.create_model('resnet20_nbn', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert same_weights(model, trained)


def test_weights_of_which_a_part_does_not_fit_are_refused(weights_cache, tmp_path):
    weights = timm.create_model('resnet20_nbn', num_classes=5).state_dict()
    mixed = {**{f'model.{name}': value for name, value in weights.items()}, 'loss.weight': torch.ones(5)}
    short = {name: value for name, value in weights.items() if not name.startswith('layer2.')}
    for index, wrong in enumerate((mixed, short)):
        path = tmp_path / f'{index}.safetensors'
        save_file(wrong, path)
        for classes in (5, 7):
            with pytest.raises(InputError):
                timm.create_model('resnet20_nbn', pretrained=True, num_classes=classes,
                                  pretrained_cfg_overlay=dict(file=str(path)))


def test_plain_weights_are_not_loaded_into_nbn(tmp_path):
    plain = timm.create_model('resnet18')
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    with pytest.raises(InputError, match='no NBN scale'):
        timm.create_model('resnet10_nbn', pretrained=True,
                          pretrained_cfg_overlay=dict(file=str(tmp_path / 'plain.safetensors')))


@pytest.fixture
def folder(tmp_path):
    """A small network in timm's format."""
    save_for_hf(timm.create_model('resnet20_nbn', num_classes=3), tmp_path / 'folder', safe_serialization='both')
    return tmp_path / 'folder'


def as_int8(weights):
    return {**weights, 'conv1.weight': weights['conv1.weight'].to(torch.int8)}


def with_nan(weights):
    return {**weights, 'conv1.weight': weights['conv1.weight'] * float('nan')}


@pytest.mark.parametrize(('change', 'said'), [(as_int8, 'conv1.weight.* is of int8'), (with_nan, 'is NaN or infinite')])
def test_timm_makes_no_network_of_weights_that_cannot_be_used(folder, change, said):
    weights = change(load_file(folder / 'model.safetensors'))
    save_file(weights, folder / 'model.safetensors')
    for name, overlay in ((f'local-dir:{folder}', {}), ('resnet20_nbn', dict(state_dict=weights, num_classes=3))):
        with pytest.raises(InputError, match=said):
            timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_timm_makes_no_network_of_a_folder_with_a_wrong_bit(folder, file):
    path = folder / file
    if file == 'model.safetensors':
        save_weights(load_file(path), path)
    else:
        (folder / 'model.safetensors').unlink()
    timm.create_model(f'local-dir:{folder}', pretrained=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(InputError, match=f'{file}.*is damaged'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


@pytest.mark.parametrize('kind', [torch.int8, torch.complex64])
def test_numbers_of_another_type_are_not_cast(tmp_path, kind):
    model = timm.create_model('resnet20_nbn', num_classes=3)
    weights = model.state_dict() | {'bn1.running_var': torch.ones(16, dtype=kind)}
    torch.save(weights, tmp_path / 'odd.pth')
    said = f"'bn1.running_var' is of {str(kind).removeprefix('torch.')}"
    with pytest.raises(InputError, match=said):
        timm.create_model('resnet20_nbn', num_classes=3, checkpoint_path=str(tmp_path / 'odd.pth'))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(InputError, match=said):
            copied.load_state_dict(weights)
    with pytest.raises(InputError, match="'0.bn1.running_var'"):
        torch.nn.Sequential(model).load_state_dict({f'0.{name}': value for name, value in weights.items()})
    model.load_state_dict({name: value.double() for name, value in model.state_dict().items()})



def run_convert(*arguments: str) -> Ended:
    return run_python('-m', 'nbn_timm.cli.convert', *arguments)


def test_convert_command_says_what_it_recognised(weights_cache, model, tmp_path):
    save_released(model, tmp_path / 'log.pth.tar')
    run = run_convert(str(tmp_path / 'log.pth.tar'))
    assert run.returncode == 0, run.stderr
    assert 'as resnet10_nbn, 1000 classes (imagenet_lt), released NBN format' in run.stdout
    assert f"timm.create_model('{NAME}', pretrained=True)" in run.stdout
    assert same_weights(timm.create_model(NAME, pretrained=True), model)


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['resnet50', 'resnext50_32x4d', 'resnet50_nbn'])
def test_convert_command_on_the_other_released_networks(arch, tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in timm.create_model(arch, device='meta').state_dict().items()}
    alpha = [name for name in shapes if name.endswith('alpha')]
    weights = released.state_dict({name: shape for name, shape in shapes.items() if name not in alpha})
    if alpha:
        weights['scale_factor'] = released.value('scale_factor', (20,))
    torch.save(released.checkpoint(weights), tmp_path / 'model_best.pth.tar')
    run = run_convert(str(tmp_path / 'model_best.pth.tar'), str(tmp_path / 'out.safetensors'))
    assert run.returncode == 0 and f'as {arch}, 1000 classes (imagenet_lt)' in run.stdout, run.stderr
    model = timm.create_model(arch, checkpoint_path=str(tmp_path / 'out.safetensors'))
    loaded = model.state_dict()
    for name, tensor in weights.items():
        if name != 'scale_factor':
            assert torch.equal(loaded[name], tensor), name
    assert not alpha or loaded[alpha[0]] == weights['scale_factor'][0]


@pytest.mark.fast
def test_convert_command_refuses_what_is_no_checkpoint(tmp_path):
    torch.save({'weights': torch.ones(3)}, tmp_path / 'other.pth')
    run = run_convert(str(tmp_path / 'other.pth'), str(tmp_path / 'out.safetensors'))
    assert run.returncode == 1 and run.stderr.count('\n') == 1 and 'weights' in run.stderr
    assert not (tmp_path / 'out.safetensors').exists()


def test_recognition_of_the_measured_checkpoint():
    from nbn_timm.models._released import recognize
    shapes = released.FIGURES['resnext50_nbn']['shapes']
    found = recognize({name: torch.empty(shape) for name, shape in shapes.items()})
    assert (found.name, found.form) == ('resnext50_nbn.imagenet_lt', 'NBN')


@pytest.mark.parametrize('arch, expected', [
    ('resnet50', 'resnet50'), ('resnext50_32x4d', 'resnext50_32x4d'), ('resnet101_nbn_lr', 'resnet101_nbn_lr'),
    ('resnet152_nbn', 'resnet152_nbn'), ('resnet18', 'resnet18'), ('resnet56_nbn_lr', 'resnet56_nbn_lr'),
    ('resnet20', 'resnet20'), ('resnext101_nbn', 'resnext101_nbn'), ('efficientnet_b0', None),
    ('vit_tiny_patch16_224', None),
])
def test_architectures_are_recognised_by_keys_and_shapes(arch, expected):
    from nbn_timm.models._released import recognize
    found = recognize(timm.create_model(arch, device='meta').state_dict())
    assert (found.arch if found else None) == expected


def test_a_network_of_other_widths_is_no_checkpoint_of_the_name():
    """It was written under the name, and did not load."""
    from nbn_timm.models._released import convert_checkpoint, recognize
    weights = timm.create_model('resnet20', channels=[16, 32, 96], device='meta').state_dict()
    with pytest.raises(InputError, match='looks like a resnet20 but differs in fc.weight, layer3.0.bn1.bias'):
        convert_checkpoint(weights, recognize(weights))


def test_archive_contents_are_recorded(weights_cache, model, server, tmp_path):
    address, folder, _ = server
    save_released(model, folder / 'download')
    find_weights(NAME, f'{address}/download')
    assert json.loads((weights_cache / 'authors_archive.json').read_text()) == {NAME: ['checkpoint.pth']}


@pytest.mark.parametrize('content', ['', '{"x": ', '[]', '\udcff'])
def test_a_damaged_list_of_an_archive_says_what_to_do(weights_cache, content):
    weights_cache.mkdir(parents=True)
    (weights_cache / 'authors_archive.json').write_text(content, errors='surrogateescape')
    with pytest.raises(InputError, match='authors_archive.json.*: delete it, and the archive is fetched again'):
        _pretrained.find_weights('resnext50_nbn.imagenet_lt', 'https://drive.google.com/uc?id=1')

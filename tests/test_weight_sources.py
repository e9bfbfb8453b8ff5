"""What a caller or NBN_TIMM_WEIGHTS names serves or is an error, and a classifier is never new without a word."""
import hashlib
import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import nbn_timm  # noqa: F401
from nbn_timm import InputError
from nbn_timm.models import _pretrained
from nbn_timm.models._pretrained import weights_record

SHIPPED = 'resnet20_nbn.digits_lt'  # 10 classes


class Handler(BaseHTTPRequestHandler):
    """Gives `files`, with an ETag if `tags`; a path that is not there is a 404 and one that is None a 500."""
    files: dict[str, bytes | None] = {}
    tags = True
    answers: list[int] = []

    def do_GET(self):
        content = self.files.get(self.path, b'')
        tag = f'"{hashlib.sha256(content or b"").hexdigest()[:16]}"'
        same = self.tags and self.headers.get('If-None-Match') == tag
        code = 500 if content is None else 404 if not content else 304 if same else 200
        self.answers.append(code)
        self.send_response(code)
        if self.tags:
            self.send_header('ETag', tag)
        self.send_header('Content-Length', str(len(content or b'') if code == 200 else 0))
        self.end_headers()
        if code == 200:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """Its address and its handler, whose `files` are to be filled."""
    handler = type('Own', (Handler,), {'files': {}, 'answers': []})
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}', handler
        httpd.shutdown()


@pytest.fixture(scope='module')
def weights():
    """Of a small network of 10 classes, which are none of the package's."""
    torch.manual_seed(5)
    return timm.create_model('resnet20_nbn', num_classes=10).state_dict()


@pytest.fixture(scope='module')
def content(weights, tmp_path_factory):
    """A torch file of these weights."""
    return saved(weights, tmp_path_factory.mktemp('file') / 'w.pth')


def saved(weights, path: Path) -> bytes:
    torch.save(weights, path) if path.suffix == '.pth' else save_file(weights, path)
    return path.read_bytes()


def create(name=SHIPPED, overlay=None, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def has(model, weights) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def kept(cache: Path) -> list[Path]:
    return [path for path in cache.rglob('*') if path.is_file()]


@pytest.mark.parametrize('name', [SHIPPED, SHIPPED.replace('.', '_'), 'resnet20_nbn'])
def test_a_url_of_the_caller_serves_in_place_of_what_is_shipped(weights_cache, server, weights, content, name):
    address, handler = server
    handler.files['/dir/w.pth'] = content
    assert has(create(name, dict(url=f'{address}/dir/w.pth')), weights)
    handler.files['/dir/w.pth'] = None
    with pytest.raises(InputError, match=r"/other/w.pth' cannot be had \(HTTP Error 404"):
        create(name, dict(url=f'{address}/other/w.pth'))
    Path(kept(weights_cache)[0]).parent.rename(weights_cache / 'gone')
    with pytest.raises(InputError, match=r"/dir/w.pth' cannot be had \(HTTP Error 500"):
        create(name, dict(url=f'{address}/dir/w.pth'))


def test_a_broken_download_of_a_url_is_an_error_and_is_not_kept(weights_cache, server, weights, content):
    address, handler = server
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for broken in (bytes(flipped), content[:-1000], b'<html>log in</html>'):
        handler.files['/w.pth'] = broken
        with pytest.raises(InputError, match="/w.pth' gives is damaged or something else"):
            create(overlay=dict(url=f'{address}/w.pth'))
        assert not kept(weights_cache)
    handler.files['/w.pth'] = content
    assert has(create(overlay=dict(url=f'{address}/w.pth')), weights)


def test_a_digest_in_a_name_is_compared(weights_cache, server, weights, tmp_path):
    address, handler = server
    content = saved(weights, tmp_path / 'w.safetensors')  # which has no checksums by itself
    digest = hashlib.sha256(content).hexdigest()[:8]
    for name, right in ((f'w-{digest}', True), ('w-20241130', True), ('step-00012000', True), ('w-0badc0de', False)):
        handler.files[f'/{name}.safetensors'] = content
        if right:
            assert has(create(overlay=dict(url=f'{address}/{name}.safetensors')), weights)
        else:
            with pytest.raises(InputError, match='has SHA-256 [0-9a-f]{64} instead of 0badc0de'):
                create(overlay=dict(url=f'{address}/{name}.safetensors'))
            assert not [path for path in kept(weights_cache) if name in path.name]


def test_a_url_in_a_cfg_of_the_caller_is_no_archive(weights_cache, server, weights, content):
    address, handler = server
    handler.files['/w.pth'] = content
    cfg = dict(url=f'{address}/w.pth', num_classes=10, input_size=(3, 32, 32), classifier='fc', first_conv='conv1')
    assert has(timm.create_model('resnet20_nbn', pretrained=True, pretrained_cfg=cfg), weights)
    assert {path.parent.parent.name for path in kept(weights_cache)} == {'mirrors'}
    with pytest.raises(InputError, match='no weights for'):
        create('resnet20_nbn.cifar10_lt')


def test_a_cfg_of_the_package_that_the_caller_hands_back_names_nothing(weights):
    cfg = timm.get_pretrained_cfg(SHIPPED).to_dict()
    model = timm.create_model('resnet20_nbn', pretrained=True, pretrained_cfg=cfg)
    assert has(model, load_file(_pretrained.shipped_file(SHIPPED)))


@pytest.mark.parametrize(('overlay', 'said'), [
    (dict(state_dict={}), "'state_dict' .* is empty"), (dict(file=''), "'file' .* is empty"),
    (dict(url=''), "'url' .* is empty"), (dict(hf_hub_id=3), "'hf_hub_id' .* is no name"),
    (dict(url='http://127.0.0.1:9/w.pth', file='w.pth'), 'by file and by url: leave one out'),
    (dict(url='ftp://127.0.0.1/w.pth'), 'no http or https address'),
    (dict(source='hf-hub'), "'hf-hub' without 'hf_hub_id'"),
    (dict(file='/no/such.pth'), 'does not exist'), (dict(url='http://127.0.0.1:9/w.pth'), 'cannot be had'),
    (dict(state_dict={'a': 1}), "'state_dict' holds no weights")])
def test_an_overlay_that_names_nothing_that_serves_is_an_error(weights_cache, overlay, said):
    with pytest.raises(InputError, match=said) as error:
        create(overlay=overlay)
    assert '\n' not in str(error.value)


def test_a_repository_of_the_caller_serves_or_is_an_error(weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / 'model.safetensors')

    def hub_file(repo_id, name, revision):
        if (repo_id, name, revision) == ('someone/net', 'model.safetensors', None):
            return tmp_path / name
        raise FileNotFoundError(name)

    monkeypatch.setattr('nbn_timm.models.model_folder.hub_file', hub_file)
    assert has(create(overlay=dict(hf_hub_id='someone/net')), weights)
    for overlay in (dict(hf_hub_id='someone/else'), dict(hf_hub_id='someone/net', hf_hub_filename='other.bin')):
        with pytest.raises(InputError, match=f"'hf-hub:{overlay['hf_hub_id']}' has no .*or cannot be asked"):
            create(overlay=overlay)


@pytest.mark.parametrize('wrapper', ['state_dict', 'model'])
@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_a_wrapped_state_dict_is_the_weights(weights, wrapper, prefix):
    wrapped = {wrapper: {prefix + name: value for name, value in weights.items()}, 'epoch': 3}
    for name in ('resnet20_nbn', SHIPPED):
        assert has(create(name, dict(state_dict=wrapped), num_classes=10), weights)


def test_averaged_weights_of_a_checkpoint_are_taken_from_a_state_dict_as_from_a_file(weights):
    other = {name: value + 1 for name, value in weights.items()}
    assert has(create(overlay=dict(state_dict={'state_dict': other, 'state_dict_ema': weights})), weights)


def test_an_overlay_wins_over_the_folder_in_the_name(weights, tmp_path):
    from timm.models._hub import save_for_hf
    save_for_hf(timm.create_model('resnet20_nbn', num_classes=10), tmp_path / 'folder', safe_serialization=True)
    save_file(weights, tmp_path / 'w.safetensors')
    for overlay in (dict(state_dict=weights), dict(file=str(tmp_path / 'w.safetensors'))):
        assert has(create(f"local-dir:{tmp_path / 'folder'}", overlay), weights)


def test_a_mirror_is_mended(weights_cache, server, weights, tmp_path, monkeypatch):
    """What does not fit, is damaged in the cache or has changed is fetched anew."""
    address, handler = server
    file = f'/{SHIPPED}.safetensors'
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', address)
    for arch, classes in (('resnet20', 10), ('resnet20_nbn', 7)):
        other = timm.create_model(arch, num_classes=classes).state_dict()
        handler.files[file] = saved(other, tmp_path / 'other.safetensors')
        for kwargs in ({}, dict(num_classes=10)):
            with pytest.raises(InputError, match=f'{file}.*of {arch} with {classes} classes.*NBN_TIMM_WEIGHTS'):
                create(**kwargs)
        assert not kept(weights_cache)
    handler.files[file] = saved(weights, tmp_path / 'w.safetensors')
    assert has(create(), weights)
    cached, = (path for path in kept(weights_cache) if path.suffix == '.safetensors')
    damaged = bytearray(cached.read_bytes())
    damaged[-5] ^= 1
    cached.write_bytes(damaged)
    assert has(create(), weights)
    handler.answers.clear()
    assert has(create(), weights) and handler.answers == [304]
    changed = {name: value + 1 for name, value in weights.items()}
    for handler.tags, now in ((True, changed), (False, weights)):
        handler.files[file] = saved(now, tmp_path / 'w.safetensors')
        assert has(create(), now)


def test_of_a_mirror_that_is_away_the_last_answer_is_taken_with_a_word(weights_cache, server, weights, tmp_path,
                                                                       monkeypatch, caplog):
    address, handler = server
    file = f'/{SHIPPED}.safetensors'
    handler.files[file] = saved(weights, tmp_path / 'w.safetensors')
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', address)
    create()
    handler.files[file] = None
    assert has(create(), weights) and 'HTTP Error 500' in caplog.text and 'gave before is taken' in caplog.text
    monkeypatch.setattr(os, 'access', lambda path, mode: False)  # a cache that cannot be written, as of a cluster
    handler.answers.clear()
    assert has(create(), weights) and not handler.answers


def test_a_cache_that_cannot_be_written_does_without(weights_cache, server, weights, tmp_path, monkeypatch, caplog):
    address, handler = server
    file = f'/{SHIPPED}.safetensors'
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', address)
    monkeypatch.setattr(os, 'access', lambda path, mode: 'nbn_timm-' in str(path))  # temporary folders
    handler.files[file] = saved(weights, tmp_path / 'w.safetensors')
    assert has(create(), weights) and not kept(weights_cache)
    assert weights_record(SHIPPED) is None  # of other weights; the mirror answers that it has no record
    handler.files.clear()
    create()
    assert 'has no weights' in caplog.text  # of the mirror's answer, and not of the cache


def test_what_a_cache_has_that_cannot_be_written_is_taken_with_a_warning(
        weights_cache, server, weights, tmp_path, monkeypatch, caplog):
    address, handler = server
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', address)
    handler.files[f'/{SHIPPED}.safetensors'] = saved(weights, tmp_path / 'w.safetensors')
    create()
    monkeypatch.setattr(os, 'access', lambda path, mode: 'nbn_timm-' in str(path))
    assert has(create(), weights)
    assert 'without asking' in caplog.text


def test_a_file_in_the_place_of_the_cache_does_without(server, weights, tmp_path, monkeypatch):
    address, handler = server
    (tmp_path / 'torch').write_text('a file')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', address)
    handler.files[f'/{SHIPPED}.safetensors'] = saved(weights, tmp_path / 'w.safetensors')
    assert has(create(), weights)


def test_a_lightning_file_in_the_folder_is_found(weights_cache, weights, tmp_path, monkeypatch):
    lightning = {'state_dict': {f'model.{name}': value for name, value in weights.items()}, 'epoch': 1}
    torch.save(lightning, tmp_path / 'resnet20_nbn.pth.tar')
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path))
    assert has(create('resnet20_nbn.cifar10_lt'), weights)
    # Of several benchmarks with so many classes its own name has to tell which.
    with pytest.raises(InputError, match=f"'resnet20_nbn.pth.tar'.*may be '{SHIPPED}'.*rename it to {SHIPPED}.safet"):
        create()
    target = tmp_path / f'{SHIPPED}.safetensors'
    assert _pretrained.write_zoo_file(tmp_path / 'resnet20_nbn.pth.tar', target)[0].arch == 'resnet20_nbn'
    assert has(create(), weights)
    (tmp_path / 'resnet20_nbn.pth.tar').unlink()
    with pytest.raises(InputError, match="no weights for 'resnet20_nbn.cifar10_lt'"):  # another benchmark's name
        create('resnet20_nbn.cifar10_lt')


@pytest.mark.parametrize(('make', 'said'), [
    (os.mkdir, 'is a folder and no file'), (os.mkfifo, 'is a pipe and no file'),
    (lambda path: os.symlink('/no/such/file', path), 'is a link to what is not there')])
def test_something_else_in_the_place_of_the_file_is_an_error(weights_cache, tmp_path, monkeypatch, make, said):
    make(tmp_path / f'{SHIPPED}.safetensors')
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path))
    with pytest.raises(InputError, match=f'{SHIPPED}.safetensors.*{said}'):
        create()


def test_weights_in_the_cache_that_do_not_fit_name_their_file(weights_cache, weights):
    weights_cache.mkdir(parents=True)
    file = weights_cache / 'resnet20_nbn.cifar100_lt.safetensors'
    save_file(weights, file)
    with pytest.raises(InputError, match=f"'{file}' cannot serve .* 10 classes and not .* 100: remove or correct"):
        create('resnet20_nbn.cifar100_lt', num_classes=10)


def test_a_classifier_is_never_new_without_a_word(weights, caplog):
    said = "The weights in 'state_dict' have 10 classes and 7 were asked for, so the classifier is new"
    with caplog.at_level(logging.WARNING):
        for overlay, kwargs, warns in (
                (dict(state_dict=weights), {}, False), (dict(state_dict=weights), dict(num_classes=7), True),
                (dict(state_dict=weights, num_classes=10), dict(num_classes=7), True),
                (dict(state_dict=weights, num_classes=-1), dict(num_classes=7), False),
                (dict(state_dict=weights), dict(num_classes=0), False),
                (dict(state_dict=weights), dict(features_only=True), False)):
            caplog.clear()
            create('resnet20_nbn', overlay, **kwargs)
            assert (said in caplog.text) == warns, (list(overlay), kwargs)
        with pytest.raises(InputError, match='have 10 classes, and their description says 7'):
            create('resnet20_nbn', dict(state_dict=weights, num_classes=7), num_classes=7)
    headless = {name: value for name, value in weights.items() if not name.startswith('fc.')}
    for classes in (7, 10, 100):
        with pytest.raises(InputError, match='have no classifier: give num_classes=-1'):
            create('resnet20_nbn', dict(state_dict=headless), num_classes=classes)
    create('resnet20_nbn', dict(state_dict=headless, num_classes=-1), num_classes=7)
    create('resnet20_nbn', dict(state_dict=headless), num_classes=0)


def test_a_config_that_says_another_number_than_the_weights_is_the_fault(weights, tmp_path):
    from timm.models._hub import save_for_hf

    from nbn_timm.trained.opening import open_trained
    save_for_hf(timm.create_model('resnet20_nbn', num_classes=10), tmp_path, safe_serialization=True)
    save_file(timm.create_model('resnet20_nbn', num_classes=7).state_dict(), tmp_path / 'model.safetensors')
    for make in (lambda: create(f'local-dir:{tmp_path}'), lambda: create(f'local-dir:{tmp_path}', num_classes=7),
                 lambda: open_trained(str(tmp_path))):
        with pytest.raises(InputError, match='have 7 classes, and their description says 10') as error:
            make()
        assert 'connection' not in str(error.value)


def test_weights_without_a_fitting_part_say_where_they_come_from(weights, tmp_path):
    plain = timm.create_model('resnet20', num_classes=10).state_dict()
    save_file(plain, tmp_path / 'plain.safetensors')
    with pytest.raises(InputError, match="plain.safetensors': the checkpoint has no NBN scale"):
        create('resnet20_nbn', dict(file=str(tmp_path / 'plain.safetensors')))


def test_what_a_place_does_not_have_comes_from_the_next_one_with_a_word(weights_cache, weights, tmp_path, monkeypatch,
                                                                        caplog):
    weights_cache.mkdir(parents=True)
    save_file(weights, weights_cache / 'resnet20_nbn.cifar10_lt.safetensors')
    (tmp_path / 'empty').mkdir()
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path / 'empty'))
    assert has(create('resnet20_nbn.cifar10_lt'), weights)
    assert f"NBN_TIMM_WEIGHTS has no weights for 'resnet20_nbn.cifar10_lt', so '{weights_cache}" in caplog.text

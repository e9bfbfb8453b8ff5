"""Checkpoints that are damaged, foreign or malicious; and files that are written whole or not at all."""
import os
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError

import nbn_timm  # noqa: F401
from nbn_timm import InputError
from nbn_timm.files import atomic_write, file_sha256, git_blob_id, write_folder
from nbn_timm.models.weight_files import load_weights, read_checkpoint, read_state_dict


class Touch:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path, legacy):
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    torch.save({'state_dict': {'fc.weight': torch.ones(2)}, 'extra': Touch(trace)}, path,
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError) as error:
        read_checkpoint(path)
    assert 'posix.system' in str(error.value) and 'nothing was run' in str(error.value)
    assert '\n' not in str(error.value) and not trace.exists()
    with pytest.raises(InputError, match='posix.system'):
        timm.create_model('resnet20_nbn', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert not trace.exists()


def test_plain_pickles_and_other_files_are_refused(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f'protocol{protocol}.pth'
        path.write_bytes(pickle.dumps({'a': Touch(tmp_path / 'trace')}, protocol))
        with pytest.raises(InputError, match=f'{path.name}.*posix.system'):
            read_checkpoint(path)
    (tmp_path / 'text.pth').write_text('this is no checkpoint')
    (tmp_path / 'bad.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{"a":')
    torch.save(torch.ones(3), tmp_path / 'tensor.pth')
    with zipfile.ZipFile(tmp_path / 'zip.pth', 'w') as file:
        file.writestr('a', 'b')
    for name in ('text.pth', 'bad.safetensors', 'tensor.pth', 'zip.pth', 'missing.pth'):
        with pytest.raises(InputError, match=name) as error:
            read_checkpoint(tmp_path / name)
        assert '\n' not in str(error.value), name
    assert not (tmp_path / 'trace').exists()


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / 'last.pth.tar'
    torch.save(timm.create_model('resnet20').state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match='last.pth.tar.*damaged'):
        read_checkpoint(path)


def test_timm_training_checkpoints_load_with_and_without_ema(tmp_path):
    model, ema = timm.create_model('resnet20_nbn'), timm.create_model('resnet20_nbn')
    path = tmp_path / 'last.pth.tar'
    torch.save({'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()},
                'state_dict_ema': {f'_orig_mod.{k}': v for k, v in ema.state_dict().items()},
                'args': Namespace(lr=0.1), 'epoch': 3}, path)
    for use_ema, source in ((False, model), (True, ema)):
        target = timm.create_model('resnet20_nbn')
        load_weights(target, path, use_ema)
        assert torch.equal(target.fc.weight, source.fc.weight)
        assert read_state_dict(path, use_ema).keys() == source.state_dict().keys()


@pytest.mark.parametrize('saved, kwargs, target, message', [
    ('resnet20_nbn', {}, 'resnet32_nbn', 'resnet20_nbn, 100 classes.*do not fit resnet32_nbn'),
    ('resnet20_nbn', dict(num_classes=10), 'resnet20_nbn', 'of another shape.*--num-classes'),
    ('resnet20', {}, 'resnet20_nbn', 'no NBN scale'),
    ('resnet20_nbn', {}, 'resnet20', 'would be garbage'),
    ('resnet20_nbn_lr', {}, 'resnet20_nbn', 'unexpected'),
    ('resnet18', {}, 'efficientnet_b0', 'resnet18, 1000 classes.*efficientnet_b0'),
])
def test_a_checkpoint_of_another_architecture_is_named(tmp_path, saved, kwargs, target, message):
    path = tmp_path / 'model.pth'
    torch.save(timm.create_model(saved, **kwargs).state_dict(), path)
    with pytest.raises(InputError, match=message) as error:
        load_weights(timm.create_model(target), path)
    assert '\n' not in str(error.value)


def _raise(error: Exception):
    def write(temporary: Path) -> None:
        raise error
    return write


@pytest.mark.parametrize('write', [
    lambda folder: atomic_write(folder / 'new', lambda path: path.write_text('one') and None),
    lambda folder: write_folder(folder / 'new', lambda path: (path / 'file').write_text('one') and None)])
def test_what_is_written_is_on_the_disk_before_it_takes_its_place(write, tmp_path, monkeypatch):
    """Else a machine that loses its power has a file of the right name without content."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def replaced(source, target):
        files = [path for path in [Path(source), *Path(source).glob('*')] if path.is_file()]
        assert [path.stat().st_ino for path in files] == events != []
        assert all(path.read_text() == 'one' for path in files)
        events.append('replaced')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', synced)
    monkeypatch.setattr(os, 'replace', replaced)
    write(tmp_path)
    assert events[-1] == 'replaced' and (tmp_path / 'new').exists()


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'folder' / 'file'
    atomic_write(path, lambda temporary: temporary.write_text('one') and None)

    def fail_halfway(temporary: Path) -> None:
        temporary.write_text('tw')
        raise OSError(28, 'No space left on device')

    with pytest.raises(InputError, match='No space left on device.*is intact'):
        atomic_write(path, fail_halfway)
    assert path.read_text() == 'one' and os.listdir(path.parent) == ['file']
    with pytest.raises(InputError, match='no file was left behind'):
        atomic_write(tmp_path / 'other', fail_halfway)
    assert not (tmp_path / 'other').exists()
    with pytest.raises(InputError, match='disk full'):
        atomic_write(tmp_path / 'other', _raise(SafetensorError('I/O error: disk full')))
    with pytest.raises(ZeroDivisionError):  # not the file system's doing: not ours to translate
        atomic_write(path, lambda temporary: 1 / 0)
    assert os.listdir(path.parent) == ['file']


def test_digests(tmp_path):
    (tmp_path / 'file').write_bytes(b'hello\n')
    assert file_sha256(tmp_path / 'file') == '5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03'
    assert git_blob_id(tmp_path / 'file') == 'ce013625030ba8dba906f756967f9e9ca394464a'  # git hash-object

"""Checkpoints that are damaged, foreign or malicious; and files that are written whole or not at all."""
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import nbn_timm  # noqa: F401
import nbn_timm.files
from nbn_timm import InputError
from nbn_timm.errors import in_words, one_line, run_cli, without_password
from nbn_timm.files import (
    atomic_write,
    file_sha256,
    git_blob_id,
    prints_beside,
    write_folder,
    write_text_atomic,
)
from nbn_timm.models.weight_files import load_weights, read_checkpoint, read_state_dict, save_weights, weights_digest

pytestmark = pytest.mark.fast


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


WEIGHTS = {'fc.weight': torch.arange(12.0).reshape(3, 4), 'fc.bias': torch.ones(3), 'seen': torch.tensor(7)}


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize('name', ['last.pth.tar', 'model.safetensors'])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    """What a flip in the padding or in a date of the zip changes is nothing that is read."""
    path = tmp_path / name
    save = save_weights if name.endswith('safetensors') else torch.save
    save(WEIGHTS, path)
    whole, digest = path.read_bytes(), weights_digest(WEIGHTS)
    refused = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 250):
        path.write_bytes(whole)
        flipped(path, bit)
        try:
            assert weights_digest(read_state_dict(path)) == digest, bit
        except InputError as error:
            refused += 1
            assert name in str(error) and '\n' not in str(error)
    assert refused > 50


def test_each_number_of_a_checkpoint_is_guarded(tmp_path):
    torch.save(WEIGHTS, tmp_path / 'last.pth.tar')
    content = (tmp_path / 'last.pth.tar').read_bytes()
    at = content.index(WEIGHTS['fc.weight'].numpy().tobytes())
    for byte in range(at, at + 48, 7):
        (tmp_path / 'last.pth.tar').write_bytes(content)
        flipped(tmp_path / 'last.pth.tar', 8 * byte)
        with pytest.raises(InputError, match=r'last\.pth\.tar.*is damaged \(its checksums do not hold\)'):
            read_checkpoint(tmp_path / 'last.pth.tar')


def test_files_without_checksums_are_read(tmp_path):
    """torch's older format, files for which its checksums were turned off, and safetensors of other writers."""
    torch.save(WEIGHTS, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / 'other.safetensors')
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / 'fast.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ('old.pth', 'other.safetensors', 'fast.pth'):
        assert weights_digest(read_state_dict(tmp_path / name)) == weights_digest(WEIGHTS)


def test_a_digest_is_of_names_types_shapes_and_numbers_and_not_of_their_order():
    same = dict(reversed(WEIGHTS.items()))
    assert weights_digest(same) == weights_digest(WEIGHTS)
    for change in ({'fc.bias': torch.ones(3).half()}, {'fc.bias': torch.ones(3, 1)}, {'fc.bias': torch.zeros(3)},
                   {'other': torch.ones(1)}):
        assert weights_digest(WEIGHTS | change) != weights_digest(WEIGHTS)


@pytest.mark.parametrize(('entries', 'said'), [
    ({0: torch.ones(2)}, 'has 0 for a name'),
    ({'fc.weight': torch.ones(2, dtype=torch.int8)}, "'fc.weight' is of int8"),
    ({'fc.weight': torch.ones(2, dtype=torch.complex64)}, "'fc.weight' is of complex64"),
    ({'fc.weight': torch.eye(2).to_sparse()}, "'fc.weight' is a sparse"),
    ({'fc.weight': torch.tensor([1.0, float('nan')])}, "'fc.weight' is NaN or infinite"),
    ({'bn.running_var': torch.tensor([1.0, float('inf')])}, "'bn.running_var' is NaN or infinite"),
    ({'fc.weight': 'text'}, 'holds no weights'), ({}, 'holds no weights'),
])
def test_weights_that_nothing_can_be_computed_with_are_named(tmp_path, entries, said):
    torch.save({'state_dict': entries}, tmp_path / 'odd.pth')
    with pytest.raises(InputError, match=f'odd.pth.*{said}'):
        read_state_dict(tmp_path / 'odd.pth')


@pytest.mark.filterwarnings('ignore:.*quantized tensor creation:UserWarning')
def test_quantised_weights_are_named(tmp_path):
    torch.save({'fc.weight': torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, tmp_path / 'odd.pth')
    with pytest.raises(InputError, match="odd.pth.*'fc.weight' is a quantised"):
        read_state_dict(tmp_path / 'odd.pth')


def test_weights_of_another_kind_of_number_are_not_cast(tmp_path):
    model = timm.create_model('resnet20_nbn')
    weights = model.state_dict()
    name = next(key for key in weights if key.endswith('num_batches_tracked'))
    torch.save(weights | {name: torch.tensor(3.5)}, tmp_path / 'model.pth')
    with pytest.raises(InputError, match=f"'{name}' is of float32 there and of int64 in the model"):
        load_weights(model, tmp_path / 'model.pth')


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


def test_a_link_and_its_file_stay_what_they_are(tmp_path):
    (tmp_path / 'far').mkdir()
    target, link = tmp_path / 'far' / 'file', tmp_path / 'link'
    target.write_text('old')
    target.chmod(0o600)
    link.symlink_to(target)
    write_text_atomic(link, 'new')
    assert link.is_symlink() and target.read_text() == 'new' and target.stat().st_mode & 0o777 == 0o600
    write_text_atomic(tmp_path / 'fresh', 'x')
    assert (tmp_path / 'fresh').stat().st_mode & 0o777 == 0o666 & ~nbn_timm.files._umask()
    assert sorted(os.listdir(tmp_path)) == ['far', 'fresh', 'link'] and os.listdir(tmp_path / 'far') == ['file']


@pytest.mark.parametrize('name', ['x' * 300, 'a\0b', 'loop'])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    (tmp_path / 'loop').symlink_to('loop')
    for write in (lambda: write_text_atomic(tmp_path / name, 'x'), lambda: write_folder(tmp_path / name, put('x'))):
        with pytest.raises(InputError, match='nothing can be written to .*: choose another name') as error:
            write()
        assert '\0' not in str(error.value)
    assert os.listdir(tmp_path) == ['loop']


def test_a_name_that_is_too_long_to_be_read_is_one_sentence(capsys):
    assert run_cli(lambda argv: Path('x' * 5000).is_file() and None, 'nbn-test') == 1
    said = capsys.readouterr().err
    assert said.startswith("nbn-test: error: 'xxx") and said.endswith("xxx' is no file (File name too long): correct "
                                                                      'the path\n') and len(said) < 600


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / 'pipe').read_text()))
    reader.start()
    write_text_atomic(tmp_path / 'pipe', 'through')
    reader.join()
    assert read == ['through'] and (tmp_path / 'pipe').is_fifo() and os.listdir(tmp_path) == ['pipe']


def test_the_standard_output_by_its_path_is_written_into(tmp_path, capfd):
    print('a')
    write_text_atomic('/dev/stdout', 'b\n')
    print('c')
    assert capfd.readouterr().out == 'a\nb\nc\n'


def test_a_link_to_the_standard_output_goes_on_in_the_file_that_it_is(tmp_path):
    (tmp_path / 'near').symlink_to('/dev/stdout')
    (tmp_path / 'link').symlink_to('near')
    code = f"from nbn_timm.files import write_text_atomic as write; write({str(tmp_path / 'link')!r}, 'told')"
    with open(tmp_path / 'out', 'w') as out:
        out.write('before ')
        out.flush()
        subprocess.run([sys.executable, '-c', code], stdout=out, check=True)
    assert (tmp_path / 'out').read_text() == 'before told' and (tmp_path / 'link').is_symlink()


def test_what_is_printed_beside_an_output_does_not_get_into_it(tmp_path, capfd):
    (tmp_path / 'link').symlink_to('/dev/stdout')
    for output, stream in (('/dev/stdout', 1), (tmp_path / 'link', 1), (tmp_path / 'file', 0), (None, 0)):
        with prints_beside(None, output):
            print('told')
        assert capfd.readouterr()[stream] == 'told\n'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
@pytest.mark.parametrize('buffering', [1, -1], ids=['lines', 'blocks'])
def test_a_full_standard_output_is_one_sentence(capsys, monkeypatch, buffering):
    def main(argv: list[str] | None) -> None:
        print('x')

    with open('/dev/full', 'w', buffering=buffering) as full:
        monkeypatch.setattr(sys, 'stdout', full)
        assert run_cli(main, 'nbn-test') == 1
        monkeypatch.undo()
    said = capsys.readouterr().err
    assert said.startswith('nbn-test: error: the standard output cannot be written (No space left on device)')
    assert said.count('\n') == 1

    def broken(argv: list[str] | None) -> None:
        raise FileNotFoundError(2, 'No such file or directory', 'x')

    with pytest.raises(FileNotFoundError):
        run_cli(broken, 'nbn-test')


def writing(kind: str, target: Path) -> multiprocessing.Process:
    """A process in the middle of writing `target`."""
    context = multiprocessing.get_context('fork')
    begun = context.Event()

    def slowly(path: Path) -> None:
        (path / 'file' if path.is_dir() else path).write_text('half')
        begun.set()
        time.sleep(60)

    process = context.Process(target=atomic_write if kind == 'file' else write_folder, args=(target, slowly))
    process.start()
    assert begun.wait(30)
    return process


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_what_a_killed_command_leaves_is_cleared_by_the_next_one_and_a_living_one_keeps_its_own(tmp_path, kind):
    target = tmp_path / 'out.put'
    dead, living = writing(kind, target), writing(kind, target)
    (tmp_path / '.out.put.my_notes.tmp').mkdir()  # looks alike, but nobody's lock is in it
    (tmp_path / '.out.put.my_notes.tmp' / 'notes').touch()
    assert len(list(tmp_path.glob('.out.put.*.tmp'))) == 3
    dead.kill()
    dead.join()
    if kind == 'file':
        write_text_atomic(target, 'whole')
    else:
        write_folder(target, put('whole'))
    assert len(list(tmp_path.glob('.out.put.*.tmp'))) == 2
    living.kill()
    living.join()
    assert (target if kind == 'file' else target / 'file').read_text() == 'whole'


def put(text: str):
    def fill(folder: Path) -> None:
        (folder / 'file').write_text(text)
    return fill


def test_a_folder_is_exchanged_in_one_step_or_put_back_after_a_crash(tmp_path, monkeypatch):
    folder = tmp_path / 'folder'
    write_folder(folder, put('one'))
    folder.chmod(0o700)
    write_folder(folder, put('two'), replaceable=['file'])
    assert (folder / 'file').read_text() == 'two' and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(nbn_timm.files, '_exchange', lambda first, second: False)
    replace = os.replace

    def refused(source: Path, target: Path) -> None:
        if Path(source).name == 'new':
            raise OSError(5, 'Input/output error')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', refused)
    with pytest.raises(InputError, match='Input/output error'):
        write_folder(folder, put('three'), replaceable=['file'])
    assert (folder / 'file').read_text() == 'two' and os.listdir(tmp_path) == ['folder']
    monkeypatch.setattr(os, 'replace', replace)
    # A process that was killed between the two renames.
    leftover = tmp_path / '.folder.abcdefgh.tmp'
    leftover.mkdir()
    (leftover / nbn_timm.files._LOCK).touch()
    os.replace(folder, leftover / 'old')
    with pytest.raises(InputError, match="'folder' is not empty|folder' is not empty"):
        write_folder(folder, put('three'))
    assert (folder / 'file').read_text() == 'two' and os.listdir(tmp_path) == ['folder']
    write_folder(folder, put('three'), replaceable=['file'])
    assert (folder / 'file').read_text() == 'three' and os.listdir(tmp_path) == ['folder']


def test_a_sentence_is_whole_on_one_line_and_tells_no_password(capsys):
    def fails(message: str):
        def main(argv: list[str] | None) -> None:
            raise InputError(message)
        return main

    name = "the image 'a\nb\x1b[2Jc.png' of http://me:p@ss@host:80/x?mail=a@b is broken: replace it"
    worker = ('Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
              f'  File "x.py", line 3\nnbn_timm.errors.InputError: {name}\n')
    for message in (name, worker):
        assert run_cli(fails(message), 'nbn-test') == 1
        assert capsys.readouterr().err == (
            "nbn-test: error: the image 'a\\nb\\x1b[2Jc.png' of http://host:80/x?mail=a@b is broken: replace it\n")
    assert without_password('https://a@h/b@c') == 'https://h/b@c' and one_line('ä b\t') == 'ä b\\t'


ALIKE = '''
import os, sys, time
from nbn_timm.errors import InputError, run_cli

def alike(argv):
    raise InputError('all are wrong')

def own(argv):
    raise InputError(f"process {os.environ['RANK']} is wrong")

code = run_cli(alike, 'nbn-test') and run_cli(own, 'nbn-test')
open(f"done{os.environ['RANK']}", 'w').close()
while not (os.path.exists('done0') and os.path.exists('done1')):
    time.sleep(0.1)
sys.exit(code)
'''


def test_processes_that_fail_alike_say_so_once(tmp_path):
    (tmp_path / 'script.py').write_text(ALIKE)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'script.py'],
        capture_output=True, text=True, cwd=tmp_path, timeout=300)
    said = sorted(line for line in done.stderr.splitlines() if line.startswith('nbn-test: '))
    assert said == ['nbn-test: error: all are wrong', 'nbn-test: error: process 0 is wrong',
                    'nbn-test: error: process 1 is wrong'], done.stderr


def test_digests(tmp_path):
    (tmp_path / 'file').write_bytes(b'hello\n')
    assert file_sha256(tmp_path / 'file') == '5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03'
    assert git_blob_id(tmp_path / 'file') == 'ce013625030ba8dba906f756967f9e9ca394464a'  # git hash-object


@pytest.mark.parametrize('content', [b'h\x05.', b'j\xa5\x86\x6b\x0a.'])
def test_a_number_is_no_reason_that_a_checkpoint_cannot_be_read_for(tmp_path, content):
    (tmp_path / 'junk.pth').write_bytes(content)  # asks for what was never stored
    with pytest.raises(InputError, match="junk.pth' cannot be read: it is damaged or no checkpoint, so get it again"):
        read_checkpoint(tmp_path / 'junk.pth')


@pytest.mark.parametrize(('error', 'said'), [
    (KeyError(174812789), 'KeyError: 174812789'), (KeyError('images'), "KeyError: 'images'"),
    (ValueError(), 'ValueError'), (OSError(5), 'OSError: 5'), (ValueError('it is\n odd'), 'it is odd'),
    (ValueError('a' * 5000 + 'b' * 5000), f'{"a" * 400} ... {"b" * 400}')])
def test_what_an_error_says_is_in_words(error, said):
    assert in_words(error) == said

"""Processes that see other files, settings or data than each other all stop with one sentence."""
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from forks import run_ranks
from PIL import Image

from nbn_timm import InputError
from nbn_timm.cli import train, validate
from nbn_timm.data import Classes, Splits
from nbn_timm.data.dataset import ArraySamples, ImageSamples
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.models.weight_files import save_weights
from nbn_timm.training import agreement
from nbn_timm.training.agreement import check_alike


def test_differences_and_errors_are_the_same_sentence_everywhere():
    check_alike([{}, {}], 'mend it')
    check_alike([{'--lr': '1'}, {'--lr': '1'}], 'mend it')
    damaged = InputError('it is damaged')
    for seen, said in (
            ([{'--lr': '1', '-x': '2'}, {'--lr': '1', '-x': '3'}],
             r'^the processes differ in -x \(process 0: 2; process 1: 3\): mend'),
            ([{'a': '1'}, {'a': '1'}, {}], r'differ in a \(process 0: 1; process 2: none\)'),
            ([{'a': '1'}, damaged], '^process 1 found: it is damaged'),
            ([damaged, InputError('it is damaged')], '^it is damaged')):
        with pytest.raises(InputError, match=said):
            check_alike(seen, 'mend it')


def splits(folder: str, names: tuple[str, ...] = ('cat/1.png', 'dog/2.png'), pixel: int = 0) -> Splits:
    pictures = ImageSamples([f'{folder}/{name}' for name in names], [0, 1])
    arrays = ArraySamples(np.full((2, 4, 4, 3), pixel, np.uint8), [0, 1])
    return Splits(pictures, None, arrays, Classes((1, 1), ('cat', 'dog'), folder), OWN_IMAGES)


def test_data_are_told_by_what_they_are_and_not_by_where_they_lie():
    here = agreement._data(splits('/here'), None)
    assert agreement._data(splits('/there/else'), None) == here and set(here) == {
        'the classes', 'the train split', 'the test split'}
    for other, where in ((splits('/here', ('cat/1.png', 'dog/3.png')), 'train'), (splits('/here', pixel=1), 'test')):
        with pytest.raises(InputError, match=f'differ in the {where} split .process 0: 2 pictures, SHA-256 '):
            check_alike([here, agreement._data(other, None)], 'mend it')


def test_files_and_folders_of_runs_are_told_by_their_content_and_words_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('one', 'two', 'uniform'):
        Path(name).mkdir()
    Path('one/last.pth.tar').write_bytes(b'weights')
    Path('two/a.txt').write_bytes(b'weights')
    Path('pipe').symlink_to('/dev/null')
    content = agreement._content
    assert content('one') == content('two/a.txt') == content('local-dir:one') == 'SHA-256 9a129038d9a0'
    assert [content(name) for name in ('uniform', 'hf-hub:a/b', 'gone/list.txt', 'pipe')] == [
        'uniform', 'b', 'list.txt', 'pipe']


def write_node(folder: Path, seed: int) -> None:
    """What is called the same on all nodes, and differs."""
    folder.mkdir()
    torch.manual_seed(seed)
    model = timm.create_model('resnet20_nbn', num_classes=10)
    torch.save({'arch': 'resnet20_nbn', 'epoch': 3, 'state_dict': model.state_dict(),
                'args': {'model': 'resnet20_nbn', 'dataset': 'digits_lt'}}, folder / 'ck.pth.tar')
    (folder / 'weights').mkdir()
    save_weights(model.state_dict(), folder / 'weights' / 'resnet20_nbn.digits_lt.safetensors')
    for number in range(2 + seed):
        for name in ('ant', 'bee'):
            path = folder / 'pictures' / 'train' / name / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4)).save(path)
    (folder / 'counts.json').write_text(f'[{seed + 1}, 2]')
    (folder / 'lr.yaml').write_text(f'lr: 0.{seed + 1}\n')


MINIMAL = ['--device', 'cpu', '--workers', '0']
TRAIN = ['--dataset', 'digits_lt', '--model', 'resnet20_nbn', *MINIMAL]
PUBLISHED = ['--model', 'resnet20_nbn.digits_lt', '--pretrained']
CASES = {
    '--checkpoint': (validate.main, ['--checkpoint', 'ck.pth.tar', *MINIMAL]),
    '--kd-checkpoint': (train.main, [*TRAIN, '--kd-checkpoint', 'ck.pth.tar']),
    '--initial-checkpoint': (train.main, [*TRAIN, '--initial-checkpoint', 'ck.pth.tar']),
    '--class-counts': (train.main, [*TRAIN, '--class-counts', 'counts.json']),
    "the weights of 'resnet20_nbn.digits_lt'": (validate.main, [*PUBLISHED, *MINIMAL]),
    "the weights of 'resnet20_nbn.digits_lt' in a training": (
        train.main, [*PUBLISHED, '--dataset', 'digits_lt', *MINIMAL]),
    'the classes': (train.main, [*TRAIN[2:], '--dataset', 'folder', '--data-dir', 'pictures']),
    '--lr': (train.main, [*TRAIN, '--config', 'lr.yaml']),
}


def run_all_cases(folder: Path) -> None:
    rank = int(os.environ['RANK'])
    os.chdir(folder / f'node{rank}')
    os.environ['NBN_TIMM_WEIGHTS'] = 'weights'
    said = []
    for name, (main, arguments) in CASES.items():
        # Rank 0 alone has the folder of the run, so that it alone asks for its lock.
        place = ['--output', str(folder / name)] if main is train.main else []
        with pytest.raises(InputError) as refusal:
            main([*arguments, *place])
        said.append(str(refusal.value))
        if dist.is_initialized():
            dist.destroy_process_group()
    Path('said').write_text('\n'.join(said))


@pytest.fixture(scope='module')
def said(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp('nodes')
    for rank in range(2):
        write_node(folder / f'node{rank}', rank)
    run_ranks(run_all_cases, folder, timeout=120)
    first, second = ((folder / f'node{rank}' / 'said').read_text().splitlines() for rank in range(2))
    assert first == second
    return dict(zip(CASES, first, strict=True))


@pytest.mark.parametrize('name', CASES)
def test_nodes_with_another_file_of_the_same_name_all_stop(said, name):
    value = {'--lr': '0.1; process 1: 0.2', 'the classes': '2 classes, SHA-256 '}.get(name, 'SHA-256 ')
    what = name.removesuffix(' in a training')
    assert said[name].startswith(f'the processes differ in {what} (process 0: {value}')

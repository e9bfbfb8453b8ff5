"""benchmarks/gpu.py: it runs small on a CPU, leaves alone what is there, and its published pattern computes NBN."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_train_run import images as pictures  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def gpu():
    import gpu
    return gpu


def run(gpu, monkeypatch, folder, *more: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['gpu.py', '--device', 'cpu', '--small', '--output', str(folder), '--repeats', '1',
                                      *more])
    gpu.main()


def test_parts_leave_their_results_and_are_not_done_twice(gpu, monkeypatch, tmp_path, capsys):
    run(gpu, monkeypatch, tmp_path, '--parts', 'steps', 'experts', 'evaluation', 'recipes')
    steps, experts, evaluation = (json.loads((tmp_path / f'{name}.json').read_text()) for name in (
        'steps', 'experts', 'evaluation'))
    assert set(steps['ratio']) == {'resnet20', 'resnet20_nbn', 'published pattern'} and steps['ratio']['resnet20'] == 1
    assert steps['ours against published'] == pytest.approx(steps['ms']['resnet20_nbn'] / steps['ms'][
        'published pattern'])
    assert experts['arithmetic'] == pytest.approx(1.457, abs=2e-3)  # 100,358,208 of 68,868,352 multiply-adds
    assert all(value > 0 for value in evaluation['images per second'].values())
    assert steps['commit'] and steps['torch'] == torch.__version__.partition('+')[0]
    assert 'recipes: not done, since there is no --data-dir' in capsys.readouterr().out
    assert not (tmp_path / 'recipes.json').exists()

    run(gpu, monkeypatch, tmp_path, '--parts', 'steps')
    assert 'steps: there already' in capsys.readouterr().out
    assert json.loads((tmp_path / 'steps.json').read_text()) == steps


def test_no_part_begins_when_the_time_is_up(gpu, monkeypatch, tmp_path, capsys):
    run(gpu, monkeypatch, tmp_path, '--minutes', '0')
    assert capsys.readouterr().out.count('no time is left') == len(gpu.PARTS)
    assert not list(tmp_path.iterdir())


def test_the_published_pattern_computes_nbn(gpu):
    torch.manual_seed(0)
    ours = timm.create_model('resnet20_nbn', num_classes=7, gradient='released').train()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs = gpu.published(timm.create_model('resnet20_nbn', num_classes=7, gradient='released')).train()
    theirs.load_state_dict(ours.state_dict())
    for network in (ours, theirs):
        network(images).square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(other.grad, mine.grad, rtol=2e-3, atol=1e-4, msg=name)
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(ours.buffers(), theirs.buffers(),
                                                                            strict=True))


def commands(gpu, monkeypatch, epochs_done=1, returncode=0):
    """Notes what would be started; a training logs some epochs."""
    told = []

    def start(command, check=False, timeout=None):
        told.append(command)
        if '--experiment' in command:
            folder = Path(command[command.index('--output') + 1], command[command.index('--experiment') + 1])
            folder.mkdir(parents=True, exist_ok=True)
            assert 0 < timeout <= 600
            with open(folder / 'log.jsonl', 'a') as log:
                log.write('{"train_images_per_second": 100.0}\n' * epochs_done)
        if check and returncode:
            raise subprocess.CalledProcessError(returncode, command)
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(gpu, 'about_this_machine', lambda *_: {})
    monkeypatch.setattr(gpu.subprocess, 'run', start)
    return told


def test_flags_behind_the_dashes_go_to_every_training(gpu, monkeypatch, tmp_path):
    told = commands(gpu, monkeypatch)
    run(gpu, monkeypatch, tmp_path, '--data-dir', 'd', '--parts', 'cifar', 'recipes', '--', '--train-list', 'a.txt')
    assert [Path(command[1]).name for command in told] == ['train.py', 'train_list.py']
    assert all(command[-2:] == ['--train-list', 'a.txt'] for command in told)
    assert json.loads((tmp_path / 'cifar.json').read_text())['seconds of 200 epochs'] == pytest.approx(21_694)


def test_a_run_that_was_cut_goes_on(gpu, monkeypatch, tmp_path):
    told = commands(gpu, monkeypatch)
    visit = gpu.Visit(torch.device('cuda'), False, tmp_path, 'd', tmp_path, 1, lambda: 60.0, 1)
    assert [gpu.measure_cifar(visit)['epochs'] for _ in range(4)] == [1, 2, 3, 3] and len(told) == 3
    assert {'--cuda-graphs', '--channels-last', '--amp', 'bfloat16'} < set(told[0])


def test_a_part_that_fails_lets_the_others_run(gpu, monkeypatch, tmp_path, capsys):
    told = commands(gpu, monkeypatch, returncode=1)
    with pytest.raises(SystemExit, match=r'failed, see .*: cifar, recipes'):
        run(gpu, monkeypatch, tmp_path, '--data-dir', 'd', '--parts', 'cifar', 'recipes', 'cifar')
    assert len(told) == 2  # the third finds the epochs of the first
    assert 'runs have failed' in json.loads((tmp_path / 'recipes.failed.json').read_text())['error']
    assert (tmp_path / 'cifar.json').exists() and not (tmp_path / 'cifar.failed.json').exists()


def test_a_part_ends_with_the_time(gpu, tmp_path):
    left = iter([1.0] * 3 + [0.0] * 9)
    visit = gpu.Visit(torch.device('cpu'), True, tmp_path, None, tmp_path, 1, lambda: next(left), 9)
    steps = []
    assert list(gpu.in_turns({'a': lambda: steps.append(1)}, visit)) == ['a'] and len(steps) == 3 + 1
    with pytest.raises(TimeoutError):
        gpu.in_turns({'a': lambda: steps.append(1)}, visit)


def test_what_the_time_has_cut_is_no_failure(gpu, monkeypatch, tmp_path, capsys):
    def cut(visit):
        raise subprocess.TimeoutExpired('train.py', 1)

    monkeypatch.setitem(gpu.PARTS, 'cifar', cut)
    run(gpu, monkeypatch, tmp_path, '--parts', 'cifar')
    assert 'cifar: not done, the time was up' in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_trainings_run_on_pictures_and_lists(gpu, monkeypatch, pictures, tmp_path):  # noqa: F811
    recipes = tmp_path / 'recipes.txt'
    recipes.write_text('tiny-s1 --dataset cifar100_lt --model resnet20 --epochs 1 -b 4\n')
    run(gpu, monkeypatch, tmp_path, '--data-dir', str(pictures), '--recipes', str(recipes), '--jobs', '1',
        '--parts', 'cifar', 'recipes', '--', '--train-list', 'train.txt', '--test-list', 'test.txt', '--img-size', '8',
        '--workers', '0')
    cifar, finished = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('cifar', 'recipes'))
    assert cifar['epochs'] == 1 and cifar['images per second'] > 0
    assert finished['finished'] == ['tiny-s1']

"""benchmarks/gpu.py: it runs small on a CPU, leaves alone what is there, and its published pattern computes NBN."""
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def gpu():
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    try:
        import gpu
        yield gpu
    finally:
        sys.path.remove(str(ROOT / 'benchmarks'))


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

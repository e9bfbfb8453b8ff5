"""Where the time of an epoch goes, and what is advised for a processor."""
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
import nbn_timm.cli.train as train
from nbn_timm.computation import PrecisionSettings
from nbn_timm.training import cpu_advice
from nbn_timm.training.cpu_advice import Way, advise, best_advice, measure, possible_ways, steps_of
from nbn_timm.training.profile import PARTS, REST, NoProfile, Profile

pytestmark = pytest.mark.fast


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_parts_add_up_to_the_epoch():
    clock = Clock()
    profile = Profile(torch.device('cpu'), clock)

    def loader():
        for batch in range(3):
            clock.passes(2)
            yield batch
        clock.passes(1)  # until it is known that there is no more

    for _ in range(2):
        profile.start()
        assert list(profile.input(loader())) == [0, 1, 2]
        with profile.part('forward'):
            clock.passes(4)
        with profile.part('forward'):
            clock.passes(1)
        with profile.part('evaluation'):
            clock.passes(10)
        clock.passes(3)
        seconds = profile.seconds()
        profile.finish()
        clock.passes(100)  # between epochs
        assert seconds == {'input': 7, 'forward': 5, 'backward': 0, 'optimizer': 0, 'evaluation': 10, REST: 3}
    lines = profile.table().splitlines()
    assert [line.split() for line in lines[1:3]] == [['input', '7.00', '28.0', '%'], ['forward', '5.00', '20.0', '%']]
    assert lines[-1].split() == ['all', '25.00', '100.0', '%']
    assert Profile(torch.device('cpu')).table() is None


def test_without_it_nothing_is_wrapped():
    profile, loader = NoProfile(), [1, 2]
    assert profile.input(loader) is loader and profile.seconds() is None and profile.table() is None


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two epochs with --profile and without."""
    root = tmp_path_factory.mktemp('profile')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for index in range(12):
            folder = root / split / 'ab'[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f'{index}.png')
    said = {}
    for name, flags in (('with', ['--profile']), ('without', [])):
        train.main(['--dataset', 'folder', '--data-dir', str(root), '--model', 'resnet20_nbn', '--img-size', '8',
                    '--device', 'cpu', '--workers', '0', '--epochs', '2', '--batch-size', '4', '--output', str(root),
                    '--experiment', name, *flags])
        said[name] = [json.loads(line) for line in (root / name / 'log.jsonl').read_text().splitlines()]
    return root, said


def test_a_run_tells_its_parts_in_the_log(runs):
    root, said = runs
    for row in said['with']:
        assert list(row['seconds']) == [*PARTS, REST]
        assert all(row['seconds'][part] > 0 for part in PARTS)
    assert all('seconds' not in row for row in said['without'])
    assert 'seconds' not in (root / 'with' / 'summary.csv').read_text()


def test_measuring_changes_no_weight(runs):
    root, _ = runs
    states = [torch.load(root / name / 'last.pth.tar', weights_only=True)['state_dict']
              for name in ('with', 'without')]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def plan(stage=None, processes=1, **settings):
    return SimpleNamespace(
        settings=SimpleNamespace(precision=PrecisionSettings(**settings), second_stage=SimpleNamespace(stage=stage)),
        input=SimpleNamespace(input_size=(3, 16, 16)),
        world=SimpleNamespace(device=torch.device('cpu'), size=processes))


def test_advice_is_a_line_and_changes_nothing(caplog, monkeypatch):
    monkeypatch.setattr(cpu_advice, 'measure', lambda steps: {
        way: step() or (1.0 if way.advice == '' else 0.5) for way, step in steps.items()})
    model = timm.create_model('resnet20_nbn', num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    with caplog.at_level(logging.INFO):
        advise(plan(), model, 1000)
    line, = caplog.messages
    assert line.startswith('A step takes 0.50 of the time on this processor with --channels-last')
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('settings,updates', [
    ({'channels_last': True}, 1000), ({'amp': True}, 1000), ({'model_dtype': 'bfloat16'}, 1000),
    ({'stage': 'expert_router'}, 1000), ({'processes': 2}, 1000), ({}, 999)])
def test_nothing_is_measured_where_something_was_chosen_or_the_run_is_short(settings, updates, monkeypatch):
    monkeypatch.setattr(cpu_advice, 'possible_ways', lambda: pytest.fail('measured'))
    advise(plan(**settings), None, updates)


def test_ways_take_turns_and_patience_ends():
    clock = Clock()
    usual, other = Way('', False, False, 1), Way('--channels-last', True, False, 1)
    calls = []

    def step(way, seconds):
        def run():
            calls.append(way)
            clock.passes(seconds)
        return run

    seconds = measure({usual: step(usual, 4), other: step(other, 3)}, clock)
    assert calls == [usual, other] * 2  # one to warm up, one that counts, and then ten seconds are over
    assert seconds == {usual: 4, other: 3}
    assert best_advice(seconds).startswith('A step takes 0.75 of the time')
    assert best_advice({usual: 4, other: 3.9}) is None and best_advice({usual: 3, other: 4}) is None


def test_the_ways_are_those_of_this_processor(monkeypatch):
    usual = torch.get_num_threads()
    monkeypatch.setattr(cpu_advice, 'cores', lambda: usual + 6)
    ways = possible_ways()
    assert ways[0] == Way('', False, False, usual)
    assert any(way.bfloat16 for way in ways) == cpu_advice.has_bfloat16()
    assert Way(f'OMP_NUM_THREADS={usual + 6} before the command', False, False, usual + 6) in ways
    assert Way(f'--channels-last and OMP_NUM_THREADS={usual + 6} before the command', True, False, usual + 6) in ways
    assert {way.threads for way in ways} == {1, usual, usual + 6} and len(set(ways)) == len(ways)


def test_a_step_is_taken_in_each_way():
    threads = []
    model = timm.create_model('resnet32_ride_nbn', num_classes=3)
    model.register_forward_pre_hook(lambda _, given: threads.append(
        (torch.get_num_threads(), given[0].is_contiguous(memory_format=torch.channels_last))))
    ways = [Way('', False, False, 1), Way('--channels-last', True, False, 2)]
    for step in steps_of(model, (3, 16, 16), ways).values():
        step()
    assert threads == [(1, False), (2, True)]

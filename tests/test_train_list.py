"""benchmarks/train_list.py: what it trains, in which order, and what it leaves alone."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIST = """
# first and second stage
second-s1  --config b --initial-checkpoint {runs}/first-s1/last.pth.tar   # waits for the other
first-s1   --config a
"""


@pytest.fixture(scope='module')
def train_list():
    import train_list
    return train_list


@pytest.fixture
def entries(train_list, tmp_path):
    (tmp_path / 'list.txt').write_text(LIST)
    return train_list.read_list(tmp_path / 'list.txt')


def runner(train_list, tmp_path, monkeypatch, flags=('--device', 'cuda'), fails=(), **settings):
    """A runner whose trainings are over at once, and the commands that it gave."""
    made = train_list.Runner(tmp_path / 'runs', '/data', flags, {'hardware': 'none'}, **settings)
    commands = []

    def run(command, folder):
        commands.append(command)
        if folder.name in fails:
            return False
        (folder / 'test.json').write_text('{}')
        return True
    monkeypatch.setattr(made, '_run', run)
    return made, commands


def test_a_second_stage_waits_for_its_first(train_list, entries, tmp_path, monkeypatch):
    made, commands = runner(train_list, tmp_path, monkeypatch)
    assert made.train(entries, jobs=2) == []
    assert [command[command.index('--experiment') + 1] for command in commands] == ['first-s1', 'second-s1']
    assert str(tmp_path / 'runs' / 'first-s1' / 'last.pth.tar') in commands[1]
    about = json.loads((tmp_path / 'runs' / 'second-s1' / 'hardware.json').read_text())
    assert about == {'command': 'python train.py --config b --initial-checkpoint \'{runs}/first-s1/last.pth.tar\' '
                                '--device cuda', 'hardware': 'none'}


def test_a_second_stage_goes_without_cuda_graphs(train_list, entries, tmp_path, monkeypatch):
    """Which train.py refuses there, so that one list and one command have both stages."""
    made, commands = runner(train_list, tmp_path, monkeypatch, flags=('--device', 'cuda', '--cuda-graphs'))
    assert made.train(entries, jobs=2) == []
    assert ['--cuda-graphs' in command for command in commands] == [True, False]
    shown = [json.loads((tmp_path / 'runs' / name / 'hardware.json').read_text())['command']
             for name in ('first-s1', 'second-s1')]
    assert ['--cuda-graphs' in command for command in shown] == [True, False]


def test_finished_runs_are_left_alone_and_others_go_on(train_list, entries, tmp_path, monkeypatch, capsys):
    made, _ = runner(train_list, tmp_path, monkeypatch, fails=('second-s1',))
    assert made.train(entries, jobs=2) == ['second-s1']
    made, commands = runner(train_list, tmp_path, monkeypatch)
    assert made.train(entries, jobs=2) == []
    assert [command[command.index('--experiment') + 1] for command in commands] == ['second-s1']
    assert '--resume' in commands[0] and 'first-s1: there already' in capsys.readouterr().out


def test_a_run_of_another_command_is_not_gone_on_with(train_list, entries, tmp_path, monkeypatch, capsys):
    made, _ = runner(train_list, tmp_path, monkeypatch, fails=('first-s1', 'second-s1'))
    made.train(entries, jobs=2)
    made, commands = runner(train_list, tmp_path, monkeypatch, flags=('--device', 'cpu'))
    assert made.train(entries, jobs=2) == ['second-s1', 'first-s1']
    assert not commands and 'was begun by another command' in capsys.readouterr().out


def test_nothing_begins_when_the_time_is_up(train_list, entries, tmp_path, monkeypatch):
    made, commands = runner(train_list, tmp_path, monkeypatch, seconds=0)
    assert made.train(entries, jobs=2) == ['second-s1', 'first-s1'] and not commands


def test_a_run_beyond_its_time_is_killed(train_list, tmp_path):
    made = train_list.Runner(tmp_path, '/data', (), {}, seconds=0.5)
    assert not made._run([sys.executable, '-c', 'import time; time.sleep(60)'], tmp_path)


def test_the_lists_of_the_repository_are_read(train_list):
    for name in ('full_recipes.txt', 'full_wide_shike.txt', 'queue.txt'):
        entries = train_list.read_list(ROOT / 'benchmarks' / name)
        assert len({entry.name for entry in entries}) == len(entries) > 5
        for entry in entries:
            config = entry.flags[entry.flags.index('--config') + 1]
            assert (ROOT / 'configs' / f'{config}.yaml').is_file()

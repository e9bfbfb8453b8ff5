"""The folder of a run in place of a file: which checkpoint it stands for, and who takes it."""
import json
from pathlib import Path

import pytest
import torch

from nbn_timm.cli import probe, train
from nbn_timm.errors import InputError
from nbn_timm.models.create import create_model
from nbn_timm.models.run_folder import ADJUSTED, BEST, LAST, RECOVERY, finished_file, new_run_folder, source_file
from nbn_timm.probe.probe import probe_settings
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.trained.opening import open_trained, opened_source
from nbn_timm.training.distillation import DistillationSettings, build_teacher
from nbn_timm.training.run_checkpoint import find_resume
from nbn_timm.training.sweep import Trial
from nbn_timm.validation import ValidateSettings, validation_settings

pytestmark = pytest.mark.fast
MODEL = 'resnet20'


def put(folder, *names):
    for name in names:
        (folder / name).touch()


def test_a_run_is_its_best_checkpoint_else_its_last(tmp_path):
    (tmp_path / 'begun').mkdir()
    put(tmp_path / 'begun', RECOVERY)
    with pytest.raises(InputError, match=f"has finished no epoch: give '.*begun/{RECOVERY}' itself, or let --resume"):
        source_file(tmp_path / 'begun')
    with pytest.raises(InputError, match='has no weights: give a file'):
        source_file(tmp_path)
    put(tmp_path, 'model.safetensors')
    assert source_file(tmp_path).name == 'model.safetensors'
    put(tmp_path, LAST)
    assert source_file(tmp_path).name == source_file(tmp_path, finished=True).name == LAST
    put(tmp_path, BEST)
    assert source_file(tmp_path).name == source_file(tmp_path, finished=True).name == BEST
    assert source_file(tmp_path / LAST).name == LAST and finished_file('resnet20_nbn') == 'resnet20_nbn'


def test_what_a_run_has_come_to_is_what_its_results_are_of(tmp_path):
    put(tmp_path, LAST, BEST, ADJUSTED)
    assert source_file(tmp_path).name == BEST  # what a training goes on from
    assert source_file(tmp_path, finished=True).name == ADJUSTED
    (tmp_path / 'test.json').write_text(json.dumps({'weights': {'file': LAST}}))
    assert source_file(tmp_path, finished=True).name == LAST
    (tmp_path / 'test.json').write_text(json.dumps({'weights': {'file': '../gone.pth'}}))
    assert source_file(tmp_path, finished=True).name == ADJUSTED
    (tmp_path / 'test.json').write_text('[')
    assert source_file(tmp_path, finished=True).name == ADJUSTED


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose best checkpoint has weights of 1 and whose last has weights of 2."""
    for name, value in ((BEST, 1.0), (LAST, 2.0)):
        model = create_model(MODEL, 3)
        torch.nn.init.constant_(model.conv1.weight, value)
        torch.save({'arch': MODEL, 'epoch': int(value), 'state_dict': model.state_dict(),
                    'args': {'model': MODEL, 'dataset': 'cifar10_lt', 'num_classes': 3}}, tmp_path / name)
    return tmp_path


def test_commands_take_the_folder(run, tmp_path):
    assert opened_source(str(run)) == str(run / BEST)
    assert bool((open_trained(str(run)).model.conv1.weight == 1).all())
    given = {'checkpoint': str(run)}
    assert validation_settings(ValidateSettings.of(given), given).weights.checkpoint == str(run / BEST)
    assert probe_settings(ProbeSettings.of(given), given).weights.checkpoint == str(run / BEST)
    teacher = build_teacher(DistillationSettings(kd_checkpoint=str(run)), 3, None, open_trained(str(run)).input)
    assert bool((teacher.conv1.weight == 1).all())
    assert find_resume(str(run), tmp_path / 'new') == run / LAST
    with pytest.raises(InputError, match="--resume '.*empty' has no checkpoint in it: give a checkpoint, the folder"):
        (tmp_path / 'empty').mkdir()
        find_resume(str(tmp_path / 'empty'), tmp_path / 'new')


@pytest.mark.parametrize('name', ['', ' ', '.', '..', '../elsewhere', 'a/b', '/tmp/elsewhere', 'two\nlines'])
@pytest.mark.parametrize('command', [train.main, probe.main], ids=['train', 'probe'])
def test_a_run_lies_where_its_name_says(name, command, tmp_path):
    flags = ['--dataset', 'digits_lt', '--model', 'resnet20_nbn.digits_lt', '--device', 'cpu']
    flags += ['--pretrained'] if command is probe.main else []
    with pytest.raises(InputError, match=r"^--experiment '.*' is no name of a folder in --output: give"):
        command([*flags, '--output', str(tmp_path / 'out'), '--experiment', name])
    with pytest.raises(InputError, match=r"^--output '' is no name of a folder"):
        command([*flags, '--output', '', '--experiment', 'run'])
    assert not (tmp_path / 'out').exists()


def test_names_of_runs_are_as_long_as_a_file_system_takes():
    assert new_run_folder('out', None, 'x' * 255) == Path('out', 'x' * 255)
    with pytest.raises(InputError, match='is too long: give an --experiment of at most 255 bytes'):
        new_run_folder('out', None, 'ä' * 128)
    for name in ('پایان\u200cنامه', '実験\u30001', 'a\u00a0b'):
        assert new_run_folder(f'/data/{name}', name, '') == Path('/data', name, name)
    short, long, other = (Trial((('aa', value),), 7, ()).folder for value in ('rand', 'x-' * 200, 'x-' * 200 + 'y'))
    assert short == 'aa-rand-s7' and Trial((), 7, ()).folder == 's7'
    assert long != other and len(long) <= 255 and long.startswith('aa-x-x-') and long.endswith('-s7')

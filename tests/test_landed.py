"""Files of the version before settings were declared (2026-11): args.yaml, the record of a checkpoint, results.

They are of `train.py --config quickstart --epochs 1 --workers 0 --mixup 0.2 --model-ema`.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli.train import parse_train
from nbn_timm.data import Classes
from nbn_timm.models.create import create_model
from nbn_timm.trained.opening import open_trained
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.trained.results import results_beside
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast
FILES = Path(__file__).parent / 'landed'
FLAGS = ['--config', 'quickstart', '--epochs', '1', '--workers', '0', '--mixup', '0.2', '--model-ema']


@pytest.fixture(scope='module')
def record() -> dict:
    return json.loads((FILES / 'record.json').read_text())


@pytest.fixture
def checkpoint(record, tmp_path) -> Path:
    """A checkpoint in that version's form, with new weights."""
    torch.manual_seed(0)
    weights = create_model('resnet20_nbn', 10).state_dict()
    state = {'epoch': 0, 'arch': 'resnet20_nbn', 'version': 2, 'args': record, 'metric': 11.0,
             'best': {'metric': 11.0, 'epoch': 0}, 'state_dict': weights, 'state_dict_ema': weights,
             'class_counts': Classes(tuple(range(10, 0, -1)), tuple(map(str, range(10))), 'a test').to_dict()}
    torch.save(state, tmp_path / 'model_best.pth.tar')
    return tmp_path / 'model_best.pth.tar'


# Defaults that have changed since.
_SINCE = {'model_ema_warmup': (False, True)}


def test_its_config_is_the_recipe_that_its_flags_are_today():
    again, today = (parse_train(argv).values() for argv in (['--config', str(FILES / 'args.yaml')], FLAGS))
    assert TrainSettings.changed(again, today) == _SINCE
    assert again['seed'] == 42 and again['mixup'] == 0.2 and again['model_ema'] and again['epochs'] == 1


def test_its_record_is_of_the_recipe_that_its_flags_are_today(record):
    of_format = {'input_size', 'mean', 'std', 'interpolation', 'crop_pct'}  # which a record has as they came out
    assert TrainSettings.changed(record, parse_train(FLAGS).values()).keys() == of_format | _SINCE.keys()
    settings = NetworkRecord.of_checkpoint({'args': record}).told(TrainSettings)
    assert (settings.optimizer.lr, settings.schedule.epochs, settings.average.model_ema) == (0.05, 1, True)


def test_its_checkpoint_is_opened_as_it_was_trained(checkpoint):
    trained = open_trained(str(checkpoint), use_ema=True)
    assert trained.name == 'resnet20_nbn' and trained.record.epoch == 1
    assert trained.input.input_size == (3, 16, 16) and trained.input.mean == (0.306, 0.306, 0.306)
    assert trained.classes is not None and trained.classes.counts == tuple(range(10, 0, -1))


def test_its_results_are_told_of_its_checkpoint_and_of_no_other(checkpoint):
    shutil.copy(FILES / 'test.json', checkpoint.with_name('test.json'))
    found = results_beside(str(checkpoint), True, 1)
    assert found is not None and found.results.accuracies['top1'] == 11.0
    assert results_beside(str(checkpoint), True, 2) is None

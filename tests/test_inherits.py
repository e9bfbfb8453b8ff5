"""What a command takes from the record of a finished network, and what it leaves."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import validate
from nbn_timm.cli.train import parse_train
from nbn_timm.data import ArraySamples, Classes
from nbn_timm.data.settings import DataSettings, InputSettings
from nbn_timm.data.splits import Known, Source, assemble
from nbn_timm.datasets import find_dataset
from nbn_timm.models.create import create_model
from nbn_timm.trained.opening import open_trained
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.distributed import World
from nbn_timm.training.plan import open_training_data
from nbn_timm.training.settings import public_record

pytestmark = pytest.mark.fast
CLASSES = Classes((3, 2, 1), ('ant', 'bee', 'cat'), 'a test')


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of a training on lists, at 16 pixels, with averaged weights."""
    weights = create_model('resnet20', 3).state_dict()
    arguments = {'dataset': 'list', 'data_dir': 'first', 'train_list': 'train.txt', 'val_list': 'val.txt',
                 'test_list': 'test.txt', 'model': 'resnet20', 'img_size': 16, 'input_size': [3, 16, 16],
                 'mean': [0.5, 0.4, 0.3], 'std': [0.3, 0.2, 0.1], 'crop_pct': 0.77, 'interpolation': 'nearest',
                 'model_ema': True}
    torch.save({'arch': 'resnet20', 'epoch': 0, 'args': arguments, 'class_counts': CLASSES.to_dict(),
                'state_dict': weights, 'state_dict_ema': weights}, tmp_path / 'last.pth.tar')
    return tmp_path / 'last.pth.tar'


def test_a_second_stage_takes_data_model_and_format(checkpoint):
    settings = parse_train(['--stage', 'crt', '--initial-checkpoint', str(checkpoint)])
    assert (settings.data.dataset, settings.data.data_dir, settings.model.model) == ('list', 'first', 'resnet20')
    assert settings.data.lists == {'train': 'train.txt', 'val': 'val.txt', 'test': 'test.txt'}
    assert settings.input == InputSettings(
        input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1), crop_pct=0.77, interpolation='nearest')


def test_lists_of_other_images_are_not_mixed_with_the_recorded_ones(checkpoint):
    """Else a network that is trained on a new list would be reported on the old test images."""
    settings = parse_train(['--initial-checkpoint', str(checkpoint), '--train-list', 'new.txt', '--data-dir', 'new'])
    assert settings.data.lists == {'train': 'new.txt'}


def test_another_dataset_takes_neither_lists_nor_folder(checkpoint):
    settings = parse_train(['--initial-checkpoint', str(checkpoint), '--dataset', 'folder'])
    assert (settings.data.lists, settings.data.data_dir) == ({}, None)
    assert settings.input.input_size == (3, 16, 16)  # class folders have no format of their own


def test_a_benchmark_has_its_own_format(checkpoint):
    settings = parse_train(['--initial-checkpoint', str(checkpoint), '--dataset', 'cifar10_lt', '--data-dir', 'x'])
    assert settings.input.input_size is None and settings.input.mean is None


def test_averaged_weights_are_told_and_are_not_part_of_what_is_made_public(checkpoint):
    plain, averaged = (open_trained(str(checkpoint), use_ema=use_ema) for use_ema in (False, True))
    assert any('averaged weights' in note for note in plain.notes) and not averaged.notes
    assert public_record(plain.record) == public_record(averaged.record)
    assert public_record(plain.record).to_dict().keys() == {'settings', 'epoch', 'class_counts'}


def test_labels_without_names_are_taken_by_position_and_that_is_said():
    samples = ArraySamples(torch.zeros(3, 4, 4, 3, dtype=torch.uint8).numpy(), [0, 1, 2])
    splits = assemble(DataSettings('list'), ('test',), Source({'test': samples}), find_dataset('list').defaults,
                      known=Known(CLASSES, "checkpoint 'x'"))
    assert splits.classes == CLASSES
    assert any('no class names' in note and "checkpoint 'x'" in note for note in splits.notes)


def test_a_network_without_class_names_beside_data_with_names_is_told(checkpoint, tmp_path):
    for name in CLASSES.names:
        for split in ('train', 'test'):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (16, 16)).save(tmp_path / split / name / 'a.png')
    flags = ['--dataset', 'folder', '--data-dir', str(tmp_path), '--initial-checkpoint', str(checkpoint)]
    told = 'records no class names'
    for known in (True, False):
        if not known:
            torch.save({**torch.load(checkpoint, weights_only=True), 'class_counts': None}, checkpoint)
        splits = open_training_data(parse_train(flags), BatchPlan(2, 1, 2), World(torch.device('cpu')))
        assert any(told in note for note in splits.notes) != known


def test_validation_tells_settings_of_a_config_that_have_no_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validate, 'validate', lambda *_: None)
    (tmp_path / 'some.yaml').write_text(json.dumps({'pretrained': True, 'amp_dtype': 'bfloat16'}))
    validate.main(['--config', str(tmp_path / 'some.yaml'), '--model', 'resnet20_nbn.digits_lt', '--device', 'cpu'])
    assert 'amp_dtype (has no effect without --amp)' in capsys.readouterr().out

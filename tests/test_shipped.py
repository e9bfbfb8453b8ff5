"""The weights that come with the package."""
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli.validate import main as validate
from nbn_timm.errors import InputError
from nbn_timm.models._pretrained import shipped_file, shipped_names, weights_record
from nbn_timm.models.weight_files import DIGEST, read_checkpoint, weights_digest

CIFAR_FOLDER = 'NBN_TIMM_CIFAR100_LT'  # a folder with the images and lists that the shipped networks were trained on


@pytest.mark.parametrize('name', shipped_names())
def test_each_loads_from_the_package_and_is_what_its_record_says(name):
    model, file, record = timm.create_model(name, pretrained=True), shipped_file(name), weights_record(name)
    alias = timm.create_model(name.replace('.', '_'), pretrained=True)
    weights = load_file(file)
    for network in (model, alias):
        state_dict = network.state_dict()
        assert state_dict.keys() == weights.keys()
        assert all(torch.equal(state_dict[key], weights[key]) for key in weights)
    assert os.path.getsize(file) < 4e6
    assert name in timm.list_pretrained() and name.replace('.', '_') in timm.list_pretrained()
    assert record['model'] == name and name.startswith(record['settings']['model'])
    assert record['settings']['dataset'] == name.partition('.')[2]
    assert len(record['class_counts']['counts']) == model.num_classes
    assert tuple(record['settings']['input_size']) == model.pretrained_cfg['input_size']
    assert 0 < record['epoch'] <= record['settings']['epochs']
    assert not [value for value in record['settings'].values() if isinstance(value, str) and value.startswith('/')]


@pytest.mark.fast
@pytest.mark.parametrize('name', shipped_names())
def test_a_copy_with_a_wrong_bit_is_refused_wherever_it_lies(name, tmp_path, monkeypatch):
    content = bytearray(Path(shipped_file(name)).read_bytes())
    content[len(content) // 2] ^= 8
    copy = tmp_path / Path(shipped_file(name)).name
    copy.write_bytes(content)
    with pytest.raises(InputError, match='damaged'):
        read_checkpoint(copy)
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path))
    with pytest.raises(InputError, match='damaged'):
        timm.create_model(name, pretrained=True)


def reproduced(name, tmp_path, *flags):
    """What validate.py finds for a shipped name, and what its record says."""
    validate(['--model', name, '--pretrained', '--workers', '0', '--device', 'cpu', '--results-file',
              str(tmp_path / 'results.json'), *flags])
    found, said = json.loads((tmp_path / 'results.json').read_text()), weights_record(name)['test']
    return {key: found[key] for key in said if key in found}, {key: said[key] for key in said if key in found}


def test_the_quick_start_reproduces_to_the_last_sample(tmp_path):
    found, said = reproduced('resnet20_nbn.digits_lt', tmp_path)
    assert found == said and {'top1', 'many', 'medium', 'few'} <= said.keys()


@pytest.mark.skipif(CIFAR_FOLDER not in os.environ, reason=f'{CIFAR_FOLDER} names no folder of the images')
@pytest.mark.parametrize('name', [name for name in shipped_names() if name.endswith('cifar100_lt')])
def test_cifar_networks_reproduce_to_the_last_sample(tmp_path, name):
    found, said = reproduced(name, tmp_path, '--data-dir', os.environ[CIFAR_FOLDER])
    assert found == said


def test_a_folder_of_ones_own_comes_first(tmp_path, monkeypatch):
    name = shipped_names()[0]
    weights = {key: value + 1 if value.is_floating_point() else value for key, value in
               load_file(shipped_file(name)).items()}
    save_file(weights, tmp_path / f'{name}.safetensors')
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path))
    state_dict = timm.create_model(name, pretrained=True).state_dict()
    assert all(torch.equal(state_dict[key], weights[key]) for key in weights)
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path / 'nothing-of-the-kind'))
    (tmp_path / 'nothing-of-the-kind').mkdir()
    state_dict = timm.create_model(name, pretrained=True).state_dict()
    assert not torch.equal(state_dict['conv1.weight'], weights['conv1.weight'])


def test_a_shipped_network_takes_another_number_of_classes():
    name = next(name for name in shipped_names() if '_ride' not in name)
    model = timm.create_model(name, pretrained=True, num_classes=3)
    weights = load_file(shipped_file(name))
    assert model.fc.out_features == 3 and torch.equal(model.conv1.weight, weights['conv1.weight'])


def test_the_quick_starts_weights_do_not_change_what_a_bare_name_is():
    model = timm.create_model('resnet20_nbn')
    assert (model.pretrained_cfg['tag'], model.num_classes) == ('cifar100_lt', 100)
    assert '*' not in ''.join(timm.list_models('resnet*_nbn*', include_tags=True))


def test_a_record_is_not_told_of_other_weights_of_the_same_name(tmp_path, monkeypatch):
    """Of weights that NBN_TIMM_WEIGHTS puts in the place of the package's, a record beside them tells, else nothing."""
    name = 'resnet20_nbn.digits_lt'
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(tmp_path))
    assert weights_record(name)['epoch'] > 0
    weights = timm.create_model(name).state_dict()
    save_file(weights, tmp_path / f'{name}.safetensors')
    assert weights_record(name) is None
    (tmp_path / f'{name}.json').write_text(json.dumps({'epoch': 7}))
    assert weights_record(name) is None  # it does not say of which weights it is
    (tmp_path / f'{name}.json').write_text(json.dumps({'epoch': 7, DIGEST: weights_digest(weights)}))
    assert weights_record(name)['epoch'] == weights_record(name.replace('.', '_'))['epoch'] == 7

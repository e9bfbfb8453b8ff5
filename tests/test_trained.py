"""Opening trained models from files, folders and names."""
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli.push import main as push
from nbn_timm.cli.train import main as train
from nbn_timm.data import Classes
from nbn_timm.errors import InputError
from nbn_timm.layers.conversion import nbn_layers
from nbn_timm.losses.settings import LossSettings
from nbn_timm.models import _pretrained
from nbn_timm.models.weight_files import DIGEST, weights_digest
from nbn_timm.trained.opening import RECORD_KEY, open_trained, published_record, read_folder_config
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.trained.results import Results
from nbn_timm.training.optim import OptimizerSettings

pytestmark = pytest.mark.fast
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    train(['--config', 'quickstart', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '64', '--model-ema',
           '--device', 'cpu', '--output', str(folder), '--experiment', 'run'])
    return folder / 'run'


def test_a_checkpoint_brings_its_classes_its_input_and_its_training(run):
    opened = open_trained(str(run / 'last.pth.tar'))
    saved = torch.load(run / 'last.pth.tar', weights_only=True)
    assert opened.name == 'resnet20_nbn' and not opened.nbn and not opened.model.training
    assert opened.input.input_size == (3, 16, 16) and opened.input.mean == (0.306, 0.306, 0.306)
    assert opened.class_counts.num_classes == 10 and opened.class_counts.total == sum(saved['class_counts']['counts'])
    assert opened.record.epoch == 1 and opened.record.told(LossSettings).loss == 'balanced_softmax'
    assert torch.equal(opened.model.fc.weight, saved['state_dict']['fc.weight'])
    averaged = open_trained(str(run / 'last.pth.tar'), use_ema=True).model
    assert torch.equal(averaged.fc.weight, saved['state_dict_ema']['fc.weight'])
    assert not torch.equal(averaged.fc.weight, opened.model.fc.weight)


def test_bare_weights_are_recognised(tmp_path):
    model = timm.create_model('resnet32_ride_nbn', num_classes=7, num_experts=2)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    opened = open_trained(str(tmp_path / 'model.safetensors'))
    assert (opened.name, opened.model_args['num_experts'], opened.model.num_classes) == ('resnet32_ride_nbn', 2, 7)
    assert same_weights(opened.model, model) and opened.class_counts is None and opened.record == NetworkRecord()


def test_a_folder_in_timms_format_brings_its_record(tmp_path):
    model = timm.create_model('resnet20_nbn', num_classes=3)
    save_for_hf(model, tmp_path, model_config={RECORD_KEY: {
        DIGEST: weights_digest(model.state_dict()),
        'class_counts': {'counts': [5, 3, 1], 'names': ['a', 'b', 'c'], 'source': 'somewhere'},
        'settings': {'input_size': [3, 16, 16], 'mean': [0.1, 0.2, 0.3]}, 'epoch': 7}},
        model_args={'gradient': 'released'})
    for source in (str(tmp_path), f'local-dir:{tmp_path}'):
        opened = open_trained(source)
        assert same_weights(opened.model, model)
        assert opened.class_counts.counts == (5, 3, 1) and opened.record.epoch == 7
        assert opened.input.input_size == (3, 16, 16) and opened.input.mean == (0.1, 0.2, 0.3)
        assert opened.model_args['gradient'] == 'released' and 'num_classes' not in opened.model_args
        assert not any(layer.cap_gradient for layer in nbn_layers(opened.model).values())


def test_a_record_of_other_weights_is_not_told(tmp_path, caplog):
    """As after a fine-tuning elsewhere, which keeps what it does not know of config.json."""
    torch.manual_seed(0)
    model = timm.create_model('resnet20_nbn', num_classes=3)
    record = {DIGEST: weights_digest(model.state_dict()), 'epoch': 7, 'test': {'top1': 61.25},
              'class_counts': {'counts': [5, 3, 1], 'names': ['a', 'b', 'c'], 'source': 'somewhere'}}
    for num_classes in (3, 7):
        tuned = timm.create_model('resnet20_nbn', num_classes=num_classes)
        save_for_hf(tuned, tmp_path, model_config={RECORD_KEY: record, 'label_names': ['a', 'b', 'c']})
        opened = open_trained(str(tmp_path))
        assert opened.record == NetworkRecord() and opened.class_counts is None and same_weights(opened.model, tuned)
        assert bool(opened.model.pretrained_cfg.get('label_names')) == (num_classes == 3)
        assert published_record(f'local-dir:{tmp_path}') == NetworkRecord()
        assert 'records the training of other weights' in caplog.text


def test_a_pushed_folder_with_a_wrong_bit_is_refused(tmp_path):
    push(['resnet20_nbn.digits_lt', '--output', str(tmp_path / 'out')])
    assert open_trained(str(tmp_path / 'out')).record.test.accuracies['top1'] == 93.5
    path = tmp_path / 'out' / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content)
    for source in (str(tmp_path / 'out'), f"local-dir:{tmp_path / 'out'}"):
        with pytest.raises(InputError, match='model.safetensors.*is damaged'):
            open_trained(source)


@pytest.mark.parametrize(('file', 'content', 'said'), [
    ('model.safetensors', b'', 'model.safetensors'), ('model.safetensors', b'<html>', 'model.safetensors'),
    ('config.json', b'{"architecture": 7}', 'names no architecture'), ('config.json', b'[]', 'no object'),
    ('config.json', b'{"architecture"', 'config.json'), ('config.json', b'\xff\xfe', 'config.json'),
    ('config.json', b'[' * 100_000, 'config.json'),
    ('config.json', b'{"architecture": "resnet20_nbn", "pretrained_cfg": 3}', "'pretrained_cfg'"),
    ('config.json', b'{"architecture": "resnet20_nbn", "num_classes": "3"}', "'num_classes'"),
    ('config.json', b'{"architecture": "resnet20_nbn", "num_classes": -3}', 'is negative'),
    ('config.json', b'{"architecture": "resnet20_nbn", "num_classes": -1, "pretrained_cfg": {}}', 'is negative'),
    ('config.json', b'{"architecture": "resnet20_nbn", "num_classes": 3, "pretrained_cfg": {}, '
     b'"model_args": {"num_classes": 10}}', "its weights have 3 classes, and asks for 10 in 'model_args'"),
    ('config.json', b'{"architecture": "resnet20_nbn", "pretrained_cfg": {}, "model_args": {"no_such": 1}}', 'no_such'),
    ('config.json', b'{"architecture": "test_vit", "pretrained_cfg": {}}', 'cannot be had .Error.s. in loading'),
    ('config.json', b'{"architecture": "no_such_model", "pretrained_cfg": {}}', 'no_such_model'),
    *(('config.json', b'{"architecture": "resnet20_nbn", "num_classes": 3, "pretrained_cfg": {%s}}' % entry, said)
      for entry, said in (
          (b'"input_size": 5', 'has input_size 5: it takes several values'),
          (b'"input_size": [3, 0, 12]', r'has input_size \[3, 0, 12\]: give a number at least 1'),
          (b'"input_size": [3, 12.5, 12]', 'give a whole number'),
          (b'"input_size": [3, "x", 12]', 'give a whole number'),
          (b'"input_size": [3, 12]', 'give 3 values'), (b'"mean": []', 'give one or more values'),
          (b'"mean": ["a", "b", "c"]', 'give a number'), (b'"mean": [null, null, null]', 'give a number'),
          (b'"std": [0, 0, 0]', r'has std \[0, 0, 0\]: give a number at least 1e-06'),
          (b'"std": [1e-320, 1, 1]', 'give a number at least 1e-06'),
          (b'"crop_mode": "foo"', "has crop_mode 'foo' .there are center, squash, border"),
          (b'"std": [0.2, 0.3]', 'has 2 numbers as the std of 3 channels'),
          (b'"crop_pct": "x"', 'give a number'), (b'"crop_pct": -1', 'give a number at least 0.1'),
          (b'"interpolation": 5', 'give text'))),
    ('config.json', b'{"architecture": "resnet20_nbn", "pretrained_cfg": {}, "model_args": {"drop_rate": "x"}}',
     "cannot take config.json's drop_rate=x: give a number from 0 to 1"),
    ('config.json', b'{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"embed_dim": 1000000}}',
     'too large for this machine .its weights take more than half'),
    ('config.json', b'{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"depth": 1000000000}}',
     "cannot take config.json's depth=1000000000: give whole numbers up to 1,000,000"),
    ('config.json', b'{"architecture": "resnet20_nbn", "num_classes": 3, "pretrained_cfg": {}, '
     b'"model_args": {"share_alpha": "false"}}',
     "cannot take config.json's share_alpha=false: give True or False"),
])
def test_malformed_folders_are_one_sentence(tmp_path, file, content, said):
    save_for_hf(timm.create_model('resnet20_nbn', num_classes=3), tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        open_trained(str(tmp_path))
    assert '\n' not in str(error.value) and len(str(error.value)) < 1000


def test_a_negative_variance_is_refused(tmp_path):
    weights = timm.create_model('resnet20_nbn', num_classes=3).state_dict()
    weights['bn1.running_var'][2] = -5
    torch.save(weights, tmp_path / 'weights.pth')
    with pytest.raises(InputError, match="'bn1.running_var' is a negative variance"):
        open_trained(str(tmp_path / 'weights.pth'), model='resnet20_nbn')


def test_shipped_weights_bring_their_record(tmp_path, monkeypatch):
    name = _pretrained.shipped_names()[0]
    opened = open_trained(name)
    record = published_record(name)
    assert opened.name == name and opened.record == record and opened.classes == record.classes
    assert published_record(name.replace('.', '_')) == record
    nothing = NetworkRecord()
    assert published_record('resnet50_nbn') == published_record('resnet18') == published_record(None) == nothing


def test_a_record_comes_back_from_json_as_it_was():
    record = NetworkRecord(
        {'model': 'resnet20', 'lr': 0.5, 'world_size': 2, 'train_transform': 'cifar'}, name='resnet20.digits_lt',
        classes=Classes((5, 3), ('a', 'b'), 'somewhere'), epoch=7, digest='abc', folded=True, facts={'torch': '2.14'},
        test=Results('val', 30, {'top1': 61.25, 'many': 70.0}, (100, 20), 'bfloat16'))
    again = NetworkRecord.from_dict(json.loads(json.dumps(record.to_dict())), 'a test')
    assert again == record and (again.model, again.processes, again.train_transform) == ('resnet20', 2, 'cifar')
    assert again.told(OptimizerSettings).lr == 0.5
    assert NetworkRecord.from_dict(NetworkRecord().to_dict(), 'a test') == NetworkRecord()


@pytest.mark.parametrize('change', [{'settings': [1]}, {'test': 3}, {'epoch': 'last'}, {'test': {'top1': 'high'}},
                                    {'test': {'top1': 50.0, 'images': 3, 'splits': {'many_above': None}}},
                                    {'class_counts': {'counts': 'many'}}])
def test_a_malformed_record_is_one_sentence(change):
    with pytest.raises(InputError, match='a test|class counts'):
        NetworkRecord.from_dict(change, 'a test')


def test_given_counts_replace_the_recorded_ones(run, tmp_path):
    (tmp_path / 'counts.json').write_text(json.dumps({'counts': list(range(1, 11))}))
    opened = open_trained(str(run / 'last.pth.tar'), class_counts_file=str(tmp_path / 'counts.json'))
    assert opened.class_counts.counts == tuple(range(1, 11))
    (tmp_path / 'counts.json').write_text(json.dumps({'counts': [1, 2]}))
    with pytest.raises(InputError, match='counts 2 classes but .* has 10'):
        open_trained(str(run / 'last.pth.tar'), class_counts_file=str(tmp_path / 'counts.json'))


def test_what_is_not_there_is_said_in_one_sentence(run, tmp_path):
    with pytest.raises(InputError, match="unknown --model 'resnet20_nbm'"):
        open_trained('resnet20_nbm')
    with pytest.raises(InputError, match='is no checkpoint file'):
        open_trained('missing.pth.tar', use_ema=True)
    with pytest.raises(InputError, match=f"there is no file '{tmp_path}/missing.pth.tar'"):
        open_trained(f'{tmp_path}/missing.pth.tar')
    with pytest.raises(InputError, match='--all-experts is for a network with routing'):
        open_trained(str(run / 'last.pth.tar'), all_experts=True)
    with pytest.raises(InputError, match='no router'):
        open_trained('resnet20_nbn.digits_lt', all_experts=True)
    with pytest.raises(InputError, match='has no config.json'):
        read_folder_config(f'local-dir:{tmp_path}')
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(InputError, match='is no object'):
        read_folder_config(f'local-dir:{tmp_path}')
    torch.save({'weight': torch.ones(3)}, tmp_path / 'other.pth')
    with pytest.raises(InputError, match='does not record its architecture'):
        open_trained(str(tmp_path / 'other.pth'))


def test_timms_own_training_checkpoints_say_their_size_as_img_size(tmp_path):
    model = timm.create_model('resnet20', num_classes=3)
    torch.save({'arch': 'resnet20', 'state_dict': model.state_dict(), 'args': {'model': 'resnet20', 'img_size': 24}},
               tmp_path / 'last.pth.tar')
    assert open_trained(str(tmp_path / 'last.pth.tar')).input.input_size == (3, 24, 24)


@pytest.mark.parametrize('change', [
    {'images': float('nan')}, {'images': None}, {'images': 1e300}, {'images': -1}, {'top1': float('inf')},
    {'top1': '50'},
    {'top1': None}, {'many': [1]}, {'splits': [1]}, {'splits': {'many_above': 100}},
    {'splits': {'many_above': 100, 'few_below': float('nan')}}])
def test_results_that_are_no_numbers_are_one_sentence(change):
    with pytest.raises(InputError, match='a record has no results that can be read .*: evaluate again'):
        Results.from_dict({'images': 10, 'top1': 50.0, **change}, 'a record')

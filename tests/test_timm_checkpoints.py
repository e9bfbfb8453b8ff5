"""Checkpoints that timm's own training writes, with its Namespace of flags, in all commands."""
import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from test_train_run import assert_same, data_flags, images  # noqa: F401  (a fixture)
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver
from torch import nn

from nbn_timm.cli import export, predict, push, train, validate
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.errors import InputError
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.trained.opening import open_trained
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training import run_checkpoint

CPU = ['--device', 'cpu', '--workers', '0']
# Of what timm's parser leaves, all that a reader might ask for: "not given" is None, '', False or {}.
FLAGS = dict(
    data=None, data_dir='gone', dataset='', train_split='train', val_split='validation', class_map='',
    model='resnet20_nbn', pretrained=False, initial_checkpoint='', resume='', num_classes=4, gp=None, img_size=8,
    input_size=None, crop_pct=None, mean=None, std=None, interpolation='', batch_size=4, model_kwargs={}, opt='sgd',
    momentum=0.9, weight_decay=2e-5, clip_grad=None, opt_kwargs={}, sched='cosine', lr=0.05, warmup_lr=1e-5, min_lr=0,
    epochs=3, warmup_epochs=0, scale=[0.08, 1.0], hflip=0.5, color_jitter=0.4, aa=None, mixup=0.0, cutmix=0.0,
    smoothing=0.1, train_interpolation='random', drop=0.0, drop_path=None, model_ema=True, seed=42, workers=4,
    amp=False, output='', experiment='', eval_metric='top1', device_modules=['nbn_timm'])


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """What timm's CheckpointSaver leaves after the second epoch of three."""
    folder = tmp_path_factory.mktemp('timm')
    torch.manual_seed(0)
    model = timm.create_model('resnet20_nbn', num_classes=4)
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.05, weight_decay=2e-5, momentum=0.9)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False)
    task.setup_ema(0.5)
    saver = CheckpointSaver(model, optimizer, args=Namespace(**FLAGS), checkpoint_dir=str(folder),
                            recovery_dir=str(folder), task=task)
    for epoch in range(2):
        for _ in range(2):
            task.train()
            task(torch.randn(4, 3, 8, 8), torch.arange(4))['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=epoch)
        saver.save_checkpoint(epoch, 50.0 + epoch)
    return folder / 'last.pth.tar'


def test_what_was_not_given_is_not_recorded(checkpoint):
    recorded = NetworkRecord.of_checkpoint(read_checkpoint(checkpoint)).arguments
    assert not {'interpolation', 'dataset', 'resume', 'crop_pct', 'model_kwargs', 'mean'} & recorded.keys()
    assert recorded['img_size'] == 8 and recorded['lr'] == 0.05 and recorded['min_lr'] == 0
    opened = open_trained(str(checkpoint))
    default = DataDefaults(published=False).for_model(opened.model.pretrained_cfg)
    assert opened.input.interpolation == default.interpolation and opened.input.input_size == (3, 8, 8)


@pytest.mark.parametrize('averaged', [False, True])
def test_validation_and_prediction_are_what_plain_timm_gives(averaged, checkpoint, images, tmp_path):  # noqa: F811
    model = timm.create_model('resnet20_nbn', num_classes=4)
    model.load_state_dict(read_checkpoint(checkpoint)['state_dict_ema' if averaged else 'state_dict'])
    transform = timm.data.create_transform((3, 8, 8), interpolation='bilinear', crop_pct=1.0,
                                           mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std'])
    files = [line.split() for line in (images / 'test.txt').read_text().splitlines()]
    pixels = torch.stack([transform(predict_open(images / name)) for name, _ in files])
    with torch.no_grad():
        found = model.eval()(pixels).argmax(1).tolist()
    right = sum(label == int(wanted) for label, (_, wanted) in zip(found, files, strict=True)) / len(files)
    more = [*(['--use-ema'] if averaged else []), *CPU]
    validate.main(['--checkpoint', str(checkpoint), *data_flags(images, 'test'), '--counts-from', 'none',
                   '--results-file', str(tmp_path / 'result.json'), *more])
    assert json.loads((tmp_path / 'result.json').read_text())['top1'] == pytest.approx(100 * right)
    predict.main(['--model', str(checkpoint), '--json', '-o', str(tmp_path / 'found.jsonl'), *more,
                  *(str(images / name) for name, _ in files)])
    lines = (tmp_path / 'found.jsonl').read_text().splitlines()
    assert [json.loads(line)['predictions'][0]['class'] for line in lines] == found


def predict_open(path: Path):
    from PIL import Image
    return Image.open(path).convert('RGB')


def test_a_validation_takes_no_benchmark_of_other_classes_for_its_own(checkpoint):
    """The network is configured for CIFAR-100-LT, and has four classes."""
    with pytest.raises(InputError, match='^give --dataset: neither the checkpoint nor the model says'):
        validate.main(['--checkpoint', str(checkpoint), *CPU])


def test_it_is_exported_and_pushed(checkpoint, tmp_path):
    export.main([str(checkpoint), str(tmp_path / 'out'), '--formats', 'timm', '--num-images', '2'])
    push.main([str(checkpoint), '--output', str(tmp_path / 'folder')])
    weights = read_checkpoint(checkpoint)['state_dict']
    for folder in ('out', 'folder'):
        config = json.loads((tmp_path / folder / 'config.json').read_text())
        assert config['pretrained_cfg']['interpolation'] == 'bilinear'
    pushed = timm.create_model(f'local-dir:{tmp_path}/folder', pretrained=True)
    assert torch.equal(pushed.fc.weight, weights['fc.weight'])


def run(images: Path, tmp_path: Path, *flags: str) -> Path:  # noqa: F811
    train.main([*data_flags(images), '--model', 'resnet20_nbn', '--img-size', '8', '-b', '4', '--lr', '0.05',
                '--output', str(tmp_path), '--experiment', 'run', *CPU, *flags])
    return tmp_path / 'run'


def test_a_training_starts_from_its_averaged_weights(checkpoint, images, tmp_path):  # noqa: F811
    folder = run(images, tmp_path, '--initial-checkpoint', str(checkpoint), '--epochs', '1', '--lr', '0',
                 '--weight-decay', '0')
    there, here = read_checkpoint(checkpoint)['state_dict_ema'], read_checkpoint(folder / 'last.pth.tar')['state_dict']
    assert all(torch.equal(value, here[name]) for name, value in there.items() if name.endswith('weight'))


AS_TIMM = ['--opt', 'sgd', '--weight-decay', '2e-5', '--no-decay-1d', '--model-ema']


def test_a_training_goes_on_after_its_last_epoch(checkpoint, images, tmp_path, monkeypatch, capsys):  # noqa: F811
    found = {}
    resume_run = run_checkpoint.resume_run

    def spy(path, task, optimizer, *rest):
        result = resume_run(path, task, optimizer, *rest)
        names = {id(parameter): name for name, parameter in task.get_trainable_module().named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group['params']:
                buffer = optimizer.state[parameter]['momentum_buffer']
                found[names[id(parameter)]] = buffer.clone(), group['weight_decay']
        return result

    monkeypatch.setattr('nbn_timm.training.keeper.resume_run', spy)
    folder = run(images, tmp_path, '--resume', str(checkpoint), '--epochs', '4', *AS_TIMM)
    with open(folder / 'summary.csv', newline='') as file:
        assert [int(row['epoch']) for row in csv.DictReader(file)] == [2, 3]
    # Every parameter has its own momentum and decay, by timm's order of groups: those without decay first.
    model = timm.create_model('resnet20_nbn', num_classes=4)
    order = [name for decayed in (False, True) for name, parameter in model.named_parameters()
             if (parameter.ndim > 1) == decayed]
    saved = read_checkpoint(checkpoint)['optimizer']['state']
    for number, name in enumerate(order):
        assert_same(found[name][0], saved[number]['momentum_buffer'])
        assert found[name][1] == (2e-5 if model.get_parameter(name).ndim > 1 else 0)
    said = capsys.readouterr()
    told = next(line for line in (said.out + said.err).splitlines() if 'settings differ from those of' in line)
    assert 'epochs 3 -> 4' in told and 'smoothing 0.1 -> 0.0' in told
    assert 'interpolation bil' not in told and 'mean' not in told and 'initial_checkpoint' not in told
    assert 'decay_1d' not in told  # timm has no such setting, and its groups were those of now
    assert 'warmup_lr' not in told  # without effect before and now


@pytest.mark.parametrize(('flags', 'reason'), [
    (['--opt', 'sgd'], r'it has groups of \[40, 20\] parameters, where this optimizer has groups of \[60\]'),
    (['--opt', 'adamw', '--no-decay-1d'], 'it has momentum_buffer of a parameter, where this optimizer has step, exp'),
])
def test_another_optimizer_or_other_groups_are_refused(flags, reason, checkpoint, images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=f'{reason}.*keep --opt sgd, .* --initial-checkpoint') as error:
        run(images, tmp_path, '--resume', str(checkpoint), '--epochs', '4', *flags)
    assert '\n' not in str(error.value)


def test_groups_of_the_same_sizes_in_another_order_are_refused(checkpoint, images, tmp_path):  # noqa: F811
    state = torch.load(checkpoint, weights_only=False)
    numbers = sorted(state['optimizer']['state'])
    state['optimizer']['state'] = {number: state['optimizer']['state'][other]
                                   for number, other in zip(numbers, reversed(numbers), strict=True)}
    torch.save(state, tmp_path / 'other.pth.tar')
    with pytest.raises(InputError, match=r'the momentum_buffer of a parameter has the shape \[.*so its groups of'):
        run(images, tmp_path, '--resume', str(tmp_path / 'other.pth.tar'), '--epochs', '4', *AS_TIMM)


@pytest.mark.parametrize(('change', 'reason'), [
    (lambda buffer: [1], 'the momentum_buffer of a parameter is a list there and a Tensor here'),
    (lambda buffer: buffer.int(), 'the momentum_buffer of a parameter is of torch.int32 there'),
    (lambda buffer: buffer * float('nan'), r'has values that are not numbers \(NaN\)')])
def test_a_malformed_state_of_a_parameter_is_refused(change, reason, checkpoint, images, tmp_path):  # noqa: F811
    state = torch.load(checkpoint, weights_only=False)
    state['optimizer']['state'][3]['momentum_buffer'] = change(state['optimizer']['state'][3]['momentum_buffer'])
    torch.save(state, tmp_path / 'odd.pth.tar')
    with pytest.raises(InputError, match=reason):
        run(images, tmp_path, '--resume', str(tmp_path / 'odd.pth.tar'), '--epochs', '4', *AS_TIMM)


def test_auto_refuses_another_optimizer_than_the_run_had(images, tmp_path):  # noqa: F811
    run(images, tmp_path, '--epochs', '1', '--opt', 'adamw')
    with pytest.raises(InputError, match='it has step, exp_avg, exp_avg_sq of a parameter.*keep --opt adamw'):
        run(images, tmp_path, '--epochs', '2', '--resume', 'auto')
    folder = run(images, tmp_path, '--epochs', '2', '--resume', 'auto', '--opt', 'adamw')
    assert read_checkpoint(folder / 'last.pth.tar')['epoch'] == 1


def test_momentum_may_be_turned_off_and_on(images, tmp_path):  # noqa: F811
    """Its state is then one that the optimizer makes itself."""
    for epochs, momentum in ((1, '0'), (2, '0.9'), (3, '0')):
        resume = ['--resume', 'auto'] if epochs > 1 else []
        folder = run(images, tmp_path, '--epochs', str(epochs), '--momentum', momentum, *resume)
    assert read_checkpoint(folder / 'last.pth.tar')['epoch'] == 2

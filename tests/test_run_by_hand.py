"""Whole runs against plain torch: what `train()` calls, in which order, and with what of its settings.

The loop of `by_hand` is written from the documentation of the flags alone. Augmentation is off, so that nothing but the
order of the images is random.
"""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from stage_flags import TRAINED, stage_flags, takes_network
from test_train_run import assert_same, data_flags, images, rows, weights  # noqa: F401
from timm.task import ClassificationTask
from timm.utils import NativeScaler, unwrap_model
from torch import nn

import nbn_timm.training.plan as plans
import nbn_timm.training.run as run
from nbn_timm.cli import train
from nbn_timm.cli.train import parse_train
from nbn_timm.data import create_splits
from nbn_timm.evaluation import EvalResult
from nbn_timm.layers import nbn_layers
from nbn_timm.samplers import create_sampler
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.build import build_task, build_train_loader
from nbn_timm.training.distributed import World
from nbn_timm.training.loop import LoopSettings
from nbn_timm.training.optim import AverageSettings
from nbn_timm.training.plan import Plan, input_format
from nbn_timm.training.run_checkpoint import BEST, LAST
from nbn_timm.training.task import share_statistics

pytestmark = pytest.mark.fast

MEAN, STD = 0.4, 0.3
LR, DECAY, EMA, SMOOTHING, CLIP, EPOCHS, SEED = 0.2, 1e-2, 0.7, 0.2, 0.8, 4, 7
FLAGS = ['--model', 'resnet20_nbn', '--img-size', '8', '--crop-pct', '1', '--mean', *['0.4'] * 3, '--std', *['0.3'] * 3,
         '--device', 'cpu', '--workers', '0', '--seed', str(SEED)]


@pytest.fixture(scope='module')
def first(tmp_path_factory) -> Path:
    """Weights to begin with, the scale of NBN among them away from its initial value."""
    torch.manual_seed(3)
    model = timm.create_model('resnet20_nbn', num_classes=4)
    with torch.no_grad():
        for layer in nbn_layers(model).values():
            layer.bias.normal_()
            layer.scale.alpha.fill_(1.7)
    path = tmp_path_factory.mktemp('first') / 'first.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return path


def network(path: Path) -> nn.Module:
    model = timm.create_model('resnet20_nbn', num_classes=4)
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    return model


def split_of(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images [N, 3, 8, 8] and labels [N] of a list.

    They are computed in the order of timm's loader, bit for bit: a rounding can push a ReLU over its kink.
    """
    lines = [line.split() for line in (root / f'{name}.txt').read_text().splitlines()]
    pixels = np.stack([np.asarray(Image.open(root / file)) for file, _ in lines])
    mean, std = torch.tensor(255 * MEAN), torch.tensor(255 * STD)
    return ((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - mean) / std,
            torch.tensor([int(label) for _, label in lines]))


def rate(update: int, updates: int, on_updates: bool) -> float:
    """An even rise in the first epoch, then halved from the epochs 3 and 4 (counted from 1) on."""
    epoch = update // updates + 1
    done, steps = (update, updates) if on_updates else (epoch - 1, 1)
    rise = (done + 1) / (steps + 1) if done < steps else 1.0
    return LR * rise * 0.5 ** ((epoch >= 3) + (epoch >= 4))


def by_hand(path: Path, root: Path, on_updates: bool) -> dict:
    """Updates of two batches of four images; their average of the weights; losses and rates of the epochs."""
    model, loss = network(path), nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    x, y = split_of(root, 'train')
    order = create_sampler('instance_balanced', y.numpy(), None, SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=DECAY)
    average, losses, rates, update = None, [], [], 0
    updates = -(-len(y) // 8)
    for epoch in range(EPOCHS):
        model.train()
        order.set_epoch(epoch)
        chosen, summed = torch.tensor(list(order)), 0.0
        for group in chosen.split(8):
            optimizer.param_groups[0]['lr'] = rate(update, updates, on_updates)
            for batch in group.split(4):
                value = loss(model(x[batch]), y[batch]) * len(batch)
                summed += value.item()
                (value / len(group)).backward()
            if on_updates:
                nn.utils.clip_grad_value_(model.parameters(), CLIP / 20)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            rates.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            optimizer.zero_grad()
            update += 1
            now = {key: value.clone() for key, value in model.state_dict().items()}
            average = now if average is None else {
                key: EMA * average[key] + (1 - EMA) * value if value.is_floating_point() else value
                for key, value in now.items()}
        losses.append(summed / len(y))
    evaluated = network(path)
    evaluated.load_state_dict(average)
    tested, labels = split_of(root, 'test')
    hits = (evaluated.eval()(tested).argmax(1) == labels).float().mean().item()
    return dict(state=model.state_dict(), average=average, losses=losses, top1=100 * hits,
                rates=[rates[(epoch + 1) * updates - 1] for epoch in range(EPOCHS)],
                momentum=[optimizer.state[parameter]['momentum_buffer'] for parameter in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize('on_updates', [False, True])
def test_a_run_is_what_plain_torch_computes(on_updates, first, images, tmp_path, monkeypatch):  # noqa: F811
    """In two parts, of two epochs each; with a smooth activation, since a rounding can push a ReLU over its kink."""
    monkeypatch.setattr(nn.ReLU, 'forward', lambda self, x: F.silu(x))
    expected = by_hand(first, images, on_updates)
    flags = [
        *data_flags(images, 'train', 'test'), *FLAGS, '--initial-checkpoint', str(first), '--no-aug', '-b', '4',
        '--global-batch-size', '8', '--lr', str(LR), '--sched', 'multistep',
        '--decay-milestones', '3', '4', '--decay-rate', '0.5', '--warmup-epochs', '1', '--weight-decay', str(DECAY),
        '--smoothing', str(SMOOTHING), '--clip-grad', *([str(CLIP / 20), '--clip-mode', 'value', '--sched-on-updates']
        if on_updates else [str(CLIP)]), '--model-ema', '--no-model-ema-warmup', '--model-ema-decay', str(EMA),
        '--output', str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', str(EPOCHS // 2)])
    train.main([*flags, '--epochs', str(EPOCHS), '--resume', 'auto'])
    folder = tmp_path / 'run'
    saved = torch.load(folder / LAST, weights_only=True)
    for key, value in expected['state'].items():
        torch.testing.assert_close(saved['state_dict'][key], value, rtol=1e-3, atol=1e-5, msg=key)
    for key, value in expected['average'].items():
        torch.testing.assert_close(saved['state_dict_ema'][key], value, rtol=1e-3, atol=1e-5, msg=key)
    buffers = [saved['optimizer']['state'][index]['momentum_buffer'] for index in range(len(expected['momentum']))]
    for one, other in zip(buffers, expected['momentum'], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    logged = rows(folder)
    assert [row['epoch'] for row in logged] == list(range(EPOCHS))
    assert [row['train_loss'] for row in logged] == pytest.approx(expected['losses'], rel=1e-4)
    assert [row['lr'] for row in logged] == pytest.approx(expected['rates'])
    assert json.loads((folder / 'test.json').read_text())['top1'] == pytest.approx(expected['top1'], abs=1e-3)


def test_an_average_holds_for_all_layers_that_share_a_scale(first, images, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(run, 'report_run', lambda plan, task, *rest: seen.append(task))
    train.main([*data_flags(images, 'train'), *FLAGS, '--initial-checkpoint', str(first), '--no-aug', '-b', '5',
                '--epochs', '1', '--model-ema', '--model-ema-decay', '0.5', '--output', str(tmp_path)])
    trained, averaged = (list(nbn_layers(unwrap_model(seen[0].get_trainable_module(ema=ema))).values())
                         for ema in (False, True))
    saved = torch.load(next(tmp_path.glob('*/' + LAST)), weights_only=True)
    scales = [value for key, value in saved['state_dict_ema'].items() if key.endswith('alpha')]
    assert len(scales) < len(averaged)  # some do share
    for own, layers in zip((saved['state_dict'], saved['state_dict_ema']), (trained, averaged), strict=True):
        assert {layer.scale.alpha.item() for layer in layers} == {
            value.item() for key, value in own.items() if key.endswith('alpha')}
    assert all(one.scale.alpha.item() not in (1.7, other.scale.alpha.item())
               for one, other in zip(averaged, trained, strict=True))


# What is handed on


def test_all_parts_of_a_run_are_given_its_settings(first, images, tmp_path, monkeypatch):  # noqa: F811
    seen = {}

    def spy(name, result=None):
        original = getattr(run, name)

        def call(*args, **kwargs):
            seen[name] = args
            return result or original(*args, **kwargs)
        monkeypatch.setattr(run, name, call)

    for name in ('build_train_loader', 'train_one_epoch', 'prepare_task'):
        spy(name)
    train.main([*data_flags(images, 'train'), *FLAGS, '--initial-checkpoint', str(first), '-b', '5',
                '--grad-accum-steps', '2', '--validation-batch-size', '3', '--epochs', '1', '--amp', '--amp-dtype',
                'bfloat16', '--channels-last', '--clip-grad', '0.5', '--clip-mode', 'value', '--model-ema',
                '--model-ema-decay', '0.9', '--model-ema-warmup', '--drop', '0.25', '--bn-momentum', '0.3',
                '--output', str(tmp_path)])
    plan, model = seen['build_train_loader']
    assert plan.batch == BatchPlan(5, 2, 10)
    assert (plan.input.input_size, plan.input.mean, plan.num_classes) == ((3, 8, 8), (MEAN,) * 3, 4)
    assert plan.folder.parent == tmp_path
    assert model.drop_rate == 0.25
    assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.3}
    assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)
    task, world, average, backend = seen['prepare_task']
    assert average == AverageSettings(True, 0.9, True) and backend is None
    ema = task.trainable_module_ema
    assert (ema.decay, ema.use_warmup) == (0.9, True)
    loop = seen['train_one_epoch'][3]
    assert loop == LoopSettings(2, torch.bfloat16, True, 0.5, 'value')


@pytest.mark.parametrize('rank', [0, 1])
def test_loaders_are_those_of_this_process(rank, images):  # noqa: F811
    settings = parse_train([*data_flags(images), *FLAGS, '--validation-batch-size', '3'])
    world = World(torch.device('cpu'), rank, rank, 2)
    splits = create_splits(settings.data)
    plan = Plan(settings, world, Path(), BatchPlan(5, 1, 10), splits, input_format(
        settings, splits.defaults, timm.create_model('resnet20_nbn')), 4)
    loader = build_train_loader(plan, nn.Identity())
    assert (loader.rank, loader.seed, loader.loader.batch_size) == (rank, SEED, 5)
    sampler = loader.loader.sampler
    assert (sampler.rank, sampler.world_size, sampler.seed, len(sampler)) == (rank, 2, SEED, 10)
    labels = torch.cat([target for _, target in plan.eval_loader(splits.val)])
    assert labels.tolist() == [[0, 2], [1, 3]][rank]
    assert plan.eval_loader(splits.val).loader.batch_size == 3


def test_streams_are_told_batch_size_and_seed(images, monkeypatch):  # noqa: F811
    told = []
    monkeypatch.setattr(plans, 'create_splits', lambda data, **_: told.append(data) or create_splits(data))
    settings = parse_train([*data_flags(images), *FLAGS])
    plans.open_training_data(settings, BatchPlan(5, 1, 5), World(torch.device('cpu')))
    assert [(data.batch_size, data.seed) for data in told] == [(5, SEED)]


def test_an_evaluation_is_as_precise_as_the_training(first, images):  # noqa: F811
    for flags, dtype in (([], torch.float32), (['--amp', '--amp-dtype', 'bfloat16'], torch.bfloat16)):
        settings = parse_train([*data_flags(images), *FLAGS, *flags])
        splits, model, seen = create_splits(settings.data), network(first).eval(), []
        plan = Plan(settings, World(torch.device('cpu')), Path(), BatchPlan(5, 1, 5), splits,
                    input_format(settings, splits.defaults, model), 4)
        model.fc.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        plan.evaluate(model, splits.test)
        assert set(seen) == {dtype}


@pytest.mark.parametrize('flags', [[], ['--kd-teacher-mode', 'train', '--kd-target', 'experts', '--kd-temperature',
                                        '3', '--distill-loss-weight', '0.4']])
def test_a_teacher_is_asked_as_the_settings_say(flags, first, images):  # noqa: F811
    torch.save({'arch': 'resnet20_nbn', 'state_dict': network(first).state_dict()}, first.parent / 'teacher.pth')
    settings = parse_train([*data_flags(images), *FLAGS, '--kd-checkpoint', str(first.parent / 'teacher.pth'), *flags])
    splits, student = create_splits(settings.data), network(first)
    plan = Plan(settings, World(torch.device('cpu')), Path(), BatchPlan(5, 1, 5), splits,
                input_format(settings, splits.defaults, student), 4)
    task = build_task(plan, student, None, None)
    assert (task.target, task.temperature, task.weight) == (('experts', 3.0, 0.4) if flags else ('mean', 1.5, 1.0))
    task.train()
    assert task.teacher.training == bool(flags) and task.trainable_module.training
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())


# What is random


def watched(monkeypatch, *flags: str) -> list[tuple]:
    """A run; of each epoch a draw from every generator at its beginning, and the images that it gave first."""
    seen, original = [], run.train_one_epoch

    def spy(task, loader, *rest):
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        draws = random.random(), np.random.rand(), torch.rand(1).item()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        batches = [(x.clone(), y.clone()) for x, y in loader]
        seen.append((draws, torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])))
        return original(task, batches, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, 'train_one_epoch', spy)
        train.main(list(flags))
    return seen


def test_every_epoch_has_draws_of_its_own_that_come_again(images, tmp_path, monkeypatch):  # noqa: F811
    """Of the order of the images and of their augmentation, with another seed others, on a resumed run the same."""
    flags = [*data_flags(images, 'train'), *FLAGS[:-2], '--output', str(tmp_path), '-b', '20', '--rotation', '30']
    whole = watched(monkeypatch, *flags, '--epochs', '3', '--seed', '5', '--experiment', 'whole')
    for generator in range(3):
        assert len({draws[generator] for draws, _, _ in whole}) == 3
    assert len({tuple(labels.tolist()) for _, _, labels in whole}) == 3
    other = watched(monkeypatch, *flags, '--epochs', '1', '--seed', '6', '--experiment', 'other')
    assert other[0][0] != whole[0][0] and other[0][2].tolist() != whole[0][2].tolist()
    first_part = watched(monkeypatch, *flags, '--epochs', '2', '--seed', '5', '--experiment', 'parts')
    second = watched(monkeypatch, *flags, '--epochs', '3', '--seed', '5', '--experiment', 'parts', '--resume', 'auto')
    for once, again in zip(whole, first_part + second, strict=True):
        assert once[0] == again[0]
        assert torch.equal(once[1], again[1]) and torch.equal(once[2], again[2])
    # Augmentation itself differs from epoch to epoch: no image comes twice.
    pictures = torch.cat([x for _, x, _ in whole]).flatten(1)
    assert len(torch.unique(pictures, dim=0)) == len(pictures)


# What is watched and reported


def test_a_test_split_is_watched_on_request_only_and_never_chooses(images, tmp_path):  # noqa: F811
    flags = [*data_flags(images, 'train', 'test'), *FLAGS, '-b', '10', '--epochs', '2', '--output', str(tmp_path)]
    for more in ([], ['--watch-test']):
        folder = tmp_path / f'run{len(more)}'
        train.main([*flags, *more, '--experiment', folder.name])
        assert all(('eval_top1' in row) == bool(more) for row in rows(folder))
        assert not (folder / BEST).exists()
        state = torch.load(folder / LAST, weights_only=True)
        assert (state['metric'], state['best']) == (None, None)
        report = json.loads((folder / 'test.json').read_text())
        assert report['weights'] == {'file': LAST, 'epoch': 2, 'epochs': 2, 'chosen_by': None}
    assert_same(weights(tmp_path / 'run0'), weights(tmp_path / 'run1'))


@pytest.mark.parametrize(('metric', 'best'), [('top1', 2), ('loss', 3)])
def test_the_report_is_on_the_best_weights_and_says_which(metric, best, images, tmp_path, monkeypatch):  # noqa: F811
    """What the validation split gives is made up here, epoch by epoch."""
    made_up, reported = [(3.0, 1), (2.0, 3), (1.0, 2)], {}

    original = Plan.evaluate

    def evaluate(plan, model, dataset, evaluator=None):
        if dataset is plan.splits.test:
            reported.update({key: value.clone() for key, value in unwrap_model(model).state_dict().items()})
            original(plan, model, dataset, evaluator)  # what is kept of each picture
            return EvalResult(0.5, 100.0, (1, 1, 1, 0), (1, 1, 1, 1), None)
        if evaluator is not None:  # for the temperature
            return original(plan, model, dataset, evaluator)
        loss, hits = made_up.pop(0)
        return EvalResult(loss, 100.0, (hits, 0, 0, 0), (4, 0, 0, 0), None)

    monkeypatch.setattr(Plan, 'evaluate', evaluate)
    train.main([*data_flags(images), *FLAGS, '-b', '10', '--epochs', '3', '--eval-metric', metric, '--amp',
                '--amp-dtype', 'bfloat16', '--model-ema', '--output', str(tmp_path), '--experiment', 'run'])
    report = json.loads((tmp_path / 'run' / 'test.json').read_text())
    assert report['weights'] == {'file': BEST, 'epoch': best, 'epochs': 3, 'chosen_by': f'validation {metric}'}
    assert (report['use_ema'], report['precision'], report['split']) == (True, 'bfloat16', 'test')
    assert (report['model'], report['dataset']) == ('resnet20_nbn', 'list')
    assert (report['top1'], report['loss']) == (75.0, 0.5)
    saved = torch.load(tmp_path / 'run' / BEST, weights_only=True)
    assert saved['epoch'] == best - 1
    assert all(torch.equal(value, reported[key]) for key, value in saved['state_dict_ema'].items())
    assert torch.load(tmp_path / 'run' / LAST, weights_only=True)['best'] == {
        'metric': {'top1': 75.0, 'loss': 1.0}[metric], 'epoch': best - 1}
    assert made_up == []


def test_a_plain_run_reports_plain_weights_in_float32(images, tmp_path):  # noqa: F811
    train.main([*data_flags(images), *FLAGS, '-b', '10', '--epochs', '1', '--output', str(tmp_path), '--experiment',
                'run'])
    report = json.loads((tmp_path / 'run' / 'test.json').read_text())
    assert (report['use_ema'], report['precision']) == (False, 'float32')
    assert report['weights'] == {'file': BEST, 'epoch': 1, 'epochs': 1, 'chosen_by': 'validation top1'}


# Float16


def test_float16_is_scaled_and_the_scale_goes_on_where_it_was(images, tmp_path):  # noqa: F811
    flags = [*data_flags(images, 'train'), *FLAGS, '-b', '10', '--amp', '--amp-dtype', 'float16', '--output',
             str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', '1'])
    path, key = tmp_path / 'run' / LAST, NativeScaler.state_dict_key
    state = torch.load(path, weights_only=True)
    assert state[key]['scale'] > 1
    state[key] = {**state[key], 'scale': 48.0, '_growth_tracker': 5}
    torch.save(state, path)
    train.main([*flags, '--epochs', '2', '--resume', 'auto'])
    after = torch.load(path, weights_only=True)[key]
    assert (after['scale'], after['_growth_tracker']) == (48.0, 7)  # two updates without an overflow


@pytest.mark.parametrize('flags', [[], ['--amp', '--amp-dtype', 'bfloat16']])
def test_nothing_else_is_scaled(flags, images, tmp_path):  # noqa: F811
    train.main([*data_flags(images, 'train'), *FLAGS, '-b', '10', '--epochs', '1', *flags, '--output', str(tmp_path),
                '--experiment', 'run'])
    assert NativeScaler.state_dict_key not in torch.load(tmp_path / 'run' / LAST, weights_only=True)


# Second stages


@pytest.mark.parametrize('stage', TRAINED)
def test_the_optimizer_of_a_second_stage_has_what_the_stage_trains_and_no_more(
        stage, images, tmp_path, monkeypatch):  # noqa: F811
    model = next(name for name in ('resnet20_nbn', 'resnet32_ride') if takes_network(stage, name))
    path = tmp_path / 'first.pth'
    torch.manual_seed(0)
    torch.save({'state_dict': timm.create_model(model, num_classes=4).state_dict()}, path)
    seen, original = [], run.create_optimizer

    def spy(part, settings, rates=None):
        seen.append((part, original(part, settings, rates)))
        return seen[-1][1]

    monkeypatch.setattr(run, 'create_optimizer', spy)
    train.main([*data_flags(images, 'train'), '--model', model, *FLAGS[2:], '-b', '10', '--stage', stage,
                *stage_flags(stage), '--epochs', '1', '--initial-checkpoint', str(path), '--output', str(tmp_path)])
    (part, optimizer), = seen
    handed = {parameter for group in optimizer.param_groups for parameter in group['params']}
    assert handed == set(part.parameters()) and all(parameter.requires_grad for parameter in handed)
    whole = torch.load(path, weights_only=True)['state_dict']
    assert 0 < sum(parameter.numel() for parameter in handed) < 0.1 * sum(value.numel() for value in whole.values())


# Several processes


@pytest.mark.parametrize(('way', 'reduce'), [('reduce', True), ('broadcast', False)])
def test_running_statistics_are_shared_as_asked(way, reduce, images, tmp_path, monkeypatch):  # noqa: F811
    """By all processes' mean or the first one's, for the weights and for their average."""
    asked = []
    monkeypatch.setattr(run, 'share_statistics', lambda task, world, reduce: asked.append(reduce))
    train.main([*data_flags(images, 'train'), *FLAGS, '-b', '10', '--epochs', '1', '--dist-bn', way, '--output',
                str(tmp_path)])
    assert asked == [reduce]
    norm = nn.BatchNorm2d(2)
    task = ClassificationTask(nn.Sequential(norm), nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False)
    task.setup_ema(0.5)
    norm.running_mean.fill_(1.0)

    def all_reduce(tensor, *_, **__):  # the other process has 3
        tensor.add_(3.0)

    def broadcast(tensor, *_, **__):  # and it is the first one
        tensor.fill_(3.0)

    monkeypatch.setattr(torch.distributed, 'all_reduce', all_reduce)
    monkeypatch.setattr(torch.distributed, 'broadcast', broadcast)
    share_statistics(task, World(torch.device('cpu'), rank=1, local_rank=1, size=2), reduce)
    assert norm.running_mean.tolist() == [2.0 if reduce else 3.0] * 2
    averaged = unwrap_model(task.get_trainable_module(ema=True))[0]
    assert averaged.running_mean.tolist() == [1.5 if reduce else 3.0] * 2

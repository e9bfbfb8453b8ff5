"""What recipes need to be the published ones: settings that carry their values, each against a plain computation."""
import math

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli.train import parse_train
from nbn_timm.config import ASKED_FOR, shipped_configs
from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.layers import CosPlusLinear
from nbn_timm.losses import create_loss
from nbn_timm.models.create import create_model, init_by_torch
from nbn_timm.samplers import create_sampler
from nbn_timm.second_stages import FittedSecondStage
from nbn_timm.settings import flag
from nbn_timm.training.build import build_second_stage
from nbn_timm.training.combinations import check_combinations, loss_settings
from nbn_timm.training.freezing import parameters_up_to
from nbn_timm.training.optim import OptimizerSettings, create_optimizer, create_scheduler

pytestmark = pytest.mark.fast


def test_robals_classifier_is_the_written_out_one():
    """scale * x / ||x|| . w / (||w|| + gamma), by loops; the vectors start uniform within 1 / sqrt(D)."""
    torch.manual_seed(0)
    head = CosPlusLinear(5, 3, gamma=1 / 16)
    x = torch.randn(4, 5)
    expected = [[10 * sum(a * b for a, b in zip(row, w, strict=True)) / math.hypot(*row) / (math.hypot(*w) + 1 / 16)
                 for w in head.weight.tolist()] for row in x.tolist()]
    torch.testing.assert_close(head(x), torch.tensor(expected))
    weight = CosPlusLinear(64, 400).weight
    assert weight.abs().max() <= 1 / 8 and weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)
    model = timm.create_model('resnet20', num_classes=4, head='cosplus', head_kwargs={'scale': 7.0, 'gamma': 0.5})
    model.reset_classifier(6)
    assert isinstance(model.fc, CosPlusLinear) and (model.fc.scale, model.fc.gamma) == (7.0, 0.5)
    torch.jit.script(model)


@pytest.mark.parametrize('head, settings, message', [
    ('cosine', {'gamma': 0.1}, "a cosine head has no setting 'gamma' in head_kwargs: it has scale"),
    ('linear', {'scale': 2.0}, "a linear head has no setting 'scale' in head_kwargs: it has none"),
    ('cosplus', {'gamma': -1.0}, 'gamma=-1.0: give a number from 0'),
    ('cosplus', {'scale': 0}, 'scale=0: give a number above 0')])
def test_wrong_settings_of_a_head_are_one_sentence(head, settings, message):
    with pytest.raises(InputError, match=message):
        create_model('resnet20', 4, model_kwargs={'head': head, 'head_kwargs': settings})


@pytest.mark.parametrize('name', ['resnext50_nbn', 'resnext50_32x4d'])  # the method and its baseline
def test_the_released_initialisation_of_resnext_is_torchs(name):
    """Uniform within 1 / sqrt(fan_in), as nn.Conv2d and nn.Linear start; Kaiming's rule has other deviations."""
    torch.manual_seed(0)
    model = create_model(name, 1000, model_kwargs={'zero_init_last': False})
    released = math.sqrt(1 / 3 / (4 * 9))  # of a grouped 3x3 convolution of 4 channels a group
    conv = model.layer1[0].conv2.weight
    assert conv.std().item() != pytest.approx(released, rel=0.2)
    init_by_torch(model)
    assert conv.std().item() == pytest.approx(released, rel=0.02)
    assert conv.abs().max().item() <= 1 / 6
    assert model.fc.weight.abs().max().item() <= 1 / math.sqrt(2048)
    norm = model.layer4[0].bn3
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


def test_the_classifier_of_bag_of_tricks_starts_by_torchs_rule():
    """0.072 = 1 / sqrt(3 * 64), where Kaiming's rule has sqrt(2 / 64) = 0.177; convolutions keep Kaiming's rule."""
    torch.manual_seed(0)
    model = create_model('resnet32', 100)
    conv = model.layer3[0].conv2.weight.clone()
    assert model.fc.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    init_by_torch(model, classifier_alone=True)
    assert model.fc.weight.std().item() == pytest.approx(0.072, rel=0.02)
    assert torch.equal(conv, model.layer3[0].conv2.weight)
    experts = create_model('resnet32_ride', 10, model_kwargs={'head': 'cosine'})
    init_by_torch(experts, classifier_alone=True)
    assert all(torch.linalg.vector_norm(part.weight, dim=1).sub(1).abs().max() < 1e-6 for part in experts.fc)


@pytest.mark.parametrize('given', ['--pretrained', '--initial-checkpoint'])
def test_an_initialisation_beside_weights_is_refused(given, tmp_path):
    torch.save({'args': {'model': 'resnet20'}}, tmp_path / 'first.pth')
    flags = [given] if given == '--pretrained' else [given, str(tmp_path / 'first.pth')]
    with pytest.raises(InputError, match=f'--init.*has no effect with {given}'):
        parse_train(['--dataset', 'list', '--model', 'resnet20', '--init', 'torch', *flags])


def rates(*flags: str) -> list[float]:
    settings = parse_train(['--dataset', 'list', '--model', 'resnet20', *flags])
    optimizer = create_optimizer(nn.Linear(1, 1), settings.optimizer)
    scheduler, found = create_scheduler(optimizer, settings.schedule, 3), []
    for epoch in range(settings.schedule.epochs):
        scheduler.step(epoch + settings.schedule.sched_ahead)
        found.append(optimizer.param_groups[0]['lr'])
    return found


@pytest.mark.parametrize('epochs', [5, 10, 90])
def test_a_schedule_that_is_ahead_is_one_stepped_before_every_epoch(epochs):
    """The rates of Kang et al.'s and BALMS's code with torch from 1.1 on: `scheduler.step()` opens an epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    theirs, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), []
    for _ in range(epochs):
        optimizer.step()
        theirs.step()
        expected.append(optimizer.param_groups[0]['lr'])
    found = rates('--lr', '0.2', '--epochs', str(epochs), '--sched-ahead', '1')
    assert found == pytest.approx(expected, abs=1e-12)
    assert found[-1] == 0


@pytest.mark.parametrize('flags', [['--sched-on-updates'], ['--sched', 'constant']])
def test_being_ahead_is_for_schedules_by_epochs(flags):
    with pytest.raises(InputError, match='--sched-ahead has no effect'):
        rates('--sched-ahead', '1', *flags)


@pytest.mark.parametrize('name, parts', [('resnet20', ['fc']), ('resnet32_ride', ['fc.0', 'fc.1', 'fc.2'])])
def test_a_rate_of_the_classifiers_own_follows_the_schedule(name, parts):
    """OLTR's and LADE's recipes for Places-LT: 0.001 for the features and 0.1 for the classifier, times 0.1 each 10."""
    settings = parse_train(['--dataset', 'list', '--model', name, '--lr', '0.001', '--classifier-lr', '0.1', '--sched',
                            'step', '--decay-epochs', '10', '--epochs', '30'])
    model = timm.create_model(name, num_classes=4)
    optimizer = create_optimizer(model, settings.optimizer)
    scheduler = create_scheduler(optimizer, settings.schedule, 1)
    for epoch, factor in ((0, 1), (9, 1), (10, 0.1), (20, 0.01)):
        scheduler.step(epoch)
        rate_of = {parameter: group['lr'] for group in optimizer.param_groups for parameter in group['params']}
        assert len(rate_of) == len(list(model.parameters()))
        for key, parameter in model.named_parameters():
            expected = 0.1 if key.startswith(tuple(parts)) else 0.001
            assert rate_of[parameter] == pytest.approx(expected * factor)
    assert {group['weight_decay'] for group in optimizer.param_groups} == {5e-4}


@pytest.mark.parametrize('settings, message', [
    (OptimizerSettings(classifier_lr=0.1, lr=0.0), 'a multiple of --lr, which is 0'),
    (OptimizerSettings(classifier_lr=0.1, layer_decay=0.7), 'leave one of the two out')])
def test_rates_that_cannot_be_had_together(settings, message):
    with pytest.raises(InputError, match=message):
        create_optimizer(timm.create_model('resnet20', num_classes=4), settings)


@pytest.mark.parametrize('name', shipped_configs())
def test_every_recipe_starts(name, tmp_path):
    """Settings that go together, and its loss, sampler, optimizer and first rate; models are built in test_config."""
    torch.save({'args': {'model': 'resnet20'}}, tmp_path / 'first.pth')
    given = yaml.safe_load(shipped_configs()[name].read_text())
    flags = ['--initial-checkpoint', str(tmp_path / 'first.pth')] if 'stage' in given else []
    flags += [] if 'dataset' in given or 'stage' in given else ['--dataset', 'digits_lt']  # for whatever pictures
    flags += [] if 'model' in given or 'stage' in given else ['--model', 'resnet20']
    flags += [f'{flag(key)}={tmp_path}/first.pth' for key, value in given.items() if value == ASKED_FOR]
    settings = parse_train(['--config', name, *flags])
    assert settings.without_effect(list(given)) == {}
    stage = build_second_stage(settings)
    check_combinations(settings, stage)
    if isinstance(stage, FittedSecondStage):
        return
    counts = ClassCounts((400, 90, 30, 6) * 25, tuple(map(str, range(100))), 'a test')
    targets = np.repeat(np.arange(100), 4)
    create_sampler(settings.sampler.sampler, targets, counts, 0, 0, 1, settings.schedule.epochs,
                   **settings.sampler.sampler_kwargs)
    create_loss(settings.loss.loss, counts, **loss_settings(settings, False))
    experts = 'ride' in settings.model.model or settings.second_stage.stage == 'routing'
    model = timm.create_model('resnet32_ride' if experts else 'resnet20', num_classes=100)
    model = model if stage is None else stage.prepare(model)
    trained, parts = (model, None) if stage is None else (stage.trained(model), stage.rates(model))
    optimizer = create_optimizer(trained, settings.optimizer, parts)
    scheduler = create_scheduler(optimizer, settings.schedule, 10)
    scheduler.step(settings.schedule.sched_ahead)
    assert 0 < optimizer.param_groups[0]['lr'] <= settings.optimizer.lr


def test_the_first_stage_of_mislas_on_places_trains_one_block_behind_a_whole_resnet152():
    """train_stage1.py gives the optimizer Bottleneck(2048, 512) and the classifier; the ResNet-152 is in eval mode."""
    settings = yaml.safe_load(shipped_configs()['places_lt/resnet152_mixup'].read_text())
    with torch.device('meta'):
        model = create_model(settings['model'], 365, model_kwargs=settings['model_kwargs'])
        whole = timm.create_model('resnet152')
    frozen = parameters_up_to(model, settings['freeze'])
    assert frozen == {name for name, _ in whole.named_parameters() if not name.startswith('fc.')}
    assert {name.rsplit('.', 1)[0] for name, _ in model.named_parameters() if name not in frozen} == {
        'fc', *(f'layer4.3.{layer}' for layer in ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3'))}
    block = model.layer4[3]
    assert block.conv1.weight.shape == (512, 2048, 1, 1) and block.conv3.weight.shape == (2048, 512, 1, 1)
    assert block.downsample is None and block.conv2.stride == (1, 1)

"""What else changes how a network is trained: averaged epochs, optimizers of timm, SAM, rates by kind, small images."""
import copy
import json

import pytest
import torch
from formats import CIFAR_LT
from test_train_engine import CPU, make_batch, make_task, run_epoch
from test_train_run import LAST, MODEL, assert_same, data_flags, images  # noqa: F401
from torch import nn

import nbn_timm.cli.train as train
import nbn_timm.training.run as run
from nbn_timm.errors import InputError
from nbn_timm.layers import NormalizedBatchNorm2d, freeze_nbn
from nbn_timm.layers.frozen import keep_statistics
from nbn_timm.models.create import create_model
from nbn_timm.training.averages import EpochAverage, measure_statistics
from nbn_timm.training.loop import LoopSettings, train_step
from nbn_timm.training.optim import (
    OptimizerSettings,
    ScheduleSettings,
    create_optimizer,
    create_scheduler,
    end_lookahead,
    scheduled_rate,
)
from nbn_timm.training.profile import NoProfile
from nbn_timm.training.progressive import ProgressiveSettings, ProgressiveSize, build_progressive_size


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def parts_and_whole(images, folder, *flags: str):  # noqa: F811
    """Checkpoints of a run of three epochs, and of one that was interrupted after two."""
    flags = [*data_flags(images, 'train', 'test'), *MODEL, '-b', '4', '--epochs', '3', '--loss', 'balanced_softmax',
             '--output', str(folder), '--sched-on-updates', '--warmup-epochs', '1', *flags]
    train.main([*flags, '--experiment', 'whole'])
    train_one = run.train_one_epoch

    def killed(*args, **kwargs):
        if args[6] == 2:
            raise KeyboardInterrupt
        return train_one(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'train_one_epoch', killed)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, '--experiment', 'parts'])
    train.main([*flags, '--experiment', 'parts', '--resume', 'auto'])
    return [torch.load(folder / name / LAST, weights_only=True) for name in ('whole', 'parts')]


@pytest.mark.parametrize('flags', [
    ['--swa-epochs', '2', '--mixup', '0.2'],
    ['--opt', 'lookahead_momentum', '--bias-lr-scale', '4', '--norm-lr-scale', '0.5'],
    ['--opt', 'muon', '--lr', '0.02'],
    ['--sam-rho', '0.05', '--drop', '0.1', '--grad-accum-steps', '2'],
    ['--progressive-size', '6', '--progressive-epochs', '0.4', '--cutmix', '1'],
    ['--adversarial', 'trades', '--adv-steps', '2'],
], ids=lambda flags: flags[0] + flags[1])
@pytest.mark.slow
def test_a_resumed_run_ends_as_the_whole_one(flags, images, tmp_path):  # noqa: F811
    whole, parts = parts_and_whole(images, tmp_path, *flags)
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'averaged_epochs'):
        assert_same(whole.get(key), parts.get(key))
    assert whole.get('averaged_epochs') == (2 if '--swa-epochs' in flags else None)


def test_swa_is_the_mean_of_the_last_epochs_with_statistics_of_its_own(images, tmp_path):  # noqa: F811
    """Without augmentation the statistics are those of a pass in training mode over all images, in any order."""
    flags = [*data_flags(images, 'train', 'test'), *MODEL, '-b', '20', '--no-aug', '--checkpoint-hist', '5',
             '--output', str(tmp_path), '--experiment', 'run', '--epochs', '3', '--swa-epochs', '2']
    train.main(flags)
    last, before = (torch.load(tmp_path / 'run' / name, weights_only=True) for name in (LAST, 'last-1.pth.tar'))
    average = last['state_dict_ema']
    assert json.loads((tmp_path / 'run' / 'test.json').read_text())['use_ema'] is True  # for who evaluates it again
    assert last['averaged_epochs'] == 2 and before['averaged_epochs'] == 1
    assert_same(before['state_dict'], before['state_dict_ema'])
    for key, value in average.items():
        if 'running' not in key and 'tracked' not in key:
            mean = (last['state_dict'][key].double() + before['state_dict'][key].double()) / 2
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)

    model = create_model('resnet20_nbn', 4)
    model.load_state_dict(average)
    inputs = []
    loader = train_loader(tmp_path / 'run', images)
    assert any(isinstance(module, NormalizedBatchNorm2d) for module in model.modules())
    hook = model.layer3[2].bn2.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    for pixels, _ in loader:
        model.train()(pixels)
    hook.remove()
    values, = inputs
    torch.testing.assert_close(average['layer3.2.bn2.running_mean'], values.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(average['layer3.2.bn2.running_var'], values.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(average['layer3.2.bn2.running_var'], last['state_dict']['layer3.2.bn2.running_var'],
                              rtol=1e-3)


def test_the_mean_of_weights_keeps_statistics_that_are_fixed():
    """torch's `update_bn` would reset them, and layers that never measure would normalise by 0 and 1 from then on."""
    model = create_model('resnet20_nbn', 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    freeze_nbn(model.layer1)
    keep_statistics(model.layer2)
    before, batches = copy.deepcopy(model.state_dict()), torch.randn(2, 4, 3, 8, 8)
    measure_statistics(model.eval(), batches)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if ('running' in key or 'tracked' in key)
                     and not key.startswith(('layer1.', 'layer2.'))}
    first = torch.stack([model.conv1(batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, first)
    assert model.bn1.momentum == 0.1 and not model.training


def train_loader(folder, root):
    """All training images of a run in one batch."""
    from nbn_timm.data import create_eval_loader
    from nbn_timm.datasets import create_splits
    settings = train.parse_train([*data_flags(root, 'train', 'test'), *MODEL, '--output', str(folder)])
    splits = create_splits(settings.data)
    defaults = splits.defaults.for_model(create_model('resnet20_nbn', 4).pretrained_cfg).as_trained(settings.input)
    return create_eval_loader(splits.train, batch_size=20, defaults=defaults, num_workers=0)


def test_epoch_average_counts():
    model = nn.Linear(1, 1, bias=False)
    average = EpochAverage(model)
    for value in (5.0, 1.0, 2.0, 6.0):
        if value == 1.0:
            average.begin()
        model.weight.data.fill_(value)
        average.take(model)
        average.update(model, step=3)  # timm's call after every update
    assert average.module.weight.item() == pytest.approx(3.0) and average.n_averaged == 3


def test_lookahead_is_its_formula():
    """Every sixth step the slow weights go half of the way; between them there is plain SGD."""
    weight = nn.Parameter(torch.tensor([1.0]))
    settings = OptimizerSettings('lookahead_momentum', lr=0.1, momentum=0.0, weight_decay=0.0)
    optimizer = create_optimizer(nn.ParameterList([weight]), settings)
    slow = None
    for step in range(1, 13):
        before = weight.item()
        weight.grad = torch.tensor([2.0])
        optimizer.step()
        fast = before - 0.2
        if step % 6 == 0:
            slow = fast if slow is None else slow + 0.5 * (fast - slow)  # timm begins with the first fast weights
            assert weight.item() == pytest.approx(slow, abs=1e-6)
        else:
            assert weight.item() == pytest.approx(fast, abs=1e-6)
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    optimizer.zero_grad()  # as after each step of a run
    end_lookahead(optimizer)  # timm's own call does nothing here, for want of a gradient
    assert weight.item() == pytest.approx(slow - 0.1, abs=1e-6) and weight.grad is None


def test_the_rate_that_is_told_is_that_of_the_schedule():
    """With layer decay the first group is the slowest layer's."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD([{'params': model[0].parameters(), 'lr': 0.01, 'lr_scale': 0.1},
                                 {'params': model[1].parameters(), 'lr': 0.1, 'lr_scale': 1.0}])
    assert scheduled_rate(optimizer) == 0.1
    del optimizer.param_groups[1]
    assert scheduled_rate(optimizer) == pytest.approx(0.1)


@pytest.mark.parametrize('opt, message', [
    ('lookahead_momentm', "unknown --opt 'lookahead_momentm'"),
    ('lookahead', "unknown --opt 'lookahead'"),
])
def test_unknown_optimizers_behind_lookahead(opt, message):
    with pytest.raises(InputError, match=message):
        create_optimizer(nn.Linear(2, 2), OptimizerSettings(opt))


@pytest.mark.parametrize('sched', ['cosine', 'linear', 'wsd', 'step', 'multistep', 'constant'])
@pytest.mark.parametrize('decay_1d', [True, False])
def test_rates_by_kind(sched, decay_1d):
    """Of the whole course of the schedule; NBN's alpha is of the norms."""
    model = create_model('resnet20_nbn', 4)
    settings = OptimizerSettings(lr=0.2, weight_decay=1e-3, bias_lr_scale=8, norm_lr_scale=0.5, decay_1d=decay_1d)
    optimizer = create_optimizer(model, settings)
    scheduler = create_scheduler(optimizer, ScheduleSettings(epochs=4, sched=sched), 3)
    plain = create_optimizer(model, OptimizerSettings(lr=0.2, weight_decay=1e-3))
    reference = create_scheduler(plain, ScheduleSettings(epochs=4, sched=sched), 3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(id(p) for group in optimizer.param_groups for p in group['params']) == sorted(names)
    for epoch in range(4):
        scheduler.step(epoch)
        reference.step(epoch)
        rate = plain.param_groups[0]['lr']
        for group in optimizer.param_groups:
            for parameter in group['params']:
                name = names[id(parameter)]
                scale = 8 if name.endswith('bias') else 0.5 if parameter.ndim <= 1 else 1
                assert group['lr'] == pytest.approx(scale * rate), name
                assert group['weight_decay'] == (1e-3 if decay_1d or scale == 1 else 0)
    assert {name.rpartition('.')[2] for name in names.values()} == {'weight', 'bias', 'alpha'}


def test_rates_by_kind_and_by_layer_are_one_too_many():
    with pytest.raises(InputError, match='--layer-decay scales the rates by layer'):
        create_optimizer(nn.Linear(2, 2), OptimizerSettings(bias_lr_scale=2, layer_decay=0.7))


def test_a_rate_by_kind_multiplies_that_of_the_classifier():
    model = create_model('resnet20_nbn', 4)
    optimizer = create_optimizer(model, OptimizerSettings(lr=0.2, classifier_lr=0.6, bias_lr_scale=8))
    scales = {id(parameter): group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']}
    for name, parameter in model.named_parameters():
        expected = (3 if name.startswith('fc.') else 1) * (8 if name.endswith('bias') else 1)
        assert scales[id(parameter)] == pytest.approx(expected), name
    assert optimizer.param_groups[0]['lr_scale'] == 1  # whose rate is shown as the run's


def test_sam_is_its_formula():
    """SGD at rate 1 moves by the gradient at w + rho g / |g|, which autograd gives; BatchNorm sees the batch once."""
    task = make_task()
    task.trainable_module.append(nn.BatchNorm1d(3))
    task.train()
    model, rho = copy.deepcopy(task.trainable_module), 0.3
    pixels, target = make_batch(8)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(pixels), target), parameters)
    length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    statistics = model[-1].running_mean.clone()
    start = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter += rho * gradient / length
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(pixels), target), parameters)
    batches = list(zip(pixels.split(8), target.split(8), strict=True))
    train_step(task, batches, torch.optim.SGD(task.trainable_module.parameters(), lr=1.0), LoopSettings(sam_rho=rho),
               CPU)
    for parameter, before, gradient in zip(task.trainable_module.parameters(), start, gradients, strict=True):
        torch.testing.assert_close(before - parameter, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(task.trainable_module[-1].running_mean, statistics, rtol=0, atol=0)
    assert task.trainable_module[-1].num_batches_tracked == 1


@pytest.mark.parametrize('rho, passes', [(0.0, 1), (0.3, 2)])
def test_both_passes_of_sam_are_in_the_profile(rho, passes):
    class Named(NoProfile):
        def part(self, name):
            names.append(name)
            return super().part(name)

    names, task = [], make_task()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=1.0)
    train_step(task, [make_batch(4), make_batch(4)], optimizer, LoopSettings(sam_rho=rho), CPU, profile=Named())
    assert names == ['forward', 'backward'] * 2 * passes + ['optimizer']


def test_small_images_come_first():
    resize = ProgressiveSize(4, 2)
    pixels = torch.randn(2, 3, 3, 8, 8)
    seen = []
    for epoch in range(3):
        resize.set_epoch(epoch)
        seen.append([tuple(resize(given).shape) for given in (pixels, pixels[0])])
    assert seen == [[(2, 3, 3, 4, 4), (3, 3, 4, 4)]] * 2 + [[(2, 3, 3, 8, 8), (3, 3, 8, 8)]]
    resize.set_epoch(0)
    torch.testing.assert_close(resize(torch.ones(2, 3, 8, 8)), torch.ones(2, 3, 4, 4))
    task, shapes = make_task(), []
    task.trainable_module = nn.Sequential(nn.AdaptiveAvgPool2d(2), task.trainable_module)
    task.trainable_module.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    run_epoch(task, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))], resize=resize)
    assert shapes == [(4, 3, 4, 4)]


def test_a_share_of_the_epochs_and_what_the_network_can_take():
    model = create_model('resnet20', 3)

    def build(size, epochs=5, network=model, name='resnet20'):
        return build_progressive_size(ProgressiveSettings(size, 0.6), epochs, CIFAR_LT.input_size, network, name)

    assert build(None) is None and build(20).epochs == 3
    with pytest.raises(InputError, match='--progressive-size 32 is not below the 32 pixels'):
        build(32)
    with pytest.raises(InputError, match='no effect, as --progressive-epochs 0.1 of 4 epochs is less than one'):
        build_progressive_size(ProgressiveSettings(20, 0.1), 4, CIFAR_LT.input_size, model, 'resnet20')
    with pytest.raises(InputError, match='makes squares, and the images are of 32 x 40 pixels'):
        build_progressive_size(ProgressiveSettings(20), 4, (3, 32, 40), model, 'resnet20')


@pytest.mark.parametrize('flags, message', [
    (['--swa-epochs', '2', '--model-ema'], '--swa-epochs has no effect with --model-ema'),
    (['--swa-epochs', '2', '--patience', '1'], '--patience can end a run before the last --swa-epochs'),
    (['--swa-epochs', '4'], '--swa-epochs 4 is more than the 3 --epochs'),
    (['--sam-rho', '0.1', '--amp', '--amp-dtype', 'float16'], '--sam-rho does not go with float16'),
    (['--progressive-epochs', '0.3'], '--progressive-epochs has no effect without --progressive-size'),
    (['--progressive-size', '8'], '--progressive-size 8 is not below the 8 pixels'),
])
def test_wrong_combinations_are_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *MODEL, '--epochs', '3', '-b', '4', '--output', str(tmp_path), *flags])

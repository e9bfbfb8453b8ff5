"""RIDE's losses, routing and distillation: formulas against plain computations, and whole runs."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import released
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from forks import run_killed_at, run_ranks
from test_train_run import (
    assert_same,
    data_flags,
    images,  # noqa: F401  (a fixture)
    run_two_processes,
    weights,
)

import nbn_timm.cli.train as train
import nbn_timm.cli.validate as validate
from nbn_timm import InputError, fold_nbn
from nbn_timm.data import ClassCounts
from nbn_timm.evaluation import LongTailEvaluator, RoutingEvaluator, evaluate
from nbn_timm.losses import create_loss, takes_experts, takes_soft_targets
from nbn_timm.losses.router_loss import RoutingLoss, should_ask
from nbn_timm.models import RoutedExperts
from nbn_timm.second_stages import create_second_stage
from nbn_timm.training.distillation import DistillationTask
from nbn_timm.training.run_checkpoint import LAST
from nbn_timm.training.task import begin_epoch

FIGURES = json.loads((released.REFERENCE / 'ride_loss.json').read_text())
RIDE = ['--model', 'resnet32_ride_nbn', '--model-kwargs', 'num_experts=2', 'num_blocks=1', '--img-size', '8',
        '--device', 'cpu', '--workers', '0']


def counts_of(counts) -> ClassCounts:
    return ClassCounts(tuple(counts), tuple(map(str, range(len(counts)))), 'a test')


COUNTS = counts_of((300, 40, 9, 2))


@pytest.mark.fast
def test_the_loss_gives_the_released_figures():
    """RIDELoss of the NBN release (commit 7365e21) in epoch 161, with reweighting after 160."""
    experts = torch.tensor(FIGURES['experts'], requires_grad=True)  # [E, B, C]
    loss = create_loss('ride', counts_of(FIGURES['counts']), reweight_epoch=160)
    loss.set_epoch(160)
    result = loss(experts.transpose(0, 1), torch.tensor(FIGURES['target']))
    result.backward()
    assert result.item() == pytest.approx(FIGURES['loss'], rel=1e-5)
    assert experts.grad.norm().item() == pytest.approx(FIGURES['grad_norm'], rel=1e-5)


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


def ride_by_hand(experts, target, counts, base, diversity, reweighting, factor=0.05):
    """The sum over experts in plain Python, from nested lists [B][E][C]."""
    classes = len(counts)
    v = [classes * count / sum(counts) * factor + 1 - factor for count in counts]
    temperature = [value / max(v) for value in v] if reweighting else [1.0] * classes
    effective = [(1 - 0.9999) / (1 - 0.9999 ** count) for count in counts]
    weight = [classes * value / sum(effective) for value in effective] if reweighting else [1.0] * classes
    margins = [count ** -0.25 for count in counts]
    margins = [30 * 0.5 * margin / max(margins) for margin in margins]
    total = 0.0
    for expert in range(len(experts[0])):
        base_sum, weight_sum, divergence = 0.0, 0.0, 0.0
        for image, label in zip(experts, target, strict=True):
            logits = list(image[expert])
            mean = [sum(z[c] for z in image) / len(image) for c in range(classes)]
            if base == 'ldam':
                logits[label] -= margins[label]
            else:
                logits = [z + math.log(count) for z, count in zip(logits, counts, strict=True)]
            base_sum -= weight[label] * log_softmax(logits)[label]
            weight_sum += weight[label]
            p = log_softmax([z / t for z, t in zip(mean, temperature, strict=True)])
            q = log_softmax([z / t for z, t in zip(image[expert], temperature, strict=True)])
            divergence += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) / len(experts)
        total += base_sum / weight_sum - diversity * (sum(temperature) / classes) ** 2 * divergence
    return total


@pytest.mark.parametrize('name, base', [('ride', 'ldam'), ('ride_balanced_softmax', 'balanced softmax')])
@pytest.mark.parametrize('epoch', [0, 2, 3])
def test_losses_and_gradients_are_the_written_out_ones(name, base, epoch):
    generator = torch.Generator().manual_seed(1)
    experts = 3 * torch.randn(5, 3, 4, generator=generator)
    target = torch.tensor([0, 3, 1, 2, 3])
    settings = dict(reweight_epoch=3) if name == 'ride' else {}
    loss = create_loss(name, COUNTS, diversity=0.45, **settings).double()
    if name == 'ride':
        loss.set_epoch(epoch)
    reweighting = name == 'ride' and epoch >= 3
    logits = experts.clone().requires_grad_()
    result = loss(logits, target)
    result.backward()

    def by_hand(values):
        return ride_by_hand(values.tolist(), target.tolist(), COUNTS.counts, base, 0.45, reweighting)

    assert result.item() == pytest.approx(by_hand(experts), rel=1e-5)
    # The mean is a constant in the divergence, so differences are taken with the experts' mean held: two experts
    # that move against each other leave it where it is.
    step = 1e-4
    for image, klass in ((0, 1), (3, 2)):
        moved = torch.zeros_like(experts, dtype=torch.float64)
        moved[image, 0, klass], moved[image, 1, klass] = step, -step
        slope = (by_hand(experts.double() + moved) - by_hand(experts.double() - moved)) / (2 * step)
        found = (logits.grad[image, 0, klass] - logits.grad[image, 1, klass]).item()
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_without_diversity_the_mean_learns_in_rides_code_and_each_expert_in_that_of_nbn():
    torch.manual_seed(0)
    experts, target = torch.randn(4, 3, 4), torch.tensor([0, 1, 2, 3])
    margins, balanced = create_loss('ldam', COUNTS), create_loss('balanced_softmax', COUNTS)
    torch.testing.assert_close(
        create_loss('ride', COUNTS, diversity=0.0)(experts, target), 3 * margins(experts.mean(dim=1), target))
    torch.testing.assert_close(
        create_loss('ride_balanced_softmax', COUNTS, diversity=0.0)(experts, target),
        sum(balanced(experts[:, expert], target) for expert in range(3)))


@pytest.mark.parametrize('init, spread', [('torch', 1 / math.sqrt(3)), ('kaiming_normal', math.sqrt(2))])
def test_a_router_starts_as_asked(init, spread):
    """Standard deviation times the square root of the inputs: uniform within 1, or normal with variance 2 / inputs."""
    torch.manual_seed(0)
    stage = create_second_stage('routing', top_k=30, hidden=64, init=init)
    router = stage.prepare(timm.create_model('resnet32_ride', num_classes=100)).router
    hidden = torch.cat([layer.weight.flatten() for layer in router.hidden])
    assert hidden.std().item() * math.sqrt(router.hidden[0].in_features) == pytest.approx(spread, rel=0.05)
    assert router.decide.bias.abs().item() <= 1 / math.sqrt(94)
    assert (hidden.abs().max().item() * math.sqrt(router.hidden[0].in_features) > 1) is (init == 'kaiming_normal')


def test_what_the_losses_take():
    assert takes_experts('ride') and takes_experts('ride_balanced_softmax') and not takes_experts('ldam')
    assert takes_soft_targets('ride') and takes_soft_targets('ride_balanced_softmax')
    experts, target = torch.randn(4, 3, 4), torch.tensor([0, 1, 2, 3])
    soft = F.one_hot(target, 4).float()
    for name in ('ride', 'ride_balanced_softmax'):
        loss = create_loss(name, COUNTS)
        torch.testing.assert_close(loss(experts, soft), loss(experts, target))
    for name in ('ride', 'ride_balanced_softmax'):
        with pytest.raises(InputError, match='--class-counts'):
            create_loss(name, None)
        half = create_loss(name, counts_of((100_000, 10, 1, 0)))
        assert torch.equal(half(experts.bfloat16(), target), half(experts.bfloat16().float(), target))
        assert half(experts.half(), target).isfinite()
    for settings in (dict(reweight_factor=1.0), dict(temperature=0.0), dict(margin=1)):
        with pytest.raises(InputError):
            create_loss('ride', COUNTS, **settings)


# Routing


def routed_model(classes: int = 6, experts: int = 3, threshold: bool = True) -> RoutedExperts:
    """A router that passes on about half of the images after each expert."""
    torch.manual_seed(0)
    network = timm.create_model('resnet32_ride', num_classes=classes, num_experts=experts)
    model = RoutedExperts(network, top_k=4)
    nn.init.normal_(model.router.decide.weight)
    if threshold:
        with torch.no_grad():
            model.router.decide.bias -= model.train()(pictures(64))[0].median()
    return model.eval()


def pictures(number: int) -> torch.Tensor:
    x = torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return x * torch.linspace(0.2, 2, number)[:, None, None, None]


@torch.no_grad()
def test_a_batch_is_routed_as_its_images_one_at_a_time():
    model, x = routed_model(), pictures(40)
    logits, used = model.route(x)
    assert set(used.tolist()) == {1, 2, 3}
    alone = [model.route(image[None]) for image in x]
    assert used.tolist() == [int(asked) for _, asked in alone]
    torch.testing.assert_close(logits, torch.cat([one for one, _ in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), logits)
    for asked in (1, 2, 3):
        chosen = used == asked
        torch.testing.assert_close(logits[chosen], model.forward_first(x, asked)[chosen], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_first(x, 3), model.network(x), rtol=1e-4, atol=1e-5)
    folded = fold_nbn(RoutedExperts(timm.create_model('resnet32_ride_nbn', num_classes=6), top_k=4).eval())
    assert folded(x).shape == (40, 6)


def test_the_router_learns_and_the_network_stays():
    model, x = routed_model(), pictures(8)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    decisions, logits = model.train()(x)
    assert (decisions.shape, logits.shape) == ((8, 2), (8, 3, 6))
    RoutingLoss()((decisions, logits), torch.arange(8) % 6).backward()
    assert all(parameter.grad is not None for parameter in model.router.parameters())
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert_same(before, dict(model.network.state_dict()))
    assert not model.network.training


def test_the_routing_loss_is_the_written_out_one():
    torch.manual_seed(0)
    decisions, logits, target = torch.randn(30, 2), torch.randn(30, 3, 4), torch.randint(4, (30,))
    wanted, loss = [], 0.0
    for row, experts, label in zip(decisions.tolist(), logits.numpy(), target.tolist(), strict=True):
        right = [int(np.argmax(experts[:first].mean(axis=0))) == label for first in (1, 2, 3)]
        asks = [not right[0] and (right[1] or right[2]), not right[1] and right[2]]
        wanted.append(asks)
        for decision, ask in zip(row, asks, strict=True):
            p = 1 / (1 + math.exp(-decision))
            loss -= (7 * math.log(p) if ask else math.log(1 - p)) / 60
    assert torch.equal(should_ask(logits, target), torch.tensor(wanted))
    assert {True, False} == {ask for asks in wanted for ask in asks}
    assert RoutingLoss(pos_weight=7)((decisions, logits), target).item() == pytest.approx(loss, rel=1e-5)


def test_costs_are_those_of_the_parts():
    from torch.utils.flop_counter import FlopCounterMode

    def multiply_adds(function, *inputs):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*inputs)
        return counter.get_total_flops() // 2

    model, x = routed_model(), torch.zeros(1, 3, 16, 16)
    costs = model.multiply_adds((3, 16, 16))
    decision = 48 * 16 + (4 + 16)  # two linear layers
    shared = multiply_adds(model.network.forward_shared, x)
    whole = multiply_adds(model.network, x)
    expert = (whole - shared) // 3
    assert costs == (shared + expert + decision, shared + 2 * expert + 2 * decision, whole + 2 * decision)


def test_routed_evaluation_counts_experts_without_padding():
    model, x = routed_model(), pictures(40)
    target = torch.arange(40) % 6
    evaluator = RoutingEvaluator(model.multiply_adds((3, 16, 16)), 6, None)
    result = evaluate(model, [(x[:25], target[:25]), (x[25:], target[25:])], evaluator, torch.device('cpu'))
    used = model.route(x)[1]
    assert result.experts_used == tuple(torch.bincount(used - 1, minlength=3).tolist())
    assert result.mean_experts == pytest.approx(used.float().mean().item())
    costs = torch.tensor(result.multiply_adds, dtype=torch.float64)
    assert result.mean_multiply_adds == pytest.approx(costs[used - 1].mean().item())
    assert sum(result.shares) == pytest.approx(100)
    plain = evaluate(model, [(x, target)], LongTailEvaluator(6), torch.device('cpu'))
    assert plain.per_class_correct == result.per_class_correct
    assert result.to_dict()['routing']['experts_used'] == list(result.experts_used)
    assert '3 experts' in result.table() and 'Multiply-adds' in result.table()

    evaluator.reset()
    evaluator.max_samples = 10  # as where a distributed sampler has padded
    evaluator.update(evaluator.predict(model, x), target)
    assert sum(evaluator.compute().experts_used) == 10


@pytest.mark.parametrize('network, settings, message', [
    ('resnet20', {}, 'no experts'), ('resnet32_ride', dict(top_k=101), 'top_k is 101'),
    ('resnet32_ride', dict(top_k=0), 'top_k is 0')])
def test_what_cannot_be_routed(network, settings, message):
    with pytest.raises(InputError, match=message):
        RoutedExperts(timm.create_model(network), **settings)


# Distillation


def distillation(**settings) -> tuple[DistillationTask, nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = timm.create_model('resnet32_ride', num_classes=4, num_experts=2)
    student.set_expert_logits()
    teacher = timm.create_model('resnet32_ride', num_classes=4, num_experts=3)
    task = DistillationTask(student, teacher, create_loss('ride', COUNTS), device=torch.device('cpu'), **settings)
    return task.train(), student, teacher


@pytest.mark.parametrize('target', ['mean', 'experts'])
def test_distillation_is_the_written_out_sum(target):
    task, student, teacher = distillation(target=target, weight=0.7, temperature=2.0)
    x, labels = pictures(6), torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        logits = student.double().train()(x.double()).float()  # batch statistics: the same in every pass
        student.float()
        expected_teacher = teacher.eval()(x)
    t = F.softmax(expected_teacher / 2, dim=1)

    def divergence(z):
        return 4 * (t * (t.log() - F.log_softmax(z / 2, dim=1))).sum(dim=1).mean()

    own = task.criterion(logits, labels)
    if target == 'mean':
        expected = sum(own + 0.7 * divergence(logits.mean(dim=1)) for _ in range(2))
    else:
        expected = own + 0.7 * sum(divergence(logits[:, expert]) for expert in range(2))
    torch.testing.assert_close(task(x, labels)['loss'], expected, rtol=1e-4, atol=1e-4)


def wave(rows: int, columns: int, phase: float) -> torch.Tensor:
    """sin(phase + 1.7 i) of the entries i in order, float32 of values in float64."""
    entries = torch.arange(rows * columns, dtype=torch.float64)
    return torch.sin(phase + 1.7 * entries).reshape(rows, columns).float()


@pytest.mark.fast
@pytest.mark.parametrize('temperature, power, alpha, value, norm, first', [
    (2.0, 0.5, 0.5, 3.1251973471533594, 0.2963383135119483,
     [-0.056580365, 0.05766741, -0.001566455, -0.013823225, 0.002694442, 0.011608193]),
    (3.0, 1.0, 0.7, 2.702052180719166, 0.26672864177237504,
     [-0.070721841, 0.063776244, 0.009815242, -0.0150504, -0.022273119, 0.034453874])])
def test_dive_is_its_authors(temperature, power, alpha, value, norm, first):
    """Value and gradient of `DiVEKLD` in zhangyongshun/BagofTricks-LT, commit ce7859a, in float64, with balanced
    softmax; here in float32, to a relative 1e-6."""
    logits, labels = (3 * wave(7, 6, 0.5)).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, 5, 0])
    task = DistillationTask(nn.Identity(), nn.Linear(1, 1), create_loss('balanced_softmax', counts_of(
        (500, 199, 79, 31, 12, 5))), 'mean', alpha, temperature, power, 1 - alpha, device=torch.device('cpu'))
    task.teacher.forward = lambda _: 4 * wave(7, 6, 1.3)
    loss = task(logits, labels)['loss']
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad.norm().item() == pytest.approx(norm, rel=1e-6)
    assert logits.grad[0].tolist() == pytest.approx(first, abs=1e-7)


def test_the_teacher_is_frozen_and_its_mode_is_chosen():
    for train_teacher in (False, True):
        task, _, teacher = distillation(train_teacher_statistics=train_teacher)
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        task(pictures(6), torch.tensor([0, 1, 2, 3, 0, 1]))['loss'].backward()
        assert teacher.training == train_teacher
        assert torch.equal(before['bn1.running_mean'], teacher.bn1.running_mean) != train_teacher
        assert torch.equal(before['conv1.weight'], teacher.conv1.weight) and teacher.conv1.weight.grad is None
        task.eval()
        assert not teacher.training
        assert not any(key.startswith('teacher') for key in task.get_checkpoint_state()['state_dict'])


def test_a_single_network_can_be_distilled_into():
    torch.manual_seed(0)
    student, teacher = (timm.create_model('resnet20', num_classes=4) for _ in range(2))
    x, labels = pictures(4), torch.tensor([0, 1, 2, 3])
    losses = [DistillationTask(student, teacher, create_loss('cross_entropy'), target=target).train()(x, labels)['loss']
              for target in ('mean', 'experts')]
    torch.testing.assert_close(losses[0], losses[1])


# Whole runs


@pytest.fixture(scope='module')
def first_stage(images, tmp_path_factory):  # noqa: F811
    """A short RIDE run, killed after its second epoch begins and resumed, and the same without interruption."""
    folder = tmp_path_factory.mktemp('ride')
    flags = [*data_flags(images), *RIDE, '--epochs', '3', '-b', '4', '--loss', 'ride', '--loss-kwargs',
             'reweight_epoch=1', '--rotation', '15', '--opt', 'sgd', '--log-interval', '1', '--output', str(folder)]
    train.main([*flags, '--experiment', 'whole'])
    run_killed_at('epoch 3/3  step 2/5', train.main, [*flags, '--experiment', 'killed'])
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    return folder


def test_a_killed_ride_run_ends_where_the_whole_one_does(first_stage):
    """The loss reweights from the second epoch on, of the resumed run too."""
    whole, killed = (torch.load(first_stage / run / LAST, weights_only=True) for run in ('whole', 'killed'))
    for key in ('state_dict', 'optimizer'):
        assert_same(whole[key], killed[key])


def test_begin_epoch_tells_losses_that_want_to_know():
    loss = create_loss('ride', COUNTS, reweight_epoch=2)
    task = DistillationTask(nn.Linear(2, 2), nn.Linear(2, 2), loss)
    told = []
    loader = SimpleNamespace(set_epoch=lambda epoch, part: told.append(epoch))
    for epoch, expected in ((0, False), (1, False), (2, True)):
        begin_epoch(task, loader, None, epoch)
        assert loss.reweighting is expected
    begin_epoch(DistillationTask(nn.Linear(2, 2), nn.Linear(2, 2), create_loss('cross_entropy')), loader, None, 5)
    assert told == [0, 1, 2, 5]


def test_routing_and_distillation_run_and_validate_on_one_and_two_processes(images, first_stage, tmp_path):  # noqa: F811
    teacher = first_stage / 'whole' / LAST
    data = [*data_flags(images), '--img-size', '8', '--device', 'cpu', '--workers', '0', '--output', str(tmp_path)]
    routing = [*data, '--stage', 'routing', '--stage-kwargs', 'top_k=3', 'pos_weight=2', '--initial-checkpoint',
               str(teacher), '--sampler', 'class_balanced', '--epochs', '2', '-b', '4', '--lr', '0.01']
    run_two_processes([*routing, '--experiment', 'routing'])
    assert_same({key.removeprefix('network.'): value for key, value in weights(tmp_path / 'routing').items()
                 if key.startswith('network.')}, weights(first_stage / 'whole'))

    distilled = [*data, *RIDE[:5], '--loss', 'ride', '--kd-checkpoint', str(teacher), '--epochs', '1', '-b', '4']
    run_two_processes([*distilled, '--experiment', 'distilled'])

    for run in ('routing', 'distilled'):
        flags = ['--checkpoint', str(tmp_path / run / LAST), '--workers', '0', '--device', 'cpu', '-b', '3']
        validate.main([*flags, '--results-file', str(tmp_path / f'{run}1.json')])
        run_ranks(validate.main, [*flags, '--results-file', str(tmp_path / f'{run}2.json')])
        one, two = (json.loads((tmp_path / f'{run}{processes}.json').read_text()) for processes in (1, 2))
        # Batches of another size round the float32 logits otherwise, and this loss is in the thousands.
        assert one.pop('loss') == pytest.approx(two.pop('loss'), rel=1e-5)
        assert one == two
    routed = json.loads((tmp_path / 'routing1.json').read_text())
    assert routed['routed'] and sum(routed['routing']['experts_used']) == 4
    flags = ['--checkpoint', str(tmp_path / 'routing' / LAST), '--workers', '0', '--device', 'cpu']
    validate.main([*flags, '--all-experts', '--results-file', str(tmp_path / 'all.json')])
    every = json.loads((tmp_path / 'all.json').read_text())
    assert not every['routed'] and 'routing' not in every
    validate.main([*flags[:1], str(teacher), *flags[2:], '--fuse', '--results-file', str(tmp_path / 'fused.json')])
    fused = json.loads((tmp_path / 'fused.json').read_text())
    assert (fused['top1'], fused['per_class']) == (every['top1'], every['per_class'])
    assert fused['loss'] == pytest.approx(every['loss'], rel=1e-4)


@pytest.mark.parametrize('flags, message', [
    (['--model', 'resnet20', '--loss', 'ride'], "loss 'ride' is for the experts.*'resnet20' has none"),
    ([*RIDE[:5], '--loss', 'seql', '--mixup', '0.2'], "loss 'seql' takes labels and no mixed targets"),
    ([*RIDE[:5], '--loss', 'ride', '--loss-kwargs', 'diversty=1'], "no setting 'diversty'.*did you mean 'diversity'"),
    ([*RIDE[:5], '--stage', 'routing'], '--initial-checkpoint'),
    ([*RIDE[:5], '--stage-kwargs', 'top_k=3'], '--stage-kwargs'),
    (['--config', 'cifar100_lt/resnet32_ride_distilled', '--epochs', '1'],
     'asks for --kd-checkpoint: give one'),
    ([*RIDE[:5], '--kd-checkpoint', 'missing.pth'], "'missing.pth' does not exist"),
])
def test_wrong_combinations_are_one_sentence(images, tmp_path, flags, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *RIDE[5:], *flags, '--output', str(tmp_path)])


@pytest.mark.parametrize('flags, message', [
    (['--loss', 'balanced_softmax'], '--loss would have no effect'), (['--mixup', '0.2'], '--mixup would'),
    (['--stage-kwargs', 'topk=3'], "no setting 'topk'.*did you mean 'top_k'"),
    (['--stage-kwargs', 'top_k=5'], 'top_k is 5, but there are 4 classes')])
def test_wrong_settings_of_routing_are_one_sentence(images, first_stage, tmp_path, flags, message):  # noqa: F811
    given = ['--stage', 'routing', '--initial-checkpoint', str(first_stage / 'whole' / LAST)]
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *RIDE[5:], *given, *flags, '--output', str(tmp_path)])


def test_a_teacher_of_other_classes_or_pixels_is_refused(images, first_stage, tmp_path):  # noqa: F811
    checkpoint = torch.load(first_stage / 'whole' / LAST, weights_only=True)
    checkpoint['args']['mean'] = [0.1, 0.1, 0.1]
    torch.save(checkpoint, tmp_path / 'pixels.pth')
    flags = [*data_flags(images), *RIDE, '--output', str(tmp_path)]
    with pytest.raises(InputError, match='was trained on images of mean'):
        train.main([*flags, '--kd-checkpoint', str(tmp_path / 'pixels.pth')])
    torch.save(dict(arch='resnet20', state_dict=timm.create_model('resnet20').state_dict()), tmp_path / 'classes.pth')
    with pytest.raises(InputError, match='do not fit resnet20 with 4 classes'):
        train.main([*flags, '--kd-checkpoint', str(tmp_path / 'classes.pth')])

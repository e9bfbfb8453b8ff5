"""MiSLAS's second stage: its steps against plain autograd, and what becomes of scales and rates."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss
from nbn_timm.second_stages import create_second_stage
from nbn_timm.second_stages.lws import ScaledClassifier
from nbn_timm.training.optim import OptimizerSettings, ScheduleSettings, create_optimizer, create_scheduler

pytestmark = pytest.mark.fast

COUNTS = (500, 64, 23, 5)


def by_hand(batches, weight, bias, rates, head=0.4, tail=0.1, wd=2e-4):
    """SGD on (1 - e_y) * -log p_y + e_y * mean of -log p with e as in the paper's equation 6 (concave form), written
    out: weight and bias at a fifth of the rate, scales at the whole one, momentum 0.9, decay on all."""
    smoothing = torch.tensor([
        tail + (head - tail) * math.sin(math.pi * (n - min(COUNTS)) / (2 * (max(COUNTS) - min(COUNTS))))
        for n in COUNTS])
    values = [weight.clone(), bias.clone(), torch.ones(len(bias))]
    velocity = [torch.zeros_like(value) for value in values]
    losses = []
    for (x, y), rate in zip(batches, rates, strict=True):
        w, b, s = (value.requires_grad_() for value in values)
        log_p = F.log_softmax(s * (x @ w.T + b), dim=1)
        e = smoothing[y]
        loss = ((1 - e) * -log_p[torch.arange(len(y)), y] - e * log_p.mean(dim=1)).mean()
        gradients = torch.autograd.grad(loss, (w, b, s))
        losses.append((loss.item(), gradients))
        values = [value.detach() for value in values]
        for index, gradient in enumerate(gradients):
            velocity[index] = 0.9 * velocity[index] + gradient + wd * values[index]
            values[index] = values[index] - rate * (0.2 if index < 2 else 1) * velocity[index]
    return losses, values


def test_values_gradients_and_steps_are_the_written_out_ones():
    """As with the authors' own code on 50 batches: values to a relative 2e-7, gradients and weights to the last bit."""
    torch.manual_seed(0)
    model = timm.create_model('resnet20', num_classes=4)
    weight, bias = model.fc.weight.detach().clone(), torch.randn(4)
    with torch.no_grad():
        model.fc.bias.copy_(bias)
    batches = [(torch.randn(16, 64), torch.randint(4, (16,))) for _ in range(6)]
    rates = [0.05 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)]
    expected, (w, b, s) = by_hand(batches, weight, bias, rates)

    stage = create_second_stage('mislas')
    model = stage.prepare(model).requires_grad_(False)
    trained = stage.trained(model).requires_grad_(True)
    settings = OptimizerSettings(lr=0.1, momentum=0.9, weight_decay=2e-4)
    optimizer = create_optimizer(trained, settings, stage.rates(model))
    scheduler = create_scheduler(optimizer, ScheduleSettings(epochs=6), 1)
    names = tuple('abcd')
    criterion = create_loss('label_aware_smoothing', ClassCounts(COUNTS, names, 'the test'), head=0.4, tail=0.1)
    part = model.fc
    for epoch, ((x, y), (value, gradients)) in enumerate(zip(batches, expected, strict=True)):
        scheduler.step(epoch)
        optimizer.zero_grad()
        loss = criterion(part(x), y)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-6)
        for parameter, gradient in zip((part.classifier.weight, part.classifier.bias, part.scale.weight), gradients,
                                       strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        optimizer.step()
    for parameter, value in zip((part.classifier.weight, part.classifier.bias, part.scale.weight), (w, b, s),
                                strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    x = torch.randn(3, 64)
    finished = stage.finished(model)
    assert type(finished.fc) is torch.nn.Linear
    torch.testing.assert_close(finished.fc(x), s * (x @ w.T + b))


@pytest.mark.parametrize('decay_1d, groups', [(True, 2), (False, 3)])
def test_the_classifier_is_slow_whatever_decays(decay_1d, groups):
    stage = create_second_stage('mislas', classifier_rate=0.05)
    model = stage.prepare(timm.create_model('resnet32_ride', num_classes=4)).requires_grad_(False)
    trained = stage.trained(model).requires_grad_(True)
    optimizer = create_optimizer(trained, OptimizerSettings(lr=0.2, decay_1d=decay_1d), stage.rates(model))
    create_scheduler(optimizer, ScheduleSettings(epochs=4), 1).step(2)
    rate_of = {parameter: group['lr'] for group in optimizer.param_groups for parameter in group['params']}
    assert len(optimizer.param_groups) == groups and optimizer.param_groups[0]['lr'] == pytest.approx(0.1)
    for scaled in (module for module in model.modules() if isinstance(module, ScaledClassifier)):
        assert rate_of[scaled.scale.weight] == pytest.approx(0.1)
        assert rate_of[scaled.classifier.weight] == rate_of[scaled.classifier.bias] == pytest.approx(0.005)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(InputError, match='classifier_rate=0: give a number above 0'):
        create_second_stage('mislas', classifier_rate=0)

"""Contrastive losses against their authors' code, and what a loss with parameters and a state of its own gets of a run.

The figures were computed in float64 from the formulas and by running the authors' own loss on the same vectors: BCL
FlamieZhu/Balanced-Contrastive-Learning, commit f72d070; ProCo LeapLabTHU/ProCo, af9e78e; PaCo and GPaCo
dvlab-research/Parametric-Contrastive-Learning, fe56535; NCL Bazinga699/NCL, f64fddb.
"""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from test_losses import class_counts
from test_losses_published import COUNTS, LABELS, check, expert_logits
from test_train_run import LAST, assert_same, data_flags, images  # noqa: F401
from torch import nn

import nbn_timm.cli.train as train
from nbn_timm.errors import InputError
from nbn_timm.layers import SlowCopy
from nbn_timm.losses import create_loss
from nbn_timm.losses.bcl import balanced_contrast
from nbn_timm.losses.contrast import Queue, on_sphere, projection
from nbn_timm.losses.ncl import momentum_contrast, mutual_divergence
from nbn_timm.losses.paco import parametric_contrast
from nbn_timm.losses.proco import ClassDirections, log_bessel
from nbn_timm.models.create import create_model
from nbn_timm.training.build import check_lone_loss
from nbn_timm.training.distributed import World
from nbn_timm.training.settings import TrainSettings
from nbn_timm.training.views import WithViews


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows(phase: float, count: int, dim: int, shift: float = 0.0) -> torch.Tensor:
    """sin(phase + 2 i + 3 k + shift), rows of length 1, float64."""
    i, k = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)
    return F.normalize(torch.sin(phase + 2 * i + 3 * k + shift), dim=1)


def views(dim: int) -> torch.Tensor:
    return torch.stack([rows(1, 8, dim), rows(2, 8, dim)]).requires_grad_()


def class_centres(dim: int) -> torch.Tensor:
    return rows(0.5, 10, dim, math.pi / 2)


def test_the_contrastive_term_of_bcl_is_its_authors():
    f = views(16)
    assert f[0, 0, :3].tolist() == pytest.approx([0.3655505, -0.3287690, 0.2854071], abs=1e-7)
    loss = balanced_contrast(f, class_centres(16), LABELS, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(6.6030523, rel=1e-7)
    assert f.grad.norm().item() == pytest.approx(3.1457429, rel=1e-7)
    assert f.grad[0, 0, 0].item() == pytest.approx(0.019532913, rel=1e-6)


def test_the_contrastive_term_of_proco_is_its_authors():
    f = views(128)
    classes = ClassDirections(10, 128)
    classes.mean = torch.linspace(0.3, 0.9, 10, dtype=torch.float64)[:, None] * class_centres(128)
    prior = (COUNTS.tensor() / COUNTS.tensor().sum()).log()
    expected = [classes.log_expected(view, 0.1) for view in f]
    assert expected[0][0, :3].tolist() == pytest.approx([1.7169381, -3.3922009, 1.8121792], rel=1e-6)
    loss = torch.stack([F.cross_entropy(part.double() + prior, LABELS) for part in expected]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(5.3791519, rel=2e-7)
    assert f.grad.norm().item() == pytest.approx(1.8755187, rel=1e-6)
    assert f.grad[0, 0, 0].item() == pytest.approx(0.034194986, rel=1e-5)


@pytest.mark.parametrize('order', [7, 15, 63])
def test_bessel_functions_by_their_series(order):
    """I(k) k^-order = sum over m of (k/2)^(2m + order) / (m! Gamma(order + m + 1)) k^-order, and its derivative."""
    k = torch.tensor([1e-3, 1.0, 10.0, 50.0, 200.0], dtype=torch.float64, requires_grad=True)
    value = log_bessel(k, order)
    slope, = torch.autograd.grad(value.sum(), k)
    for argument, one, gradient in zip(k.tolist(), value.tolist(), slope.tolist(), strict=True):
        terms = [2 * m * math.log(argument / 2) - order * math.log(2) - math.lgamma(m + 1) - math.lgamma(order + m + 1)
                 for m in range(400)]
        series = torch.tensor(terms, dtype=torch.float64)
        assert one == pytest.approx(torch.logsumexp(series, 0).item(), abs=3e-8)
        shares = series.softmax(0)
        expected = sum(2 * m / argument * share for m, share in enumerate(shares.tolist()))
        assert gradient == pytest.approx(expected, rel=4e-7)
    assert log_bessel(torch.zeros(1, dtype=torch.float64), order).isfinite()


def parametric(f, logits, anchors, queue, smoothing=0.0):
    """PaCo's term on two views with a queue; `anchors` views are anchors."""
    vectors = torch.cat([f.flatten(0, 1), queue])
    labels = torch.cat([LABELS, LABELS, 7 * torch.arange(16) % 10])
    prior = (COUNTS.tensor() / COUNTS.tensor().sum() + 1e-9).log()
    one_hot = F.one_hot(LABELS, 10).double()
    target = (one_hot * (1 - smoothing) + (1 - one_hot) * smoothing / 9).repeat(anchors, 1)
    return parametric_contrast(logits + prior, target, vectors, labels, 0.01, 0.05)


def test_the_terms_of_paco_and_gpaco_are_their_authors():
    logits, f, queue = expert_logits().requires_grad_(), views(16), rows(3, 16, 16)
    loss = parametric(torch.stack([f[0], f[1].detach()]), logits[:, 0], 1, queue)  # keys have no gradient
    z, q = torch.autograd.grad(loss, (logits, f))
    assert loss.item() == pytest.approx(23.7621875, rel=1e-7)
    assert z.norm().item() == pytest.approx(0.34494245, rel=1e-6)
    assert q.norm().item() == pytest.approx(8.7462564, rel=1e-7)
    assert z[0, 0, 0].item() == pytest.approx(-0.12135922, rel=1e-7)  # twice GPaCo's below, which has 2B anchors
    for smoothing, value, norm, first in ((0.0, 23.4874360, 0.24391114, -0.06067961),
                                          (0.1, 23.5152441, 0.21967054, -0.05461165)):
        loss = parametric(f, torch.cat([logits[:, 0], logits[:, 1]]), 2, queue, smoothing)
        z, q = torch.autograd.grad(loss, (logits, f))
        assert loss.item() == pytest.approx(value, rel=1e-7)
        assert z.norm().item() == pytest.approx(norm, rel=1e-6)
        assert z[0, 0, 0].item() == pytest.approx(first, rel=1e-6)
        if not smoothing:
            assert [part.norm().item() for part in q] == pytest.approx([4.5397209, 4.5104374], rel=1e-7)


def test_ncl_is_its_authors():
    check(create_loss('ncl', COUNTS), expert_logits(), LABELS, 26.3375088, 1.38682665, 0.029201804, 1e-5)


def test_divergences_of_one_expert_are_none_and_of_two_are_written_out():
    logits = expert_logits()
    assert mutual_divergence(logits[:, :1]).item() == pytest.approx(0, abs=1e-12)
    p, q = (logits[:, e].softmax(1) for e in (0, 1))
    expected = (p * (p / (q + 1e-9)).log() + q * (q / (p + 1e-9)).log()).sum() / len(logits)
    assert mutual_divergence(logits[:, :2]).item() == pytest.approx(expected.item(), rel=1e-6)


def test_complete_experts_are_three_networks():
    """The numbers of parameters of NCL, and each expert's output from its own parts alone."""
    model = create_model('resnet32_ride', 100, model_kwargs={'complete': True, 'reduced': False})
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * 470_004
    single = create_model('resnet32', 100)
    model.set_expert_logits()
    state, own = model.state_dict(), single.state_dict()
    for expert in range(3):
        for name in own:
            there = name
            parts = name.split('.')
            if parts[0].startswith('layer'):
                there = '.'.join([*parts[:2], str(expert), *parts[2:]])
            elif parts[0] == 'fc':
                there = f'fc.{expert}.{parts[1]}'
            value = state[there]
            if name in ('conv1.weight',) or parts[0] == 'bn1' and value.ndim:
                value = value.chunk(3)[expert]
            own[name] = value
        single.load_state_dict(own)
        pixels = torch.randn(4, 3, 16, 16)
        single.train()
        torch.testing.assert_close(model.train()(pixels)[:, expert], single(pixels), rtol=1e-3, atol=1e-4)


# Parts


def test_a_queue_keeps_the_latest():
    queue = Queue(5, 2, 3)
    torch.testing.assert_close(queue.vectors.norm(dim=0), torch.ones(2))
    before = queue.vectors
    for start in (0, 3, 6):
        queue.push(torch.arange(start, start + 3.0)[:, None].expand(3, 2), torch.arange(start, start + 3))
    assert sorted(queue.labels.tolist()) == [4, 5, 6, 7, 8] and torch.equal(queue.vectors[:, 0].long(), queue.labels)
    assert not torch.equal(before, queue.vectors)
    queue.push(torch.arange(20.0, 27)[:, None].expand(7, 2), torch.arange(20, 27))
    assert sorted(queue.labels.tolist()) == [22, 23, 24, 25, 26]


def test_momentum_contrast_is_a_cross_entropy_of_one_image_against_the_queue():
    queries, keys, queue = rows(1, 3, 4), rows(2, 3, 4), rows(3, 5, 4)
    expected = 0.0
    for query, key in zip(queries, keys, strict=True):
        products = [math.exp(float(query @ other) / 0.2) for other in (key, *queue)]
        expected -= math.log(products[0] / sum(products)) / 3
    assert momentum_contrast(queries, keys, queue, 0.2).item() == pytest.approx(expected, rel=1e-6)


def test_a_slow_copy_follows_and_gives_no_gradient():
    module = nn.Linear(2, 2)
    slow = SlowCopy(module, 0.9)
    start = module.weight.detach().clone()
    module.weight.data += 1
    slow.follow(module)
    torch.testing.assert_close(slow.copy.weight, start + 0.1)
    assert not slow(torch.ones(1, 2, requires_grad=True)).requires_grad


def test_views_for_the_slow_copy_pass_it_alone():
    model = timm.create_model('resnet20', num_classes=3)
    slow = SlowCopy(model, 0.5)
    for parameter in slow.parameters():
        parameter.data.zero_()
    weight = model.fc.weight.detach().clone()
    pixels = torch.randn(3, 4, 3, 16, 16)
    output = WithViews(model, slow, 1).train()(pixels)
    assert output.shape == (3, 4, 3)
    torch.testing.assert_close(slow.copy.fc.weight, 0.5 * weight)
    output[2].sum().backward(retain_graph=True)
    assert model.conv1.weight.grad.abs().sum() == 0
    output[:2].sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


def test_heads_are_those_of_the_papers():
    head = projection((64, 512, 128), norm=True)
    assert [type(layer).__name__ for layer in head] == ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    assert sum(parameter.numel() for parameter in head.parameters()) == 569_972 - 470_004
    plain = [type(layer).__name__ for layer in projection((4, 4, 4, 2))]
    assert plain == ['Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']
    vectors = on_sphere(head, torch.randn(2, 5, 64))
    assert vectors.shape == (2, 5, 128)
    torch.testing.assert_close(vectors.norm(dim=2), torch.ones(2, 5))


def test_the_means_of_proco_are_those_of_all_images_of_a_class():
    classes = ClassDirections(3, 16)
    torch.testing.assert_close(classes.mean.norm(dim=1), torch.full((3,), 0.9))
    untouched = classes.mean[2].clone()
    vectors, labels = rows(1, 6, 16).float(), torch.tensor([0, 0, 1, 0, 1, 0])
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        classes.add(vectors[part], labels[part])
    torch.testing.assert_close(classes.mean[0], vectors[labels == 0].mean(0))
    torch.testing.assert_close(classes.mean[1], vectors[labels == 1].mean(0))
    assert torch.equal(classes.mean[2], untouched) and classes.count.tolist() == [4, 2, 0]


# Runs


RUN = ['--img-size', '8', '--device', 'cpu', '--workers', '0', '-b', '4']
EXPERTS = ['--model', 'resnet32_ride', '--model-kwargs', 'num_experts=2', 'complete=True', 'reduced=True']


@pytest.mark.parametrize('loss, flags', [
    ('bcl', ['--loss-kwargs', 'dim=8', '--clip-grad', '5']), ('proco', ['--loss-kwargs', 'dim=16', 'hidden=8']),
    ('paco', ['--loss-kwargs', 'queue_size=6', 'dim=8', '--model-ema', '--model-ema-decay', '0.9']),
    pytest.param('gpaco', ['--loss-kwargs', 'queue_size=6', 'smooth=0.1', '--swa-epochs', '2', '--no-decay-1d'],
                 marks=pytest.mark.slow),
    pytest.param('ncl', EXPERTS, marks=pytest.mark.slow),
    ('ncl_contrast', [*EXPERTS, '--loss-kwargs', 'queue_size=6', '--channels-last']),
])
def test_a_run_resumes_bit_for_bit_with_the_state_of_its_loss(loss, flags, images, tmp_path):  # noqa: F811
    flags = [*data_flags(images, 'train', 'test'), '--model', 'resnet20_nbn', *RUN, '--loss', loss, *flags,
             '--epochs', '2', '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])
    train.main([*flags, '--experiment', 'parts', '--epochs', '1', *(
        ['--swa-epochs', '1'] if '--swa-epochs' in flags else [])])
    train.main([*flags, '--experiment', 'parts', '--resume', 'auto'])
    whole, parts = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ('whole', 'parts'))
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'task_state'):
        assert_same(whole.get(key), parts.get(key))
    assert not any('head' in key or 'queue' in key or 'slow' in key for key in whole['state_dict'])
    assert bool(whole.get('task_state')) == (loss != 'ncl')


def test_a_state_of_another_loss_is_refused(images, tmp_path):  # noqa: F811
    flags = [*data_flags(images, 'train', 'test'), '--model', 'resnet20', *RUN, '--epochs', '1', '--output',
             str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--loss', 'gpaco', '--loss-kwargs', 'queue_size=6'])
    with pytest.raises(InputError, match='has not the state of this --loss'):
        train.main([*flags, '--loss', 'gpaco', '--loss-kwargs', 'queue_size=7', '--epochs', '2', '--resume', 'auto'])


@pytest.mark.parametrize('flags, message', [
    (['--loss', 'bcl', '--sam-rho', '0.1'], 'count each batch twice with --sam-rho'),
    (['--loss', 'bcl', '--model', 'resnet32_ride'], "loss 'bcl' is for a network with one classifier"),
    (['--loss', 'paco', '--mixup', '0.2'], "'paco' takes labels and no mixed targets"),
    (['--loss', 'proco', '--kd-checkpoint', 'x.pth'], "'proco' takes features"),
    (['--loss', 'paco', '--layer-decay', '0.7'], 'in no layer of --layer-decay'),
    (['--loss', 'ncl_contrast'], "'ncl_contrast' is for the experts of a network"),
    (['--loss', 'proco', '--loss-kwargs', 'dim=8'], 'dim=8: give a number from 16'),
    (['--loss', 'paco', '--loss-kwargs', 'queue_size=0'], 'queue_size=0: give a number from 1'),
])
def test_wrong_combinations_are_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images, 'train', 'test'), '--model', 'resnet20', *RUN, *flags, '--output',
                    str(tmp_path)])


@pytest.mark.parametrize('flag, given', [
    ('--stage', dict(stage='crt')), ('--kd-checkpoint', dict(kd_checkpoint='x')),
    ('--adversarial', dict(adversarial='pgd'))])
def test_a_loss_with_a_state_of_its_own_is_not_trained_by_what_drops_it(flag, given):
    """They would be dropped without a word, as the task of such a loss knows none of them."""
    settings = TrainSettings().with_values(loss='gpaco', **given)
    with pytest.raises(InputError, match=f"buffers of its own, which training with {flag} does not keep: leave"):
        check_lone_loss(settings, World(torch.device('cpu')))


def test_losses_need_class_counts():
    for name in ('bcl', 'proco', 'paco', 'gpaco', 'ncl', 'ncl_contrast'):
        with pytest.raises(InputError, match='--class-counts'):
            create_loss(name, None)
        with pytest.raises(InputError, match='leave out --mixup'):
            create_loss(name, class_counts(3, 2, 1))(torch.zeros(1), torch.ones(2, 3) / 3)

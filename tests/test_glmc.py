"""GLMC: its loss and its two mixtures against the authors' code, and whole runs.

With the network, mixtures and loss of the authors (ynu-yangpeng/GLMC, commit 2c0261c) in float64, and the same weights,
images and draws in this package, images, targets, losses, gradients of all weights and BatchNorm statistics were the
same to 5e-16, in epochs 0, 60 and 199 of 200. The figures below are of their formulas on features that a formula gives.
"""
import numpy as np
import pytest
import torch
from forks import run_killed_at
from test_bbn import wave
from test_train_run import assert_same, data_flags, images, run_two_processes, weights  # noqa: F401  (a fixture)
from torch import nn

from nbn_timm.cli import train
from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss
from nbn_timm.mixing.glmc import GlobalLocalMixture
from nbn_timm.training.run_checkpoint import LAST
from nbn_timm.training.views import WithViews

COUNTS = ClassCounts((50, 20, 8, 3, 1), tuple('abcde'), 'a test')
LABELS, OTHERS = torch.tensor([0, 1, 4, 2]), torch.tensor([3, 0, 4, 1])
RUN = ['--model', 'resnet20_nbn', '--model-kwargs', 'num_blocks=1', 'channels=[4,4,6]', '--img-size', '8', '--device',
       'cpu', '--workers', '0', '-b', '4', '--lr', '0.02', '--log-interval', '1', '--loss', 'glmc', '--glmc', '1']


def made_loss(width: int, **kwargs) -> nn.Module:
    loss = create_loss('glmc', COUNTS, **kwargs)
    network = nn.Module()
    network.head_hidden_size = width
    loss.prepare(network)
    return loss


@pytest.mark.fast
@pytest.mark.parametrize('epoch, value, first, second, own, other', [
    (0, 2.4355460863657497, 1.0257599096929373, 0.7769196547028088, 0.0, 1.1224128082957447),
    (60, 2.253701440322679, 0.9927990142359563, 0.7390903371189058, 0.1225052446774184, 1.0213956555491277),
    (199, 0.43520446749029706, 0.7390492050376279, 0.8304713390676564, 1.3475917206862356, 0.011196067762750004)])
def test_values_and_gradients_are_the_authors(epoch, value, first, second, own, other):
    loss = made_loss(6, dim=3)
    for layer, phase in ((loss.classifier, 0.9), (loss.projection, 1.3), (loss.prediction, 2.2)):
        layer.weight.data = wave(*layer.weight.shape, phase=phase)
    for layer, phase in ((loss.classifier, 1.1), (loss.projection, 1.9), (loss.prediction, 2.7)):
        layer.bias.data = wave(*layer.bias.shape, phase=phase)
    weight = wave(5, 6, phase=0.4).requires_grad_()
    features = [wave(4, 6, phase=phase).requires_grad_() for phase in (1.5, 2.5)]
    target = 0.7 * nn.functional.one_hot(LABELS, 5) + 0.3 * nn.functional.one_hot(OTHERS, 5)
    loss.set_epoch(epoch)
    both = torch.stack(features)
    result = loss((both @ weight.T + wave(5, phase=0.8), both), target)
    result.backward()
    assert result.item() == pytest.approx(value, rel=1e-6)
    found = [part.grad.norm().item() for part in (*features, weight, loss.classifier.weight, loss.projection.weight,
                                                  loss.prediction.weight)]
    assert found == pytest.approx([first, second, own, other, 1.0610260487995362, 1.9958875821769888], rel=2e-6)


@pytest.mark.fast
def test_both_mixtures_are_the_authors():
    """Sums with a ramp from -1 to 1 of what their `GLMC_mixed` made by the same draws."""
    views = [wave(4, 3, 7, 9, phase=phase) for phase in (0.1, 0.2, 0.3, 0.4)]
    mixing = GlobalLocalMixture([], 5)
    longer = torch.cat([torch.stack(views[2:]), torch.zeros(2, 2, 3, 7, 9)], dim=1)  # the last batch here is smaller
    mixing.stream = iter([(longer, torch.cat([OTHERS, OTHERS[:2]]))])
    np.random.seed(7)
    (whole, boxed), target = mixing.mix(torch.stack(views[:2]), LABELS)
    ramp = torch.linspace(-1, 1, whole.numel()).double().view_as(whole)
    assert (whole * ramp).sum().item() == pytest.approx(0.07925402486647704, rel=1e-4)
    assert (boxed * ramp).sum().item() == pytest.approx(0.5250372534453622, rel=1e-5)
    assert boxed.ne(views[1]).sum() == 504
    lam = 0.08912155549916569
    expected = lam * nn.functional.one_hot(LABELS, 5) + (1 - lam) * nn.functional.one_hot(OTHERS, 5)
    torch.testing.assert_close(target, expected)


@pytest.mark.fast
def test_views_pass_the_network_one_after_the_other():
    norm, views = nn.BatchNorm2d(3), torch.stack([torch.randn(4, 3, 5, 5), 3 + 2 * torch.randn(4, 3, 5, 5)])
    found = WithViews(norm, apart=True)(views)
    assert norm.num_batches_tracked == 2
    for view in found:
        torch.testing.assert_close(view.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    together = WithViews(norm)(views)
    assert norm.num_batches_tracked == 3 and together[0].mean() < -0.5
    assert torch.equal(WithViews(norm, apart=True).eval()(views[0]), norm(views[0]))


@pytest.mark.fast
@pytest.mark.parametrize('flags, message', [
    (['--loss', 'glmc'], "loss 'glmc' takes images that are mixed for it: give --glmc 1"),
    (['--glmc', '1'], "--glmc mixes several views of an image, and loss 'cross_entropy' takes one: leave it out, or"),
    (['--glmc', '1', '--loss', 'gpaco'], "'gpaco' takes labels and no mixed targets"),
    ([*RUN, '--mixup', '1'], '--glmc and --mixup cannot mix the same batch'),
    ([*RUN, '--mixup-prob', '0.5'], '--mixup-prob has no effect on --glmc'),
    (['--glmc-resampling', '0.5'], '--glmc-resampling has no effect without --glmc'),
    ([*RUN, '--loss-kwargs', 'power=-1'], 'power=-1'),
    ([*RUN, '--loss-kwargs', 'epochs=0'], 'epochs=0: give a'),
    ([*RUN, '--stage', 'crt', '--initial-checkpoint', 'FIRST'], 'takes features, which training with --stage'),
    ([*RUN, '--kd-checkpoint', 'FIRST'], 'takes features, which training with --kd-checkpoint'),
    ([*RUN, '--adversarial', 'pgd'], 'adversarial pgd attacks the label of a picture, and --glmc mixes labels'),
    ([*RUN, '--layer-decay', '0.7'], "loss 'glmc' has parameters of its own, which are in no layer of --layer-decay")])
def test_what_does_not_go_together_is_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    first = tmp_path / 'first.pth'
    torch.save({'args': {'model': 'resnet20'}}, first)
    flags = [str(first) if word == 'FIRST' else word for word in flags]
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *RUN[:11], '--output', str(tmp_path), '--epochs', '1', *flags])


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):  # noqa: F811
    """The folder of runs, and the flags of one that has been to its end there, as `whole`."""
    folder = tmp_path_factory.mktemp('runs')
    flags = [*data_flags(images, 'train', 'test'), *RUN, '--epochs', '3', '--loss-kwargs', 'epochs=3', 'dim=4',
             '--glmc-resampling', '1', '--output', str(folder)]
    train.main([*flags, '--experiment', 'whole'])
    return folder, flags


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_weights(whole):
    folder, flags = whole
    run_killed_at('epoch 3/3  step 2/5', train.main, [*flags, '--experiment', 'killed'])
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    one, other = (torch.load(folder / run / LAST, weights_only=True) for run in ('whole', 'killed'))
    for key in ('state_dict', 'optimizer', 'task_state'):
        assert_same(one[key], other[key])
    assert set(one['task_state']['loss']) == {
        f'{layer}.{part}' for layer in ('classifier', 'projection', 'prediction') for part in ('weight', 'bias')}


@pytest.mark.slow
def test_two_processes_train_one_network_and_one_loss(whole):
    folder, flags = whole
    run_two_processes([*flags, '--experiment', 'two'])
    first, second = (torch.load(folder / 'two' / f'rank{rank}.pt') for rank in (0, 1))
    assert_same(first, second)
    assert_same(first['state_dict'], weights(folder / 'two'))

"""BBN: its network, loss and second stream against the authors' code and plain computations, and whole runs.

With the authors' network, classifier and combiner (Megvii-Nanjing/BBN, commit 7992e90) in float64, and the same weights
and images in this package's, logits, gradients of all weights and BatchNorm statistics were the same to 2e-15. The
figures below are of their classifier and combiner on features that a formula gives.
"""
import pytest
import timm
import torch
from forks import run_killed_at
from test_train_run import assert_same, data_flags, images, run_two_processes, weights  # noqa: F401  (a fixture)
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import train
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss, takes_streams
from nbn_timm.mixing.second_stream import SecondStream
from nbn_timm.training.run_checkpoint import LAST

SMALL = {'num_blocks': 1, 'channels': (4, 4, 6), 'num_classes': 5}
RUN = ['--model', 'resnet32_bbn', '--model-kwargs', 'num_blocks=1', '--img-size', '8', '--device', 'cpu', '--workers',
       '0', '-b', '4', '--lr', '0.02', '--log-interval', '1', '--loss', 'bbn', '--second-stream', 'reverse']


def wave(*shape: int, phase: float) -> torch.Tensor:
    """sin(phase + 1.7 i) of the entries i in order, float32 of values in float64."""
    return torch.sin(phase + 1.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape).float()


def network(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('resnet32_bbn', **{**SMALL, **kwargs})


@pytest.mark.fast
@pytest.mark.parametrize('epoch, value, first, second, weight, entry', [
    (0, 4.181930042323887, 2.170966715117025, 0.0, 2.4376530366169558, -0.6626139293103315),
    (60, 3.760560585528516, 1.8215460184602144, 0.1718837876771934, 2.10614690089151, -0.536277727569876),
    (199, 4.438188079127564, 0.021696861959568207, 2.1380287233975404, 2.12270028515777, 0.00011219400462712529)])
def test_values_and_gradients_are_the_authors(epoch, value, first, second, weight, entry):
    model = network().train()
    model.set_branch_logits()
    with torch.no_grad():
        model.fc.weight.copy_(wave(5, 12, phase=0.4))
        model.fc.bias.copy_(wave(5, phase=0.8))
    features = [wave(4, 6, phase=phase).requires_grad_() for phase in (1.5, 2.5)]
    loss = create_loss('bbn', epochs=200)
    loss.set_epoch(epoch)
    labels = torch.tensor([[0, 4], [1, 3], [2, 4], [0, 2]])
    result = loss(model.forward_head(torch.cat(features, dim=1)[:, :, None, None]), labels)
    result.backward()
    assert result.item() == pytest.approx(value, rel=1e-6)
    for part, norm in zip(features, (first, second), strict=True):
        assert part.grad.norm().item() == pytest.approx(norm, rel=2e-5, abs=1e-9)
    assert model.fc.weight.grad.norm().item() == pytest.approx(weight, rel=1e-6)
    assert model.fc.weight.grad[0, 0].item() == pytest.approx(entry, rel=1e-4)


@pytest.mark.fast
def test_each_stream_passes_the_trunk_by_itself_and_goes_on_through_its_own_branch():
    """As two networks of one branch each, one after the other: their batch statistics, and the running ones of both."""
    model, streams = network(num_blocks=2), torch.randn(2, 4, 3, 16, 16)
    model.train().set_branch_logits()
    expected, plain = [], network(num_blocks=2).train()
    for branch, stream in enumerate(streams):
        x = plain.layer3(plain.layer2(plain.layer1(plain.act1(plain.bn1(plain.conv1(stream))))))
        pooled = plain.layer4[0][branch](x).mean(dim=(2, 3))
        weight = plain.fc.weight[:, 6 * branch:6 * branch + 6]
        expected.append(2 * pooled @ weight.T + plain.fc.bias)
    torch.testing.assert_close(model(streams), torch.stack(expected, dim=1))
    assert_same(model.state_dict(), plain.state_dict())
    assert model.eval()(streams[0]).shape == (4, 5)
    model.train().set_branch_logits(False)
    assert model(streams[0]).shape == (4, 5)  # an ordinary network for other losses


@pytest.mark.fast
@pytest.mark.parametrize('pool, mult', [('avg', 1), ('catavgmax', 2)])
def test_the_output_is_the_mean_of_the_branches(pool, mult):
    model, x = network(global_pool=pool).train(), torch.randn(3, 12, 4, 4)
    assert model.head_hidden_size == 12 * mult
    ordinary = model.forward_head(x)
    model.set_branch_logits()
    torch.testing.assert_close(model.forward_head(x).mean(dim=1), ordinary)


@pytest.mark.fast
def test_parts_of_the_network():
    model, x = network(num_blocks=2, nbn=True), torch.randn(2, 3, 16, 16)
    maps = model.eval().forward_intermediates(x, intermediates_only=True)
    assert [part.shape[1] for part in maps] == [info['num_chs'] for info in model.feature_info] == [4, 4, 4, 12]
    torch.testing.assert_close(model.forward_head(maps[-1]), model(x))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    assert len({id(layer.scale) for layer in model.modules() if hasattr(layer, 'scale')}) == 3  # layer3, two branches
    model.prune_intermediate_layers([1])
    assert model(x).shape == (2, 4, 16, 16)  # the maps of layer1, and nothing behind them
    full = timm.create_model('resnet32_bbn', num_classes=10)
    assert sum(value.numel() for value in full.parameters()) == 538_778  # the authors'


@pytest.mark.fast
def test_the_second_stream_stands_beside_the_first():
    class Others(list):
        set_epoch = list.append

    pairs = SecondStream(Others(), 3)
    pairs.set_epoch(2)
    assert pairs.others == [2]
    pairs.stream = iter([(torch.ones(4, 3, 2, 2), torch.tensor([2, 1, 0, 2]))])
    streams, labels = pairs(torch.zeros(3, 3, 2, 2), torch.tensor([0, 0, 1]))  # the last batch of an epoch is smaller
    assert streams.shape == (2, 3, 3, 2, 2) and streams[0].eq(0).all() and streams[1].eq(1).all()
    assert labels.tolist() == [[0, 2], [0, 1], [1, 0]]
    pairs.end_epoch()
    assert not list(pairs.stream)


@pytest.mark.fast
@pytest.mark.parametrize('flags, message', [
    (['--loss', 'bbn', '--model', 'resnet32_bbn'], "loss 'bbn' takes two streams of images: give the sampler"),
    (['--second-stream', 'reverse', '--model', 'resnet32_bbn'], 'takes two streams of images, and .cross_entropy'),
    ([*RUN, '--model', 'resnet20'], "loss 'bbn' is for a network of two branches, and 'resnet20' is none"),
    ([*RUN, '--mixup', '1'], 'cannot mix the same batch'),
    ([*RUN, '--second-stream', 'meta'], 'learns in a second stage'),
    ([*RUN, '--sampler', 'repeat_factor', '--sampler-kwargs', 'threshold=0.5'], 'samplers with epochs of one length'),
    ([*RUN, '--loss-kwargs', 'epochs=0'], 'epochs=0: give a'),
    ([*RUN, '--stage', 'crt', '--initial-checkpoint', 'FIRST'], 'takes two streams of images, which training with'),
    ([*RUN, '--mixup-prob', '0.5'], '--mixup-prob has no effect on --second-stream')])
def test_what_does_not_go_together_is_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    first = tmp_path / 'first.pth'
    torch.save({'args': {'model': 'resnet20'}}, first)
    flags = [str(first) if word == 'FIRST' else word for word in flags]
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), '--output', str(tmp_path), '--epochs', '1', '--device', 'cpu', *flags])


@pytest.mark.slow
def test_killed_and_resumed_and_on_two_processes(images, tmp_path):  # noqa: F811
    flags = [*data_flags(images), *RUN, '--epochs', '3', '--loss-kwargs', 'epochs=3', '--output',
             str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])
    run_killed_at('epoch 3/3  step 2/5', train.main, [*flags, '--experiment', 'killed'])
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    whole, killed = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ('whole', 'killed'))
    for key in ('state_dict', 'optimizer'):
        assert_same(whole[key], killed[key])
    run_two_processes([*flags, '--experiment', 'two'])
    first, second = (torch.load(tmp_path / 'two' / f'rank{rank}.pt')['state_dict'] for rank in (0, 1))
    assert_same(first, second)
    assert_same(first, weights(tmp_path / 'two'))
    assert takes_streams('bbn') and not takes_streams('shike')

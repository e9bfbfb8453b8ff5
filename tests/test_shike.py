"""SHIKE: its network, losses and stages against the figures of the authors' code (jinyan-06/SHIKE, commit 2b04b62)."""
import json
import math
import re

import numpy as np
import pytest
import released
import timm
import torch
import torch.nn as nn
from test_train_run import data_flags, images, weights  # noqa: F401  (images: a fixture)
from torch.utils.flop_counter import FlopCounterMode

import nbn_timm.cli.train as train
import nbn_timm.cli.validate as validate
from nbn_timm.data import ClassCounts
from nbn_timm.layers import NormalizedBatchNorm2d
from nbn_timm.losses import create_loss
from nbn_timm.models import ResNetCifarShike, RoutedExperts
from nbn_timm.models._released import recognize
from nbn_timm.training.run_checkpoint import LAST

FIGURES = json.loads((released.REFERENCE / 'shike.json').read_text())


def theirs(name: str, heads: str = 'classifiers') -> str:
    """The authors' name of an entry."""
    name = re.sub(r'^layer3\.(\d)\.(\d)\.', r'layer3s.\2.\1.', name).replace('.downsample.', '.shortcut.')
    name = re.sub(r'^fusion\.(\d)\.(\d)\.', lambda found: (
        f'shallow_exps.{found[1]}.convs.StridedConv{int(found[2]) // 3}.conv.{int(found[2]) % 3}.'), name)
    return re.sub(r'^fc\.', f'{heads}.', name)


def network(heads: str = 'classifiers') -> ResNetCifarShike:
    """The network in double precision with weights by the rule of `released`, which goes by the authors' names."""
    model = timm.create_model('resnet32_shike', num_classes=100)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith('fc.'):  # theirs are transposed
            state[name] = released.value(theirs(name, heads), tensor.shape[::-1]).T
        else:
            state[name] = released.value(theirs(name), tensor.shape)
    model.load_state_dict(state)
    model.set_expert_logits()
    return model.double()


def pictures(number: int = 8, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(7).standard_normal((number, 3, size, size)))


# The network

@torch.no_grad()
@pytest.mark.parametrize('heads, figures', [('classifiers', 'logits'), ('rt_classifiers', 'second_logits')])
def test_logits_are_those_of_the_released_network(heads, figures):
    model, x = network(heads).eval(), pictures(2)
    shared = model.forward_shared(x)
    logits = torch.stack([model.forward_expert(shared, expert)[1] for expert in range(3)], dim=1)
    assert released.relative_error(logits[:, :, :4], torch.tensor(FIGURES[figures]).double()) < 1e-6
    torch.testing.assert_close(model(x), logits.mean(dim=1))


def test_loss_and_gradients_are_those_of_the_released_training():
    model = network().train()
    loss = create_loss('shike')(model(pictures()), torch.arange(8) * 13)
    loss.backward()
    assert loss.item() == pytest.approx(FIGURES['loss'], rel=1e-6)
    norms = {theirs(name): parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert {name: norms[name] for name in FIGURES['grad_norms']} == pytest.approx(FIGURES['grad_norms'], rel=1e-5)


def test_it_costs_what_was_counted_of_the_released_network():
    model = timm.create_model('resnet32_shike', device='meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device='meta'))
    assert counter.get_total_flops() == 2 * 120_130_304
    heads = sum(parameter.numel() for parameter in model.fc.parameters())
    assert heads == 19_200  # of which the authors have another set
    assert sum(parameter.numel() for parameter in model.fusion.parameters()) == 65_024


def test_all_but_the_strided_convolutions_start_by_kaimings_rule():
    """Standard deviation sqrt(2 / n) of a normal distribution, or 1 / sqrt(3 n) of a uniform one, for n inputs."""
    torch.manual_seed(0)
    for name, module in timm.create_model('resnet32_shike').named_modules():
        if isinstance(module, nn.Conv2d):
            inputs = module.weight[0].numel()
            expected = math.sqrt((1 / 3 if name.startswith('fusion') else 2) / inputs)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name


@torch.no_grad()
@pytest.mark.parametrize('experts', [1, 2, 4])
def test_experts_look_back_at_the_first_and_the_second_stage_in_turn(experts):
    model = timm.create_model('resnet32_shike_nbn', num_experts=experts, num_classes=5).eval()
    assert [len(view) for view in model.fusion] == [5, 3, 5, 3][:experts]
    x = pictures(2).float()
    first, second, fused = model.forward_intermediates(x, [1, 2, 3], intermediates_only=True)
    last = model.layer3(second)
    for expert, (part, whole) in enumerate(zip(last.chunk(experts, 1), fused.chunk(experts, 1), strict=True)):
        looked_at = (first, second)[expert % 2]
        assert torch.equal(model.fusion.expert(first, second, part, expert), whole)
        assert torch.equal(part * model.fusion[expert](looked_at), whole)


@torch.no_grad()
def test_features_are_the_fused_ones():
    model = timm.create_model('resnet32_shike').eval()
    x = pictures(2).float()
    fused = model.forward_features(x)
    features = timm.create_model('resnet32_shike', features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(features(x)[3], fused)
    assert torch.equal(model.forward_intermediates(x, [-1], intermediates_only=True)[0], fused)
    final, maps = model.forward_intermediates(x, [1, 3])
    assert torch.equal(final, fused) and torch.equal(maps[1], fused) and maps[0].shape[1] == 16
    early = model.forward_intermediates(x, [0, 2], stop_early=True)
    assert early[0].shape == early[1][1].shape == (2, 32, 16, 16)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert not list(model.fusion.parameters())
    assert torch.equal(model(x), early[0])


@torch.no_grad()
def test_each_image_can_be_given_other_experts():
    torch.manual_seed(0)
    model = RoutedExperts(timm.create_model('resnet32_shike', num_classes=6), top_k=4)
    nn.init.normal_(model.router.decide.weight)
    x = pictures(12).float() * torch.linspace(0.2, 3, 12)[:, None, None, None]
    model.network.train()(x)  # running statistics that keep the images apart
    model.eval().network.eval()
    model.router.decide.bias -= model.train()(x)[0][:, 0].median()
    logits, used = model.eval().route(x)
    assert len(set(used.tolist())) > 1
    for image, row, number in zip(x, logits, used.tolist(), strict=True):
        torch.testing.assert_close(model.forward_first(image[None], number)[0], row, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_recognised_by_its_keys():
    for name, settings in (('resnet32_shike', {}), ('resnet32_shike_nbn', dict(num_experts=2, head='linear'))):
        model = timm.create_model(name, num_classes=100, **settings)
        found = recognize(model.state_dict())
        assert found is not None and (found.name, found.form) == (f'{name}.cifar100_lt', '')
        assert found.model_args == {'num_experts': 3, 'head': 'cosine'} | settings
    assert {type(module) for module in model.fusion.modules()}.isdisjoint({NormalizedBatchNorm2d})


# The losses

COUNTS = ClassCounts(tuple(int(500 * 0.01 ** (c / 9)) for c in range(10)), tuple('abcdefghij'), 'a test')
TARGET = torch.tensor([3 * i % 10 for i in range(8)])


def logits_of_experts() -> torch.Tensor:
    """[B, E, C]."""
    return torch.tensor([[[3 * math.sin(1 + 7 * i + 3 * c + 5 * e) for c in range(10)] for e in range(3)]
                         for i in range(8)], requires_grad=True)


@pytest.mark.parametrize('name, settings, value, norm, first', [
    ('shike', {}, 16.9202001, 0.77504044, -0.049162417),
    ('shike', dict(suppression=0, mutual=0), 10.8019861, None, None),
    ('shike', dict(mutual=0), 10.8019861 + 4.6222209, None, None),
    ('shike', dict(suppression=0), 10.8019861 + 1.4959930, None, None),
    ('expert_balanced_softmax', {}, 12.8334369, 0.65811269, -0.026055907),
])
def test_losses_and_gradients_of_the_released_code(name, settings, value, norm, first):
    """Of its `mix_outputs` on the same logits in double precision."""
    logits = logits_of_experts()
    loss = create_loss(name, COUNTS, **settings)(logits, TARGET)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    if norm:
        assert logits.grad.norm().item() == pytest.approx(norm, rel=1e-6)
        assert logits.grad[0, 0, 0].item() == pytest.approx(first, rel=1e-5)


def test_balanced_softmax_of_experts_is_that_of_each():
    logits = logits_of_experts()
    plain = create_loss('balanced_softmax', COUNTS)
    torch.testing.assert_close(create_loss('expert_balanced_softmax', COUNTS)(logits, TARGET),
                               sum(plain(part, TARGET) for part in logits.unbind(1)))


# The stages

def test_both_stages_run_and_validate(images, tmp_path):  # noqa: F811
    """The second stage changes classifiers and running statistics, and nothing else."""
    common = [*data_flags(images), '--img-size', '16', '--device', 'cpu', '--workers', '0', '-b', '4',
              '--global-batch-size', '4', '--output', str(tmp_path)]
    train.main(['--config', 'cifar100_lt/resnet32_shike_nbn', *common, '--epochs', '2', '--warmup-epochs', '1',
                '--warmup-lr', '0.05', '--lr', '0.1', '--experiment', 'first'])
    train.main(['--config', 'cifar100_lt/resnet32_shike_nbn_stage2', *common, '--epochs', '2', '--warmup-epochs', '1',
                '--initial-checkpoint', str(tmp_path / 'first' / LAST), '--experiment', 'second'])
    first, second = weights(tmp_path / 'first'), weights(tmp_path / 'second')
    changed = {name for name, value in first.items() if not torch.equal(value, second[name])}
    statistics = {name for name in first if re.search('running_|num_batches', name)}
    assert changed == statistics | {f'fc.{expert}.weight' for expert in range(3)}
    validate.main(['--checkpoint', str(tmp_path / 'second' / LAST), '--workers', '0', '--device', 'cpu',
                   '--results-file', str(tmp_path / 'result.json')])
    validated = json.loads((tmp_path / 'result.json').read_text())
    tested = json.loads((tmp_path / 'second' / 'test.json').read_text())
    assert validated['top1'] == tested['top1']
    # New classifiers may be of another kind than the first stage's cosines.
    train.main(['--config', 'cifar100_lt/resnet32_shike_nbn_stage2', *common, '--epochs', '1', '--warmup-epochs', '0',
                '--initial-checkpoint', str(tmp_path / 'first' / LAST), '--experiment', 'rectified',
                '--model-kwargs', 'head=rectified'])
    other = weights(tmp_path / 'rectified')
    kept = {name for name in first if name in other and not name.startswith('fc.') and name not in statistics}
    assert kept == {name for name in first if not name.startswith('fc.')} - statistics
    assert all(torch.equal(first[name], other[name]) for name in kept)
    assert {f'fc.{expert}.bn.running_var' for expert in range(3)} <= other.keys()
    validate.main(['--checkpoint', str(tmp_path / 'rectified' / LAST), '--workers', '0', '--device', 'cpu'])

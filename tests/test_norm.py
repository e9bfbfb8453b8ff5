"""The NBN layer against its formula, its gradients, and what a layer must survive."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from nbn_timm.layers import NormalizedBatchNorm2d, RectifiedLinear, add_nbn, nbn_layers, share_scale

pytestmark = pytest.mark.fast


def random_layer(channels: int = 16, **kwargs) -> NormalizedBatchNorm2d:
    torch.manual_seed(0)
    layer = NormalizedBatchNorm2d(channels, alpha=3.5, **kwargs)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    return layer


def released_formula(layer: NormalizedBatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """w = g / (|g|_2 + 1e-6) * alpha and the same for b, as the authors' code computes them."""
    alpha = layer.scale.alpha
    return (layer.weight / (torch.norm(layer.weight, 2) + 1e-6) * alpha,
            layer.bias / (torch.norm(layer.bias, 2) + 1e-6) * alpha)


@pytest.mark.parametrize('gradient', ['capped', 'released'])
def test_value_is_bit_identical_to_the_released_formula(gradient):
    layer = random_layer(gradient=gradient)
    for bias_length in (0.0, 1e-9, 0.3, 1.0, 1e4):
        with torch.no_grad():
            layer.bias.copy_(F.normalize(torch.randn(16), dim=0) * bias_length)
        weight, bias = layer.effective_affine()
        expected_weight, expected_bias = released_formula(layer)
        assert torch.equal(weight, expected_weight) and torch.equal(bias, expected_bias)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('momentum', [0.1, None])
def test_forward_and_statistics_are_batch_norms(training, momentum):
    layer = random_layer(momentum=momentum).train(training)
    plain = nn.BatchNorm2d(16, momentum=momentum).train(training)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if 'scale' not in key})
    with torch.no_grad():
        weight, bias = released_formula(layer)
        plain.weight.copy_(weight)
        plain.bias.copy_(bias)
    for _ in range(3):
        x = torch.randn(4, 16, 5, 7)
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == plain.num_batches_tracked


def test_released_gradient_is_that_of_the_formula():
    layer = random_layer(gradient='released')
    upstream = torch.randn(2, 16)
    ours = torch.autograd.grad(layer.effective_affine(), layer.parameters(), upstream.unbind())
    reference = torch.autograd.grad(released_formula(layer), layer.parameters(), upstream.unbind())
    for gradient, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('length', [0.0, 1e-4, 0.5, 2.0, 50.0])
def test_cap_scales_the_released_gradient_by_the_length_below_one(length):
    direction = F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    upstream = torch.randn(16, generator=torch.Generator().manual_seed(2))
    gradients = {}
    for gradient in ('capped', 'released'):
        layer = random_layer(gradient=gradient)
        with torch.no_grad():
            layer.bias.copy_(direction * length)
        gradients[gradient], = torch.autograd.grad(layer.effective_affine()[1], layer.bias, upstream)
    factor = min(length + 1e-6, 1.0)
    torch.testing.assert_close(gradients['capped'], gradients['released'] * factor, rtol=1e-4, atol=1e-7)
    assert gradients['capped'].norm() <= 3.5 * upstream.norm() * 1.001  # alpha times the gradient, at any length


def test_bias_does_not_explode_in_the_first_step():
    torch.manual_seed(0)
    lengths = {}
    for gradient in ('capped', 'released'):
        layer = NormalizedBatchNorm2d(8, gradient=gradient)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
        (layer(torch.randn(4, 8, 3, 3)) * torch.randn(8)[:, None, None]).mean().backward()
        optimizer.step()
        lengths[gradient] = layer.bias.norm().item()
    assert lengths['capped'] < 1 < 1e3 < lengths['released']


def shared_pair() -> nn.Sequential:
    pair = nn.Sequential(NormalizedBatchNorm2d(4, alpha=2.0), NormalizedBatchNorm2d(4, alpha=5.0))
    share_scale(nbn_layers(pair).values())
    return pair


def alphas(model: nn.Module) -> list[float]:
    return [layer.scale.alpha.item() for layer in nbn_layers(model).values()]


def test_shared_alpha_has_one_key_one_parameter_and_one_gradient():
    pair = shared_pair()
    assert alphas(pair) == [2.0, 2.0]
    assert [key for key in pair.state_dict() if 'alpha' in key] == ['0.scale.alpha']
    assert len([name for name, _ in pair.named_parameters() if 'alpha' in name]) == 1
    pair(torch.randn(2, 4, 3, 3)).square().sum().backward()
    assert pair[1].scale.alpha.grad is pair[0].scale.alpha.grad is not None


@pytest.mark.parametrize('transform', [
    lambda pair: copy.deepcopy(pair),
    lambda pair: pickle.loads(pickle.dumps(pair)),
    lambda pair: pair.to('meta').to_empty(device='cpu'),
    lambda pair: pair.half().float(),
    lambda pair: ModelEmaV3(pair).module,
], ids=['deepcopy', 'pickle', 'to_empty', 'dtype', 'ema'])
def test_alpha_stays_shared(transform):
    pair = transform(shared_pair())
    with torch.no_grad():
        pair[0].scale.alpha.fill_(9.0)
    assert alphas(pair) == [9.0, 9.0]


@pytest.mark.parametrize('assign', [False, True])
def test_load_keeps_alpha_shared_and_complete(assign):
    source, target = shared_pair(), shared_pair()
    with torch.no_grad():
        source[0].scale.alpha.fill_(9.0)
    if assign:
        target = target.to('meta')
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert alphas(target) == [9.0, 9.0]
    assert target[0].scale.alpha is target[1].scale.alpha


def test_load_without_alpha_or_with_one_per_layer_is_an_error():
    pair = shared_pair()
    state_dict = pair.state_dict()
    alpha = state_dict.pop('0.scale.alpha')
    with pytest.raises(RuntimeError, match='0.scale.alpha'):
        pair.load_state_dict(state_dict)
    with pytest.raises(RuntimeError, match='share_alpha=False'):
        pair.load_state_dict({**state_dict, '0.scale.alpha': alpha, '1.scale.alpha': alpha})


def test_ema_updates_a_shared_alpha_once():
    pair = shared_pair()
    ema = ModelEmaV3(pair, decay=0.75)
    with torch.no_grad():
        pair[0].scale.alpha.fill_(4.0)
    ema.update(pair)
    assert alphas(ema.module) == pytest.approx([2.5, 2.5])


def use_functional_call(pair: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    doubled = {name: value * 2 if 'alpha' in name else value for name, value in parameters.items()}
    expected = copy.deepcopy(pair)
    expected[0].scale.alpha.data.mul_(2)
    assert torch.equal(functional_call(pair, doubled, x), expected(x))


def use_grad(pair: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    gradients = grad(lambda given: functional_call(pair, given, x).square().sum())(parameters)
    expected, = torch.autograd.grad(pair(x).square().sum(), pair[0].scale.alpha)
    torch.testing.assert_close(gradients['0.scale.alpha'], expected)


def use_vmap(pair: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    stacked = {name: torch.stack([value, value * 2]) for name, value in parameters.items()}
    with torch.no_grad():
        torch.testing.assert_close(vmap(lambda given: functional_call(pair, given, x))(stacked)[0], pair(x))


@pytest.mark.parametrize('use', [use_functional_call, use_grad, use_vmap])
def test_torch_func_leaves_a_shared_alpha_as_it_was(use):
    pair = shared_pair().eval()
    x, parameters, before = torch.randn(2, 4, 3, 3), dict(pair.named_parameters()), pair[0].scale.alpha
    use(pair, parameters, x)
    assert pair[0].scale.alpha is pair[1].scale.alpha is before and alphas(pair) == [2.0, 2.0]


@torch.no_grad()
def test_a_part_without_the_first_layer_has_alpha_too():
    pair = shared_pair()
    assert 'scale.alpha' in pair[1].state_dict() and '1.scale.alpha' not in pair.state_dict()
    pair[1].load_state_dict({**pair[1].state_dict(), 'scale.alpha': torch.tensor([7.0])})
    assert alphas(pair) == [7.0, 7.0]
    pair[0] = nn.Identity()
    assert [name for name, _ in pair.named_parameters()] == ['1.weight', '1.bias', '1.scale.alpha']
    fresh = shared_pair()
    fresh[0] = nn.Identity()
    fresh.load_state_dict(pair.state_dict(), strict=True)
    assert alphas(fresh) == [7.0]
    state_dict = pair.state_dict()
    del state_dict['1.scale.alpha']
    with pytest.raises(RuntimeError, match='Missing.*1.scale.alpha'):
        fresh.load_state_dict(state_dict)


def test_alphas_that_are_views_of_one_buffer_are_saved_each():
    pair, buffer = nn.Sequential(NormalizedBatchNorm2d(4), NormalizedBatchNorm2d(4)), torch.tensor([2.0, 5.0])
    for index, layer in enumerate(pair):
        layer.scale.alpha.data = buffer[index:index + 1]
    saved = pair.state_dict()
    assert (saved['0.scale.alpha'].item(), saved['1.scale.alpha'].item()) == (2.0, 5.0)
    assert list(pair.state_dict(keep_vars=True)) == list(saved)


def set_data(layer: NormalizedBatchNorm2d) -> None:
    layer.weight.data.mul_(torch.linspace(1, 2, 16))  # which no version counter shows


def set_in_place(layer: NormalizedBatchNorm2d) -> None:
    layer.bias.add_(1)


def set_alpha(layer: NormalizedBatchNorm2d) -> None:
    layer.scale.alpha.fill_(9.0)


def set_parameter(layer: NormalizedBatchNorm2d) -> None:
    layer.weight = nn.Parameter(torch.linspace(1, 2, 16))


def load(layer: NormalizedBatchNorm2d) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def assign(layer: NormalizedBatchNorm2d) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def train_a_step(layer: NormalizedBatchNorm2d) -> None:
    with torch.enable_grad():
        layer.train()(torch.randn(4, 16, 3, 3)).pow(3).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    layer.eval()


@pytest.mark.parametrize('inference', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('change', [set_data, set_in_place, set_alpha, set_parameter, load, assign, train_a_step,
                                    lambda layer: layer.to(torch.float64), lambda layer: layer.bfloat16()])
def test_what_evaluation_keeps_follows_every_change(change, inference):
    layer = random_layer().eval()
    x = torch.randn(2, 16, 3, 3)
    with inference():
        layer(x)
        assert layer._kept.tensors is not None
        assert torch.equal(layer(x), layer.fuse()(x))
    with torch.no_grad():
        change(layer)
    with inference():
        x = x.to(layer.weight.dtype)
        for _ in range(2):
            assert torch.equal(layer(x), layer.fuse()(x))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_what_evaluation_keeps_is_neither_copied_nor_saved_nor_differentiated():
    layer = random_layer().eval()
    x = torch.randn(2, 16, 3, 3, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x).clone()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied._kept.tensors is None and torch.equal(copied.eval()(x), expected)
    assert '_kept' not in ''.join(layer.state_dict())
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None and layer.scale.alpha.grad is not None
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()  # what inference mode kept may be saved for a backward pass
    stacked = {name: torch.stack([value, value + 1]) for name, value in layer.named_parameters()}
    with torch.no_grad():
        both = vmap(lambda given: functional_call(layer, given, x))(stacked)
        torch.testing.assert_close(both[0], expected)
        assert not torch.allclose(both[1], expected)
        traced = torch.jit.trace(layer, x)
        doubled = {name: value * (2 if 'alpha' in name else 1) for name, value in layer.state_dict().items()}
        traced.load_state_dict(doubled)
        layer.load_state_dict(doubled)
        torch.testing.assert_close(traced(x), layer(x))


def test_what_evaluation_keeps_stays_out_of_dispatch_modes():
    x = torch.randn(2, 16, 3, 3)
    layer = random_layer().eval()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(x)
        assert torch.equal(layer(x), layer.fuse()(x))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(layer(x), FakeTensor)
        graph = make_fx(layer)(x)
        layer.scale.alpha.mul_(2)
        assert torch.equal(graph(x), layer(x))  # the parameters are in the graph, not what was kept of them


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_a_layer_saved_before_anything_was_kept_goes_on():
    layer = random_layer().eval()
    x = torch.randn(2, 16, 3, 3)
    expected = layer(x)
    del layer._kept
    with torch.no_grad():
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), expected)
        assert torch.equal(torch.jit.script(copied)(x), expected)


def test_fuse_is_exact_and_plain():
    layer = random_layer().eval()
    plain = layer.fuse()
    assert type(plain) is nn.BatchNorm2d and plain.state_dict().keys() == nn.BatchNorm2d(16).state_dict().keys()
    x = torch.randn(2, 16, 3, 3)
    assert torch.equal(plain(x), layer(x))


def test_layer_is_a_drop_in_norm_layer_of_timm():
    model = timm.create_model('resnet18', norm_layer=NormalizedBatchNorm2d, zero_init_last=False, num_classes=5)
    assert len(nbn_layers(model)) == 20
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize('kwargs', [dict(affine=False), dict(gradient='none')])
def test_wrong_arguments_are_refused(kwargs):
    with pytest.raises(ValueError):
        NormalizedBatchNorm2d(4, **kwargs)


def test_bfloat16_autocast_and_channels_last():
    layer = random_layer()
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


def test_rectified_head_standardises_logits_and_fuses():
    torch.manual_seed(0)
    head = RectifiedLinear(8, 5)
    x = torch.randn(64, 8)
    logits = head(x)
    torch.testing.assert_close(logits.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.var(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    for _ in range(20):
        head(torch.randn(64, 8) + 1)
    head.eval()
    plain = head.fuse()
    raw = F.linear(x, head.weight, head.bias)
    expected = (raw - head.bn.running_mean) / (head.bn.running_var + head.bn.eps).sqrt()
    torch.testing.assert_close(head(x), expected)
    assert type(plain) is nn.Linear
    assert ((plain(x) - head(x)).abs().max() / head(x).abs().max()) < 1e-5


@pytest.mark.parametrize('name', ['resnet20_nbn', 'resnet20'])
def test_networks_of_fake_tensors_can_be_made(name):
    """As tools that plan memory make them."""
    with FakeTensorMode():
        model = timm.create_model(name, num_classes=10)
        if name == 'resnet20':
            model = add_nbn(model)
    assert list(nbn_layers(model))

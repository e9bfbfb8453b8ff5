"""NBN on LayerNorm, GroupNorm and RmsNorm: the formula, folding, keys, the guard, and what compilers make of it."""
import copy
import io
import pickle
import re
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import GatedMlp, GluMlp, Mlp, norm, norm_act
from timm.models import reparameterize_model
from timm.models.mlp_mixer import MixerBlock, MlpMixer, SpatialGatingBlock

from nbn_timm import InputError, add_nbn, convert_sync_batchnorm, fold_nbn, freeze_nbn
from nbn_timm.deploy import deployed
from nbn_timm.layers import NormalizedAffine, NormalizedLayerNorm, nbn_layers
from nbn_timm.layers.frozen import is_frozen, unfreeze_nbn
from nbn_timm.models.transfer import add_nbn_to_trained

MODELS = {'test_vit': 2, 'test_convnext': 3, 'test_efficientnet_gn': 3}
CHANNELS_LAST = (nn.LayerNorm, norm.LayerNorm, norm.LayerNormFp32, norm_act.LayerNormAct, norm_act.LayerNormActFp32,
                 nn.RMSNorm, norm.RmsNorm, norm.RmsNormFp32, norm_act.RmsNormAct, norm_act.RmsNormActFp32)
CHANNELS_FIRST = (norm.LayerNorm2d, norm.LayerNorm2dFp32, norm.LayerNormExp2d, norm_act.LayerNormAct2d,
                  norm_act.LayerNormAct2dFp32, norm.RmsNorm2d, norm.RmsNorm2dFp32, norm_act.RmsNormAct2d,
                  norm_act.RmsNormAct2dFp32, norm.GroupNorm, norm.GroupNorm1, norm_act.GroupNormAct,
                  norm_act.GroupNorm1Act)


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, NormalizedAffine) or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) \
                or 'RmsNorm' in type(module).__name__:
            nn.init.normal_(module.weight, 1, 0.4)
            if getattr(module, 'bias', None) is not None:
                nn.init.normal_(module.bias)
    for layer in nbn_layers(model).values():
        nn.init.constant_(layer.scale.alpha, 11.0)
    return model


def images(model: nn.Module, number: int = 2) -> torch.Tensor:
    return torch.randn(number, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('kind', [*CHANNELS_LAST, *CHANNELS_FIRST], ids=lambda kind: kind.__module__ + kind.__name__)
@torch.no_grad()
def test_a_layer_of_each_kind_is_the_plain_one_with_vectors_of_length_alpha(kind):
    grouped = kind in (norm.GroupNorm, norm_act.GroupNormAct)
    plain = randomize(kind(8, num_groups=2) if grouped else kind(8)).eval()
    x = torch.randn(3, 8, 5, 4) if kind in CHANNELS_FIRST else torch.randn(3, 5, 8)
    model = randomize(add_nbn(nn.Sequential(copy.deepcopy(plain)), '0')).eval()
    layer = model[0]
    expected = copy.deepcopy(plain)
    expected.weight.copy_(11 * layer.weight / (layer.weight.norm() + 1e-6))
    if layer.bias is not None:
        expected.bias.copy_(11 * layer.bias / (layer.bias.norm() + 1e-6))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-6, atol=1e-5)
    folded = fold_nbn(model)
    assert type(folded[0]) is kind and torch.equal(folded(x), model(x))
    assert vars(folded[0]).keys() == vars(plain).keys()
    plain.load_state_dict(folded[0].state_dict(), strict=True)
    assert torch.equal(plain(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize('name', MODELS)
def test_a_network_trains_folds_exactly_and_keeps_its_keys(name):
    model = timm.create_model(name, num_classes=7)
    plain_keys = set(model.state_dict())
    assert add_nbn(model) is model
    layers = nbn_layers(model)
    assert len(layers) == MODELS[name] and len({layer.scale for layer in layers.values()}) == 1
    alpha, = set(model.state_dict()) - plain_keys  # one for the stage
    assert alpha == f'{next(iter(layers))}.scale.alpha'

    randomize(model).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=1e-4)
    model(images(model, 4)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for layer in layers.values()
               for parameter in layer.parameters())
    optimizer.step()
    after = model.eval().state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in after if 'norm' in key or 'alpha' in key)

    with torch.no_grad():
        expected = model(images(model))
        folded = deployed(model)
        fresh = timm.create_model(name, num_classes=7).eval()
        fresh.load_state_dict(folded.state_dict(), strict=True)
        assert torch.equal(fresh(images(model)), expected)
        assert torch.equal(reparameterize_model(model)(images(model)), expected)
        other = add_nbn(timm.create_model(name, num_classes=7)).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(images(model)), expected)
        assert torch.equal(convert_sync_batchnorm(copy.deepcopy(model))(images(model)), expected)


@torch.no_grad()
def test_compilers_and_exporters():
    plain = nn.Sequential(
        norm.LayerNorm2d(8), norm.GroupNorm(8, 2), nn.Flatten(2), norm.LayerNorm(20), norm.RmsNorm(20))
    model = randomize(add_nbn(plain, list('0134'))).eval()
    x = torch.randn(2, 8, 5, 4)
    expected = model(x)
    for compiled in (torch.export.export(model, (x,)).module(),
                     torch.compile(model, backend='eager', fullgraph=True), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext'])
@torch.no_grad()
def test_a_network_can_be_scripted(name):
    model, buffer = randomize(add_nbn(timm.create_model(name, num_classes=7))).eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(images(model)), model(images(model)))


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext'])
@torch.no_grad()
def test_nbn_on_trained_weights_keeps_the_function(name):
    """What the vectors' common length changes is taken up by the layers that read them."""
    model = randomize(timm.create_model(name, num_classes=7)).eval()
    before = model(images(model))
    told = add_nbn_to_trained(model)
    assert nbn_layers(model) and 'differ by' in told
    assert (model(images(model)) - before).abs().max() <= 5e-6 * before.abs().max()
    fresh = timm.create_model(name, num_classes=7).eval()
    fresh.load_state_dict(fold_nbn(model).state_dict(), strict=True)
    assert (fresh(images(model)) - before).abs().max() <= 5e-6 * before.abs().max()


def mixer(block: type[nn.Module] = MixerBlock, mlp: type[nn.Module] = Mlp, mlp_ratio: Any = (0.5, 4)) -> nn.Module:
    """With as many tokens as channels."""
    return MlpMixer(num_classes=7, img_size=16, patch_size=4, embed_dim=16, num_blocks=1, block_layer=block,
                    mlp_layer=mlp, mlp_ratio=mlp_ratio)


def stages_around(*layers: nn.Module) -> nn.Module:
    """Of timm's kind, with these layers on maps of four channels as its stage 'body'."""
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 1), body=nn.Sequential(*layers)))
    model.pretrained_cfg = {'input_size': (3, 5, 5)}
    return model


def refuses_and_stays(model: nn.Module, reason: str, **settings: Any) -> None:
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=reason):
        add_nbn(model, keep_function=True, **settings)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('make, reason', [
    (lambda: timm.create_model('test_efficientnet_gn', num_classes=7),
     "'blocks.4.0.bn3' is read by 'conv_head', which has no bias"),
    (mixer, "'blocks.0.norm1' is read by 'blocks.0.mlp_tokens.fc1', which sums over other things than its channels"),
    (lambda: mixer(SpatialGatingBlock, GatedMlp, 2),
     "'blocks.0.mlp_channels.gate.norm' is read by 'blocks.0.mlp_channels.gate.proj', which sums over other"),
    (lambda: mixer(MixerBlock, GluMlp), "'blocks.0.norm1' is read by 'blocks.0.mlp_tokens.fc1', which sums over other"),
])
def test_a_function_that_cannot_be_kept_is_said_before_anything_has_changed(make, reason):
    refuses_and_stays(randomize(make()), reason)


@pytest.mark.parametrize('layers, reason', [
    ((norm.LayerNorm2d(4), nn.Flatten(), nn.Linear(100, 7)), "read by 'body.2', which sums over other things"),
    ((norm_act.LayerNormAct2d(4), nn.Conv2d(4, 4, 1)), "'body.0' has an activation, ReLU"),
    ((norm.LayerNorm2d(4), nn.AdaptiveAvgPool2d(1)), "'body.0' is read by torch.nn.functional.adaptive_avg_pool2d"),
    ((nn.BatchNorm2d(4, track_running_stats=False),), "'body.0' has no running statistics"),
    ((norm.LayerNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(3, 7)), 'since no image could be followed through it'),
])
def test_what_a_norm_must_be_for_its_function_to_be_kept(layers, reason):
    refuses_and_stays(randomize(stages_around(*layers)), reason, stages='body')


@pytest.mark.parametrize('plain', [norm.LayerNorm2d(4), nn.BatchNorm2d(4)])
def test_the_function_of_a_weight_of_zeros_is_not_kept(plain):
    """NBN sets such a weight to one."""
    nn.init.zeros_(plain.weight)
    refuses_and_stays(stages_around(plain, nn.Conv2d(4, 4, 1)), "'body.0' has a weight of zeros", stages='body')


@torch.no_grad()
def test_a_function_that_would_move_is_refused_on_a_copy(monkeypatch):
    model = randomize(timm.create_model('test_vit', num_classes=7))
    monkeypatch.setattr('nbn_timm.layers.readers.Reader.take_up', lambda *_: None)
    refuses_and_stays(model, r'its outputs on an image would move by \d')


@torch.no_grad()
def test_a_norm_that_is_read_by_its_channels_keeps_its_function_in_a_mixer():
    model, x = randomize(mixer()).eval(), torch.randn(2, 3, 16, 16)
    before = model(x)
    add_nbn(model, layers='norm2', keep_function=True)
    assert list(nbn_layers(model)) == ['blocks.0.norm2']
    assert (model(x) - before).abs().max() <= 5e-6 * before.abs().max()


@pytest.mark.parametrize('dtype, most', [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_the_function_is_kept_in_any_type(dtype, most):
    model = randomize(timm.create_model('test_vit', num_classes=7, depth=1)).to(dtype)
    told = add_nbn_to_trained(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert float(re.search(r'differ by (\S+) of the largest', told)[1]) <= most


class ForeignNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))


def copying(norm: nn.Module, kind: type[nn.Module]) -> nn.Module:
    new = kind(len(norm.weight))
    with torch.no_grad():
        new.weight.copy_(norm.weight)
        new.bias.copy_(norm.bias)
    return new


def sharing(norm: nn.Module, kind: type[nn.Module]) -> nn.Module:
    new = kind(len(norm.weight))
    new.weight, new.bias = norm.weight, norm.bias
    return new


@pytest.mark.parametrize('make', [copying, sharing])
@pytest.mark.parametrize('kind', [ForeignNorm, nn.LayerNorm, norm.LayerNorm], ids=lambda kind: kind.__name__)
def test_a_layer_with_the_raw_vectors_does_not_take_the_place_of_nbn(kind, make):
    model = randomize(add_nbn(timm.create_model('test_vit')))
    block = model.blocks[-1]
    with pytest.raises(InputError, match='would drop its normalisation'):
        block.norm1 = make(block.norm1, kind)
    assert isinstance(block.norm1, NormalizedLayerNorm)
    block.norm1 = fold_nbn(block.norm1)  # the folded one may
    block.norm2 = nn.Identity()


def test_code_that_replaces_layer_norms_passes_over_nbn():
    model = randomize(add_nbn(timm.create_model('test_vit'))).eval()
    expected = model(images(model))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.LayerNorm(child.normalized_shape, child.eps))
                getattr(module, name).load_state_dict(child.state_dict())
    torch.testing.assert_close(model(images(model)), expected)


def test_nbn_is_added_once_and_only_to_what_it_knows():
    class Own(nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = add_nbn(timm.create_model('test_vit'))
    with pytest.raises(InputError, match='has NBN already'):
        add_nbn(model)
    own = nn.Sequential(nn.LayerNorm(4), Own(4))
    with pytest.raises(InputError, match="'1' is a Own, which cannot become NBN"):
        add_nbn(own, ['0', '1'])
    assert type(own[0]) is nn.LayerNorm
    with pytest.raises(InputError, match="TransformerEncoderLayer, which reads its raw weight"):
        add_nbn(nn.Sequential(nn.TransformerEncoderLayer(8, 2)), '0')
    mixed = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4)))
    assert list(nbn_layers(add_nbn(mixed, '0'))) == ['0.0']  # as in the paper, where there is BatchNorm
    assert list(nbn_layers(add_nbn(mixed, '0', layers='1'))) == ['0.0', '0.1']


@pytest.mark.parametrize('alpha_trainable', [False, True])
def test_frozen_layers_keep_values_and_keys_while_the_rest_learns(alpha_trainable):
    model = randomize(add_nbn(timm.create_model('test_vit', num_classes=7)))
    before = copy.deepcopy(model.state_dict())
    freeze_nbn(model, alpha_trainable)
    layers = nbn_layers(model)
    assert all(is_frozen(layer) for layer in layers.values())
    assert {layer.scale.alpha.requires_grad for layer in layers.values()} == {alpha_trainable}
    model.requires_grad_(True)  # even so
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(images(model)).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert list(before) == list(after)
    fixed = [f'{name}.{part}' for name in layers for part in ('weight', 'bias')]
    assert all(torch.equal(before[key], after[key]) for key in fixed)
    assert not torch.equal(before['blocks.0.norm1.weight'], after['blocks.0.norm1.weight'])
    unfreeze_nbn(model)
    model(images(model)).square().sum().backward()
    assert not any(is_frozen(layer) for layer in layers.values())
    assert all(layer.weight.grad is not None for layer in layers.values())


@pytest.mark.parametrize('name, stage, size', [('test_convnext', 'stages_3', 64), ('test_vit', 'model.blocks.1', 160)])
@torch.no_grad()
def test_a_network_of_maps_keeps_each_of_them(name, stage, size):
    model, x = timm.create_model(name, features_only=True).eval(), torch.randn(1, 3, size, size)
    before = model(x)
    add_nbn(model, keep_function=True, stages=stage)
    assert nbn_layers(model)
    for after, value in zip(model(x), before, strict=True):
        torch.testing.assert_close(after, value, rtol=1e-5, atol=1e-5)

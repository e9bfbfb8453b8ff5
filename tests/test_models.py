"""The contract of every registered model, and the figures that fix each architecture."""
import copy
import io
import pickle
import sys
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from test_layer_conversion import randomize
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3

import nbn_timm
from nbn_timm import InputError
from nbn_timm.layers import HEADS, RectifiedLinear, fold_nbn, nbn_layers
from nbn_timm.models import resnet_cifar, ride, wide_resnet_cifar
from nbn_timm.models._released import convert_checkpoint, recognize
from nbn_timm.models.tuning import with_head

FAMILIES = tuple(module for name, module in sorted(sys.modules.items())
                 if name.startswith('nbn_timm.models.') and hasattr(module, 'default_cfgs'))

ARCHS = sorted(
    name for module in FAMILIES for name, default in module.default_cfgs.items()
    if '' not in default.tags)
ALIASES = sorted(
    name for module in FAMILIES for name, default in module.default_cfgs.items()
    if '' in default.tags)
SMALL = ['resnet20', 'resnet20_nbn', 'resnet20_nbn_lr', 'resnet10_nbn', 'resnet10_nbn_lr', 'resnet32_ride',
         'resnet32_ride_nbn_lr', 'resnet10_ride', 'resnet10_ride_nbn_lr', 'resnet32_shike', 'resnet32_shike_nbn',
         'resnet32_bbn', 'wrn_16_2_nbn']
# Of WRN-34-10 its small sister tells the same, and of ResNet-18 one form tells enough beside ResNet-10.
LIGHT = [name for name in ARCHS if not name.startswith('wrn_34_10') and name not in (
    'resnet18_cifar', 'resnet18_cifar_nbn_lr')]

# Parameters for the default number of classes: timm's and torchvision's plain networks, and one alpha.
PARAMETERS = {
    'resnet14_wide': 464 + 9_344 + 121_472 + 795_200 + 16_100, 'resnet14_wide_nbn': 942_580 + 1,  # stem, stages, head
    'resnet20': 275_572, 'resnet32': 470_004, 'resnet32_nbn': 470_005, 'resnet44': 664_436, 'resnet56': 858_868,
    'resnet50_nbn': 25_557_033, 'resnext50_nbn': 25_028_905, 'resnet101_nbn': 44_549_161,
    'resnet152_nbn': 60_192_809, 'resnext101_nbn': 44_177_705, 'resnet10_nbn': 5_418_793,
    'resnet50_ride': 73_781_240, 'resnet50_ride_nbn': 73_781_243, 'resnet32_ride': 784_156,
    'wrn_16_2': 703_284, 'wrn_34_10': 46_160_474 + 90 * 641, 'wrn_34_10_nbn': 46_160_474 + 90 * 641 + 1,
    'resnet18_cifar': 11_173_962 + 90 * 513, 'resnet18_cifar_nbn': 11_173_962 + 90 * 513 + 1,
    'resnet32_shike': 1_277_008 - 19_200, 'resnet32_shike_nbn': 1_277_008 - 19_200 + 3,  # without SHIKE's second heads
    # Stem, layer1, layer2, three of layer3 and of cosines, two views of layer1 and one of layer2.
    'resnet14_wide_shike': 464 + 9_344 + 121_472 + 3 * (311_232 + 9_600) + 2 * (9_344 + 55_488) + 55_488,
    'resnet14_wide_shike_nbn': 1_278_928 + 3,
    'resnet32_bbn': 550_388,
}
TAGS = {
    'imagenet_lt': (1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, 224),
    'places_lt': (365, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, 224),
    'inat18': (8142, (0.466, 0.471, 0.380), (0.195, 0.194, 0.192), 0.875, 224),
    'cifar10_lt': (10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 1.0, 32),
    'cifar100_lt': (100, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 1.0, 32),
    'digits_lt': (10, (0.306,) * 3, (0.324,) * 3, 1.0, 16),
}


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    size = min(model.pretrained_cfg['input_size'][-1], 64)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def is_rectified(model: nn.Module) -> bool:
    kinds = {type(head) for head in (model.fc if isinstance(model.fc, nn.ModuleList) else [model.fc])}
    assert len(kinds) == 1
    return kinds == {RectifiedLinear}


def test_the_zoo_is_complete():
    families = ['resnet10', 'resnet50', 'resnet101', 'resnet152', 'resnext50', 'resnext101']
    expected = {f'{family}{form}' for family in families for form in ('_nbn', '_nbn_lr')}
    expected |= {f'resnet{net}{form}' for net in ('14_wide', 20, 32, 44, 56) for form in ('', '_nbn', '_nbn_lr')}
    expected |= {f'{family}_ride{form}' for family in ('resnet10', 'resnet32', 'resnet50', 'resnext50')
                 for form in ('', '_nbn', '_nbn_lr')}
    expected |= {f'resnet{net}_shike{form}' for net in ('14_wide', 32) for form in ('', '_nbn')} | {'resnet32_bbn'}
    expected |= {f'{family}{form}' for family in ('wrn_16_2', 'wrn_34_10', 'resnet18_cifar')
                 for form in ('', '_nbn', '_nbn_lr')}
    assert set(ARCHS) >= expected
    assert len(ALIASES) >= 12 * 3 + 12 * 2 + 9 * 3 + 3 * 2 + 1


@pytest.mark.parametrize('arch', ARCHS)
def test_every_architecture_is_recognised(arch):
    weights = timm.create_model(arch, device='meta').state_dict()
    found = recognize(weights)
    assert found is not None and found.arch == arch
    assert convert_checkpoint(weights, found).keys() == weights.keys()


@pytest.mark.parametrize('arguments', [
    {'nbn': True}, {'head': 'cosine'}, {'nbn': True, 'head': 'cosine'}, {'nbn': True, 'head': 'rectified'}])
def test_arguments_of_the_network_with_two_branches_are_recognised(arguments):
    """Its last stage was taken for a fourth one, of which no depth was known."""
    weights = timm.create_model('resnet32_bbn', num_classes=10, device='meta', **arguments).state_dict()
    found = recognize(weights)
    assert (found.arch, found.num_classes, found.model_args) == ('resnet32_bbn', 10, arguments)
    assert convert_checkpoint(weights, found).keys() == weights.keys()


@pytest.mark.parametrize('arch', ['resnet32', 'resnet32_ride_nbn', 'resnet10_nbn', 'resnet32_bbn'])
@pytest.mark.parametrize('head', sorted(HEADS))
def test_every_head_is_recognised(arch, head):
    weights = timm.create_model(arch, num_classes=10, head=head, device='meta').state_dict()
    found = recognize(weights)
    assert found is not None and (found.num_classes, found.added_head) == (10, '')
    assert convert_checkpoint(weights, found).keys() == weights.keys()


def test_timms_network_with_another_head_is_no_zoo_file():
    """timm's constructor was given the head, and raised a TypeError."""
    weights = with_head(timm.create_model('resnet18', num_classes=10, device='meta'), 'cosine', {}).state_dict()
    found = recognize(weights)
    assert str(found) == 'resnet18 with a cosine classifier, 10 classes (cifar10_lt), no conversion needed'
    with pytest.raises(InputError, match='a resnet18 with a cosine classifier, which timm has no name for'):
        convert_checkpoint(weights, found)


@pytest.mark.parametrize('name', PARAMETERS)
def test_number_of_parameters(name):
    model = timm.create_model(name, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize('name', ARCHS + ALIASES)
def test_names_list_resolve_and_carry_the_right_data_config_and_cast_no_whole_numbers(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert name in timm.list_models(name)
        model = timm.create_model(name, device='meta')
    tag = model.pretrained_cfg['tag']
    classes, mean, std, crop, size = TAGS[tag]
    config = resolve_model_data_config(model)
    assert name in ALIASES or f'{name}.{tag}' in timm.list_models(name, include_tags=True)
    assert name not in ALIASES or name.endswith(tag)
    assert model.num_classes == classes == model.get_classifier().out_features
    assert (config['mean'], config['std'], config['crop_pct']) == (mean, std, crop)
    assert config['input_size'] == (3, size, size) and config['interpolation'] == 'bilinear'
    first = next(name for name, _ in model.named_parameters())
    with pytest.raises(InputError, match=f"'{first}' is of int64"):
        model.load_state_dict({first: torch.ones(1, dtype=torch.int64)}, strict=False)


@pytest.mark.parametrize('name', ARCHS)
def test_which_layers_are_nbn(name):
    model = timm.create_model(name, device='meta')
    layers = nbn_layers(model)
    if '_nbn' not in name:
        assert not layers
    elif isinstance(model, ride.MultiExpert):
        # Every BatchNorm of an expert's last stage; ten of them in ResNet-50, as released.
        last = model.expert_stages[-1]
        norms = {key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        assert set(layers) == {key for key in norms if key.startswith(last)}
        by_expert = [{layer.scale for key, layer in layers.items() if key.split('.')[2] == f'{expert}'}
                     for expert in range(model.num_experts)]
        assert [len(scales) for scales in by_expert] == [1] * model.num_experts
        assert len(set.union(*by_expert)) == model.num_experts
        assert 'resnet50' not in name or len(layers) == 10 * model.num_experts
        return
    elif isinstance(model, resnet_cifar.ResNetCifar):
        assert set(layers) == {f'layer3.{index}.bn2' for index in range(len(model.layer3))}
    elif isinstance(model, wide_resnet_cifar.WideResNetCifar):
        assert set(layers) == {'bn1'} | {f'block3.layer.{index}.bn2' for index in range(len(model.block3.layer))}
    else:
        last = 'bn2' if name.startswith(('resnet10_', 'resnet18_')) else 'bn3'
        blocks = {f'layer4.{index}.{last}' for index in range(len(model.layer4))}
        assert set(layers) == blocks | {'layer4.0.downsample.1'}
    assert len({layer.scale for layer in layers.values()}) == bool(layers)
    assert is_rectified(model) == name.endswith('_lr')


@pytest.mark.parametrize('name', LIGHT)
def test_contract(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).train()
    x = images(model)
    out = model(x)
    out.square().sum().backward()
    assert out.shape == (2, 7)
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.zero_grad()
    randomize(model).eval()
    with torch.no_grad():
        expected = model(x)
        maps = model.forward_features(x)
        assert maps.shape[1] == model.num_features
        assert torch.equal(model.forward_head(maps), expected)
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(final, maps) and len(intermediates) == len(model.feature_info)
        assert [m.shape[1] for m in intermediates] == [info['num_chs'] for info in model.feature_info]
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(ModelEmaV3(model).module(x), expected)
        folded = fold_nbn(model)
        assert (folded(x) - expected).abs().max() / expected.abs().max() < 1e-5
        assert not any('alpha' in key or '.bn.' in key for key in folded.state_dict())
        model.reset_classifier(3)
        assert model(x).shape == (2, 3) and is_rectified(model) == name.endswith('_lr')
        model.reset_classifier(0, '')
        assert torch.equal(model(x), maps)


@pytest.mark.parametrize('name', LIGHT)
def test_features_only_matches_intermediates(name):
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True).eval()
    x = images(model, 1)
    with torch.no_grad():
        outputs = model(x)
    assert [tuple(out.shape[1:2]) for out in outputs] == [(channels,) for channels in model.feature_info.channels()]
    assert [x.shape[-1] // out.shape[-1] for out in outputs] == model.feature_info.reduction()


@pytest.mark.parametrize('name', SMALL)
def test_serialisation_round_trips(name, tmp_path):
    model = randomize(timm.create_model(name, num_classes=7)).eval()
    x = images(model)
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    loaded = timm.create_model(name, num_classes=7).eval()
    load_checkpoint(loaded, str(tmp_path / 'model.safetensors'))
    assert torch.equal(loaded(x), expected)
    on_meta = timm.create_model(name, num_classes=7, device='meta').eval()
    on_meta.load_state_dict(load_file(tmp_path / 'model.safetensors'), assign=True)
    assert torch.equal(on_meta(x), expected)


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name in (
    'resnet20', 'resnet10_nbn', 'resnet10_ride', 'resnet10_ride_nbn_lr', 'resnet32_shike'))) for name in SMALL])
def test_compilers_and_exporters(name):
    shallow = {'num_blocks': 1} if timm.get_pretrained_cfg(name).input_size[-1] < 224 else {}
    fewer = {'num_experts': 2} if '_ride' in name else {}
    model = randomize(timm.create_model(name, num_classes=7, **shallow, **fewer)).eval()
    x = images(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit is deprecated, timm's contract still has it
        expected = model(x)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
        buffer.seek(0)
        batch = torch.export.Dim('batch', min=1, max=64)
        for compiled in (
                torch.jit.load(buffer), torch.fx.symbolic_trace(model),
                torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module(),
                torch.compile(model, backend='eager', fullgraph=True)):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_modes_of_use(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.1).train()
    x = images(model)[:, :1]
    model.set_grad_checkpointing()
    model(x).sum().backward()
    model.set_grad_checkpointing(False)
    model = model.to(memory_format=torch.channels_last).eval()
    expected = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast('cpu', torch.bfloat16):
        assert (model(x).float() - expected).abs().max() <= 0.1 * expected.abs().max() + 0.01
    half = timm.create_model(name, num_classes=7, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.eval()(images(half).bfloat16()).isfinite().all()


@pytest.mark.parametrize('name', ['resnet20_nbn', 'resnet10_nbn'])
def test_gradient_and_sharing_are_recorded_as_model_arguments(name, tmp_path):
    model = timm.create_model(name, num_classes=5, gradient='released', share_alpha=False)
    layers = nbn_layers(model).values()
    assert len({layer.scale for layer in layers}) == len(layers)
    assert not any(layer.cap_gradient for layer in layers)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert not any(layer.cap_gradient for layer in nbn_layers(restored).values())
    x = images(model)
    assert torch.equal(restored.eval()(x), model.eval()(x))


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('name', ['resnet20_nbn', 'resnet10_nbn'])
def test_the_head_is_a_keyword_too(name, head):
    model = timm.create_model(name, head=head)
    assert type(model.fc) is HEADS[head]
    model.reset_classifier(5)
    assert type(model.fc) is HEADS[head] and model.fc.out_features == 5
    with pytest.raises(nbn_timm.InputError, match="unknown head 'lineal'.*did you mean 'linear'"):
        timm.create_model(name, head='lineal')


@pytest.mark.parametrize('name', ['resnet20_nbn', 'resnet10_nbn'])
def test_initialisation_leaves_nbn_weights_at_one(name):
    model = timm.create_model(name)
    model.init_weights()
    assert all(torch.equal(layer.weight, torch.ones_like(layer.weight)) for layer in nbn_layers(model).values())
    assert all(not layer.bias.any() for layer in nbn_layers(model).values())


def test_option_a_shortcut_subsamples_and_pads():
    shortcut = resnet_cifar.PadShortcut(2, 6)
    x = torch.randn(1, 2, 5, 5)
    out = shortcut(x)
    assert out.shape == (1, 6, 3, 3)
    assert torch.equal(out[:, 2:4], x[:, :, ::2, ::2]) and not out[:, :2].any() and not out[:, 4:].any()


@pytest.mark.parametrize('indices', [5, [4], [-5]])
def test_intermediates_that_do_not_exist(indices):
    with pytest.raises(ValueError, match='there are 4'):
        timm.create_model('resnet20').forward_intermediates(torch.randn(1, 3, 32, 32), indices=indices)


def test_pruning_keeps_what_is_asked_for():
    model = timm.create_model('resnet20_nbn').eval()
    x = images(model)
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    for pruned, whole in zip(model.forward_intermediates(x, [0, 2], intermediates_only=True), expected, strict=True):
        assert torch.equal(pruned, whole)
    assert model(x).shape == (2, 32, 16, 16)

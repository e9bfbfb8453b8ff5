"""Multi-expert networks: their parts, and the checkpoints released with NBN and with RIDE."""
import argparse
import sys
import types
from pathlib import Path

import by_hand
import numpy as np
import pytest
import released
import timm
import torch
import torch.nn as nn
from test_layer_conversion import randomize

from nbn_timm import CosineLinear, InputError, RectifiedLinear, fold_nbn, merge_experts
from nbn_timm.layers import ExpertHead, ExpertStage, nbn_layers
from nbn_timm.models import RoutedExperts
from nbn_timm.models._released import recognize, rename_experts
from nbn_timm.models.routed_experts import router_settings
from nbn_timm.models.weight_files import load_weights, read_state_dict


def as_released(model: nn.Module, prefix: str = '') -> dict[str, tuple[int, ...]]:
    """Names and shapes of a RIDE network in its released form; no alphas but `scale_factor`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in model.state_dict().items():
        parts = key.split('.')
        if key.endswith('.scale.alpha'):
            continue
        if parts[0].startswith('layer') and parts[2].isdecimal():
            key = f'{parts[0]}s.{parts[2]}.{parts[1]}.{".".join(parts[3:])}'
        elif parts[0] == 'fc':
            key = f'linears.{".".join(parts[1:])}'
        shape = tuple(value.shape)
        if key.endswith('weight') and key.startswith('linears') and isinstance(model.fc[0], CosineLinear):
            shape = shape[::-1]
        shapes[f'{prefix}{key}'] = shape
    if nbn_layers(model):
        shapes = {'scale_factor': (24 + 29 * model.num_experts,), **shapes}
    return shapes


def images(size: int, number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def each_expert(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits of each expert [B, E, C]."""
    shared = model.forward_shared(x)
    return torch.stack([model.forward_expert(shared, expert)[1] for expert in range(model.num_experts)], dim=1)


# The networks: a name, its arguments, input size, groups of the convolutions, and the prefix of the released code.
NETWORKS = {
    'plain RIDE of the NBN release': ('resnet50_ride', {}, 64, 1, ''),
    'NBN with linear heads': ('resnet50_ride_nbn', {}, 64, 1, ''),
    'NBN with four reduced experts': ('resnet50_ride_nbn_lr', dict(num_experts=4, reduced=True), 64, 1, 'module.'),
    'ResNeXt-50 of RIDE': ('resnext50_ride', dict(reduced=True, head='cosine'), 64, 32, 'module.backbone.'),
    'ResNet-10 of RIDE': ('resnet10_ride', dict(num_experts=2, reduced=True, head='cosine'), 64, 1, 'backbone.'),
    'RIDE with a shared layer3': ('resnet50_ride', dict(share_layer3=True, num_experts=2), 64, 1, 'backbone.'),
    'CIFAR': ('resnet32_ride', dict(head='cosine'), 32, 1, 'backbone.'),
    'CIFAR, six experts of full width': ('resnet32_ride', dict(num_experts=6, reduced=False), 32, 1, 'backbone.'),
}


@pytest.mark.parametrize('what', [
    pytest.param(what, marks=[pytest.mark.slow] * ('50_' in name)) for what, (name, *_) in NETWORKS.items()])
@torch.no_grad()
def test_released_checkpoints_give_what_their_tensors_say(what, tmp_path):
    """Each expert's and the mean logits, against the network written out by hand."""
    name, args, size, groups, prefix = NETWORKS[what]
    classes = 20
    fresh = timm.create_model(name, num_classes=classes, device='meta', **args)
    bare = released.state_dict(as_released(fresh))
    torch.save(dict(arch='whatever', state_dict={f'{prefix}{key}': value for key, value in bare.items()}),
               tmp_path / 'released.pth')

    found = recognize(read_state_dict(tmp_path / 'released.pth'))
    assert found is not None and (found.arch, found.num_classes) == (name, classes)
    assert found.form == ('RIDE' if 'backbone' in prefix else 'NBN')
    assert {**found.model_args, **args} == found.model_args | args  # no contradiction
    assert found.model_args['num_experts'] == args.get('num_experts', 3)

    expected = by_hand.expert_logits(bare, images(size), fresh.num_experts, groups)
    loaded = timm.create_model(name, num_classes=classes, **args)
    load_weights(loaded, tmp_path / 'released.pth')
    for model in (timm.create_model(name, pretrained=True, num_classes=classes,
                                    pretrained_cfg_overlay=dict(file=str(tmp_path / 'released.pth'))), loaded):
        model.eval()
        assert released.relative_error(each_expert(model, images(size)), expected) < 1e-5
        assert released.relative_error(model(images(size)), expected.mean(dim=1)) < 1e-5


def test_weights_of_other_experts_than_asked_for_are_refused(tmp_path):
    torch.save(timm.create_model('resnet32_ride', num_experts=2).state_dict(), tmp_path / 'two.pth')
    overlay = dict(file=str(tmp_path / 'two.pth'))
    with pytest.raises(InputError, match='num_experts=2, but num_experts=3 was asked for'):
        timm.create_model('resnet32_ride', pretrained=True, pretrained_cfg_overlay=overlay, num_experts=3)
    assert timm.create_model('resnet32_ride', pretrained=True, pretrained_cfg_overlay=overlay).num_experts == 2
    with pytest.raises(InputError, match='do not fit resnet32_ride'):
        load_weights(timm.create_model('resnet32_ride'), tmp_path / 'two.pth')


def test_another_number_of_classes_leaves_out_every_classifier(tmp_path):
    torch.save(timm.create_model('resnet32_ride_nbn_lr').state_dict(), tmp_path / 'hundred.pth')
    overlay = dict(file=str(tmp_path / 'hundred.pth'))
    model = timm.create_model('resnet32_ride_nbn_lr', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert [head.out_features for head in model.fc] == [7, 7, 7]
    assert all(not head.bn.running_mean.any() for head in model.fc)


@pytest.fixture
def ride_configuration(monkeypatch):
    """An object such as RIDE's training pickles beside the weights, of a class that says so if it is woken."""
    def wake(self, state):
        pytest.fail('the class was used')

    module = types.ModuleType('parse_config')
    module.ConfigParser = type('ConfigParser', (), dict(__module__='parse_config', __setstate__=wake))
    monkeypatch.setitem(sys.modules, 'parse_config', module)
    configuration = module.ConfigParser()
    configuration.resume, configuration.levels = Path('saved/models'), {0: 30}
    return configuration


def test_a_checkpoint_with_rides_configuration_is_read_without_running_it(ride_configuration, tmp_path):
    weights = {'backbone.conv1.weight': torch.ones(2)}
    best = np.float64(0.5)
    torch.save(dict(state_dict=weights, config=ride_configuration, monitor_best=best), tmp_path / 'ride.pth')
    assert read_state_dict(tmp_path / 'ride.pth').keys() == weights.keys()
    torch.save(dict(state_dict=weights, config=argparse.ArgumentParser), tmp_path / 'other.pth')
    with pytest.raises(InputError, match='asks for code'):
        read_state_dict(tmp_path / 'other.pth')


def test_widths_and_heads_have_the_published_sizes():
    def parameters(name, **args):
        return sum(value.numel() for value in timm.create_model(name, device='meta', **args).parameters())

    assert round(parameters('resnet50_ride', reduced=True, head='cosine') / 1e6, 1) == 43.7
    assert parameters('resnet32_ride', head='cosine') == 783_856  # SADE's network, by building it
    assert parameters('resnet32_ride', head='cosine', reduced=False) == 1_362_064  # BalPoE's
    # The release counts 140 entries of `scale_factor` where there are four alphas.
    assert parameters('resnet50_ride_nbn', num_experts=4, reduced=True) == 57_758_828 - 140 + 4


def test_experts_of_the_last_stage_alone_with_channels_of_ones_own():
    """Three experts of 88 channels have the size of one network of 160: parameters counted by hand."""
    model = timm.create_model('resnet32_ride', num_blocks=2, channels=(16, 64, 88), share_layer2=True,
                              conv_shortcut=True, num_classes=100).eval()
    stem, first = 3 * 9 * 16 + 32, 4 * (16 * 16 * 9 + 32)
    second = 16 * 64 * 9 + 3 * 64 * 64 * 9 + 4 * 128 + 16 * 64 + 128
    expert = 64 * 88 * 9 + 3 * 88 * 88 * 9 + 4 * 176 + 64 * 88 + 176 + 88 * 100 + 100
    assert sum(value.numel() for value in model.parameters()) == stem + first + second + 3 * expert
    x = images(32)
    shared = model.forward_shared(x)
    assert shared.shape[1:] == (64, 16, 16)
    logits = torch.stack([model.forward_expert(shared, expert)[1] for expert in range(3)])
    torch.testing.assert_close(model(x), logits.mean(0))
    assert [info['num_chs'] for info in model.feature_info] == [16, 16, 64, 264]
    with pytest.raises(InputError, match='share_layer2 and complete cannot go together'):
        timm.create_model('resnet32_ride', share_layer2=True, complete=True)
    for bad in ((16, 64), (16, 32, 64, 128), 16):
        with pytest.raises(InputError, match='give the channels of three stages'):
            timm.create_model('resnet32_ride', channels=bad)


@pytest.mark.fast
@pytest.mark.parametrize('experts', [1, 2, 3, 4, 6])
def test_any_number_of_experts(experts):
    model = timm.create_model('resnet32_ride_nbn', num_experts=experts, num_classes=5)
    assert model.pretrained_cfg['classifier'] == tuple(f'fc.{expert}' for expert in range(experts))
    assert len({layer.scale for layer in nbn_layers(model).values()}) == experts
    model.set_expert_logits()
    assert model.train()(images(32)).shape == (2, experts, 5)
    assert model.eval()(images(32)).shape == (2, 5)
    for bad in (0, 2.5, 'three'):
        with pytest.raises(InputError, match='num_experts'):
            timm.create_model('resnet32_ride', num_experts=bad)


def test_the_switch_to_experts_survives_a_new_classifier_and_is_off_by_default():
    model = timm.create_model('resnet10_ride', num_classes=5).train()
    assert model(images(64)).shape == (2, 5)
    model.set_expert_logits()
    model.reset_classifier(4)
    out = model(images(64))
    assert out.shape == (2, 3, 4)
    model.set_expert_logits(False)
    torch.testing.assert_close(model(images(64)), out.mean(dim=1))


def test_experts_start_apart_and_do_not_mix():
    torch.manual_seed(0)
    model = timm.create_model('resnet32_ride_nbn', num_classes=5).train()
    model.set_expert_logits()
    first, second = (model.layer2[0][expert].conv1.weight for expert in (0, 1))
    assert not torch.equal(first, second)
    model(images(32))[:, 1].square().sum().backward()
    for name, parameter in model.named_parameters():
        parts = name.split('.')
        if parts[0] in ('layer2', 'layer3'):
            assert bool(parameter.grad is not None and parameter.grad.any()) == (parts[2] == '1'), name
        elif parts[0] == 'fc':
            assert bool(parameter.grad is not None and parameter.grad.any()) == (parts[1] == '1'), name


@pytest.mark.parametrize('pool', ['avg', 'max', 'catavgmax'])
def test_pooling_keeps_the_experts_apart(pool):
    torch.manual_seed(0)
    model = timm.create_model('resnet10_ride', num_classes=5, global_pool=pool).eval()
    x = images(64)
    torch.testing.assert_close(each_expert(model, x).mean(dim=1), model(x))
    torch.testing.assert_close(merge_experts(model)(x), model(x))


@pytest.mark.parametrize('name', ['resnet32_ride', 'resnet32_ride_nbn_lr', 'resnet10_ride_nbn'])
@torch.no_grad()
@pytest.mark.fast
def test_heads_merge_into_one_linear(name):
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, num_classes=7)).eval()
    x = images(64)
    expected = model(x)
    for merged in (merge_experts(model), merge_experts(fold_nbn(model)), timm.models.reparameterize_model(model)):
        assert type(merged.fc) is nn.Linear
        assert released.relative_error(merged(x), expected) < 1e-5
    assert not any(isinstance(module, RectifiedLinear) for module in merge_experts(model).modules())
    assert isinstance(model.fc, ExpertHead)


def test_cosine_heads_do_not_merge():
    model = timm.create_model('resnet32_ride', head='cosine').eval()
    with pytest.raises(InputError, match='cosines'):
        merge_experts(model)
    with pytest.raises(InputError, match='no heads of experts'):
        merge_experts(timm.create_model('resnet20'))
    x = images(32)
    torch.testing.assert_close(timm.models.reparameterize_model(model)(x), model(x))


def test_cosine_head_is_scaled_cosines():
    torch.manual_seed(0)
    head, x = CosineLinear(6, 4), torch.randn(3, 6)
    expected = 30 * torch.stack([torch.cosine_similarity(x, vector[None]) for vector in head.weight], dim=1)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(4))


def test_a_stage_of_experts_is_each_experts_stage():
    torch.manual_seed(0)
    model = timm.create_model('resnet32_ride').eval()
    stage, x = model.layer3, torch.randn(2, 72, 8, 8)
    assert isinstance(stage, ExpertStage)
    expected = torch.cat([stage.expert(part, expert) for expert, part in enumerate(x.chunk(3, dim=1))], dim=1)
    assert torch.equal(stage(x), expected)
    assert torch.equal(nn.Sequential(*stage)(x), expected)  # block by block, as gradient checkpointing calls it


def test_experts_take_their_shares_in_one_split():
    """Whose backward pass is one concatenation, in the layout of the maps."""
    block = timm.create_model('resnet32_ride').layer3[0]
    x = torch.randn(2, 72, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    parts = block.split(x)
    splits = {part.grad_fn for part in parts}
    assert len(splits) == 1
    gradients = [torch.randn_like(part) for part in parts]
    torch.autograd.backward(parts, gradients)
    assert torch.equal(x.grad, torch.cat(gradients, dim=1))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_layer_decay_and_checkpointing_go_block_by_block():
    from timm.optim import param_groups_layer_decay
    model = timm.create_model('resnet32_ride')
    scales = sorted({group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.5)})
    assert len(scales) == len(param_groups_layer_decay(timm.create_model('resnet32'), layer_decay=0.5)) // 2
    torch.manual_seed(0)
    x = images(32, 4)
    model.train()(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@torch.no_grad()
def test_later_experts_compute_only_the_images_that_go_on(monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model('resnet32_ride', num_classes=6)
    x = images(32, 16) * torch.linspace(0.2, 2, 16)[:, None, None, None]
    network.train()(x)  # running statistics that keep the images apart
    model = RoutedExperts(network, top_k=4)
    decisions = model.train()(x)[0][:, 0].sort().values
    model.router.decide.bias.sub_(decisions[9:11].mean())  # six go on
    asked = []
    forward_expert = network.forward_expert

    def recorded(shared, expert):
        asked.append((expert, len(shared)))
        return forward_expert(shared, expert)

    monkeypatch.setattr(network, 'forward_expert', recorded)
    used = model.eval().route(x)[1]
    assert asked[:2] == [(0, 16), (1, 6)]
    assert asked == [(expert, int((used > expert).sum())) for expert in range(int(used.max()))]


@torch.no_grad()
def test_a_released_assignment_module_routes_as_its_tensors_say(tmp_path):
    """RIDE's published networks contain one; every image alone by hand, all of them at once here."""
    top_k, classes = 5, 20
    fresh = timm.create_model('resnet32_ride', num_classes=classes, head='cosine')
    shapes = {**as_released(fresh), 'expert_help_pred_fc.weight': (1, top_k + 16), 'expert_help_pred_fc.bias': (1,)}
    for expert in range(2):
        shapes |= {f'expert_help_pred_hidden_fcs.{expert}.weight': (16, 48),
                   f'expert_help_pred_hidden_fcs.{expert}.bias': (16,)}
    bare = released.state_dict(shapes)
    bare['expert_help_pred_fc.weight'] = torch.randn(1, top_k + 16, generator=torch.Generator().manual_seed(0))
    model = RoutedExperts(fresh, top_k).eval()
    x = images(32, 24) * torch.linspace(0.1, 3, 24)[:, None, None, None]
    for bias in (torch.zeros(1), None):
        if bias is None:  # half of the images are passed on after the first expert, none of them by a hair
            middle = model.train()(x)[0][:, 0].sort().values[11:13]
            bias = -middle.mean(dim=0, keepdim=True)
        bare['expert_help_pred_fc.bias'] = bias
        torch.save(dict(state_dict={f'backbone.{key}': value for key, value in bare.items()}), tmp_path / 'ea.pth')
        load_weights(model, tmp_path / 'ea.pth')
    model.eval()
    assert router_settings(rename_experts(read_state_dict(tmp_path / 'ea.pth'))) == dict(top_k=top_k, hidden=16)
    answers = [by_hand.routed(bare, image[None], 3, top_k) for image in x]
    logits, used = model.route(x)
    assert used.tolist() == [asked for _, asked in answers]
    assert {1, 3} <= set(used.tolist())
    assert released.relative_error(logits, torch.stack([mean for mean, _ in answers])) < 1e-5
    # Without the module it is the network of all experts.
    plain = timm.create_model('resnet32_ride', num_classes=classes, head='cosine').eval()
    load_weights(plain, tmp_path / 'ea.pth')
    assert torch.equal(plain(x), model.network(x))

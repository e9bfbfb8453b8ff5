"""NBN into timm's models, folded out again, synchronised, and protected from converters that would drop it."""
import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from forks import run_ranks
from timm.layers import convert_splitbn_model, freeze_batch_norm_2d
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from timm.models import reparameterize_model

from nbn_timm import InputError, add_nbn, convert_sync_batchnorm, fold_nbn
from nbn_timm.layers import NormalizedBatchNorm2d, RectifiedLinear, SyncNormalizedBatchNorm2d, nbn_layers

MODELS = {'resnet50d': 10, 'regnety_016': 7, 'efficientnet_b0': 3, 'mobilenetv3_large_100': 1}


def randomize(model: nn.Module) -> nn.Module:
    """Give normalisation layers values that a mistake would show in."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
        for layer in nbn_layers(model).values():
            layer.scale.alpha.fill_(11.0)
    return model


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_nbn_goes_into_a_timm_model_and_out_again(name):
    model = timm.create_model(name, num_classes=10)
    plain_keys = model.state_dict().keys()
    assert add_nbn(model) is model
    randomize(model).eval()
    last_stage = model.feature_info[-1]['module']
    layers = nbn_layers(model)
    assert len(layers) == MODELS[name] and all(layer.startswith(last_stage) for layer in layers)
    assert len(model.state_dict().keys() - plain_keys) == 1

    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    folded = fold_nbn(model)
    assert not nbn_layers(folded) and nbn_layers(model)
    fresh = timm.create_model(name, num_classes=10).eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    error = (fresh(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert torch.equal(reparameterize_model(model)(x), folded(x))


def test_nbn_changes_the_output_and_all_parameters_learn():
    model = timm.create_model('resnet50d', num_classes=10)
    before = model.eval()(torch.ones(1, 3, 64, 64))
    add_nbn(model)
    assert not torch.allclose(model(torch.ones(1, 3, 64, 64)), before)
    model.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(layer.weight.any() for layer in nbn_layers(model).values())  # timm zero-initialised some


def test_layers_and_sharing_can_be_chosen():
    model = add_nbn(timm.create_model('resnet18'), ['layer3', 'layer4'], layers=r'bn2$', share_alpha=False,
                    gradient='released', alpha=2.0)
    layers = nbn_layers(model)
    assert set(layers) == {'layer3.0.bn2', 'layer3.1.bn2', 'layer4.0.bn2', 'layer4.1.bn2'}
    assert len({layer.scale for layer in layers.values()}) == 4
    assert all(not layer.cap_gradient and layer.scale.alpha == 2 for layer in layers.values())
    shared = add_nbn(timm.create_model('resnet18'), ['layer3', 'layer4'])
    assert len({layer.scale for layer in nbn_layers(shared).values()}) == 2  # one for each stage


@pytest.mark.parametrize('stages, layers, message', [
    (['layer9'], '', "no stage 'layer9'"),
    (['fc'], '', 'no BatchNorm2d layer'),
    (['layer4'], 'bn7', "that matches 'bn7'"),
])
def test_wrong_stages_are_named(stages, layers, message):
    with pytest.raises(InputError, match=message):
        add_nbn(timm.create_model('resnet18'), stages, layers)


def test_models_without_normalisation_and_synchronised_models_are_refused():
    with pytest.raises(InputError, match='no BatchNorm2d layer, and no LayerNorm'):
        add_nbn(timm.create_model('test_nfnet'))
    with pytest.raises(InputError, match='SyncBatchNorm'):
        add_nbn(timm_convert_sync_batchnorm(timm.create_model('resnet18')))


@pytest.mark.parametrize('convert', [
    nn.SyncBatchNorm.convert_sync_batchnorm, timm_convert_sync_batchnorm, convert_splitbn_model, freeze_batch_norm_2d,
], ids=['torch sync', 'timm sync', 'timm split', 'timm freeze'])
@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_b0'])
def test_converters_that_would_drop_nbn_are_refused(convert, name):
    model = add_nbn(timm.create_model(name))
    with pytest.raises(InputError, match='would drop its normalisation'):
        convert(model)
    convert(fold_nbn(timm.create_model(name)))  # plain models are none of our business


@pytest.mark.parametrize('name', ['repvit_m0_9', 'fastvit_t8', 'repghostnet_050'])
@torch.no_grad()
def test_modules_that_fuse_their_own_batch_norm_wait_for_folding(name):
    model = timm.create_model(name, num_classes=3)
    randomize(add_nbn(model)).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    with pytest.raises(InputError, match='fold_nbn'):
        reparameterize_model(model)
    fused = reparameterize_model(fold_nbn(pickle.loads(pickle.dumps(model))))
    assert (fused(x) - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize('name, stage', [
    ('repvgg_a0', 'stages.3'), ('densenet121', 'features.norm5'), ('vgg11_bn', 'features.26'),
    ('nasnetalarge', 'cell_17'),
    # timm lists 'block.3', 'block.3' and 'blocks.15', which they do not have.
    ('mvitv2_tiny', 'stages.3'), ('twins_svt_small', 'blocks.3'), ('gemma4_vit_167m', 'encoder.blocks.15'),
])
def test_the_last_stage_is_found(name, stage):
    assert all(layer.startswith(stage) for layer in nbn_layers(add_nbn(timm.create_model(name, device='meta'))))


def test_a_layer_in_two_places_is_one_layer():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU(), norm)).eval()
    add_nbn(model, '0')
    assert model[0][1] is model[0][3] and isinstance(model[0][1], NormalizedBatchNorm2d)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(fold_nbn(model)(x), model(x)) and not nbn_layers(fold_nbn(model))


def test_a_single_layer_folds_and_is_not_converted_by_strangers():
    layer = randomize(NormalizedBatchNorm2d(4)).eval()
    assert type(fold_nbn(layer)) is nn.BatchNorm2d
    with pytest.raises(InputError, match='would drop its normalisation'):
        nn.SyncBatchNorm.convert_sync_batchnorm(layer)


def test_rectified_heads_fold_too():
    model = timm.create_model('resnet18', num_classes=10)
    model.fc = RectifiedLinear.from_linear(model.fc)
    randomize(model).eval()
    x = torch.randn(2, 3, 64, 64)
    folded = fold_nbn(model)
    assert type(folded.fc) is nn.Linear
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_sync_conversion_keeps_nbn():
    model = randomize(add_nbn(timm.create_model('efficientnet_b0', num_classes=4))).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    layers = nbn_layers(converted)
    assert len(layers) == MODELS['efficientnet_b0']
    assert all(isinstance(layer, SyncNormalizedBatchNorm2d) for layer in layers.values())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) > 40
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert len({layer.scale for layer in layers.values()}) == 1
    model_layer, = [m for n, m in nbn_layers(model).items() if n.endswith('0.bn2')]
    layer, = [m for n, m in layers.items() if n.endswith('0.bn2')]
    y = torch.randn(2, layer.num_features, 4, 4)
    assert torch.equal(layer(y), model_layer(y))
    assert expected.isfinite().all()


def _sync_worker(folder: Path) -> None:
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    layer, x = _sync_problem()
    layer = convert_sync_batchnorm(layer)
    # Parts of unequal size: the statistics must weigh samples, not processes.
    part = x[:5] if rank == 0 else x[5:]
    part = part.clone().requires_grad_()
    out = layer(part)
    out.pow(3).sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    torch.save([out.detach(), part.grad, layer.running_mean, layer.running_var, *gradients], folder / f'{rank}.pt')
    dist.destroy_process_group()


def _sync_problem() -> tuple[NormalizedBatchNorm2d, torch.Tensor]:
    torch.manual_seed(0)
    layer = randomize(NormalizedBatchNorm2d(6)).train()
    return layer, torch.randn(8, 6, 3, 4) * 2 + 5


def test_synchronised_nbn_on_two_processes_is_nbn_on_the_whole_batch(tmp_path):
    run_ranks(_sync_worker, tmp_path)
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    layer, x = _sync_problem()
    x.requires_grad_()
    out = layer(x)
    out.pow(3).sum().backward()
    expected = [out, x.grad, layer.running_mean, layer.running_var, *[p.grad for p in layer.parameters()]]
    for index, whole in enumerate(expected):
        both = torch.cat([ranks[0][index], ranks[1][index]]) if index < 2 else ranks[0][index]
        torch.testing.assert_close(both, whole.detach(), rtol=1e-4, atol=1e-4)
        if index >= 2:
            assert torch.equal(ranks[0][index], ranks[1][index])

"""Released checkpoints through this package, against outputs, losses and gradients of the released code."""
import numpy as np
import pytest
import released
import timm
import torch
import torch.nn.functional as F

import nbn_timm  # noqa: F401
from nbn_timm import InputError, fold_nbn, merge_experts
from nbn_timm.layers import nbn_layers
from nbn_timm.models._released import rename_experts
from nbn_timm.models.weight_files import load_weights

FIGURES = released.FIGURES['resnext50_nbn']


@pytest.fixture(scope='module')
def weights() -> dict[str, torch.Tensor]:
    return released.state_dict(FIGURES['shapes'])


@pytest.fixture(scope='module')
def released_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp('released') / 'model_best.pth.tar'
    torch.save(released.checkpoint(weights), path)
    return path


@pytest.fixture(scope='module')
def measured():
    return np.load(released.REFERENCE / 'resnext50_nbn.npz')


@pytest.fixture(scope='module')
def model(released_file):
    return timm.create_model(
        'resnext50_nbn', pretrained=True, pretrained_cfg_overlay=dict(file=str(released_file)), gradient='released')


@torch.no_grad()
def test_eval_output(model, measured):
    assert released.relative_error(model.eval()(released.images()), measured['output']) < 1e-5


@torch.no_grad()
def test_folded_output_in_plain_timm(model, measured):
    plain = timm.create_model('resnext50_32x4d').eval()
    plain.load_state_dict(fold_nbn(model.eval()).state_dict(), strict=True)
    assert released.relative_error(plain(released.images()), measured['output']) < 1e-5


def test_training_loss_and_gradients(model, weights, measured):
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = F.cross_entropy(model.train()(released.images(4, seed=11)), torch.tensor([3, 250, 600, 999]))
    loss.backward()
    parameters = dict(model.named_parameters())
    assert loss.item() == pytest.approx(float(measured['train_loss']), rel=1e-4)
    alpha, = [parameter for name, parameter in parameters.items() if name.endswith('alpha')]
    assert alpha.grad.item() == pytest.approx(float(measured['scale_factor_grad'][0]), rel=1e-4)
    for name, norm in FIGURES['grad_norms'].items():
        if name != 'scale_factor':
            assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), name  # 1e-7 with AVX-512
    model.zero_grad()
    model.load_state_dict(statistics, strict=False)


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_every_way_of_loading_gives_the_same_weights(model, weights, prefix, tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(released.checkpoint(weights, prefix), path)
    other = timm.create_model('resnext50_nbn')
    load_weights(other, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_one_alpha_per_layer_loads_a_released_checkpoint(released_file, weights):
    model = timm.create_model('resnext50_nbn', share_alpha=False)
    load_weights(model, released_file)
    assert {layer.scale.alpha.item() for layer in nbn_layers(model).values()} == {weights['scale_factor'][0].item()}


# Three experts with NBN in ten layers each, one alpha per expert, and logit rectification.
EXPERTS = released.FIGURES['resnet50_ride_NBN_lr']


@pytest.fixture(scope='module')
def experts(tmp_path_factory):
    path = tmp_path_factory.mktemp('experts') / 'model_best.pth.tar'
    torch.save(released.checkpoint(released.state_dict(EXPERTS['shapes'])), path)
    return timm.create_model(
        'resnet50_ride_nbn_lr', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), gradient='released')


@torch.no_grad()
def test_experts_and_their_mean(experts):
    measured = np.load(released.REFERENCE / 'resnet50_ride_NBN_lr.npz')
    experts.eval()
    output = experts(released.images())
    assert released.relative_error(output, measured['output']) < 1e-5
    shared = experts.forward_shared(released.images())
    logits = torch.stack([experts.forward_expert(shared, expert)[1] for expert in range(3)], dim=1)
    assert released.relative_error(logits, measured['logits']) < 1e-5
    folded = fold_nbn(experts)
    assert released.relative_error(folded(released.images()), measured['output']) < 1e-5
    merged = merge_experts(folded, inplace=True)
    assert released.relative_error(merged(released.images()), measured['output']) < 1e-5


def test_experts_training_loss_and_gradients(experts):
    """Logit rectification over four images makes the gradients ill-conditioned: they agree less closely."""
    measured = np.load(released.REFERENCE / 'resnet50_ride_NBN_lr.npz')
    statistics = {name: buffer.clone() for name, buffer in experts.named_buffers()}
    loss = F.cross_entropy(experts.train()(released.images(4, seed=11)), torch.tensor([3, 250, 600, 999]))
    loss.backward()
    assert loss.item() == pytest.approx(float(measured['train_loss']), rel=1e-5)
    parameters = dict(experts.named_parameters())
    alphas = [parameters[f'layer4.0.{expert}.bn1.scale.alpha'].grad.item() for expert in range(3)]
    assert alphas == pytest.approx(measured['scale_factor_grad'][:3].tolist(), rel=5e-3)
    for name, norm in EXPERTS['grad_norms'].items():
        if name != 'scale_factor':
            ours, = rename_experts({name: torch.zeros(1, 1)})
            assert parameters[ours].grad.norm().item() == pytest.approx(norm, rel=2e-3), name
    experts.zero_grad()
    experts.load_state_dict(statistics, strict=False)


def test_a_plain_network_refuses_nbn_weights(released_file):
    with pytest.raises(InputError, match='garbage'):
        load_weights(timm.create_model('resnext50_32x4d'), released_file)

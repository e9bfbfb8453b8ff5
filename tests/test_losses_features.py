"""Losses on features: what the model hands over, under EMA, compilation and several processes."""
import pytest
import timm
import torch
from test_losses import class_counts
from test_train_run import LAST, MODEL, data_flags, images, rows, run_two_processes, weights  # noqa: F401
from timm.task import ClassificationTask

import nbn_timm.cli.train as train
import nbn_timm.models.create
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss, takes_features
from nbn_timm.training.distributed import World
from nbn_timm.training.features import WithFeatures
from nbn_timm.training.optim import AverageSettings
from nbn_timm.training.task import evaluation_model, prepare_task

LOSS = 'influence_balanced'


@pytest.mark.parametrize('name, size', [
    ('resnet20_nbn', 32), ('resnet32_ride', 32), ('resnet18', 64), ('test_vit', 160), ('test_convnext', 64),
    ('test_efficientnet', 64)])
def test_features_are_what_the_classifier_sees(name, size):
    """In timm's models, this package's and one of several experts: the classifier on the features gives the logits."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    with_features = WithFeatures(model)
    x = torch.randn(2, 3, size, size)
    expected = model(x)
    assert torch.equal(with_features.eval()(x), expected)
    with_features.training = True  # of the wrapper alone, so that BatchNorm and dropout stay as they are
    logits, features = with_features(x)
    assert torch.equal(logits, expected)
    assert features.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(features), logits)


def test_the_gradient_flows_back_from_the_features():
    model = WithFeatures(timm.create_model('resnet20', num_classes=5))
    _, features = model(torch.randn(4, 3, 32, 32))
    features.sum().backward()
    assert model.module.conv1.weight.grad.abs().sum() > 0
    assert model.module.fc.weight.grad is None


def test_a_model_without_timms_heads_is_refused():
    with pytest.raises(InputError, match='Linear does not tell its features'):
        WithFeatures(torch.nn.Linear(3, 3))


def test_which_losses_take_features():
    assert takes_features(LOSS) and not takes_features('cross_entropy')


def test_training_is_that_of_the_formula_on_the_models_own_parts():
    """One step of SGD at rate 1, against autograd through the network taken apart by hand."""
    torch.manual_seed(0)
    model = timm.create_model('resnet20', num_classes=3)
    loss = create_loss(LOSS, class_counts(10, 5, 2))
    x, target = torch.randn(6, 3, 32, 32), torch.tensor([0, 0, 0, 1, 1, 2])
    maps = model.forward_features(x)
    features = maps.mean(dim=(2, 3))
    expected = torch.autograd.grad(loss((model.fc(features), features), target), list(model.parameters()))
    task = ClassificationTask(WithFeatures(model), loss, device=torch.device('cpu'), verbose=False)
    actual = torch.autograd.grad(task(x, target)['loss'], list(model.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_averages_and_checkpoints_have_the_models_own_keys_and_values():
    model = timm.create_model('resnet20', num_classes=3)
    task = ClassificationTask(WithFeatures(model), create_loss(LOSS, class_counts(10, 5, 2)), verbose=False)
    prepare_task(task, World(torch.device('cpu')), AverageSettings(
        model_ema=True, model_ema_decay=0.5, model_ema_warmup=False), None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    average = None
    for step in range(1, 4):
        task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
        weight = model.fc.weight.detach()
        average = weight.clone() if average is None else 0.5 * (average + weight)
    for ema in (False, True):
        state = task.get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict']
        assert state.keys() == model.state_dict().keys()
    torch.testing.assert_close(state['fc.weight'], average)
    task.load_checkpoint_state(model.state_dict(), ema=True)
    evaluated = evaluation_model(task).eval()(torch.zeros(2, 3, 32, 32))
    torch.testing.assert_close(evaluated, model.eval()(torch.zeros(2, 3, 32, 32)))


def test_a_compiled_and_averaged_run_resumes(images, tmp_path):  # noqa: F811
    flags = [*data_flags(images), *MODEL, '--model-ema', '--loss', LOSS, '--loss-kwargs', 'start_epoch=1', 'alpha=10',
             '--lr', '0.01', '--torchcompile', 'eager', '--output', str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', '2'])
    plain = nbn_timm.models.create.create_model('resnet20_nbn', 4).state_dict()
    checkpoint = torch.load(tmp_path / 'run' / LAST, weights_only=True)
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys() == plain.keys()
    train.main([*flags, '--epochs', '3', '--resume', 'auto'])
    assert len(rows(tmp_path / 'run')) == 3


def test_processes_are_one_large_batch(images, tmp_path):  # noqa: F811
    """Without BatchNorm and augmentation, and the loss being a mean over images, two processes do what one does."""
    flags = [*data_flags(images, 'train', 'test'), '--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size',
             '32', '--device', 'cpu', '--workers', '0', '--no-aug', '--global-batch-size', '8', '--epochs', '2',
             '--loss', LOSS, '--loss-kwargs', 'alpha=10', '--lr', '0.001', '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'one'])
    run_two_processes([*flags, '--experiment', 'two'])
    expected = weights(tmp_path / 'one')
    for key, value in weights(tmp_path / 'two').items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    first, second = ([row['train_loss'] for row in rows(tmp_path / run)] for run in ('one', 'two'))
    assert second == pytest.approx(first, rel=1e-4)

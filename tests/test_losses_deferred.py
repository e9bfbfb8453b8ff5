"""Deferred losses (DRW), the recipes of all losses, and losses in train.py."""
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_config import header, recipe, schedule
from test_losses import EVERY, TARGET, class_counts, inputs
from test_train_run import LAST, MODEL, assert_same, data_flags, images, rows, weights  # noqa: F401

import nbn_timm.cli.train as train
from nbn_timm.config import shipped_configs
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss, is_deferrable, number_of_views, takes_experts, takes_features, takes_streams
from nbn_timm.losses.deferred_loss import DeferredLoss
from nbn_timm.training.build import build_loss

COUNTS = class_counts(100, 10, 1)
SETTINGS = {  # of a loss, and the loss that it is before its epoch
    'seql': ({'threshold': 0.05}, ('cross_entropy', {})),
    'ldam': ({'weighting': 'effective_number', 'max_margin': 0.3}, ('ldam', {'max_margin': 0.3})),
    'class_balanced_focal': ({'gamma': 1.0, 'form': 'sigmoid'}, ('focal', {'gamma': 1.0, 'form': 'sigmoid'})),
}
CIFAR_RECIPES = [name for name, path in shipped_configs().items()
                 if name.startswith('cifar100_lt/') and 'stage' not in yaml.safe_load(path.read_text())]
BAG_OF_TRICKS = [name for name in CIFAR_RECIPES if 'Schedule of Bag of Tricks' in header(name)]


def value(loss, name):
    torch.manual_seed(0)
    return loss(inputs(name), TARGET)


@pytest.mark.parametrize('name', [name for name in EVERY if is_deferrable(name)])
def test_a_deferred_loss_starts_at_its_epoch_and_not_before(name):
    settings, (before, before_settings) = SETTINGS.get(name, ({}, ('cross_entropy', {})))
    loss = create_loss(name, COUNTS, start_epoch=3, **settings)
    logits = inputs('cross_entropy')
    first = create_loss(before, COUNTS, **before_settings)(logits, TARGET)
    then = value(create_loss(name, COUNTS, **settings), name)
    assert not torch.isclose(first, then, rtol=1e-3)
    for epoch in (0, 1, 2):
        loss.set_epoch(epoch)
        torch.testing.assert_close(value(loss, name), first)
    for epoch in (3, 4, 100):
        loss.set_epoch(epoch)
        assert torch.equal(value(loss, name), then)
    loss.set_epoch(1)  # the epoch alone counts, not what came before
    torch.testing.assert_close(value(loss, name), first)


def test_a_resumed_run_needs_no_state_of_a_deferred_loss():
    loss = create_loss('balanced_softmax', COUNTS, start_epoch=3)
    assert not loss.state_dict()
    loss.set_epoch(7)
    assert torch.equal(value(loss, 'balanced_softmax'), value(create_loss('balanced_softmax', COUNTS), 'cross_entropy'))


def test_cross_entropy_before_has_the_same_smoothing():
    loss = create_loss('balanced_softmax', COUNTS, start_epoch=3, smoothing=0.1)
    plain = create_loss('cross_entropy', smoothing=0.1)
    soft = torch.full((2, 3), 1 / 3)
    for target in (TARGET, soft):
        assert torch.equal(loss(inputs('cross_entropy'), target), plain(inputs('cross_entropy'), target))


def test_deferred_ldam_is_ldam_drw():
    """Cao et al.: LDAM with margins throughout, beta 0 before and beta 0.9999 after."""
    loss = create_loss('ldam', COUNTS, start_epoch=160, weighting='effective_number')
    margins = 30 * 0.5 * torch.tensor([100.0, 10.0, 1.0]) ** -0.25
    lowered = inputs('ldam') - torch.nn.functional.one_hot(TARGET, 3) * margins
    for epoch, beta in ((159, 0.0), (160, 0.9999)):
        loss.set_epoch(epoch)
        weight = (1 - beta) / (1 - beta ** torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64))
        expected = torch.nn.functional.cross_entropy(lowered, TARGET, weight.float())
        torch.testing.assert_close(value(loss, 'ldam'), expected)


@pytest.mark.parametrize('name, settings, message', [
    ('cross_entropy', {'start_epoch': 3}, "'cross_entropy' cannot be deferred"),
    ('ride', {'start_epoch': 3}, "'ride' cannot be deferred as a whole"),
    ('ride_balanced_softmax', {'start_epoch': 3}, 'cannot be deferred'),
    ('ldam', {'start_epoch': 3}, 'no class weights: give weighting=effective_number'),
    ('balanced_softmax', {'start_epoch': 0}, 'a whole number from 1'),
    ('balanced_softmax', {'start_epoch': -1}, 'a whole number from 1'),
    ('balanced_softmax', {'start_epoch': 2.5}, 'a whole number from 1'),
    ('balanced_softmax', {'start_epoch': '160'}, 'a whole number from 1'),
    ('balanced_softmax', {'start_epoch': True}, 'a whole number from 1'),
    ('balanced_softmax', {'startepoch': 3}, "did you mean 'start_epoch'"),
])
def test_what_cannot_be_deferred_is_one_sentence(name, settings, message):
    with pytest.raises(InputError, match=message) as error:
        create_loss(name, COUNTS, **settings)
    assert '\n' not in str(error.value)


@pytest.fixture
def one_batch(images, tmp_path):  # noqa: F811
    """Flags of runs without learning or augmentation whose epochs are one batch of all 20 images."""
    flags = [*data_flags(images, 'train', 'test'), *MODEL, '--no-aug', '-b', '20', '--lr', '0', '--output',
             str(tmp_path)]

    def losses(name: str, *more: str) -> list[float]:
        train.main([*flags, '--experiment', name, *more])
        return [row['train_loss'] for row in rows(tmp_path / name)]
    return losses


def test_train_starts_the_loss_at_its_epoch_and_after_a_resume(one_batch, tmp_path):
    config = tmp_path / 'deferred.yaml'
    config.write_text(yaml.safe_dump({'loss': 'balanced_softmax', 'loss_kwargs': {'start_epoch': 2}}))
    plain = one_batch('plain', '--epochs', '1')[0]
    balanced = one_batch('balanced', '--epochs', '1', '--loss', 'balanced_softmax')[0]
    assert abs(plain - balanced) > 0.05
    expected = pytest.approx([plain, plain, balanced, balanced], rel=1e-5)
    assert one_batch('whole', '--config', str(config), '--epochs', '4') == expected
    one_batch('resumed', '--config', str(config), '--epochs', '3')
    assert one_batch('resumed', '--config', str(config), '--epochs', '4', '--resume', 'auto') == expected


def test_a_resumed_run_with_a_random_loss_ends_where_the_whole_one_does(images, tmp_path):  # noqa: F811
    """The draws of the equalization loss are a function of the epoch, and so is its start."""
    flags = [*data_flags(images), *MODEL, '-b', '10', '--loss', 'seql', '--loss-kwargs', 'threshold=0.4',
             'start_epoch=1', '--sched', 'constant', '--output', str(tmp_path)]
    train.main([*flags, '--epochs', '4', '--experiment', 'whole'])
    for epochs in ('2', '4'):
        train.main([*flags, '--epochs', epochs, '--experiment', 'resumed', '--resume', 'auto'])
    assert_same(weights(tmp_path / 'resumed', LAST), weights(tmp_path / 'whole', LAST))


@pytest.mark.parametrize('flags, message', [
    (['--smoothing', '0.1', '--loss-kwargs', 'smoothing=0.1'], 'given twice'),
    (['--loss-kwargs', 'class_counts=3'], 'class_counts=3 cannot be set in this way: use --class-counts FILE'),
    (['--loss', 'seql', '--smoothing', '0.1'], "no setting 'smoothing'"),
    (['--loss', 'hcm', '--mixup', '1'], "'hcm' takes labels and no mixed targets"),
    (['--loss', 'influence_balanced', '--kd-checkpoint', 'teacher.pth'], 'takes features.*--kd-checkpoint'),
])
def test_wrong_combinations_are_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *MODEL, '-b', '4', '--epochs', '1', '--output', str(tmp_path), *flags])


def test_a_run_that_ends_before_its_loss_starts_says_so(images, tmp_path, capsys):  # noqa: F811
    train.main([*data_flags(images, 'train', 'test'), *MODEL, '--loss', 'cdt', '--loss-kwargs', 'start_epoch=1',
                '--epochs', '1', '--output', str(tmp_path)])
    assert "loss 'cdt' starts after 1 epochs, and this run ends after 1" in capsys.readouterr().out


@pytest.mark.parametrize('name', CIFAR_RECIPES)
def test_recipes_build_their_loss(name):
    settings = recipe(name)
    loss = build_loss(settings, SimpleNamespace(class_counts=class_counts(*range(100, 0, -1))), None)
    assert isinstance(loss, DeferredLoss) == ('start_epoch' in settings.loss.loss_kwargs)
    if hasattr(loss, 'prepare'):  # it learns with a network, see test_contrast
        return
    logits = torch.randn(4, 100)
    output = logits[:, None].repeat(1, 3, 1) if takes_experts(settings.loss.loss) else logits
    output = torch.stack([logits] * 2, dim=1) if takes_streams(settings.loss.loss) else output
    output = torch.stack([output] * number_of_views(settings.loss.loss)) if number_of_views(
        settings.loss.loss) > 1 else output
    output = (logits, torch.rand(4, 64)) if takes_features(settings.loss.loss) else output
    for epoch in (0, 199):
        if hasattr(loss, 'set_epoch'):
            loss.set_epoch(epoch)
        assert loss(output, torch.tensor([0, 1, 50, 99])).isfinite()


def test_published_losses_have_a_recipe():
    """All but the newest, which may have none yet."""
    assert {recipe(name).loss.loss for name in CIFAR_RECIPES} >= set(SETTINGS) | {'cross_entropy', 'balanced_softmax'}


@pytest.mark.parametrize('name', BAG_OF_TRICKS)
def test_bag_of_tricks_schedule(name):
    """From a third of the rate by fifths up to epoch 5, times 0.01 from epochs 160 and 180 on (counted from 1)."""
    milestones = (100, 160, 180) if 'influence' in name else (160, 180)

    def rate(epoch: int) -> float:
        warmup = min(1.0, (1 + 2 * epoch / 5) / 3)
        return 0.1 * warmup * 0.01 ** sum(epoch >= milestone for milestone in milestones)
    assert schedule(name) == pytest.approx([rate(epoch) for epoch in range(1, 201)], rel=1e-5)
    settings = recipe(name)
    optimizer = settings.optimizer
    assert (optimizer.opt, optimizer.momentum, optimizer.weight_decay) == ('sgd', 0.9, 2e-4)
    assert settings.batch.global_batch_size == 128


def test_there_are_recipes_of_bag_of_tricks():
    """The list of names above comes from the headers' words, and must not come out empty."""
    assert len(BAG_OF_TRICKS) == 12

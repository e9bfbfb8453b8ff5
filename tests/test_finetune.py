"""Training that begins with a network for other classes, and parts of a network that do not learn."""
import re
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import EvoNorm2dB0
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli.train import main as train
from nbn_timm.cli.train import parse_train
from nbn_timm.errors import InputError
from nbn_timm.layers import RectifiedLinear, add_nbn, nbn_layers
from nbn_timm.layers.frozen import is_frozen, keep_statistics, learn_statistics, unfreeze_nbn
from nbn_timm.models.create import create_model
from nbn_timm.models.run_folder import source_file
from nbn_timm.models.transfer import add_nbn_to_trained, classifier_names, load_pretrained_file, start_model
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.training.freezing import Freezing, parameters_up_to
from nbn_timm.training.optim import OptimizerSettings, create_optimizer

MODEL = 'test_efficientnet'


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Two sets of class folders, `first` of three classes and `second` of two, one of which is among the first."""
    root, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for name, classes in (('first', ('ant', 'bee', 'cat')), ('second', ('cat', 'dog'))):
        for split, number in (('train', 6), ('test', 2)):
            for label, kind in enumerate(classes):
                place = root / name / split / kind
                place.mkdir(parents=True)
                for index in range(number):
                    pixels = rng.normal(60 + 60 * label, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(place / f'{index}.png')
    return root


@pytest.fixture(scope='module')
def first(folder, tmp_path_factory) -> Path:
    """Folder of a run on the first set, which has been moved since."""
    output = tmp_path_factory.mktemp('output')
    train([*command(folder / 'first', output), '--model', MODEL, '--experiment', 'first', '--epochs', '1'])
    return Path(shutil.move(output / 'first', output / 'moved'))


def command(data: Path, output: Path) -> list[str]:
    return ['--dataset', 'folder', '--data-dir', str(data), '--img-size', '32', '--workers', '0', '--device', 'cpu',
            '--batch-size', '4', '--lr', '0.002', '--output', str(output)]


def state(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / 'last.pth.tar')['state_dict']


def test_a_run_of_other_classes_gives_all_but_the_classifier(first, folder, tmp_path, capsys):
    """From a folder that has been moved; the class that both have keeps its row, and rate 0 lets it be seen."""
    train([*command(folder / 'second', tmp_path), '--initial-checkpoint', str(first), '--experiment', 'second',
           '--epochs', '1', '--lr', '0', '--bn-momentum', '0'])
    assert 'all but the classifier, of which 1 classes of the same name keep their rows' in capsys.readouterr().out
    before, after = state(first), state(tmp_path / 'second')
    assert after['classifier.weight'].shape[0] == 2
    assert torch.equal(after['classifier.weight'][0], before['classifier.weight'][2])
    same = [key for key in before if not key.startswith('classifier') and 'running' not in key and 'num_b' not in key]
    assert all(torch.equal(after[key], before[key]) for key in same)


def test_classes_of_other_names_do_not_take_rows_by_position(first, folder, tmp_path, capsys):
    data = shutil.copytree(folder / 'first', tmp_path / 'renamed')
    for split in ('train', 'test'):
        for old, new in (('ant', 'xenops'), ('bee', 'ant'), ('cat', 'yak')):
            (data / split / old).rename(data / split / f'_{new}')
        for new in ('xenops', 'ant', 'yak'):
            (data / split / f'_{new}').rename(data / split / new)
    train([*command(data, tmp_path), '--initial-checkpoint', str(first), '--experiment', 'renamed', '--epochs', '1',
           '--lr', '0'])
    before, after = state(first)['classifier.weight'], state(tmp_path / 'renamed')['classifier.weight']
    assert 'of which 1 classes' in capsys.readouterr().out
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1]) and not torch.equal(after[2], before[2])


@pytest.mark.parametrize('form', ['file', 'folder', 'timm'])
def test_weights_lie_in_a_file_or_a_folder(tmp_path, form):
    torch.manual_seed(0)
    model = create_model(MODEL, 7)
    path = tmp_path / 'weights.pth'
    if form == 'file':
        torch.save(model.state_dict(), path)
    elif form == 'folder':
        path = tmp_path
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    else:
        path = tmp_path / 'folder'
        timm.models.save_for_hf(model, path)
    new = create_model(MODEL, 2)
    assert load_pretrained_file(new, path) == 'all but the classifier, which begins anew'
    assert torch.equal(new.conv_stem.weight, model.conv_stem.weight)
    assert not new.classifier.weight.any() and not new.classifier.bias.any()  # so the loss begins at log 2
    fitting = create_model(MODEL, 7)
    assert load_pretrained_file(fitting, path) == ''
    assert torch.equal(fitting.classifier.weight, model.classifier.weight)


def test_a_classifier_for_other_classes_on_published_weights_begins_at_zero(tmp_path):
    torch.manual_seed(0)
    model = create_model(MODEL, 7)
    timm.models.save_for_hf(model, tmp_path)
    for classes, begins in ((2, True), (7, False), (None, False)):
        found, _ = start_model(f'local-dir:{tmp_path}', classes, None, pretrained=True)
        assert torch.equal(found.conv_stem.weight, model.conv_stem.weight)
        assert bool(found.classifier.weight.any()) is not begins
    found, _ = start_model(MODEL, 2, None)
    assert found.classifier.weight.any()  # all of it is to be trained


def test_weights_that_are_not_there_or_of_another_network_are_refused(tmp_path):
    with pytest.raises(InputError, match='there is no file or folder'):
        source_file(tmp_path / 'missing')
    with pytest.raises(InputError, match='has no weights: give a file'):
        source_file(tmp_path)
    torch.save(create_model('test_resnet', 3).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(InputError, match='do not fit test_efficientnet: they differ in'):
        load_pretrained_file(create_model(MODEL, 3), tmp_path / 'other.pth')


def test_weights_with_nbn_for_a_network_without_say_what_can_be_typed(tmp_path):
    """No architecture has _nbn in its name here."""
    torch.save(add_nbn(create_model(MODEL, 3)).state_dict(), tmp_path / 'nbn.pth')
    with pytest.raises(InputError, match='test_efficientnet has none.*give --add-nbn .*--initial-checkpoint of nbn-tr'):
        load_pretrained_file(create_model(MODEL, 3), tmp_path / 'nbn.pth')
    assert start_model(MODEL, 3, str(tmp_path / 'nbn.pth'), nbn=True)[1] == []


def test_a_norm_that_cannot_keep_its_function_says_what_can_be_typed():
    model = create_model('resnet18', 3, model_kwargs=dict(zero_init_last=True))
    with pytest.raises(InputError, match='weight of zeros, which NBN cannot have: leave out --add-nbn, or the weights'):
        add_nbn_to_trained(model)


@pytest.mark.parametrize('name', ['test_efficientnet', 'test_resnet', 'test_vit', 'test_convnext', 'resnet20_nbn_lr'])
def test_the_classifier_is_where_the_number_of_classes_shows(name):
    three, five = (create_model(name, classes).state_dict() for classes in (3, 5))
    prefixes = tuple(f'{part}.' for part in classifier_names(create_model(name, 3)))
    assert {key for key in three if three[key].shape != five[key].shape} <= {
        key for key in three if key.startswith(prefixes)}
    assert prefixes


@pytest.mark.parametrize('name', ['test_efficientnet', 'resnet18', 'resnet20'])
def test_nbn_on_trained_weights_keeps_the_function(name):
    torch.manual_seed(0)
    model = create_model(name, 3)
    for module in model.modules():  # as after a training: weights of all sizes, and one that is zero
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.7, 0.5)
            nn.init.normal_(module.bias)
            module.weight.data[0] = 0.0
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3.0)
    plain = deepcopy(model).eval()
    told = add_nbn_to_trained(model)
    assert nbn_layers(model)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before, after = plain(images), model.eval()(images)
    assert (after - before).abs().max() <= 5e-6 * before.abs().max()
    assert float(re.search(r'differ by (\S+) of the largest', told)[1]) <= 5e-6


def test_nbn_is_measured_before_a_classifier_that_begins_at_zero(tmp_path):
    """Whose outputs are 0 whatever the features; what normalises by running statistics alone goes no other way."""
    torch.manual_seed(0)
    torch.save(create_model(MODEL, 7).state_dict(), tmp_path / 'seven.pth')
    for keeps in (False, True):
        model, notes = start_model(MODEL, 2, str(tmp_path / 'seven.pth'), nbn=True, keeps_statistics=keeps)
        assert not model.classifier.weight.any()
        assert 0 < float(re.search(r'its features .* differ by (\S+) of the largest', notes[-1])[1]) <= 5e-6
        assert ('in training it normalises by the batch' in notes[-1]) is not keeps


def test_nbn_is_added_to_plain_weights_after_they_are_loaded(first, folder, tmp_path, capsys):
    """And weights that have NBN are loaded into NBN."""
    flags = ['--model', MODEL, '--add-nbn', '--epochs', '1', '--lr', '0']
    train([*command(folder / 'first', tmp_path), *flags, '--pretrained-path', str(first), '--experiment', 'one'])
    assert 'NBN was put into the network with its weights' in capsys.readouterr().out
    train([*command(folder / 'first', tmp_path), *flags, '--pretrained-path', str(tmp_path / 'one'), '--experiment',
           'two'])
    assert 'NBN was put' not in capsys.readouterr().out
    one, two = state(tmp_path / 'one'), state(tmp_path / 'two')
    assert any(key.endswith('.scale.alpha') for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith(('weight', 'alpha')))


# What does not learn

@pytest.mark.parametrize('name, last, frozen, free', [
    ('test_efficientnet', 'blocks.1', ('conv_stem.', 'bn1.', 'blocks.0.', 'blocks.1.'), ('blocks.2.', 'classifier.')),
    ('resnet20_nbn', 'layer2', ('conv1.', 'layer1.', 'layer2.'), ('layer3.', 'fc.')),
    ('resnet20_nbn', 'backbone', ('conv1.', 'layer3.'), ('fc.',)),
    ('test_vit', 'blocks.1', ('patch_embed.', 'cls_token', 'blocks.0.', 'blocks.1.'), ('blocks.2.', 'head.')),
])
def test_a_part_is_frozen_from_the_input_to_its_end(name, last, frozen, free):
    model = create_model(name, 3)
    names = parameters_up_to(model, last)
    for parameter, _ in model.named_parameters():
        if parameter.startswith(frozen):
            assert parameter in names
        if parameter.startswith(free):
            assert parameter not in names


def test_an_unknown_part_is_told_the_nearest():
    with pytest.raises(InputError, match="did you mean 'layer3'"):
        parameters_up_to(create_model('resnet20', 3), 'layr3')
    with pytest.raises(InputError, match='no classifier that could learn'):
        Freezing(create_model('resnet20', 0), 'backbone')


def test_frozen_layers_keep_weights_and_statistics_and_thaw():
    model = create_model('resnet20_nbn', 3)
    freezing = Freezing(model, 'layer1', head_epochs=1)
    kinds = {name: type(module) for name, module in create_model('resnet20_nbn', 3).named_modules()}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for epoch, frozen in ((0, [*norms]), (1, [name for name in norms if name == 'bn1' or name.startswith('layer1.')])):
        freezing.set_epoch(epoch)
        model.train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        loss = model(torch.randn(4, 3, 32, 32)).square().sum()
        model.zero_grad()
        loss.backward()
        assert [name for name, module in norms.items() if is_frozen(module)] == frozen
        for name, module in norms.items():
            kept = torch.equal(module.running_mean, before[f'{name}.running_mean'])
            assert kept == (name in frozen) and (module.weight.grad is None) == (name in frozen)
            assert name in frozen or type(module) is kinds[name]
        assert (model.layer3[0].conv1.weight.grad is None) == (epoch == 0) and model.fc.weight.grad is not None
    assert model.layer1[0].conv1.weight.grad is None


@pytest.mark.parametrize('nbn', [False, True])
def test_statistics_are_kept_and_all_else_learns(nbn):
    torch.manual_seed(0)
    model = create_model('test_efficientnet', 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    if nbn:
        nbn_timm.add_nbn(model)
    before, images = deepcopy(model.state_dict()), torch.randn(4, 3, 32, 32)
    expected = model.eval()(images)
    freezing = Freezing(model, None, head_epochs=1, keep_statistics=True)
    for epoch in (0, 1):
        freezing.set_epoch(epoch)
        model.zero_grad()
        logits = model.train()(images)
        torch.testing.assert_close(logits, expected)
        logits.square().sum().backward()
        learn = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert learn == ({'classifier.weight', 'classifier.bias'} if epoch == 0 else
                         {name for name, _ in model.named_parameters()})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(is_frozen(module) for module in model.modules()) and len(nbn_layers(model)) == (3 if nbn else 0)
    learn_statistics(model).train()(images)
    assert not torch.equal(model.bn1.running_mean, before['bn1.running_mean'])


def with_vectors_and_maps() -> nn.Sequential:
    """A network with BatchNorm of maps and of vectors, whose rectified classifier has one of its own."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.BatchNorm1d(4), RectifiedLinear(4, 3))


@pytest.mark.parametrize('fix', [keep_statistics, nbn_timm.freeze_nbn])
def test_statistics_of_vectors_are_fixed_too_but_not_those_of_a_classifier(fix):
    model = with_vectors_and_maps()
    before = deepcopy(model.state_dict())
    fix(model).train()(torch.randn(4, 3, 8, 8))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {'5.bn.running_mean', '5.bn.running_var', '5.bn.num_batches_tracked'}
    assert model[4].weight.requires_grad == (fix is keep_statistics)
    learn_statistics(unfreeze_nbn(model))
    assert type(model[4]) is nn.BatchNorm1d and model[4].weight.requires_grad


@pytest.mark.parametrize('fix', [keep_statistics, nbn_timm.freeze_nbn])
def test_statistics_that_cannot_be_fixed_are_named_and_nothing_is_changed(fix):
    for layer in (nn.BatchNorm3d(4), nn.InstanceNorm2d(4, track_running_stats=True), EvoNorm2dB0(4)):
        model = nn.Sequential(nn.BatchNorm2d(4), layer)
        with pytest.raises(InputError, match=f"'1' is a {type(layer).__name__}, which cannot be frozen"):
            fix(model)
        assert type(model[0]) is nn.BatchNorm2d
    fix(nn.Sequential(nn.InstanceNorm2d(4), nn.BatchNorm2d(4)))  # the one has no statistics


def test_what_is_kept_is_not_synchronised():
    model = nbn_timm.convert_sync_batchnorm(keep_statistics(create_model('resnet20_nbn', 3)))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert not any(module.training for module in model.train().modules() if isinstance(module, nn.BatchNorm2d))


def test_a_frozen_part_keeps_statistics_of_vectors():
    model = timm.create_model('levit_128s', num_classes=3)
    Freezing(model, 'stem')
    assert not any(is_frozen(module) for module in model.stages.modules())
    Freezing(model, 'backbone')
    inside = [module for name, module in model.named_modules()
              if isinstance(module, nn.BatchNorm1d) and name.startswith('stages')]
    assert len(inside) > 40 and all(map(is_frozen, inside))


def test_a_run_leaves_what_is_frozen(first, folder, tmp_path):
    train([*command(folder / 'first', tmp_path), '--model', MODEL, '--pretrained-path', str(first), '--experiment',
           'frozen', '--epochs', '2', '--freeze', 'backbone', '--loss', 'balanced_softmax'])
    before, after = state(first), state(tmp_path / 'frozen')
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {'classifier.weight', 'classifier.bias'}


def test_a_run_that_is_resumed_while_frozen_ends_with_the_same_weights(first, folder, tmp_path, monkeypatch):
    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        train([*command(folder / 'first', tmp_path), '--model', MODEL, '--pretrained-path', str(first), '--experiment',
               name, '--epochs', '3', '--freeze-epochs', '2', '--opt', 'adamw', '--lr', '0.01',
               '--layer-decay', '0.8', '--sched', 'constant', *more])
        return state(tmp_path / name)

    whole = run('whole')
    with monkeypatch.context() as ended:
        ended.setattr('nbn_timm.training.keeper.Keeper.gave_up', lambda keeper, epoch: epoch == 1)
        half = run('resumed')
    before = state(first)
    assert {key for key in half if not torch.equal(half[key], before[key])} == {
        'classifier.weight', 'classifier.bias'}
    resumed = run('resumed', '--resume', 'auto')
    assert not torch.equal(whole['conv_stem.weight'], before['conv_stem.weight'])
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_layers_nearer_to_the_input_have_smaller_rates():
    model = create_model('test_resnet', 3)
    optimizer = create_optimizer(model, OptimizerSettings(opt='adamw', lr=0.01, layer_decay=0.5, decay_1d=False))
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {names[parameter]: group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']}
    assert scales['fc.weight'] == 1 > scales['layer4.0.conv1.weight'] > scales['layer1.0.conv1.weight']
    with pytest.raises(InputError, match='give --layer-decay'):
        create_optimizer(model, OptimizerSettings(opt_kwargs={'layer_decay': 0.5}))


@pytest.mark.parametrize('config', ['finetune', 'linear_probe'])
@pytest.mark.parametrize('model', ['test_efficientnet', 'test_vit'])
def test_the_configs_take_any_model(config, model, folder, tmp_path):
    torch.save(create_model(model, 9).state_dict(), tmp_path / 'weights.pth')
    size = '160' if model == 'test_vit' else '32'
    train(['--config', config, '--model', model, '--pretrained-path', str(tmp_path / 'weights.pth'), '--dataset',
           'folder', '--data-dir', str(folder / 'first'), '--img-size', size, '--workers', '0', '--device', 'cpu',
           '--output', str(tmp_path), '--epochs', '3', '--batch-size', '6', '--experiment', 'run'])
    assert (tmp_path / 'run' / 'test.json').exists()


def test_freezing_is_not_for_second_stages(first):
    with pytest.raises(InputError, match='--freeze has no effect with --stage'):
        parse_train(['--stage', 'crt', '--initial-checkpoint', str(first), '--freeze', 'backbone'])

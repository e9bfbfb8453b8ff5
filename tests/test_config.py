"""Configs: the file gives defaults, flags win, everything wrong is named, every shipped file is right."""
import argparse
import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import timm
import torch
import yaml

from nbn_timm.cli.train import parse_train
from nbn_timm.config import (
    ASKED_FOR,
    build_parser,
    config_path,
    number,
    read_config,
    read_given,
    shipped_configs,
)
from nbn_timm.errors import InputError
from nbn_timm.models.create import create_model
from nbn_timm.settings import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, SettingGroups, Settings, flag, setting
from nbn_timm.training.build import build_second_stage
from nbn_timm.training.optim import create_optimizer, create_scheduler
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
SHIPPED = shipped_configs()
SECOND = [name for name, path in SHIPPED.items() if 'stage' in yaml.safe_load(path.read_text())]  # of second stages
ANY_MODEL = ['finetune', 'linear_probe']  # for a model and data that are given
FIRST = [name for name in SHIPPED if name not in (*SECOND, *ANY_MODEL)]
CIFAR = [name for name in FIRST if name.startswith('cifar')]
BAG_OF_TRICKS = [name for name in CIFAR if 'BagofTricks-LT' in SHIPPED[name].read_text()
                 and not name.endswith(('influence_balanced', 'dive', 'dive_teacher', 'cam_first', 'cam_balanced'))]
# but for those that decay at their own epochs
CHEAP = [name for name in FIRST if name.startswith('cifar') or name == 'quickstart']


@dataclass(frozen=True)
class SomeSettings(Settings):
    """A setting of every form."""

    config: str | None = setting(None, 'a file', short='-c')
    batch_size: int = setting(8, 'images', short='-b')
    lr: float | None = setting(None, 'rate')
    opt: str = setting('sgd', 'by name', choices=('sgd', 'adam'))
    amp: bool = setting(False, 'a switch')
    fuse: bool | None = setting(None, 'a switch that may be unset')
    steps: tuple[int, ...] | None = setting(None, 'several', nargs=0)
    compile: str | None = setting(None, 'may stand alone', nargs='?', const='inductor')
    model_kwargs: Mapping[str, Any] = setting({}, 'a mapping')


@dataclass(frozen=True)
class SomeGroups(SettingGroups):
    """All settings of an imaginary command."""

    some: SomeSettings = SomeSettings()


def parse(argv: list[str]) -> SomeSettings:
    return read_given(SomeGroups, build_parser(SomeGroups, 'some', 'Some command.'), argv).settings().some


def recipe(name: str, *flags: str) -> TrainSettings:
    """Settings of a shipped config, with a file wherever it asks for one."""
    asked_for = [key for key, value in yaml.safe_load(SHIPPED[name].read_text()).items() if value == ASKED_FOR]
    with TemporaryDirectory() as folder:
        file = Path(folder) / 'some.pth'
        torch.save({'args': {'model': 'resnet20'}}, file)
        return parse_train(['--config', name, *(f'{flag(key)}={file}' for key in asked_for), *flags])


def train_parser() -> argparse.ArgumentParser:
    return build_parser(TrainSettings, 'nbn-train', 'Train.')


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / 'some.yaml'
        path.write_text(text)
        return str(path)
    return write


def test_file_gives_defaults_and_flags_win(write):
    path = write('batch_size: 32\nlr: 5e-4\namp: true\nfuse: true\nsteps: [3, 4]\nopt: adam\n')
    settings = parse(['--config', path, '-b', '2', '--no-amp'])
    assert (settings.batch_size, settings.lr, settings.amp, settings.fuse) == (2, 5e-4, False, True)
    assert (settings.steps, settings.opt) == ((3, 4), 'adam')


def test_dashes_nulls_and_mappings(write):
    path = write('batch-size: 4\nlr: null\nmodel_kwargs: {width: 3, name: "7", ratios: [1, -2], flag: false}\n')
    settings = parse(['-c', path])
    assert settings.batch_size == 4
    assert settings.lr is None
    assert settings.model_kwargs == {'width': 3, 'name': '7', 'ratios': [1, -2], 'flag': False}


@pytest.mark.parametrize('text, message', [
    ('bach_size: 3', "unknown key 'bach_size'; did you mean 'batch_size'"),
    ('config: other.yaml', "unknown key 'config'"),
    ('batch_size: many', "sets 'batch_size' to 'many'"),
    ('batch_size: 1.5', "sets 'batch_size' to 1.5"),
    ('batch_size: [1, 2]', "sets 'batch_size' to"),
    ('batch_size: true', 'it takes a value'),
    ('opt: adamm', "'opt' to 'adamm'.*choose from"),
    ('amp: 1', "'amp' to 1: it must be true or false"),
    ('compile: true', 'it takes a value'),
    ('steps: [1, x]', "sets 'steps'"),
    ('model_kwargs: width', 'key=value'),
    ('- a\n- b', 'not a mapping'),
    ('a: [', 'cannot be read as YAML'),
    ('lr: 1\nopt: sgd\nlr: 2', "the key 'lr' is there twice.*line 3"),
    ('model_kwargs: {a: 1, a: 2}', "the key 'a' is there twice"),
    ('batch-size: 1\nbatch_size: 2', "sets 'batch_size' twice"),
])
def test_wrong_files_name_key_and_file(write, text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(['--config', write(text)])
    assert 'some.yaml' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_key_values_win_key_by_key(write):
    path = write('model_kwargs: {width: 3, depth: 2}\n')
    settings = parse(['-c', path, '--model-kwargs', 'width=4', 'name=x', '--model-kwargs', 'act=relu'])
    assert settings.model_kwargs == {'width': 4, 'depth': 2, 'name': 'x', 'act': 'relu'}
    assert parse(['-c', path]).model_kwargs == {'width': 3, 'depth': 2}


@pytest.mark.parametrize('accepted, refused, kind', [
    ('1', ('0', '-1', '1.5', 'x'), number(AT_LEAST_1, int)),
    ('0', ('-1', 'nan'), number(NOT_NEGATIVE, int)),
    ('1e-3', ('0', '-1', 'nan', 'inf'), number(POSITIVE)),
    ('0', ('-1', 'nan', 'inf'), number(NOT_NEGATIVE)),
    ('1', ('-0.1', '1.1', 'nan'), number(PROBABILITY)),
])
def test_numbers_have_limits(accepted, refused, kind):
    assert kind(accepted) == float(accepted)
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no .*number (above|at least)"):
            kind(text)


def test_a_number_that_no_computer_takes_is_not_called_too_small():
    for text, kind, said in [('9' * 20, number(NOT_NEGATIVE, int), 'whole number of 64 bits at least 0'),
                             ('inf', number(NOT_NEGATIVE), 'finite number at least 0'),
                             ('nan', number(), 'finite number')]:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no {said}$"):
            kind(text)


@pytest.mark.parametrize('flags', [('--epochs', '0'), ('--lr', '-1'), ('--smoothing', '1.5'), ('--workers', 'x')])
def test_impossible_numbers_are_usage_errors(flags, capsys, write):
    with pytest.raises(SystemExit) as caught:
        train_parser().parse_args(flags)
    assert caught.value.code == 2
    assert f'argument {flags[0]}' in capsys.readouterr().err.replace('-j/', '')
    with pytest.raises(InputError, match=f'number (at least|between).*|{flags[1]}'):
        read_config(train_parser(), TrainSettings, Path(write(f"{flags[0].strip('-')}: {flags[1]}")))


def test_what_a_config_asks_for_must_be_given(write):
    path = write("opt: adam\ncompile: '???'\n")
    with pytest.raises(InputError, match="some.yaml' asks for --compile: give one") as caught:
        parse(['-c', path])
    assert '\n' not in str(caught.value)
    assert parse(['-c', path, '--compile', 'mine']).compile == 'mine'


def test_wrong_flags_are_usage_errors(capsys):
    for argv in (['--bach-size', '3'], ['--model-kwargs', 'width'], ['--opt', 'x']):
        with pytest.raises(SystemExit) as caught:
            parse(argv)
        assert caught.value.code == 2


def test_a_missing_config_names_the_nearest_shipped_one():
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        config_path('quickstrat')


def test_shipped_configs_are_found_by_name_and_a_file_comes_first(tmp_path, monkeypatch):
    assert config_path('quickstart') == SHIPPED['quickstart']
    monkeypatch.chdir(tmp_path)
    assert config_path('configs/cifar100_lt/resnet32_nbn.yaml') == SHIPPED['cifar100_lt/resnet32_nbn']
    (tmp_path / 'quickstart').write_text('lr: 1.0')
    assert config_path('quickstart') == Path('quickstart')


def test_all_configs_of_the_checkout_are_shipped():
    if not (ROOT / 'configs').is_dir():
        pytest.skip('not a checkout')
    assert len(SHIPPED) == len(list((ROOT / 'configs').rglob('*.yaml'))) >= 17


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_config_has_known_keys_a_model_and_a_comment(name):
    values = read_config(train_parser(), TrainSettings, SHIPPED[name])
    assert set(values) == set(yaml.safe_load(SHIPPED[name].read_text()))
    assert 'model' not in values if name in (*SECOND, *ANY_MODEL) else timm.is_model(values['model'])
    assert SHIPPED[name].read_text().startswith('# ')
    assert ('dataset' in values) == (name not in ANY_MODEL)


@pytest.mark.parametrize('name', CHEAP)
def test_cheap_configs_build_their_model(name):
    settings = recipe(name)
    model, start = settings.model, settings.start
    model = create_model(
        model.model, 10, start.pretrained, start.drop, start.drop_path, model_kwargs=model.model_kwargs)
    size = settings.input.img_size or 32
    assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize('name', [name for name in FIRST if name not in CHEAP])
def test_large_configs_build_their_model(name):
    settings = recipe(name)
    model, start = settings.model, settings.start
    with torch.device('meta'):
        model = create_model(model.model, 10, False, start.drop, start.drop_path, model_kwargs=model.model_kwargs)
    assert model.num_classes == 10


@pytest.mark.parametrize('name', SECOND)
def test_second_stages_take_the_finished_network_and_have_no_setting_without_effect(name, tmp_path):
    torch.save({'args': {'model': 'resnet20'}}, tmp_path / 'first.pth')
    settings = recipe(name, '--initial-checkpoint', str(tmp_path / 'first.pth'))
    assert settings.model.model == 'resnet20'
    assert build_second_stage(settings) is not None
    given = read_config(train_parser(), TrainSettings, SHIPPED[name])
    assert settings.without_effect(list(given)) == {}


def schedule(name: str, *flags: str) -> list[float]:
    """Learning rate in each epoch of a config, as the training loop sets it."""
    settings = recipe(name, '--model', 'resnet20', *flags)
    optimizer = create_optimizer(torch.nn.Linear(1, 1), settings.optimizer)
    scheduler = create_scheduler(optimizer, settings.schedule, 10)
    rates = []
    for epoch in range(settings.schedule.epochs):
        scheduler.step(epoch + settings.schedule.sched_ahead)
        scheduler.step_update(epoch * 10)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


def header(name: str) -> str:
    return ' '.join(line[2:] for line in SHIPPED[name].read_text().splitlines() if line.startswith('# '))


@pytest.mark.parametrize('name', [name for name in CIFAR if 'in the fifth epoch by steps of 0.02,' in header(name)])
def test_cifar_schedule_is_ldams(name):
    """lr * e / 5 up to epoch 5, lr * 0.01 after 160, lr * 0.0001 after 180, with e counted from 1."""
    def ldam(epoch: int) -> float:
        if epoch <= 5:
            return 0.1 * epoch / 5
        return 0.1 * (1e-4 if epoch > 180 else 1e-2 if epoch > 160 else 1)
    assert schedule(name) == pytest.approx([ldam(epoch) for epoch in range(1, 201)])


@pytest.mark.parametrize('flags', [
    ('--sched', 'multistep', '--decay-milestones', '3', '5'), ('--sched', 'step', '--decay-epochs', '2')])
@pytest.mark.parametrize('more', [(), ('--sched-on-updates',)])
@pytest.mark.parametrize('warmup', [0, 1])
def test_decays_hold_from_the_same_epoch_whether_the_rate_follows_epochs_or_updates(flags, more, warmup):
    """From the first update of the 3rd and the 5th epoch on, and not an update before."""
    settings = parse_train(['--dataset', 'list', '--model', 'resnet20', '--epochs', '6', '--lr', '0.8', '--decay-rate',
                            '0.5', '--warmup-epochs', str(warmup), *flags, *more])
    optimizer = create_optimizer(torch.nn.Linear(1, 1), settings.optimizer)
    scheduler, rates = create_scheduler(optimizer, settings.schedule, 3), []
    for epoch in range(6):
        scheduler.step(epoch)
        scheduler.step_update(epoch * 3)
        for update in range(3):
            rates.append(optimizer.param_groups[0]['lr'])
            scheduler.step_update(epoch * 3 + update + 1)
    begin = 3 * warmup
    assert rates[begin:] == pytest.approx([0.8] * (6 - begin) + [0.4] * 6 + [0.2] * 6)
    rise = [0.2, 0.4, 0.6] if more else [0.4] * 3
    assert rates[:begin] == pytest.approx(rise[:begin])


@pytest.mark.parametrize('name', BAG_OF_TRICKS)
def test_schedule_of_bag_of_tricks(name):
    """lr * (1 + 2 e / 5) / 3 up to epoch 5, lr * 0.01 after four fifths of the epochs, lr * 0.0001 after nine tenths,
    with e counted from 1 and the decays in the epochs 320 and 360 of 400."""
    epochs = recipe(name).schedule.epochs

    def theirs(epoch: int) -> float:
        if epoch < 5:
            return 0.1 * (1 / 3 * (1 - epoch / 5) + epoch / 5)
        return 0.1 * (1e-4 if epoch >= epochs * 9 // 10 else 1e-2 if epoch >= epochs * 4 // 5 else 1)
    assert schedule(name) == pytest.approx([theirs(epoch) for epoch in range(1, epochs + 1)], rel=1e-5)
    group = create_optimizer(torch.nn.BatchNorm2d(2), recipe(name).optimizer).param_groups[0]
    assert (group['nesterov'], group['momentum'], group['weight_decay']) == (True, 0.9, 2e-4)


@pytest.mark.parametrize('name', ['cifar100_lt/resnet32_crt', 'cifar100_lt/resnet32_lws'])
def test_second_stages_have_the_schedule_of_bag_of_tricks(name):
    """lr (1 + 2 e / 5) / 3 up to epoch 5, times 0.1 from 10, times 0.01 from 20, with e counted from 1."""
    def theirs(epoch: int) -> float:
        if epoch < 5:
            return 0.1 * (1 + 2 * epoch / 5) / 3
        return 0.1 * (1e-2 if epoch >= 20 else 1e-1 if epoch >= 10 else 1)

    assert schedule(name) == pytest.approx([theirs(epoch) for epoch in range(1, 31)], rel=1e-5)


def test_autoaugment_schedule_is_balanced_softmaxs_but_for_where_the_cosine_ends():
    """0.05 + 0.05 (e - 1) / 36 in the first 36 epochs; theirs is then 0.05 (1 + cos(pi (e - 37) / (591 - 37)))."""
    rates = schedule('cifar100_lt/resnet32_balanced_softmax_autoaugment')
    assert len(rates) == -(-13_000 // 22)  # 22 updates of 512 among 10,847 images
    assert rates[:36] == pytest.approx([0.05 + 0.05 / 36 * (epoch - 1) for epoch in range(1, 37)])
    ours = [0.05 * (1 + math.cos(math.pi * (epoch - 37) / (592 - 37))) for epoch in range(37, 592)]
    assert rates[36:] == pytest.approx(ours)
    theirs = [0.05 * (1 + math.cos(math.pi * (epoch - 37) / (591 - 37))) for epoch in range(37, 592)]
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 0.00017


@pytest.mark.parametrize('form', ['', '_nbn'])
@pytest.mark.parametrize('stage, first, highest, epochs', [('', 0.025, 0.15, 180), ('_stage2', 0.0375, 0.1, 20)])
def test_schedule_of_shike(form, stage, first, highest, epochs):
    """0.05 + (highest - 0.05) (e - 1) / 4 for e from 0 to 4, then highest (1 + cos(pi (e - 5) / (T - 5))) / 2."""
    name = f'cifar100_lt/resnet32_shike{form}{stage}'
    expected = [0.05 + (highest - 0.05) * (epoch - 1) / 4 for epoch in range(5)]
    expected += [highest * (1 + math.cos(math.pi * (epoch - 5) / (epochs - 5))) / 2 for epoch in range(5, epochs)]
    assert expected[0] == pytest.approx(first)
    assert schedule(name) == pytest.approx(expected, rel=1e-12)
    group = create_optimizer(torch.nn.BatchNorm2d(2), recipe(name, '--model', 'resnet20').optimizer).param_groups[0]
    assert (group['nesterov'], group['momentum'], group['weight_decay']) == (False, 0.9, 5e-4)


def test_schedules_of_gcl():
    """lr e / 5 up to epoch 5, times 0.1 after 160 and 0.01 after 180, with e counted from 1; then 0.001 (1 + cos)."""
    first = [0.1 * min(epoch / 5, 1) * (0.01 if epoch > 180 else 0.1 if epoch > 160 else 1) for epoch in range(1, 201)]
    assert schedule('cifar100_lt/resnet32_gcl') == pytest.approx(first)
    second = [0.001 * (1 + math.cos(math.pi * epoch / 30)) for epoch in range(30)]
    assert schedule('cifar100_lt/resnet32_gcl_stage2') == pytest.approx(second)


@pytest.mark.parametrize('name, expected', [
    ('mixup', dict(mixup=1.0, epochs=400)),
    ('remix', dict(remix=1.0, remix_kappa=3.0, remix_tau=0.5, epochs=400)),
    ('cmo', dict(cmo=1.0, cmo_prob=0.5, cmo_power=0.0, cmo_skip_first=4, cmo_skip_last=3, loss='balanced_softmax')),
    ('ldam_drw_cmo', dict(cmo=1.0, cmo_prob=0.5, cmo_power=0.0, cmo_skip_first=4, cmo_skip_last=3, loss='ldam')),
    ('balpoe', dict(loss='balpoe', mixup=0.4, rotation=15, aa=None, cutout=0, epochs=200, weight_decay=5e-4)),
    ('mdcs', dict(loss='mdcs', rotation=15, aa=None, cutout=0, global_batch_size=64, weight_decay=5e-4,
                  other_views={'rotation': 0, 'aa': 'cifar10', 'cutout': 16})),
    ('sade', dict(loss='sade', rotation=15, aa=None, cutout=0, mixup=0.0, epochs=200, weight_decay=5e-4)),
    ('balpoe_long', dict(loss='balpoe', mixup=0.4, rotation=0, aa='cifar10', cutout=0, epochs=400)),
    ('balanced_softmax_autoaugment', dict(aa='cifar10', cutout=16, global_batch_size=512, weight_decay=5e-4)),
    ('gcl', dict(mixup=1.0, global_batch_size=64, weight_decay=2e-4, aa=None)),
    ('shike', dict(aa='cifar10', cutout=16, global_batch_size=128, loss='shike')),
])
def test_augmentation_recipes_are_the_published_ones(name, expected):
    values = parse_train(['--config', f'cifar100_lt/resnet32_{name}']).values()
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize('name, warmup, decays', [
    ('balpoe', 5, (160, 180)), ('balpoe_nbn', 5, (160, 180)), ('balpoe_long', 10, (320, 360)), ('sade', 5, (160, 180)),
    ('mdcs', 20, (200, 320, 380))])
def test_schedule_of_balpoe_sade_and_mdcs(name, warmup, decays):
    """lr (1 + e) / W up to epoch W - 1, then times 0.1 and 0.01 from the decays on, with e counted from 0."""
    def theirs(epoch: int) -> float:
        return 0.1 * min(1, (1 + epoch) / warmup) * 0.1 ** sum(epoch >= decay for decay in decays)

    rates = schedule(f'cifar100_lt/resnet32_{name}')
    assert rates == pytest.approx([theirs(epoch) for epoch in range(len(rates))])
    assert len(rates) == decays[-1] + (40 if name == 'balpoe_long' else 20)


@pytest.mark.parametrize('name, model', [
    ('modern', 'resnet32'), ('nbn_modern', 'resnet32_nbn'), ('nbn_lr_modern', 'resnet32_nbn_lr')])
def test_modern_recipes_are_balanced_softmax_with_the_flags_of_the_queue(name, model):
    """Those of the runs `bs_aa90` and `nbn_bs_aa90` of benchmarks/queue.txt, whose accuracies are the recipes'."""
    flags = ('--epochs 90 --aa cifar10 --cutout 16 --weight-decay 5e-4 --sched cosine --sched-on-updates '
             '--warmup-epochs 5')
    lines = [line.split(None, 2)[2] for line in (ROOT / 'benchmarks/queue.txt').read_text().splitlines()
             if re.match(r'(nbn_)?bs_aa90-', line)] if (ROOT / 'benchmarks/queue.txt').exists() else []
    assert all(line.endswith(flags) for line in lines)
    queued = recipe('cifar100_lt/resnet32_balanced_softmax', *flags.split(), '--model', model)
    settings = recipe(f'cifar100_lt/resnet32_{name}')
    differing = TrainSettings.changed(queued.values(), settings.values())
    assert not set(differing) - set(queued.without_effect(list(differing)))


@pytest.mark.parametrize('form', ['', '_nbn'])
def test_modern_recipes_with_a_cosine_classifier_differ_in_it_alone(form):
    base, cosine = (recipe(f'cifar100_lt/resnet32{form}_modern{head}') for head in ('', '_cosine'))
    assert TrainSettings.changed(base.values(), cosine.values()) == {'model_kwargs': ({}, {'head': 'cosine'})}


def test_recipes_with_muon_cost_as_much_as_the_modern_ones_and_differ_in_the_model_alone():
    wide, *others = (recipe(f'cifar100_lt/resnet14_wide{form}_muon') for form in ('', '_nbn', '_nbn_lr'))
    assert [TrainSettings.changed(wide.values(), other.values()) for other in others] == [
        {'model': ('resnet14_wide', model)} for model in ('resnet14_wide_nbn', 'resnet14_wide_nbn_lr')]
    modern = recipe('cifar100_lt/resnet32_modern')
    # Millions of multiply-adds of an image, from README's table.
    assert 91.6 * wide.schedule.epochs == pytest.approx(68.9 * modern.schedule.epochs, rel=0.02)
    assert set(TrainSettings.changed(modern.values(), wide.values())) == {
        'model', 'epochs', 'opt', 'lr', 'weight_decay', 'warmup_epochs', 'warmup_lr'}


def test_recipes_of_shike_on_the_wide_network_take_its_optimizer_and_cost_as_much():
    wide, first, nbn = (recipe(f'cifar100_lt/resnet14_wide{form}_muon') for form in ('', '_shike', '_shike_nbn'))
    assert TrainSettings.changed(first.values(), nbn.values()) == {
        'model': ('resnet14_wide_shike', 'resnet14_wide_shike_nbn')}
    assert set(TrainSettings.changed(wide.values(), first.values())) == {'model', 'model_kwargs', 'loss', 'epochs'}
    second, *others = (recipe(f'cifar100_lt/{name}_stage2', '--model', 'resnet20') for name in (
        'resnet14_wide_shike', 'resnet14_wide_shike_nbn', 'resnet32_shike'))
    assert [TrainSettings.changed(second.values(), other.values()) for other in others] == [{}, {}]
    # Millions of multiply-adds of an image; the second stage has a forward pass alone.
    assert 115.7 * (first.schedule.epochs + second.schedule.epochs / 3) == pytest.approx(
        91.6 * wide.schedule.epochs, rel=0.02)


@pytest.mark.parametrize('flags', [(), ('--sched-on-updates',)])
def test_imagenet_schedule_is_the_released_cosine(flags):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    expected = []
    for _ in range(90):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        theirs.step()
    assert schedule('resnext50_nbn', *flags) == pytest.approx(expected)


def test_a_cosine_ends_at_the_lowest_rate():
    rates = schedule('resnext50_nbn', '--min-lr', '0.04', '--epochs', '8')
    assert rates == pytest.approx([0.04 + 0.16 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)])


def test_a_cosine_after_the_warm_up_begins_at_its_highest_rate_and_still_ends_with_the_run():
    flags = ['--warmup-epochs', '2', '--warmup-prefix', '--epochs', '6', '--min-lr', '0.04']
    expected = [0.2 / 3, 0.4 / 3, *(0.04 + 0.16 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4))]
    assert schedule('resnext50_nbn', *flags) == pytest.approx(expected)
    by_update = schedule('resnext50_nbn', *flags, '--sched-on-updates')  # ten to an epoch
    assert by_update == pytest.approx([0.2 / 21, 0.2 / 21 + 10 * 0.2 / 21, *expected[2:]])
    assert schedule('resnext50_nbn', *flags[:3], '--epochs', '2') == pytest.approx(expected[:2])  # no cosine is left
    for others, reason in ((['--warmup-epochs', '1', '--sched', 'step'], 'is for --sched cosine'), ([], '--warmup-ep')):
        with pytest.raises(InputError, match=f'--warmup-prefix.*{reason}'):
            recipe('resnext50_nbn', '--warmup-prefix', *others)


def test_rates_that_fall_to_zero():
    """Epoch e of E, from 0: with two epochs of warm-up, 1 at the third, then evenly to 1 / n of n falling ones."""
    flags = ('--epochs', '10', '--lr', '0.3', '--warmup-epochs', '2')
    linear = schedule('quickstart', *flags, '--sched', 'linear')
    assert linear == pytest.approx([0.1, 0.2] + [0.3 * (8 - epoch) / 8 for epoch in range(8)])
    wsd = schedule('quickstart', *flags, '--sched', 'wsd')
    assert wsd == pytest.approx([0.1, 0.2] + [0.3] * 4 + [0.3, 0.225, 0.15, 0.075])
    short = schedule('quickstart', *flags, '--sched', 'wsd', '--wsd-cooldown', '0.2')
    assert short == pytest.approx([0.1, 0.2] + [0.3] * 6 + [0.3, 0.15])
    begin = schedule('quickstart', *flags, '--sched', 'wsd', '--sched-on-updates')  # of each epoch's ten updates
    assert begin == pytest.approx([0.3 / 21, 0.3 * 11 / 21] + [0.3] * 4 + [0.3, 0.225, 0.15, 0.075])
    with pytest.raises(InputError, match='--warmup-epochs 10 leaves --sched linear none of the 10 epochs'):
        schedule('quickstart', *flags[:4], '--warmup-epochs', '10', '--sched', 'linear')


def test_a_linear_rate_changes_at_every_update():
    settings = recipe('quickstart', '--epochs', '2', '--warmup-epochs', '0', '--lr', '1', '--sched', 'linear',
                      '--sched-on-updates')
    optimizer = create_optimizer(torch.nn.Linear(1, 1), settings.optimizer)
    scheduler, rates = create_scheduler(optimizer, settings.schedule, 2), []
    for update in range(4):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25])


def test_warm_up_begins_above_zero_and_loses_no_epoch():
    rates = schedule('resnext50_nbn', '--warmup-epochs', '4', '--sched', 'constant')
    assert rates[:6] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2, 0.2])


def test_released_recipes_decay_everything_with_plain_momentum():
    for name in ('resnet50', 'resnet50_nbn', 'resnext50', 'resnext50_nbn', 'cifar100_lt/resnet32_nbn'):
        optimizer = create_optimizer(torch.nn.BatchNorm2d(2), recipe(name).optimizer)
        assert isinstance(optimizer, torch.optim.SGD)
        assert len(optimizer.param_groups) == 1
        group = optimizer.param_groups[0]
        assert (group['nesterov'], group['momentum']) == (False, 0.9)
        assert group['weight_decay'] == (2e-4 if 'cifar' in name else 5e-4)
    settings = parse_train(['--config', 'resnet50_nbn', '--no-decay-1d']).optimizer
    assert [group['weight_decay'] for group in create_optimizer(torch.nn.BatchNorm2d(2), settings).param_groups] == [0]


def test_without_arguments_the_quick_start_runs():
    settings = parse_train([])
    assert (settings.run.config, settings.data.dataset) == ('quickstart', 'digits_lt')
    assert parse_train(['--epochs', '1']).schedule.epochs == 1
    with pytest.raises(InputError, match='no --dataset: give --dataset folder for a folder of pictures per class'):
        parse_train(['--model', 'resnet32'])


@pytest.mark.parametrize(('text', 'kind'), [
    ('model_kwargs: {a: !!set {b}}', 'set'), ('model_kwargs: {a: !!binary eA==}', 'bytes'),
    ('model_kwargs: {a: [2026-01-01]}', 'date'), ('experiment: !!binary eA==', 'bytes')])
def test_a_config_holds_plain_data(text, kind, tmp_path):
    (tmp_path / 'a.yaml').write_text(text)
    with pytest.raises(InputError, match=f'is or holds a value of the kind {kind}: give numbers, text, true, false'):
        read_config(train_parser(), TrainSettings, tmp_path / 'a.yaml')
    (tmp_path / 'a.yaml').write_text('experiment: 2026-01-01')
    assert read_config(train_parser(), TrainSettings, tmp_path / 'a.yaml') == {'experiment': '2026-01-01'}


def test_a_key_twice_behind_one_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        read_given(TrainSettings, train_parser(), ['--model-kwargs', 'a=1', 'b=2', 'a=None'])
    assert "the key 'a' is there twice: keep one" in capsys.readouterr().err
    given = read_given(TrainSettings, train_parser(), ['--model-kwargs', 'a=1', '--model-kwargs', 'a=None'])
    assert given.flags['model_kwargs'] == {'a': None}  # a later flag wins, as everywhere


def test_every_flag_is_a_config_key_of_its_own_name():
    """Configs find the flag as `--` and the key with dashes."""
    parser = train_parser()
    for name, declared in TrainSettings.declared().items():
        assert flag(name) in parser.format_help()
        if declared.type is bool:
            assert getattr(parser.parse_args([flag(name)]), name) is True


def test_an_unknown_flag_names_the_nearest_one_and_no_page_of_usage(capsys):
    with pytest.raises(SystemExit) as error:
        read_given(TrainSettings, train_parser(), ['--epoch', '3'])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert "unknown argument '--epoch'; did you mean '--epochs'?" in printed and printed.count('\n') == 2


@pytest.mark.parametrize(('command', 'flag', 'right'), [
    ('predict', '--topkk', '--topk'), ('export', '--tolerence', '--tolerance'), ('push', '--priv', '--private')])
def test_commands_without_a_config_name_the_nearest_flag_too(command, flag, right, capsys):
    main = importlib.import_module(f'nbn_timm.cli.{command}').main
    with pytest.raises(SystemExit) as stopped:
        main(['first', flag, 'second'])
    assert stopped.value.code == 2
    assert f"unknown argument '{flag}'; did you mean '{right}'?" in capsys.readouterr().err

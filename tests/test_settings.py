"""Settings are declared once; all that follows from a declaration is held here, over all declarations there are."""
import ast
import dataclasses
import importlib
import logging
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from timm.optim import get_optimizer_info, list_optimizers

import nbn_timm
from nbn_timm import cli
from nbn_timm.config import ASKED_FOR, Given, build_parser, read_config, read_given, shipped_configs
from nbn_timm.data.settings import DataSettings
from nbn_timm.datasets.named_dataset import DATASETS, find_dataset
from nbn_timm.errors import InputError
from nbn_timm.second_stages import SECOND_STAGES, FittedSecondStage
from nbn_timm.settings import (
    AT_LEAST_1,
    PROBABILITY,
    Field,
    Kind,
    SettingGroups,
    Settings,
    Tolerated,
    Values,
    all_of,
    fields_of,
    flag,
    not_with,
    only_with,
    plain,
    setting,
)
from nbn_timm.training.report import config_text
from nbn_timm.training.run import train
from nbn_timm.training.settings import TrainSettings
from nbn_timm.validation import validate

pytestmark = pytest.mark.fast

COMMANDS = sorted({
    value for name in pkgutil.iter_modules(cli.__path__)
    for value in vars(importlib.import_module(f'{cli.__name__}.{name.name}')).values()
    if isinstance(value, type) and issubclass(value, SettingGroups) and value is not SettingGroups
}, key=lambda groups: groups.__name__)
PACKAGE = Path(nbn_timm.__file__).parent


@dataclass(frozen=True)
class Extra(Settings):
    """A group as a stranger may add it."""

    title = 'extra'

    extra: bool = setting(False, 'do more')
    extra_rate: float = setting(0.5, 'share of the extra', limits=PROBABILITY, effect=only_with('extra'))
    extra_sizes: tuple[int, ...] = setting((1, 2), 'of the extra', limits=AT_LEAST_1, nargs=0,
                                           effect=only_with('extra'))
    extra_file: str | None = setting(None, 'read by it', is_file=True, metavar='FILE')
    extra_workers: int = setting(3, 'that do it', kind='machine')
    extra_kwargs: Mapping[str, Any] = setting({}, 'its own settings')


def parser_of(groups: type[SettingGroups]):
    return build_parser(groups, 'some-command', 'Some command.')


# The second one is for what depends on an optimizer.
TEXTS = ('some', next(name for name in list_optimizers() if not get_optimizer_info(name).has_momentum))


def some_values(declared: Field) -> Iterator[Any]:
    """Values that a setting may have, other than its default, as plain data."""
    about = declared.declaration
    if declared.type is bool:
        candidates: list[Any] = [True, False]
    elif declared.choices is not None:
        candidates = list(declared.choices)
    elif declared.type is dict:
        candidates = [{'rotation': 1} if declared.name == 'other_views' else {'a': 1}]
    elif declared.type in (int, float):
        low = about.limits.low if about.limits is not None else 0
        numbers = [declared.type(low + step) for step in (1, 2, 0)] + [0.5] * (declared.type is float)
        candidates = [number for number in numbers if about.limits is None or number in about.limits]
    else:
        candidates = ['fgsm', 'pgd7'] if declared.name == 'attack' else list(TEXTS)
    if declared.many:
        candidates = [[value] * (about.nargs or 2) for value in candidates]
    return (value for value in candidates if value != plain(declared.default))


def typed(name: str, value: Any) -> list[str]:
    """A setting as words of a command line."""
    if isinstance(value, bool):
        return [flag(name) if value else f'--no-{name}'.replace('_', '-')]
    if isinstance(value, dict):
        return [flag(name), *(f'{key}={entry}' for key, entry in value.items())]
    return [flag(name), *map(str, value)] if isinstance(value, list) else [f'{flag(name)}={value}']


def typed_flag(name: str, value: Any) -> str:
    """The flag as it is typed for that value."""
    return typed(name, value)[0].partition('=')[0]


# Declarations


@pytest.mark.parametrize('groups', COMMANDS)
def test_every_setting_says_what_it_is(groups):
    for name, declared in groups.declared().items():
        assert declared.declaration.help.strip(), name
        assert declared.declaration.kind in get_args(Kind), name
        assert declared.type in (bool, int, float, str, dict), name
        assert declared.shown_default(), name
        declared.check(declared.default)


@pytest.mark.parametrize('groups', COMMANDS)
def test_help_shows_every_flag_with_its_default(groups):
    parser = parser_of(groups)
    actions = {action.dest: action for action in parser._actions}
    for name, declared in groups.declared().items():
        assert flag(name) in actions[name].option_strings
        assert f'(default: {declared.shown_default()})'.replace('%', '%%') in actions[name].help
    assert ' '.join(parser.format_help().split()).count('(default: ') == len(groups.declared())


@pytest.mark.parametrize('groups', COMMANDS)
def test_groups_are_frozen_and_stand_under_a_title(groups):
    titles = [group.title for group in groups.group_types().values()]
    assert all(titles) and len(titles) == len(set(titles))
    for group in groups.of({}).groups():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, fields_of(type(group))[0].name, None)


def test_no_setting_is_declared_twice():
    @dataclass(frozen=True)
    class Twice(SettingGroups):
        first: Extra = Extra()
        second: Extra = Extra()

    with pytest.raises(ValueError, match="the setting 'extra' of Extra is declared twice"):
        Twice.declared()
    for groups in COMMANDS:
        names = [one.name for group in groups.group_types().values() for one in fields_of(group)]
        assert len(names) == len(set(names)) == len(groups.declared())


@pytest.mark.parametrize('groups', COMMANDS)
def test_a_setting_of_the_record_has_the_same_form_in_every_command(groups):
    """Else a value that one of them wrote would be a wrong one for another."""
    recorded = TrainSettings.declared()
    for name, declared in groups.declared().items():
        if declared.declaration.inherited:
            assert (declared.type, declared.many) == (recorded[name].type, recorded[name].many), name


# Values


@pytest.mark.parametrize('groups', COMMANDS)
def test_every_value_goes_through_flag_config_and_record(groups, tmp_path):
    parser, path = parser_of(groups), tmp_path / 'some.yaml'
    for name, declared in groups.declared().items():
        if name == 'config':
            continue
        for value in some_values(declared):
            if declared.type is bool and name.startswith('no_') and not value:
                continue
            settings = groups.of({name: value})
            assert settings.values()[name] == value
            assert read_given(groups, parser, typed(name, value)).settings() == settings
            assert groups.from_record(settings.values()) == settings
            if 'config' not in groups.declared():
                continue
            path.write_text(yaml.safe_dump({name: value}))
            assert groups.of(read_config(parser, groups, path)) == settings


@pytest.mark.parametrize('groups', COMMANDS)
def test_wrong_values_are_one_sentence_wherever_they_come_from(groups):
    wrong = {bool: 'yes', int: 'many', float: 'much', str: 3, dict: 'a=1'}
    for name, declared in groups.declared().items():
        value = wrong[declared.type]
        with pytest.raises(InputError, match=f"setting '{name}' is ") as caught:
            groups.of({name: [value] if declared.many else value})
        assert '\n' not in str(caught.value)
        limits = declared.declaration.limits
        if limits is not None and limits.low > -float('inf'):
            beyond = limits.low - 1
            with pytest.raises(InputError, match=f"setting '{name}' is .*give a number"):
                groups.of({name: [beyond] if declared.many else beyond})
    name = next(name for name in groups.declared() if len(name) > 4)
    with pytest.raises(InputError, match=f"there is no setting '{name}s'; did you mean '{name}'"):
        groups.of({f'{name}s': 3})


def test_args_yaml_repeats_the_settings(tmp_path):
    settings = TrainSettings.of({'model': 'resnet20', 'dataset': 'digits_lt', 'decay_milestones': [3, 5], 'lr': 0.3,
                                 'loss_kwargs': {'a': [1, 2]}, 'remix_kappa': 2.0, 'mean': [0.1, 0.2, 0.3],
                                 'amp': True})
    path = tmp_path / 'args.yaml'
    path.write_text(config_text(settings))
    assert read_given(TrainSettings, parser_of(TrainSettings), ['--config', str(path)]).settings() == (
        settings.with_values(config=str(path)))


@pytest.mark.parametrize('groups', COMMANDS)
def test_a_record_of_an_earlier_version_is_read(groups):
    """It had None where today's has the default, knew other settings, and lacked some of today's."""
    assert groups.from_record(dict.fromkeys(groups.declared())) == groups.of({})
    assert groups.from_record({}) == groups.of({})
    assert groups.from_record({'no_such_setting': 1}) == groups.of({})
    old = {'freeze_bn': None, 'kd_temperature': None, 'kd_target': None, 'distill_loss_weight': None,
           'remix_kappa': None, 'remix_tau': None, 'cmo_prob': None, 'warmup_lr': None, 'decay_milestones': (60, 80)}
    assert TrainSettings.changed(old, TrainSettings.of({}).values()) == {}
    assert TrainSettings.from_record(old) == TrainSettings.of({})


@pytest.mark.parametrize('groups', COMMANDS)
def test_two_records_differ_in_what_decides_the_result(groups):
    default = groups.of({}).values()
    for name, declared in groups.declared().items():
        value = next(iter(some_values(declared)), None)
        changed = groups.changed(default, {**default, name: value})
        expected = {name} if declared.declaration.kind == 'recipe' else set()
        assert set(changed) == expected, name
        if declared.declaration.is_file and declared.declaration.kind == 'recipe':
            assert changed == {name: (declared.default, value)}
            assert groups.changed({name: '/here/some.txt'}, {name: 'D:\\there\\some.txt'}) == {}
            assert set(groups.changed({name: '/here/some.txt'}, {name: '/here/other.txt'})) == {name}


@pytest.mark.parametrize('groups', COMMANDS)
def test_what_is_told_to_others_has_no_place_and_no_machine(groups):
    record = {name: next(iter(some_values(declared)), None) for name, declared in groups.declared().items()}
    record |= {name: f'/home/someone/{name}.txt' for name, declared in groups.declared().items()
               if declared.declaration.is_file}
    told = groups.public({**record, 'of_another_version': 3})
    for name, declared in groups.declared().items():
        about = declared.declaration
        assert (name in told) == (about.kind == 'recipe' or about.is_file), name
        if name in told:
            assert told[name] == (f'{name}.txt' if about.is_file else record[name])
    assert told['of_another_version'] == 3
    assert 'someone' not in str(told)


# Effects


def situations(groups: type[SettingGroups], name: str) -> Iterator[dict[str, Any]]:
    """Values of at most one other setting by which `name` has no effect by its declaration, one for each reason."""
    known, default, reasons = groups.declared(), groups.of({}).values(), set()
    effect = known[name].declaration.effect
    assert effect is not None
    for values in [{}, *others_of(groups, name)]:
        reason = effect(name, Values({**default, **values}))
        if reason is not None and reason not in reasons:
            reasons.add(reason)
            yield values


def others_of(groups: type[SettingGroups], name: str) -> list[dict[str, Any]]:
    """A value of one other setting each."""
    return [{other: value} for other, declared in groups.declared().items() if other not in (name, 'config')
            for value in some_values(declared)]


def with_an_effect(groups: type[SettingGroups], name: str) -> bool:
    """Whether the setting has an effect on some command line, with at most two other settings."""
    known, default = groups.declared(), groups.of({}).values()
    effect = known[name].declaration.effect
    assert effect is not None
    others = others_of(groups, name)
    reasons: dict[str, dict[str, Any]] = {}
    for values in [{}, *others]:
        reason = effect(name, Values({**default, **values}))
        if reason is None:
            return True
        reasons.setdefault(reason, values)
    return any(effect(name, Values({**default, **values, **other})) is None
               for values in reasons.values() for other in others)


DECLARED = [(groups, name) for groups in COMMANDS for name, declared in groups.declared().items()
            if declared.declaration.effect is not None]


@pytest.mark.parametrize(('groups', 'name'), DECLARED)
def test_a_setting_has_an_effect_somewhere_and_none_elsewhere(groups, name):
    assert with_an_effect(groups, name)
    assert next(situations(groups, name), None) is not None


@pytest.mark.parametrize(('groups', 'name'), DECLARED)
def test_a_typed_flag_without_effect_is_refused_and_a_key_of_a_config_is_told(groups, name, caplog):
    caplog.set_level(logging.INFO)
    parser = parser_of(groups)
    value = next(some_values(groups.declared()[name]))
    for others in situations(groups, name):
        around = [word for other, one in others.items() for word in typed(other, one)]
        flags = read_given(groups, parser, typed(name, value)).flags
        given = Given(groups, flags, others)
        with pytest.raises(InputError, match=f'^{typed_flag(name, value)} .*: leave it out$'):
            given.check_effects(given.settings())
        given = read_given(groups, parser, [*typed(name, value), *around])
        reason = given.settings().without_effect([name], given.flags)[name]
        if isinstance(reason, Tolerated):  # one more flag on the line of a script switches it off
            assert flag(next(iter(others))) in reason
        else:
            either = '|'.join(typed_flag(other, one) for other, one in [(name, value), *others.items()])
            with pytest.raises(InputError, match=f'^({either}) .*: leave it out$'):
                given.check_effects(given.settings())
        given = Given(groups, read_given(groups, parser, around).flags, {name: value})
        caplog.clear()
        try:
            given.check_effects(given.settings())
        except InputError as error:  # what makes the situation has no effect by itself
            assert not str(error).startswith(f'{typed_flag(name, value)} ')
            continue
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1 and re.match(rf'Settings without effect here: .*\b{name}\b', told[0])
        given = Given(groups, given.flags, {name: plain(groups.declared()[name].default)})
        caplog.clear()
        given.check_effects(given.settings())  # a default in a config is no wish
        assert not [record for record in caplog.records if re.search(rf'\b{name}\b', record.getMessage())]


@pytest.mark.parametrize('stage', SECOND_STAGES)
def test_what_a_second_stage_leaves_unused_is_refused_or_told(stage, caplog):
    caplog.set_level(logging.INFO)
    known = TrainSettings.declared()
    assert known.keys() >= set(SECOND_STAGES[stage].unused)
    for name in known.keys() - {'stage', 'dataset'}:
        value = next(some_values(known[name]))
        reason = TrainSettings.of({'stage': stage, name: value}).without_effect([name]).get(name)
        if reason is None:
            assert name not in SECOND_STAGES[stage].unused
            continue
        given = Given(TrainSettings, {'stage': stage, name: value}, {})
        if isinstance(reason, Tolerated):
            assert issubclass(SECOND_STAGES[stage], FittedSecondStage)
            given.check_effects(given.settings())
        else:
            with pytest.raises(InputError, match=f'^{typed_flag(name, value)} '):
                given.check_effects(given.settings())
        caplog.clear()
        given = Given(TrainSettings, {'stage': stage}, {name: value})
        given.check_effects(given.settings())
        assert re.search(rf'\b{name}\b', caplog.records[-1].getMessage())


@pytest.mark.parametrize('groups', [groups for groups in COMMANDS if 'dataset' in groups.declared()])
@pytest.mark.parametrize('dataset', DATASETS)
def test_what_a_dataset_does_not_use_is_refused_or_told(dataset, groups, caplog):
    caplog.set_level(logging.INFO)
    dataset = f'{dataset}some' if dataset.endswith('/') else dataset
    for declared in fields_of(DataSettings):
        name, value = declared.name, next(some_values(declared))
        settings = groups.of({'dataset': dataset, name: value}) if name != 'dataset' else groups.of({name: dataset})
        given = Given(groups, {name: getattr(settings.data, name)}, {'dataset': dataset})
        idle = settings.without_effect([name])
        if name in find_dataset(dataset).used_settings(settings.data) and not idle:
            given.check_effects(settings)
            continue
        assert name in idle
        with pytest.raises(InputError, match=f'^{typed_flag(name, value)} .*: leave it out$'):
            given.check_effects(settings)
        caplog.clear()
        Given(groups, {'dataset': dataset}, {name: value}).check_effects(settings)
        assert re.search(rf'\b{name}\b', caplog.records[-1].getMessage())


def test_effects_of_a_declaration():
    def reason(effect, **values):
        return effect('own', Values(values))

    assert reason(only_with('teacher')) == reason(only_with('teacher'), teacher=0) == (
        'has no effect without --teacher')
    assert reason(only_with('teacher'), teacher='x') is None
    assert reason(only_with('sched', 'step', 'multistep'), sched='cosine') == (
        'is for --sched step or multistep, and this is cosine')
    assert reason(only_with('sched', 'step', 'multistep'), sched='step') is None
    assert reason(not_with('no_aug'), no_aug=True) == 'has no effect with --no-aug'
    assert reason(not_with('no_aug'), no_aug=False) is None
    both = all_of(only_with('a'), not_with('b'))
    assert reason(both, a=1) is None
    assert reason(both, a=1, b=1) == 'has no effect with --b'


@pytest.mark.parametrize('name', shipped_configs())
def test_no_shipped_config_has_a_key_without_effect(name, caplog):
    caplog.set_level(logging.INFO)
    parser, path = parser_of(TrainSettings), shipped_configs()[name]
    asked_for = [key for key, value in read_config(parser, TrainSettings, path).items() if value == ASKED_FOR]
    given = read_given(TrainSettings, parser,
                       ['--config', name, *(word for key in asked_for for word in (flag(key), 'some.pth'))])
    assert given.settings().without_effect(list(given.config)) == {}
    given.check_effects(given.settings())
    assert not [record for record in caplog.records if 'without effect' in record.getMessage()]


# A new setting is one declaration


@dataclass(frozen=True)
class MoreTrainSettings(TrainSettings):
    """The settings of a training, and the extra ones."""

    extra: Extra = Extra()


def test_a_new_setting_is_a_flag_a_key_a_check_and_a_record(tmp_path, capsys):
    parser = parser_of(MoreTrainSettings)
    assert re.search(r'--extra-rate X\s+share of the extra \(default: 0.5\)', parser.format_help())
    assert re.search(r'--extra, --no-extra\s+do more \(default: off\)', parser.format_help())
    path = tmp_path / 'some.yaml'
    path.write_text('extra: true\nextra-rate: 0.25\nextra_file: /here/some.txt\nextra_workers: 5\nlr: 0.2\n')
    given = read_given(MoreTrainSettings, parser, ['-c', str(path), '--extra-sizes', '4', '5', '--extra-kwargs', 'a=1'])
    settings = given.settings()
    given.check_effects(settings)
    assert settings.extra == Extra(True, 0.25, (4, 5), '/here/some.txt', 5, {'a': 1})
    record = settings.values()
    assert MoreTrainSettings.from_record(record) == settings
    assert MoreTrainSettings.public(record).items() >= {'extra_rate': 0.25, 'extra_file': 'some.txt'}.items()
    assert 'extra_workers' not in MoreTrainSettings.public(record)
    assert MoreTrainSettings.changed(record, {**record, 'extra_rate': 0.75, 'extra_workers': 1,
                                              'extra_file': '/there/some.txt'}) == {'extra_rate': (0.25, 0.75)}
    with pytest.raises(InputError, match="setting 'extra_rate' is 2: give a number at least 0 and at most 1"):
        MoreTrainSettings.of({'extra_rate': 2})
    with pytest.raises(InputError, match="--extra-rate has no effect without --extra: leave it out"):
        given = read_given(MoreTrainSettings, parser, ['--extra-rate', '0.25'])
        given.check_effects(given.settings())
    with pytest.raises(InputError, match="unknown key 'extra_rates'; did you mean 'extra_rate'"):
        path.write_text('extra_rates: 1')
        read_config(parser, MoreTrainSettings, path)
    with pytest.raises(SystemExit):
        parser.parse_args(['--extra-rate', '2'])
    assert 'is no number at least 0 and at most 1' in capsys.readouterr().err


# The code


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob('*.py'))


def test_no_argument_object_leaves_the_commands():
    """Annotations only: what a checkpoint of timm's holds may be asked for."""
    found = []
    for path in modules():
        if path.parent.name == 'cli' or path == PACKAGE / 'config.py':
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            annotations = [getattr(node, 'annotation', None), getattr(node, 'returns', None)]
            found += [f'{path.name}:{node.lineno}' for one in annotations if one is not None  # type: ignore[attr-defined]
                      and 'Namespace' in ast.unparse(one)]
    assert found == []


@pytest.mark.parametrize('function', [train, validate])
def test_the_tables_of_contents_are_read_in_one_look(function):
    tree = ast.parse(Path(function.__code__.co_filename).read_text())
    node = next(one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function.__name__)
    assert node.end_lineno - node.lineno + 1 <= 60


@pytest.mark.parametrize('flags, reason', [
    (['--color-jitter-prob', '0.5', '--dataset', 'cifar100_lt'], 'is not jittered'),
    (['--bn-momentum', '0.3', '--stage', 'crt'], 'where BatchNorm is frozen'),
    (['--bn-momentum', '0.3', '--stage', 'routing'], 'where BatchNorm is frozen'),
    (['--cuda-graphs', '--device', 'cpu'], 'has no effect with --device cpu'),
    (['--deterministic', '--device', 'cpu'], 'has no effect with --device cpu'),
])
def test_what_the_data_or_a_stage_leave_unused_is_refused(flags, reason):
    given = cli.train.read_command_line(['--model', 'resnet32_ride', *flags, '--initial-checkpoint', 'first.pth'])
    with pytest.raises(InputError, match=f'{flags[0]}.*{reason}'):
        given.check_effects(given.settings())


@pytest.mark.parametrize('flags', [
    ['--color-jitter-prob', '0.5', '--color-jitter', '0.4', '--dataset', 'cifar100_lt'],
    ['--color-jitter-prob', '0.5', '--dataset', 'imagenet_lt'],
    ['--bn-momentum', '0.3', '--stage', 'crt', '--no-freeze-bn'],
])
def test_what_has_an_effect_is_taken(flags):
    given = cli.train.read_command_line(['--model', 'resnet32', *flags, '--initial-checkpoint', 'first.pth'])
    given.check_effects(given.settings())


@pytest.mark.parametrize('flags', [['--log-interval', '7'], ['--checkpoint-hist', '3']])
def test_what_a_pass_without_training_leaves_unused_is_told(flags):
    given = cli.train.read_command_line(
        ['--model', 'resnet32', '--stage', 'ncm', *flags, '--initial-checkpoint', 'first.pth'])
    told = []
    given.check_effects(given.settings(), told.append)
    assert any('trains nothing' in line for line in told)

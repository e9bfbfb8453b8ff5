"""Settings from the command line and YAML configs: a config gives defaults, flags win, and nothing is ever ignored."""
import argparse
import datetime
import difflib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import yaml
from timm.utils import ParseKwargs

from nbn_timm.errors import InputError, first_to_say, nearest, quoted
from nbn_timm.files import open_regular, refuse_no_file
from nbn_timm.seals import tell_text_changes
from nbn_timm.settings import PLAIN, Field, Limits, SettingGroups, Tolerated, fields_of, flag, key_of, not_plain

GroupsT = TypeVar('GroupsT', bound=SettingGroups)

MAX_CONFIG = 1_000_000  # bytes of a YAML file
MAX_DEPTH = 20  # of its nesting
ASKED_FOR = '???'  # value of a key that a config needs and only its user has, as OmegaConf writes it

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given(Generic[GroupsT]):
    """What a command was given.

    Attributes:
        groups: Type of the command's settings.
        flags: Values of the flags that were typed, by name.
        config: Values in the config, by name.
        positional: What was typed beside the flags, by name.
    """

    groups: type[GroupsT]
    flags: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    positional: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Values by name; a flag takes the place of the config's, of a mapping key by key."""
        merged = {**self.config, **self.flags}
        for name, value in self.flags.items():
            if isinstance(value, dict):
                merged[name] = {**(self.config.get(name) or {}), **value}
        return merged

    def settings(self, inherited: Mapping[str, Any] | None = None) -> GroupsT:
        """The settings, with defaults for what was not given.

        Args:
            inherited: Values that hold for what was not given, as of a finished network.

        Raises:
            InputError: A value is wrong.
        """
        return self.groups.of({**(inherited or {}), **self.values()})

    def check_effects(self, settings: GroupsT, tell: Callable[[str], None] = _logger.info, **facts: Any) -> None:
        """Refuse typed flags that have no effect, and tell those of a config in one line.

        Args:
            settings: What they amount to.
            tell: Takes the line.
            facts: See `SettingGroups.without_effect`.

        Raises:
            InputError: Names the first such flag, with the reason.
        """
        typed = settings.without_effect(list(self.flags), self.flags.keys(), **facts)
        for name, reason in typed.items():
            if not isinstance(reason, Tolerated):
                typed_as = flag(f'no_{name}' if self.flags[name] is False else name)
                raise InputError(f'{typed_as} {reason}: leave it out')
        known = self.groups.declared()
        differing = [name for name, value in self.config.items()
                     if name not in self.flags and value != _as_given(known[name])]
        idle = typed | settings.without_effect(differing, **facts)
        if idle:
            tell(f'Settings without effect here: {_told(idle)}.')


def _told(idle: Mapping[str, str]) -> str:
    """Settings and reasons, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in idle.items():
        by_reason.setdefault(str(reason), []).append(name)
    return '; '.join(f'{", ".join(names)} ({reason})' for reason, names in by_reason.items())


def _as_given(declared: Field) -> Any:
    return list(declared.default) if declared.many and declared.default is not None else declared.default


def number(limits: Limits | None = None, kind: type = float) -> Callable[[str], Any]:
    """An argument type: a finite number of `kind` within limits, a whole one of 64 bits."""
    largest = 2 ** 63 if kind is int else math.inf

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not abs(value) < largest or not (limits is None or value in limits):
            allowed = '' if limits is None else f' {limits}'
            what = 'whole number' if kind is int else 'number'
            if value is not None and not abs(value) < largest:  # it may be within the limits
                what = 'whole number of 64 bits' if kind is int else 'finite number'
            raise argparse.ArgumentTypeError(f"'{text[:40]}' is no {what}{allowed}")
        return value
    return parse


def choice(choices: Collection[str], instead: Mapping[str, str]) -> Callable[[str], str]:
    """An argument type: one of the choices; a wrong one is told what to use `instead`, or the nearest."""
    def parse(text: str) -> str:
        if text in instead:
            raise argparse.ArgumentTypeError(f"'{text}' is no choice here: {instead[text]}")
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"invalid choice: '{text}' (choose from {', '.join(choices)}){nearest(text, choices)}")
        return text
    return parse


class KeyValues(ParseKwargs):
    """timm's `ParseKwargs` (`--flag a=1 b=x` gives a dict) over the keys of earlier flags.

    A missing `=`, and a key that stands twice behind one flag, are usage errors.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, None) or {}
        keys = Counter(word.partition('=')[0] for word in values)
        twice = next((key for key, times in keys.items() if times > 1), None)
        if twice is not None:
            raise argparse.ArgumentError(self, f"the key '{twice}' is there twice: keep one")
        try:
            super().__call__(parser, namespace, values, option_string)
        except ValueError as error:
            raise argparse.ArgumentError(self, 'write each setting as key=value') from error
        setattr(namespace, self.dest, before | getattr(namespace, self.dest))


class _Parser(argparse.ArgumentParser):
    """Of several processes that are typed alike, one tells what is wrong with it."""

    def error(self, message: str) -> NoReturn:
        if first_to_say(message):
            super().error(message)
        self.exit(2)


def build_parser(groups: type[SettingGroups], prog: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command; what it gives has the flags that were typed, and no others."""
    parser = _Parser(
        prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if 'config' in groups.declared():
        parser.usage = f'{prog} [--config YAML] [--flag value ...]; --help lists the flags'
    for group in groups.group_types().values():
        section = parser.add_argument_group(group.title, group.about)
        for declared in fields_of(group):
            more = groups.explained.get(declared.name)
            add_flag(section, declared, more() if more else '')
    return parser


def add_flag(section: Any, declared: Field, more: str = '') -> None:
    """Add the flag of a setting to a parser or to a group of its flags, with `more` to say of it."""
    about = declared.declaration
    help = f'{about.help}{more} (default: {declared.shown_default()})'.strip().replace('%', '%%')
    names = [*([about.short] if about.short else []), flag(declared.name), *about.also]
    options: dict[str, Any] = dict(dest=declared.name, help=help, default=argparse.SUPPRESS)
    if declared.type is bool:
        negative = declared.name.startswith('no_')  # nobody writes --no-no-aug
        section.add_argument(*names, action='store_true' if negative else argparse.BooleanOptionalAction, **options)
        return
    if declared.type is dict:
        section.add_argument(*names, nargs='*', action=KeyValues, metavar='KEY=VALUE', **options)
        return
    if declared.type in (int, float):
        options['type'] = number(about.limits, declared.type)
    if declared.choices is not None:
        options['type'] = choice(declared.choices, about.instead)
    if about.nargs is not None:
        options['nargs'] = '+' if about.nargs == 0 else about.nargs
    if about.nargs == '?':
        options['const'] = about.const
    if about.metavar is not None:
        options['metavar'] = about.metavar
    elif declared.choices is not None:
        options['metavar'] = f'{{{",".join(declared.choices)}}}'
    else:
        options['metavar'] = {int: 'N', float: 'X'}.get(declared.type, 'TEXT')
    section.add_argument(*names, **options)


def read_given(groups: type[GroupsT], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
               ) -> Given[GroupsT]:
    """Read a command line, and the config that it names.

    Args:
        groups: The command's settings; one of them may be `config`.
        parser: Of `build_parser`, perhaps with positional arguments added.
        argv: Arguments; None means those of the process.

    Raises:
        InputError: The config is missing, is no YAML mapping, has an unknown key, a key twice or an impossible
            value, or asks for what is not given.
    """
    known, config = groups.declared(), {}
    name = None
    if 'config' in known:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument('-c', '--config')
        name = finder.parse_known_args(argv)[0].config
        config = read_config(parser, groups, config_path(name)) if name else {}
    given = vars(parse_flags(parser, argv, known, groups.elsewhere, groups.of_others))
    for key, value in config.items():
        if value == ASKED_FOR and key not in given:
            raise InputError(f"config '{name}' asks for {flag(key)}: give one")
    return Given(groups, {key: value for key, value in given.items() if key in known}, config,
                 {key: value for key, value in given.items() if key not in known})


def parse_flags(
        parser: argparse.ArgumentParser,
        argv: Sequence[str] | None = None,
        known: Mapping[str, Any] | None = None,
        elsewhere: Mapping[str, str] | None = None,
        of_others: Mapping[str, str] | None = None,
) -> argparse.Namespace:
    """Parse a command line, with flags and other arguments in any order.

    A wrong flag is told the nearest right one, and one of `SettingGroups.elsewhere` or `of_others` what to
    use instead.
    """
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        name = unknown[0].partition('=')[0]
        if name.startswith('-') and key_of(name) in (elsewhere or {}):
            parser.error(not_here(name, elsewhere))
        if name.startswith('-') and (owner := (of_others or {}).get(key_of(name))):
            parser.error(f"unknown argument '{name}': {owner}")
        parser.error(f"unknown argument '{unknown[0]}'{_nearest_flag(unknown[0], known or vars(args))}")
    return args


def not_here(name: str, elsewhere: Mapping[str, str] | None) -> str:
    """A sentence on a flag or a key of timm's, see `SettingGroups.elsewhere`."""
    return f"timm's {name} is not here: {(elsewhere or {})[key_of(name)]}"


def _nearest_flag(word: str, known: Iterable[str]) -> str:
    """What `nearest` says of a flag, where the dashes that all of them have make none of them near."""
    bare, *_ = word.lstrip('-').partition('=')
    flags = {flag(name).lstrip('-'): flag(name) for name in known}
    found = difflib.get_close_matches(bare, flags, n=1, cutoff=0.6) if word.startswith('-') else []
    if not word.startswith('-') and 'data_dir' in known:
        return ': a folder of images is given with --data-dir, and --help lists the flags'
    if not word.startswith('-') and 'model' in known:
        return ': give it with --model if it is the network, and --help lists the flags'
    return f"; did you mean '{flags[found[0]]}'?" if found else ': --help lists the flags'


class PlainLoader(yaml.SafeLoader):
    """YAML as its specification has it, a key that occurs twice being an error, without aliases and deep nesting.

    Neither has a place in a config, and a small file can blow up by them.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                problem='a config has no aliases, write the value out', problem_mark=self.peek_event().start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                problem='the values are nested too deeply', problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key.value}' is there twice, keep one", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def config_path(name: str) -> Path:
    """Find a config: an existing file, else one shipped with the package, by name with or without `.yaml`.

    Raises:
        InputError: There is neither.
    """
    if os.path.isfile(name):
        return Path(name)
    shipped = shipped_configs()
    key = name.removeprefix('configs/').removesuffix('.yaml')
    if key not in shipped:
        refuse_no_file(name)
        known = nearest(key, shipped, most=3) or (
            f': give a file, or one of the {len(shipped)} below {quoted(str(shipped_folder()))} by its name')
        raise InputError(f'there is no config file {quoted(name)} and none of that name is shipped{known}')
    return shipped[key]


def shipped_folder() -> Path:
    """The folder of the configs that come with the package: inside an installed one, beside it in a checkout."""
    package = Path(str(resources.files('nbn_timm')))
    return next((path for path in (package / 'configs', package.parent / 'configs') if path.is_dir()), package)


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name such as 'cifar100_lt/resnet32_nbn'."""
    folder = shipped_folder()
    return {path.relative_to(folder).with_suffix('').as_posix(): path for path in sorted(folder.rglob('*.yaml'))}


def read_mapping(path: Path) -> dict[Any, Any]:
    """A YAML file that holds a mapping.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_CONFIG + 1)
        if len(content) > MAX_CONFIG:
            raise InputError(f"config '{path}' has more than {MAX_CONFIG:,} bytes: give a file of settings")
        text = content.decode('utf-8')
        mapping = yaml.load(text, Loader=PlainLoader)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config '{path}' cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(mapping, dict):
        raise InputError(f"config '{path}' is not a mapping: write one 'key: value' per line")
    tell_text_changes(text, f"the config '{path}'")
    return mapping


def read_config(parser: argparse.ArgumentParser, groups: type[SettingGroups], path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings (with dashes or underscores) to values, checked as the flags themselves are.

    Returns:
        Values by name; a key whose value is null is left out, so that its default holds.

    Raises:
        InputError: See `read_given`.
    """
    known = groups.declared()
    other_names = {key_of(other): one.name for one in known.values() for other in one.declaration.also}
    values: dict[str, Any] = {}
    for key, value in read_mapping(path).items():
        name = str(key).replace('-', '_')
        name = other_names.get(name, name)
        if name in groups.elsewhere and name not in known:
            raise InputError(f"in config '{path}': {not_here(name, groups.elsewhere)}")
        if name in groups.of_others and name not in known:
            raise InputError(f"config '{path}' has the key '{key}': {groups.of_others[name]}")
        if name not in known or name == 'config':
            raise InputError(f"config '{path}' has an unknown key '{key}'{nearest(name, known)}")
        if value is None:
            continue
        if name in values:
            raise InputError(f"config '{path}' sets '{name}' twice, in two ways of writing it: keep one")
        try:
            values[name] = _parse_value(parser, known[name], value)
        except (argparse.ArgumentError, ValueError) as error:
            reason = error.message if isinstance(error, argparse.ArgumentError) else error
            raise InputError(f"config '{path}' sets '{name}' to {told(value)}: {reason}") from error
    return values


def told(value: Any) -> str:
    """A value of a config for a sentence, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # of a whole number of more digits than Python writes
        return 'a number of thousands of digits'
    return text if len(text) <= 200 else f'{text[:200]}...'


def _parse_value(parser: argparse.ArgumentParser, declared: Field, value: Any) -> Any:
    """Give a value to the parser as command-line words, so that one set of types and choices rules both."""
    # What stands alone is text, also where YAML takes it for a date.
    strange = None if isinstance(value, datetime.date) else next(not_plain(value), None)
    if strange is not None:
        raise ValueError(f'it is or holds a value of the kind {type(strange).__name__}: give {PLAIN}')
    if isinstance(value, bool) != (declared.type is bool):
        raise ValueError('it takes a value' if isinstance(value, bool) else 'it must be true or false')
    if isinstance(value, bool):
        return value
    words = [f'{flag(declared.name)}={value}']
    if isinstance(value, dict):
        words = [flag(declared.name), *(f'{key}={item!r}' for key, item in value.items())]
    elif isinstance(value, list):
        words = [flag(declared.name), *map(str, value)]
    parsed, rest = _without_exit(parser, words)
    if rest:
        raise ValueError('it takes one value')
    return getattr(parsed, declared.name)


def _without_exit(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        return parser.parse_known_args(words)
    finally:
        parser.exit_on_error = exits


"""YAML configs for argparse commands: a config gives defaults, flags win, and nothing in it is ever ignored."""
import argparse
from collections.abc import Callable, Hashable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from nbn_timm.errors import InputError, nearest


def between(
        low: float,
        high: float = float('inf'),
        kind: type = float,
        above: bool = False,
) -> Callable[[str], Any]:
    """An argument type: a finite number of `kind` from `low`, itself excluded if `above`, to `high`."""
    limits = f"{'above' if above else 'at least'} {low:g}" + ('' if high == float('inf') else f' and at most {high:g}')

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float('inf') or (above and value == low):
            raise argparse.ArgumentTypeError(f"'{text}' is no {'whole ' if kind is int else ''}number {limits}")
        return value
    return parse


POSITIVE_INT = between(1, kind=int)
COUNT = between(0, kind=int)
POSITIVE = between(0, above=True)
NOT_NEGATIVE = between(0)
PROBABILITY = between(0, 1)


class KeyValues(ParseKwargs):
    """timm's `ParseKwargs` (`--flag a=1 b=x` gives a dict) over the default's and earlier flags' keys.

    A missing `=` is a usage error.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, None) or {}
        try:
            super().__call__(parser, namespace, values, option_string)
        except ValueError as error:
            raise argparse.ArgumentError(self, 'write each setting as key=value') from error
        setattr(namespace, self.dest, before | getattr(namespace, self.dest))


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML as its specification has it: a key that occurs twice in one mapping is an error."""

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
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    key = name.removeprefix('configs/').removesuffix('.yaml')
    if key not in shipped:
        raise InputError(f"there is no config file '{name}' and none of that name is shipped "
                         f"(shipped are {', '.join(shipped)}){nearest(key, shipped)}")
    return shipped[key]


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name such as 'cifar100_lt/resnet32_nbn'.

    They lie inside an installed package and beside the package in a checkout.
    """
    package = Path(str(resources.files('nbn_timm')))
    folder = next((path for path in (package / 'configs', package.parent / 'configs') if path.is_dir()), package)
    return {path.relative_to(folder).with_suffix('').as_posix(): path for path in sorted(folder.rglob('*.yaml'))}


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line whose `--config` file, if there is one, gives the defaults.

    A flag takes the place of the file's value; of `KeyValues`, key by key.

    Args:
        parser: Has the option `-c`/`--config`; its types and choices check the file's values as well.
        argv: Arguments; None means those of the process.

    Raises:
        InputError: The config is missing, is no YAML mapping, or has an unknown key, a key twice or an
            impossible value.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument('-c', '--config')
    name = finder.parse_known_args(argv)[0].config
    if name:
        parser.set_defaults(**read_config(parser, config_path(name)))
    parser.usage = f'{parser.prog} [--config YAML] [--flag value ...]; --help lists the flags'
    return parse_flags(parser, argv)


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, with flags and other arguments in any order; a wrong flag is told the nearest right one."""
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flags = [f"--{name.replace('_', '-')}" for name in vars(args)]
        parser.error(f"unknown argument '{unknown[0]}'{nearest(unknown[0].partition('=')[0], flags)}")
    return args


def read_config(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Read a YAML mapping of flag names (with dashes or underscores) to values, checked as the flags themselves are.

    Returns:
        Argument values by destination name; a key whose value is null is left out, so that its default holds.

    Raises:
        InputError: See `parse_args`.
    """
    try:
        mapping = yaml.load(path.read_text(encoding='utf-8'), Loader=UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config '{path}' cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(mapping, dict):
        raise InputError(f"config '{path}' is not a mapping: write one 'key: value' per line")

    known = vars(parser.parse_args([]))
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).replace('-', '_')
        if name not in known or name == 'config':
            raise InputError(f"config '{path}' has an unknown key '{key}'{nearest(name, known)}")
        if value is None:
            continue
        if name in values:
            raise InputError(f"config '{path}' sets '{name}' twice, with dashes and with underscores: keep one")
        try:
            values[name] = _parse_value(parser, name, value)
        except (argparse.ArgumentError, ValueError) as error:
            reason = error.message if isinstance(error, argparse.ArgumentError) else error
            raise InputError(f"config '{path}' sets '{name}' to {value!r}: {reason}") from error
    return values


def _parse_value(parser: argparse.ArgumentParser, name: str, value: Any) -> Any:
    """Give a value to the parser as command-line words, so that one set of types and choices rules both."""
    if isinstance(value, bool) != _is_switch(parser, name):
        raise ValueError('it takes a value' if isinstance(value, bool) else 'it must be true or false')
    if isinstance(value, bool):
        return value
    flag = f"--{name.replace('_', '-')}"
    words = [f'{flag}={value}']
    if isinstance(value, dict):
        words = [flag, *(f'{key}={item!r}' for key, item in value.items())]
    elif isinstance(value, list):
        words = [flag, *map(str, value)]
    parsed, rest = _without_exit(parser, words)
    if rest:
        raise ValueError('it takes one value')
    return getattr(parsed, name)


def _is_switch(parser: argparse.ArgumentParser, name: str) -> bool:
    try:
        parsed, _ = _without_exit(parser, [f"--{name.replace('_', '-')}"])
    except argparse.ArgumentError:
        return False
    return getattr(parsed, name) is True


def _without_exit(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        return parser.parse_known_args(words)
    finally:
        parser.exit_on_error = exits

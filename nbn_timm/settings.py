"""Settings: each is declared once, as a field of a frozen dataclass beside the code that uses it.

    @dataclass(frozen=True)
    class ScheduleSettings(Settings):
        sched: str = setting('cosine', 'course of the learning rate', choices=('cosine', 'step'))
        decay_epochs: float = setting(30, 'epochs between decays', limits=AT_LEAST_1, effect=only_with('sched', 'step'))

All else follows from the declaration: the flag `--decay-epochs`, the YAML key `decay_epochs`, the check of its value,
its default in `--help`, the refusal where it has no effect, its place in args.yaml and in checkpoints, and whether two
runs have the same recipe.
"""
import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from nbn_timm.errors import InputError, nearest

Kind = Literal['recipe', 'machine', 'place']
SettingsT = TypeVar('SettingsT', bound='Settings')
GroupsT = TypeVar('GroupsT', bound='SettingGroups')


@dataclass(frozen=True)
class Limits:
    """The numbers from `low`, itself excluded if `above`, to `high`, excluded if `below`; infinity and NaN are none."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        at_an_end = (self.above and value == self.low) or (self.below and value == self.high)
        return self.low <= value <= self.high and abs(value) < math.inf and not at_an_end

    def __str__(self) -> str:
        return (f"{'above' if self.above else 'at least'} {self.low:g}"
                + ('' if self.high == math.inf else f" and {'below' if self.below else 'at most'} {self.high:g}"))


AT_LEAST_1 = Limits(1)
NOT_NEGATIVE = Limits(0)
POSITIVE = Limits(0, above=True)
PROBABILITY = Limits(0, 1)
ANY_NUMBER = Limits(-math.inf)


class Values:
    """All settings of a command by their flat names, as attributes.

    Attributes:
        typed: Names of those whose flags were typed.
    """

    typed: Collection[str]

    def __init__(self, values: Mapping[str, Any], typed: Collection[str] = ()) -> None:
        self.__dict__.update(values, typed=typed)

    def __getattr__(self, name: str) -> Any:  # a command has not all settings: what it lacks is not set
        return None


# Says why a setting, by its name, has no effect among these values, and what to do; None where it has one.
Effect = Callable[[str, Values], str | None]


class Tolerated(str):
    """A reason that is told, but for which nothing is refused.

    The command line of a training is often used again for a pass that trains nothing, and that of a script with one
    more flag that switches something off.
    """


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting beside its name, type and default; see `setting`."""

    help: str
    limits: Limits | None
    choices: tuple[str, ...] | Callable[[], Collection[str]] | None
    nargs: int | str | None
    const: Any
    metavar: str | tuple[str, ...] | None
    short: str | None
    also: tuple[str, ...]
    unset: str
    kind: Kind
    is_file: bool
    inherited: bool
    effect: Effect | None
    instead: Mapping[str, str] = field(default_factory=dict)


def setting(
        default: Any,
        help: str,
        *,
        limits: Limits | None = None,
        choices: tuple[str, ...] | Callable[[], Collection[str]] | None = None,
        nargs: int | str | None = None,
        const: Any = None,
        metavar: str | tuple[str, ...] | None = None,
        short: str | None = None,
        also: tuple[str, ...] = (),
        unset: str = 'none',
        kind: Kind = 'recipe',
        is_file: bool = False,
        inherited: bool = False,
        effect: Effect | None = None,
        instead: Mapping[str, str] | None = None,
) -> Any:
    """Declare a setting, as the default of a dataclass field.

    The flag's form follows from the field's type: bool is a switch with a `--no-` form, int and float are numbers, a
    tuple takes several values, a mapping takes KEY=VALUE.

    Args:
        default: Its value if it is not given; None where something else decides, which `unset` names.
        help: For `--help`, without the default.
        limits: Of a number, or of each of several.
        choices: The values that there are, or a function that gives them when they are needed.
        nargs: Number of values of a tuple, 0 for '+'; '?' where the flag may stand alone, which then means `const`.
        const: See `nargs`.
        metavar: Name of the value in `--help`.
        short: One-letter flag such as '-b'.
        also: Further flags of the same meaning.
        unset: What holds where the value is None, in words.
        kind: 'recipe' decides the result, 'machine' (workers, device) and 'place' (folders) do not.
        is_file: A path that is told to others by the file's name alone.
        inherited: Who goes on from a finished network takes it from there, unless it is given.
        effect: Says why it has no effect among other values, see `only_with`.
        instead: Of values that are no choices but known elsewhere, what to use in their place.
    """
    declaration = Declaration(
        help, limits, choices, nargs, const, metavar, short, also, unset, kind, is_file, inherited, effect,
        instead or {})
    metadata = {'declaration': declaration}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The flag of a setting: `--train-list` of 'train_list'."""
    return f"--{name.replace('_', '-')}"


def key_of(flag: str) -> str:
    """The YAML key of a flag: 'train_list' of `--train-list`."""
    return flag.lstrip('-').replace('-', '_')


def only_with(name: str, *values: Any) -> Effect:
    """The effect of a setting that matters only if another one has one of `values`, or without these, if it is on."""
    def effect(_: str, others: Values) -> str | None:
        value = getattr(others, name)
        if value in values if values else is_on(value):
            return None
        reason = f'has no effect without {flag(name)}'
        if values:
            reason = f'is for {flag(name)} {" or ".join(map(str, values))}, and this is {value}'
        return Tolerated(reason) if not values and name in others.typed else reason
    return effect


def not_with(name: str) -> Effect:
    """The effect of a setting that another one switches off."""
    def effect(_: str, others: Values) -> str | None:
        return f'has no effect with {flag(name)}' if is_on(getattr(others, name)) else None
    return effect


def all_of(*effects: Effect) -> Effect:
    """The effect of a setting for which several things must hold."""
    def effect(name: str, others: Values) -> str | None:
        return next((reason for one in effects if (reason := one(name, others))), None)
    return effect


def is_on(value: Any) -> bool:
    """Whether a setting that may be off is on: it is neither None, nor False, nor 0, nor empty."""
    return value is not None and value is not False and value != 0 and value not in ('', {}, ())


_WANTED = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text',
           dict: 'a mapping of settings to values'}


PLAIN = 'numbers, text, true, false, none, or lists and mappings of these'


def not_plain(value: Any) -> Iterator[Any]:
    """What in a value is no plain data of YAML, JSON and checkpoints: sets, bytes, complex numbers, tensors."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str | int | float | None):
                yield key
            yield from not_plain(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from not_plain(entry)
    elif not isinstance(value, str | int | float | os.PathLike | None):
        yield value


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:80]}...'


@dataclass(frozen=True)
class Field:
    """A declared setting of a group, ready to be read or checked."""

    name: str
    type: type  # of one value: bool, int, float, str or dict
    many: bool  # it takes several values, a tuple
    default: Any
    declaration: Declaration

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The values that there are, None where any will do."""
        choices = self.declaration.choices
        return tuple(sorted(choices())) if callable(choices) else choices

    def check(self, value: Any, written: str | None = None) -> None:
        """Refuse a value of another type, of another number of values, or out of range.

        Args:
            value: Of the setting.
            written: How it was asked for, such as '--other-views blur=16'.

        Raises:
            InputError: With the reason.
        """
        if value is None and self.default is None:
            return
        values = value if self.many else (value,)
        if self.many and not isinstance(value, tuple | list):
            raise InputError(f'{written or self._is(value)}: it takes several values, as a list or tuple')
        for part in values:
            self._check_one(part, written)
        wanted = self.declaration.nargs
        if self.many and isinstance(wanted, int) and (len(values) != wanted if wanted else not values):
            raise InputError(f'{written or self._is(value)}: give {wanted or "one or more"} values')

    def _is(self, value: Any) -> str:
        return f"setting '{self.name}' is {value!r}"

    def check_recorded(self, value: Any) -> None:
        """Refuse a recorded value of another type; another version may have had other limits and choices.

        Raises:
            InputError: With the reason.
        """
        if value is None:
            return
        if self.many and not isinstance(value, tuple | list):
            raise InputError(f"what is recorded of '{self.name}' is {_cut(value)}, and no list: take another "
                             'checkpoint, or correct the record')
        wrong = next((part for part in (value if self.many else (value,)) if not self._is_of_type(part)), None)
        if wrong is not None:
            raise InputError(f"what is recorded of '{self.name}' is {_cut(wrong)}, and not {_WANTED[self.type]}: take "
                             'another checkpoint, or correct the record')

    def _is_of_type(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = number and (value == int(value) if abs(value) < 2 ** 63 else False)
        return {bool: isinstance(value, bool), int: whole, float: number,
                str: isinstance(value, str | os.PathLike), dict: isinstance(value, Mapping)}[self.type]

    def _check_one(self, value: Any, written: str | None) -> None:
        if not self._is_of_type(value):
            raise InputError(f'{written or self._is(value)}: give {_WANTED[self.type]}')
        if isinstance(value, Mapping):
            self._check_plain(value)
        if isinstance(value, str) and '\0' in value:
            raise InputError(f"setting '{self.name}' holds a null character, which no name has: take it out")
        if self.declaration.limits is not None and value not in self.declaration.limits:
            raise InputError(f'{written or self._is(value)}: give a number {self.declaration.limits}')
        choices = self.choices
        if choices is not None and value not in choices:
            if value in self.declaration.instead:
                raise InputError(f'{written or self._is(value)}: {self.declaration.instead[value]}')
            raise InputError(f"{written or self._is(value)} (there are {', '.join(choices)})"
                             f'{nearest(str(value), choices)}')

    def _check_plain(self, value: Mapping[Any, Any]) -> None:
        """Refuse what args.yaml and checkpoints could not hold."""
        for key, entry in value.items():
            strange = next(not_plain({key: entry}), None)
            if strange is not None:
                kind = 'ellipsis' if strange is ... else type(strange).__name__
                raise InputError(f'{flag(self.name)} {key}={_cut(entry)} is or holds a value of the kind {kind}, which '
                                 f'no checkpoint can keep: give {PLAIN}')

    def shown_default(self) -> str:
        """The default in words, for `--help`."""
        if self.default in (None, ''):
            return self.declaration.unset
        if self.type is bool:
            return 'on' if self.default else 'off'
        if self.type is dict:
            return 'none'
        if self.many:
            return ' '.join(map(self._shown, self.default))
        return self._shown(self.default)

    def _shown(self, value: Any) -> str:
        return f'{value:g}' if self.type in (int, float) else str(value)


class Settings:
    """Base of a group of settings: a frozen dataclass whose fields are declared by `setting`.

    Its checks run when it is made, so that code and command line meet the same ones.

    Attributes:
        title: Of the group in `--help`.
        about: A sentence below it.
        of_training: They have an effect only where something is trained.
    """

    title: ClassVar[str] = ''
    of_training: ClassVar[bool] = False
    about: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for declared in fields_of(type(self)):
            declared.check(getattr(self, declared.name))

    @classmethod
    def from_record(cls: type[SettingsT], record: Mapping[str, Any]) -> SettingsT:
        """The group as a record tells it, with defaults.

        Another version or timm may have written it, so of its values only the types are checked.

        Raises:
            InputError: One is of another type.
        """
        group = object.__new__(cls)
        for declared in fields_of(cls):
            value = record.get(declared.name, declared.default)
            declared.check_recorded(value)
            if value is None:
                value = declared.default
            if declared.many and isinstance(value, list):
                value = tuple(value)
            object.__setattr__(group, declared.name, value)
        return group

    def with_values(self: SettingsT, values: Mapping[str, Any], of: str = '', **more: Any) -> SettingsT:
        """A copy with other values of some settings, as YAML or flags give them.

        Args:
            values: By the names of settings.
            of: The flag that takes them as KEY=VALUE, for the message; without it they are settings of their own.
            more: Further values.

        Raises:
            InputError: A value is wrong.
        """
        known = {one.name: one for one in fields_of(type(self))}
        for name, value in values.items() if of else ():
            known[name].check(_typed(known[name], value), f'{of} {name}={_cut(value)}')
        return dataclasses.replace(  # type: ignore[type-var]
            self, **{name: _typed(known[name], value) for name, value in {**values, **more}.items()})

    def values(self) -> dict[str, Any]:
        """The settings by name, as plain data: mappings as dicts, several values as a list."""
        return {declared.name: plain(getattr(self, declared.name)) for declared in fields_of(type(self))}


_FIELDS: dict[type, tuple[Field, ...]] = {}


def fields_of(group: type[Settings]) -> tuple[Field, ...]:
    """The declared settings of a group, in their order."""
    if group not in _FIELDS:
        hints = get_type_hints(group)
        _FIELDS[group] = tuple(
            Field(one.name, *_value_type(hints[one.name]), default_of(one), one.metadata['declaration'])
            for one in dataclasses.fields(group) if 'declaration' in one.metadata)  # type: ignore[arg-type]
    return _FIELDS[group]


def default_of(one: dataclasses.Field) -> Any:
    """The default of a dataclass field."""
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default


def _value_type(hint: Any) -> tuple[type, bool]:
    """Type of one value, and whether there are several, from an annotation such as `tuple[float, float] | None`."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in get_args(hint) if part is not type(None))
    origin = get_origin(hint)
    if origin is tuple:
        return get_args(hint)[0], True
    if origin is Literal:
        return str, False
    return (dict, False) if origin is not None and issubclass(origin, Mapping) else (hint, False)


def plain(value: Any) -> Any:
    """Plain data for YAML, JSON and checkpoints: tuples as lists, mappings as dicts, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class SettingGroups:
    """Base of all settings of a command: a frozen dataclass whose fields are groups, see `Settings`.

    Groups that are known only when their files have been read, as those of mixing methods, are in the mapping that
    `more_groups` describes.
    """

    command: ClassVar[str] = 'nbn-train'
    MORE: ClassVar[str] = ''  # name of the field that holds these, a mapping of names to groups
    explained: ClassVar[Mapping[str, Callable[[], str]]] = {}  # more to say in `--help` of some settings
    elsewhere: ClassVar[Mapping[str, str]] = {}  # settings that others have, by YAML key, and what to use instead
    of_others: ClassVar[Mapping[str, str]] = {}  # those of other commands here, and where they are

    @classmethod
    def more_groups(cls) -> dict[str, type[Settings]]:
        """Types of the groups in the field `MORE`, by name."""
        return {}

    @classmethod
    def group_types(cls) -> dict[str, type[Settings]]:
        """Types of all groups by name, in their order."""
        hints = get_type_hints(cls)
        fixed = {one.name: hints[one.name] for one in dataclasses.fields(cls)  # type: ignore[arg-type]
                 if one.name != cls.MORE}
        return {**fixed, **cls.more_groups()}

    @classmethod
    def declared(cls) -> dict[str, Field]:
        """All settings by their flat names."""
        found: dict[str, Field] = {}
        for group in cls.group_types().values():
            for one in fields_of(group):
                if one.name in found:
                    raise ValueError(f"the setting '{one.name}' of {group.__name__} is declared twice")
                found[one.name] = one
        return found

    @classmethod
    def group_of(cls, name: str) -> type[Settings]:
        """The group that declares a setting."""
        return next(group for group in cls.group_types().values() if name in {one.name for one in fields_of(group)})

    @classmethod
    def of(cls: type[GroupsT], values: Mapping[str, Any]) -> GroupsT:
        """The settings with these values, by flat names, and defaults for the rest.

        Raises:
            InputError: A value is wrong, or there is no setting of a name.
        """
        known = cls.declared()
        for name in values:
            if name not in known:
                raise InputError(f"there is no setting '{name}'{nearest(name, known)}")
        return cls._assemble(lambda group: group(**{
            one.name: _typed(one, values[one.name]) for one in fields_of(group) if one.name in values}))

    @classmethod
    def from_record(cls: type[GroupsT], record: Mapping[str, Any]) -> GroupsT:
        """The settings as a record tells them, see `Settings.from_record`."""
        return cls._assemble(lambda group: group.from_record(record))

    @classmethod
    def _assemble(cls: type[GroupsT], make: Callable[[type[Settings]], Settings]) -> GroupsT:
        more = cls.more_groups()
        groups: dict[str, Any] = {name: make(group) for name, group in cls.group_types().items() if name not in more}
        if cls.MORE:
            groups[cls.MORE] = types.MappingProxyType({name: make(group) for name, group in more.items()})
        return cls(**groups)

    def groups(self) -> Iterator[Settings]:
        """All groups, in their order."""
        for one in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            yield from value.values() if one.name == self.MORE else (value,)

    def values(self) -> dict[str, Any]:
        """All settings by their flat names, as plain data: what args.yaml and checkpoints hold."""
        return {name: value for group in self.groups() for name, value in group.values().items()}

    def with_values(self: GroupsT, **values: Any) -> GroupsT:
        """A copy with other values of some settings."""
        return type(self).of({**self.values(), **values})

    def without_effect(self, names: Collection[str], typed: Collection[str] = (), **facts: Any) -> dict[str, str]:
        """Those of the named settings that have no effect, each with the reason.

        Args:
            names: Of settings.
            typed: See `Values`.
            facts: What else is known of the run, for effects that depend on it, as the number of processes.
        """
        values, known = Values({**self.values(), **facts}, typed), self.declared()
        found = {}
        for name in names:
            effect = known[name].declaration.effect
            reason = (effect(name, values) if effect else None) or self.idle(name, values)
            if reason:
                found[name] = reason
        return found

    def idle(self, name: str, values: Values) -> str | None:
        """Why a setting has no effect by what a chosen method declares of it; None where it has one."""
        return None

    @classmethod
    def changed(cls, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings of kind 'recipe' in which two records differ, with both values; files differ by their names."""
        found = {}
        for name, one in cls.declared().items():
            if one.declaration.kind != 'recipe':
                continue
            before, now = (_comparable(one, record.get(name)) for record in (old, new))
            if before != now:
                found[name] = before, now
        return found

    @classmethod
    def public(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record without what is the machine's: settings of kind 'machine' and 'place', and folders of files."""
        known = cls.declared()
        told = {}
        for name, value in record.items():
            declaration = known[name].declaration if name in known else None
            if declaration is not None and declaration.is_file:
                value = None if value is None else file_name(str(value))
            elif declaration is not None and declaration.kind != 'recipe':
                continue
            told[name] = value
        return told


def file_name(path: str) -> str:
    """Last part of a path of whatever system."""
    return path.replace('\\', '/').rstrip('/').rpartition('/')[2]


def _typed(one: Field, value: Any) -> Any:
    """A value from YAML or a flag in the type that its group has."""
    if one.many and isinstance(value, list):
        return tuple(value)
    if one.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _comparable(one: Field, value: Any) -> Any:
    value = plain(one.default if value is None else value)
    return file_name(str(value)) if one.declaration.is_file and value is not None else value


def shown(names: Sequence[str]) -> str:
    """Names as flags, for a sentence."""
    return ', '.join(map(flag, names))

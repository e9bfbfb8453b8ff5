"""Settings that are handed on to code which this package does not know in advance: a loss, a model, an optimizer.

This is the one place where the refusal of such code becomes a sentence that names flag, key, value and remedy:

- `refuse_unknown`, `refuse_owned` and `check_types` look at names and types before anything is called, by the signature
  of a class;
- `call` makes the object, and if that fails finds out by trial which setting is to blame: the one without which it
  would not have failed. An error that comes whatever the settings are is not theirs, and neither is one that a line of
  this package raises, unless it speaks of a value (`InputError`, `ValueError`, `TypeError`). Both stay as they are, so
  that a bug keeps its traceback.
"""
import ast
import collections.abc
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from nbn_timm.errors import InputError, in_words, nearest, one_line

T = TypeVar('T')

_PACKAGE = str(Path(__file__).parent)
_LONGEST = 60  # characters of a value, and ten times that of a reason


@dataclass(frozen=True)
class KeyValue:
    """A value on its way to a call.

    Attributes:
        key: The name by which the call takes it.
        value: What it is given.
        written: How it was asked for, as '--drop 0.1'.
    """

    key: str
    value: Any
    written: str


def key_values(flag: str, given: Mapping[str, Any]) -> list[KeyValue]:
    """The settings of a flag that takes KEY=VALUE."""
    return [KeyValue(str(key), value, f'{flag} {key}={shown(value)}') for key, value in given.items()]


def shown(value: Any) -> str:
    """A value as it was typed: text that reads as something else is in quotes, and what is long is cut."""
    try:
        text = one_line(str(value))
    except ValueError:  # of a whole number of more digits than Python writes
        return f'a number of {math.log10(abs(value)):.0f} digits'
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            ast.literal_eval(value)
            text = repr(value)
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'


# Before the call -----------------------------------------------------------------------------------------------------

def refuse_unknown(
        what: str,
        given: Iterable[str],
        settings: Collection[str],
        known: Collection[str] | None = None,
) -> None:
    """Refuse settings that a thing does not have.

    Args:
        what: The thing, for the message.
        given: Names of settings.
        settings: Those that it has.
        known: Those that the message names, if these are more.

    Raises:
        InputError: Names the first that it has not, and the nearest one.
    """
    known = known or settings
    for key in given:
        if key not in settings:
            raise InputError(f"{what} has no setting '{key}' (it has {', '.join(known) or 'none'})"
                             f'{nearest(str(key), known) or ": leave it out"}')


def refuse_owned(given: Iterable[KeyValue], owners: Mapping[str, str]) -> None:
    """Refuse a setting that something else decides.

    Args:
        given: Settings.
        owners: For each such key, what to do instead.

    Raises:
        InputError: Names the first.
    """
    for one in given:
        if one.key in owners:
            raise InputError(f'{one.written} cannot be set in this way: {owners[one.key]}')


def check_types(what: str, given: Iterable[KeyValue], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse values of another type than the annotation of their parameter; where there is none, anything goes.

    Raises:
        InputError: Names the first.
    """
    for one in given:
        parameter = parameters.get(one.key)
        if parameter is None or one.value is None and parameter.default is None:
            continue
        wanted = _kinds(parameter.annotation)
        if wanted is not None and not any(_is_a(one.value, kind) for kind in wanted):
            allowed = ' or '.join(dict.fromkeys(_IN_WORDS[kind] for kind in wanted))
            raise InputError(f'{what} cannot take {one.written}: give {allowed}')


_IN_WORDS: dict[Any, str] = {
    bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', type(None): 'None',
    list: 'several values, as (1, 2)', dict: 'a mapping'}


def _kinds(annotation: Any) -> list[Any] | None:
    """The plain types that an annotation means, as keys of `_IN_WORDS`; None if it means others too."""
    if isinstance(annotation, str):  # of a module with `from __future__ import annotations`
        annotation = {'bool': bool, 'int': int, 'float': float, 'str': str}.get(annotation, inspect.Parameter.empty)
    origin = get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        parts = [_kinds(part) for part in get_args(annotation)]
        return None if None in parts else [kind for part in parts for kind in part or ()]
    if annotation is None:
        return [type(None)]
    if annotation in (bool, int, float, str, type(None)):
        return [annotation]
    kind = origin or annotation
    if kind in (list, tuple, collections.abc.Sequence, collections.abc.Collection):
        return [list]
    if kind in (dict, collections.abc.Mapping):
        return [dict]
    return None


def _is_a(value: Any, kind: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return value in (0, 1) and isinstance(value, int)  # also as 0 and 1
    if kind is int:
        return number and isinstance(value, int)
    if kind is float:
        return number and abs(value) <= sys.float_info.max
    if kind is list:
        return isinstance(value, Sequence) and not isinstance(value, str)
    return isinstance(value, Mapping if kind is dict else kind)


def check_number(
        what: str,
        flag: str,
        key: str,
        value: float,
        low: float = 0.0,
        high: float = math.inf,
        above: bool = False,
        below: bool = False,
        whole: bool = False,
) -> Any:
    """Return `value` if it is a finite number, a whole one if `whole`, from `low` to `high`.

    `above` excludes `low`, and `below` excludes `high`.

    Raises:
        InputError: It is not.
    """
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    number = number and abs(value) <= sys.float_info.max
    if not number or not low <= value <= high or (above and value == low) or (below and value == high):
        limits = number_range(low, high, above, below)
        raise cannot_take(what, flag, key, value, f"give a {'whole ' if whole else ''}number {limits}")
    return value


def number_range(low: float, high: float, above: bool, below: bool) -> str:
    """Limits of numbers in words, see `check_number`."""
    return f"{'above' if above else 'from'} {low:g}" + (
        '' if high == math.inf else f" to {'less than ' if below else ''}{high:g}")


def check_choice(what: str, flag: str, key: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: It is not.
    """
    if value not in choices:
        raise cannot_take(what, flag, key, value, f"give {' or '.join(choices)}{nearest(str(value), choices)}")
    return value


def cannot_take(what: str, flag: str, key: str, value: Any, remedy: str) -> InputError:
    """The error about a value of KEY=VALUE."""
    return InputError(f'{what} cannot take {flag} {key}={shown(value)}: {remedy}')


# The call ------------------------------------------------------------------------------------------------------------

def call(
        make: Callable[..., T],
        given: Sequence[KeyValue],
        what: str,
        retry: Callable[..., object] | None = None,
) -> T:
    """`make(**given)`, where a refusal is told as one of the setting that is to blame.

    Args:
        make: Called with the settings as keywords.
        given: The settings.
        what: What is made, for the message.
        retry: Called in place of `make` to find the setting, which does less: what it can do is not to blame.

    Raises:
        InputError: A setting is to blame. Whatever else `make` raises is not a setting's fault.
    """
    for index, one in enumerate(given):
        other = next((other for other in given[:index] if other.key == one.key), None)
        if other is not None:
            raise InputError(f'{other.written} and {one.written} say the same of {what}: keep one')
    try:
        return make(**{one.key: one.value for one in given})
    except Exception as error:  # of code that may raise anything; what is no setting's fault goes on
        if not _may_be_a_settings(error):
            raise
        blamed = [] if retry is not None and _succeeds(retry, given) else _blamed(retry or make, given)
        if not blamed:
            raise
        written = ' with '.join(one.written for one in blamed)
        raise InputError(f'{what} cannot take {written} ({reason_of(error)}): '
                         f"{'correct it or leave it out' if len(blamed) == 1 else 'correct one of them'}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, on one line, with its type where that says more than the text."""
    text, name = in_words(error)[:10 * _LONGEST], type(error).__name__
    of_itself = isinstance(error, ValueError | AssertionError | RuntimeError) or text.startswith(name)
    return text if of_itself else f'{name}: {text}'


def raised_here(error: BaseException) -> bool:
    """Whether it was a line of this package that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def _may_be_a_settings(error: Exception) -> bool:
    return isinstance(error, ValueError | TypeError) or not raised_here(error)


def _blamed(make: Callable[..., object], given: Sequence[KeyValue]) -> list[KeyValue]:
    """The setting without which `make` succeeds, else all of them if it does without these, else none."""
    for left_out in given:
        if _succeeds(make, [one for one in given if one is not left_out]):
            return [left_out]
    return list(given) if len(given) > 1 and _succeeds(make, []) else []


def _succeeds(make: Callable[..., object], given: Sequence[KeyValue]) -> bool:
    try:
        make(**{one.key: one.value for one in given})
    except Exception:  # whatever it is, it did not succeed
        return False
    return True

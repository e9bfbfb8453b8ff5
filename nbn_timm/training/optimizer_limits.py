"""Which values mean something to the optimizers of timm and torch, which check few of them.

Both give one name to one kind of setting, so that a name and the default beside it say what a number may be.
"""
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from nbn_timm.key_values import KeyValue, cannot_take, check_number, number_range
from nbn_timm.settings import NOT_NEGATIVE, POSITIVE, PROBABILITY, Limits

__all__ = ['annotated', 'check_values', 'with_floats']

FLAG = '--opt-kwargs'

_DECAY = Limits(0, 1, below=True)  # share of a running average that stays
_MOST_STEPS = 100  # within a step of Muon, which needs 5

# Of several, those hold in which the default lies: AdEMAMix has an alpha of 5, Adafactor a decay_rate of -0.8.
_LIMITS: dict[str, tuple[Limits, ...]] = {
    **dict.fromkeys(('betas', 'betas_1d', 'beta2_cap'), (_DECAY,)),
    'alpha': (_DECAY, NOT_NEGATIVE),
    'decay_rate': (Limits(-1, 0), PROBABILITY),
    **dict.fromkeys(('dampening', 'layer_decay_min_scale', 'layer_decay_no_opt_scale'), (PROBABILITY,)),
    'preconditioner_update_probability': (Limits(0, 1, above=True),),
    'ns_steps': (Limits(1, _MOST_STEPS),),
    **dict.fromkeys(('clip_threshold', 'clipping_threshold', 'max_grad_norm', 'precond_init_scale', 'safety_factor',
                     'trust_coeff'), (POSITIVE,)),
    **dict.fromkeys((
        'adamw_lr', 'clip_exp', 'decay_offset', 'delta', 'eps', 'eps_scale', 'fallback_lr_scale', 'gamma',
        'initial_accumulator_value', 'lr_1d_factor', 'lr_decay', 'max_size_triangular', 'min_dim_size_to_factor',
        'min_ndim_triangular', 'momentum_decay', 'precond_lr', 'schedule_decay', 'wd_ratio'), (NOT_NEGATIVE,)),
}


def annotated(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter of an optimizer; one without an annotation gets the type of its default, a number that of any."""
    kind = type(parameter.default)
    if parameter.annotation is not inspect.Parameter.empty or kind not in (bool, int, float, str, tuple):
        return parameter
    return parameter.replace(annotation=float if kind is int else kind)


def with_floats(given: Sequence[KeyValue]) -> list[KeyValue]:
    """Settings with the whole numbers in tuples as floats: torch refuses betas of both types, such as [0, 0.99]."""
    return [replace(one, value=type(one.value)(float(part) if _is_number(part) else part for part in one.value))
            if isinstance(one.value, tuple | list) else one for one in given]


def check_values(what: str, given: Sequence[KeyValue], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse numbers that mean nothing, and more or fewer of them than are needed.

    Args:
        what: The optimizer, for messages.
        given: Its settings, of the right types.
        parameters: What it has, by name.

    Raises:
        InputError: Names the first.
    """
    for one in given:
        if not all(map(math.isfinite, _numbers(one.value))):
            raise cannot_take(what, FLAG, one.key, one.value, 'give finite numbers')
        parameter, choices = parameters[one.key], _LIMITS.get(one.key)
        if choices is None or one.value is None:
            continue
        limits = next((each for each in choices if all(number in each for number in _numbers(parameter.default))),
                      choices[-1])
        allowed: dict[str, Any] = dict(low=limits.low, high=limits.high, above=limits.above, below=limits.below)
        length = _length(parameter)
        if length is None:
            check_number(what, FLAG, one.key, one.value, **allowed)
        elif len(one.value) != length or not all(_is_number(number) and number in limits for number in one.value):
            raise cannot_take(what, FLAG, one.key, one.value, f'give {length} numbers {number_range(**allowed)}')


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)
    elif _is_number(value):
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _length(parameter: inspect.Parameter) -> int | None:
    """How many numbers a parameter is, by its default or else its annotation; None if it is a single one."""
    if isinstance(parameter.default, tuple):
        return len(parameter.default)
    lengths = [len(get_args(kind)) for kind in (parameter.annotation, *get_args(parameter.annotation))
               if getattr(kind, '__origin__', None) is tuple]
    return lengths[0] if lengths else None

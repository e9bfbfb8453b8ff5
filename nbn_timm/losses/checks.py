"""Checks of the settings that losses take."""
from collections.abc import Sequence

from nbn_timm.errors import InputError, nearest


def check_number(
        loss: str,
        setting: str,
        value: float,
        low: float = 0.0,
        high: float = float('inf'),
        above: bool = False,
) -> float:
    """Return `value` if it is a finite number from `low`, itself excluded if `above`, to `high`.

    Raises:
        InputError: It is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float('inf')
    if not number or not low <= value <= high or (above and value == low):
        limits = f"{'above' if above else 'from'} {low:g}" + ('' if high == float('inf') else f' to {high:g}')
        raise InputError(f"loss '{loss}' has {setting}={value!r}: give a number {limits}")
    return value


def check_choice(loss: str, setting: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: It is not.
    """
    if value not in choices:
        raise InputError(f"loss '{loss}' has {setting}={value!r}: give {' or '.join(choices)}"
                         f'{nearest(str(value), choices)}')
    return value

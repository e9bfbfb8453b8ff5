"""Checks of the settings that losses take."""
import math
from collections.abc import Sequence

from nbn_timm import key_values

FLAG = '--loss-kwargs'


def check_number(
        loss: str,
        setting: str,
        value: float,
        low: float = 0.0,
        high: float = math.inf,
        above: bool = False,
        below: bool = False,
) -> float:
    """Return `value` if it is a finite number in the range, see `key_values.check_number`.

    Raises:
        InputError: It is not.
    """
    return key_values.check_number(f"loss '{loss}'", FLAG, setting, value, low, high, above, below)


def check_choice(loss: str, setting: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: It is not.
    """
    return key_values.check_choice(f"loss '{loss}'", FLAG, setting, value, choices)


def check_whole(loss: str, setting: str, value: float, low: int = 1) -> int:
    """Return `value` if it is a whole number from `low` on.

    Raises:
        InputError: It is not.
    """
    if isinstance(value, float) and not value.is_integer():
        raise key_values.cannot_take(f"loss '{loss}'", FLAG, setting, value, f'give a whole number from {low}')
    return int(check_number(loss, setting, value, low=low))

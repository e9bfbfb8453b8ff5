"""The losses by name: a loss is one file in this folder with one `@register_loss` line."""
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nbn_timm.data.class_counts import ClassCounts
from nbn_timm.errors import InputError, nearest

LOSSES: dict[str, type[nn.Module]] = {}


def register_loss(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: make the loss available to `create_loss` and `train.py --loss` under `name`."""
    def register(loss_class: type[nn.Module]) -> type[nn.Module]:
        LOSSES[name] = loss_class
        return loss_class
    return register


def create_loss(name: str, class_counts: ClassCounts | None = None, **kwargs: Any) -> nn.Module:
    """Create a loss by name.

    Args:
        name: A key of `LOSSES`.
        class_counts: The training set's; losses with a class prior need it, the others ignore it.
        kwargs: The loss's own settings, such as `smoothing`.

    Returns:
        A module called as `loss(logits [B, C], target)`, with `target` either class indices [B] or soft targets
        [B, C]; it returns the mean over the batch as a float32 scalar.

    Raises:
        InputError: Unknown name or setting, or class counts needed and not given.
    """
    if name not in LOSSES:
        raise InputError(f"unknown loss '{name}' (there are {', '.join(sorted(LOSSES))}){nearest(name, LOSSES)}")
    settings = list(inspect.signature(LOSSES[name]).parameters)[1:]
    for key in kwargs:
        if key not in settings:
            raise InputError(f"loss '{name}' has no setting '{key}' (it has {', '.join(settings) or 'none'})"
                             f'{nearest(key, settings)}')
    return LOSSES[name](class_counts, **kwargs)

"""The losses by name: a loss is one file in this folder with one `@register_loss` line."""
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nbn_timm.data.class_counts import ClassCounts
from nbn_timm.errors import InputError, nearest

LOSSES: dict[str, type[nn.Module]] = {}
_TAKES: dict[str, tuple[bool, bool]] = {}  # logits of each expert, soft targets


def register_loss(
        name: str,
        experts: bool = False,
        soft_targets: bool = True,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: make the loss available to `create_loss` and `train.py --loss` under `name`.

    A loss that changes during training has a method `set_epoch(epoch)`, which `train.py` calls at the start of every
    epoch (0-based), of a resumed run too.

    Args:
        name: For `create_loss` and `--loss`.
        experts: It is called with the logits of each expert [B, E, C] instead of logits [B, C].
        soft_targets: It takes targets [B, C] as mixup and cutmix make them.
    """
    def register(loss_class: type[nn.Module]) -> type[nn.Module]:
        LOSSES[name] = loss_class
        _TAKES[name] = experts, soft_targets
        return loss_class
    return register


def takes_experts(name: str) -> bool:
    """Whether the loss of that name is called with the logits of each expert [B, E, C]."""
    return _TAKES[name][0]


def takes_soft_targets(name: str) -> bool:
    """Whether the loss of that name takes targets [B, C] as mixup and cutmix make them."""
    return _TAKES[name][1]


def create_loss(name: str, class_counts: ClassCounts | None = None, **kwargs: Any) -> nn.Module:
    """Create a loss by name.

    Args:
        name: A key of `LOSSES`.
        class_counts: The training set's; losses with a class prior need it, the others ignore it.
        kwargs: The loss's own settings, such as `smoothing`.

    Returns:
        A module called as `loss(logits [B, C], target)`, or with logits [B, E, C] if `takes_experts(name)`; `target`
        is class indices [B] or, if `takes_soft_targets(name)`, soft targets [B, C]. It returns a float32 scalar.

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
    try:
        return LOSSES[name](class_counts, **kwargs)
    except TypeError as error:
        raise InputError(f"loss '{name}' does not take these settings ({error}): check --loss-kwargs") from error


def require_counts(class_counts: ClassCounts | None, loss: str) -> ClassCounts:
    """The class counts that a loss cannot do without.

    Raises:
        InputError: There are none.
    """
    if class_counts is None:
        raise InputError(f"loss '{loss}' needs the training images per class, and this training set cannot be "
                         'counted: give them with --class-counts FILE')
    return class_counts

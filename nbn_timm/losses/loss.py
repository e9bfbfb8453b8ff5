"""The losses by name: a loss is one file in this folder with one `@register_loss` line."""
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.key_values import cannot_take, check_types, key_values, refuse_owned, refuse_unknown
from nbn_timm.losses.checks import FLAG
from nbn_timm.losses.deferred_loss import DeferredLoss
from nbn_timm.registry import Registry


class _Traits(NamedTuple):
    """What a loss takes, see `register_loss`."""

    experts: bool
    features: bool
    soft_targets: bool
    deferrable: bool
    views: int
    slow_views: int
    balances: bool
    label_sets: bool
    streams: bool
    mixing: str | None
    apart: bool
    parallel: bool
    both_labels: bool


LOSSES: Registry[nn.Module] = Registry('loss')
_TRAITS: dict[str, _Traits] = {}


def register_loss(
        name: str,
        experts: bool = False,
        features: bool = False,
        soft_targets: bool = True,
        deferrable: bool = True,
        views: int = 1,
        slow_views: int = 0,
        balances: bool = False,
        label_sets: bool = False,
        streams: bool = False,
        mixing: str | None = None,
        apart: bool = False,
        parallel: bool = False,
        both_labels: bool = False,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: make the loss available to `create_loss` and `train.py --loss` under `name`.

    A loss that changes during training has a method `set_epoch(epoch)`, which `train.py` calls at the start of every
    epoch (0-based), of a resumed run too. A loss with class weights has a method `unweighted()` that returns the same
    loss without them, which is what it is before its epoch if it is deferred; others are then cross-entropy.

    A loss with parameters or a state of its own, as a head for contrast, prototypes or a queue, has a method
    `prepare(network)`, which is called once, with the network on its device, before anything is trained. There it makes
    its modules and buffers. `train.py` moves them to the device, trains the parameters with those of the network, and
    keeps all in checkpoints. What belongs to the network must not become a part of the loss.

    Args:
        name: For `create_loss` and `--loss`.
        experts: It is called with the logits of each expert [B, E, C] instead of logits [B, C].
        features: It is called with a tuple of logits [B, C] and the features [B, D] that the classifier sees.
        soft_targets: It takes targets [B, C] as mixup and cutmix make them.
        deferrable: It can have the setting `start_epoch`.
        views: How many differently augmented versions of each image it is called with. If there are several, logits
            and features have one dimension more, the first, as logits [views, B, C], and the target is still that of
            the B images.
        slow_views: How many of the views, the last ones, pass a slow copy of the network instead (MoCo), which gives no
            gradient; the loss has its `momentum`.
        balances: It makes classes count alike, by weights or by the prior, so that a balanced sampler beside it would
            do so twice.
        label_sets: It takes images of several classes too, with targets uint8 [B, C], see `nbn_timm.data.label_sets`.
        streams: It is called with the logits of each branch [B, 2, C], of two streams of images, and the labels [B, 2]
            of both. `train.py` asks for `--second-stream` and a network of two branches.
        mixing: Name of the mixing method that makes its images and soft targets, which `train.py` asks for.
        apart: Its views pass the network one after the other, so that BatchNorm sees each by itself.
        parallel: Of a loss with parameters: it is a mean over the images and has no other state, so that several
            processes can train it, by the mean of their gradients.
        both_labels: Of images that are mixed with those of a second stream it takes targets [B, 2, C], the shares of
            either label, in place of their sum. That is for class weights that divide, see `mean_by_weight`.
    """
    def register(loss_class: type[nn.Module]) -> type[nn.Module]:
        LOSSES.register(name)(loss_class)
        deferrable_here = deferrable and not (experts or streams) and views == 1 and not hasattr(loss_class, 'prepare')
        _TRAITS[name] = _Traits(
            experts, features, soft_targets, deferrable_here, views, slow_views, balances, label_sets, streams, mixing,
            apart, parallel, both_labels)
        return loss_class
    return register


def takes_experts(name: str) -> bool:
    """Whether the loss of that name is called with the logits of each expert [B, E, C]."""
    return _TRAITS[name].experts


def takes_features(name: str) -> bool:
    """Whether the loss of that name is called with a tuple of logits [B, C] and features [B, D]."""
    return _TRAITS[name].features


def takes_soft_targets(name: str) -> bool:
    """Whether the loss of that name takes targets [B, C] as mixup and cutmix make them."""
    return _TRAITS[name].soft_targets


def number_of_views(name: str) -> int:
    """How many augmented versions of each image the loss of that name is called with."""
    return _TRAITS[name].views


def number_of_slow_views(name: str) -> int:
    """How many of these, the last ones, pass a slow copy of the network."""
    return _TRAITS[name].slow_views


def balances_classes(name: str) -> bool:
    """Whether the loss of that name makes classes count alike."""
    return _TRAITS[name].balances


def takes_label_sets(name: str) -> bool:
    """Whether the loss of that name takes images of several classes."""
    return _TRAITS[name].label_sets


def takes_streams(name: str) -> bool:
    """Whether the loss of that name is called with the logits of two branches on two streams, [B, 2, C]."""
    return _TRAITS[name].streams


def needed_mixing(name: str) -> str | None:
    """Name of the mixing method without which the loss of that name is not trained; None for most."""
    return _TRAITS[name].mixing


def takes_views_apart(name: str) -> bool:
    """Whether the views of the loss of that name pass the network one after the other."""
    return _TRAITS[name].apart


def learns_in_parallel(name: str) -> bool:
    """Whether several processes can train the parameters of the loss of that name."""
    return _TRAITS[name].parallel


def takes_both_labels(name: str) -> bool:
    """Whether the loss of that name takes the shares of either label of a mixed image, [B, 2, C]."""
    return _TRAITS[name].both_labels


def is_deferrable(name: str) -> bool:
    """Whether the loss of that name can have the setting `start_epoch`."""
    return _TRAITS[name].deferrable


def create_loss(
        name: str,
        class_counts: ClassCounts | None = None,
        start_epoch: int | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Create a loss by name.

    Args:
        name: A key of `LOSSES`.
        class_counts: The training set's; losses with a class prior need it, the others ignore it.
        start_epoch: Defer the loss (DRW): so many epochs it is plain cross-entropy, with the same `smoothing`, or, of
            losses with class weights, the same loss without them. Needs `set_epoch`, which `train.py` calls.
        kwargs: The loss's own settings, such as `smoothing`.

    Returns:
        A module called as `loss(logits [B, C], target)`, with logits [B, E, C] if `takes_experts(name)`, or with
        `(logits [B, C], features [B, D])` if `takes_features(name)`, each with the views of an image as first dimension
        if `number_of_views(name)` is above 1; `target` is class indices [B] or, if
        `takes_soft_targets(name)`, soft targets [B, C]. It returns a float32 scalar.

    Raises:
        InputError: Unknown name or setting, class counts needed and not given, or a loss that cannot be deferred.
    """
    check_loss_settings(name, kwargs)
    loss: nn.Module = LOSSES[name](class_counts, **kwargs)
    if start_epoch is None:
        return loss
    return _deferred(name, loss, start_epoch, kwargs.get('smoothing', 0.0))


def check_loss_settings(name: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that a loss does not have, and values of another type than they have.

    Raises:
        InputError: There is one, or no loss of that name.
    """
    parameters = dict(list(inspect.signature(LOSSES.find(name)).parameters.items())[1:])
    what, own = f"loss '{name}'", {key: value for key, value in given.items() if key != 'start_epoch'}
    refuse_owned(key_values(FLAG, own), {'name': 'use --loss', 'class_counts': 'use --class-counts FILE'})
    refuse_unknown(what, own, list(parameters), [*parameters, *['start_epoch'] * is_deferrable(name)])
    check_types(what, key_values(FLAG, own), parameters)
    if given.get('start_epoch') is not None:
        _check_start(name, given['start_epoch'])


def _check_start(name: str, start_epoch: Any) -> None:
    if not is_deferrable(name):
        raise InputError(f"loss '{name}' cannot be deferred as a whole: leave out start_epoch (it is for "
                         f"{', '.join(sorted(filter(is_deferrable, LOSSES)))})")
    if not isinstance(start_epoch, int) or isinstance(start_epoch, bool) or start_epoch < 1:
        raise cannot_take(f"loss '{name}'", FLAG, 'start_epoch', start_epoch,
                          'give the number of epochs before it starts, a whole number from 1')


def _deferred(name: str, loss: nn.Module, start_epoch: int, smoothing: float) -> nn.Module:
    _check_start(name, start_epoch)
    unweighted: Callable[[], nn.Module] | None = getattr(loss, 'unweighted', None)
    before = LOSSES['cross_entropy'](None, smoothing=smoothing) if unweighted is None else unweighted()
    return DeferredLoss(before, loss, start_epoch)


def require_counts(class_counts: ClassCounts | None, loss: str) -> ClassCounts:
    """The class counts that a loss cannot do without.

    Raises:
        InputError: There are none.
    """
    if class_counts is None or class_counts.counts is None:
        raise InputError(f"loss '{loss}' needs the training images per class, and this training set cannot be "
                         'counted: give them with --class-counts FILE')
    return class_counts

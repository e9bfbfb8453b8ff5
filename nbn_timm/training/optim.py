"""Optimizer and learning-rate schedule by name, both timm's."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.wsd_lr import WSDLRScheduler
from torch import nn

from nbn_timm.errors import InputError, nearest
from nbn_timm.settings import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Settings,
    Values,
    all_of,
    only_with,
    setting,
)


def _clips(name: str, others: Values) -> str | None:
    return 'has no effect without --clip-grad' if others.clip_grad is None else None


def _has_momentum(name: str, others: Values) -> str | None:
    known = str(others.opt).lower() in list_optimizers()
    if known and not get_optimizer_info(str(others.opt).lower()).has_momentum:
        return f'has no effect on --opt {others.opt}, which has no such momentum'
    return None


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """What changes the weights."""

    title = 'optimizer'
    of_training = True

    opt: str = setting('momentum', "any of timm's; 'momentum' is SGD with plain, 'sgd' with Nesterov momentum",
                       metavar='NAME')
    lr: float = setting(0.1, 'learning rate, the highest of the schedule', limits=NOT_NEGATIVE)
    momentum: float = setting(0.9, 'for optimizers that have one', limits=NOT_NEGATIVE, effect=_has_momentum)
    weight_decay: float = setting(5e-4, 'of all parameters', limits=NOT_NEGATIVE)
    decay_1d: bool = setting(True, "decay biases and norm parameters too, which NBN needs; --no-decay-1d is timm's "
                             'default', effect=only_with('weight_decay'))
    opt_kwargs: Mapping[str, Any] = setting({}, "the optimizer's own settings")
    clip_grad: float | None = setting(None, 'limit of the gradient', limits=POSITIVE)
    clip_mode: str = setting('norm', 'what is limited', choices=('norm', 'value', 'agc'), effect=_clips)


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """The course of the learning rate."""

    title = 'schedule'
    of_training = True

    epochs: int = setting(90, 'of the run, warm-up included', limits=AT_LEAST_1)
    sched: str = setting('cosine', "course of the rate; 'linear' falls evenly to zero, 'wsd' does so at the end alone",
                         choices=('cosine', 'linear', 'wsd', 'step', 'multistep', 'constant'))
    sched_on_updates: bool = setting(False, 'change the rate at every update instead of every epoch',
                                     effect=only_with('sched', 'cosine', 'linear', 'wsd', 'step', 'multistep'))
    min_lr: float = setting(0.0, 'end of the cosine', limits=NOT_NEGATIVE, effect=only_with('sched', 'cosine'))
    warmup_epochs: int = setting(0, 'in which the rate rises evenly', limits=NOT_NEGATIVE)
    warmup_lr: float | None = setting(
        None, 'rate of the first epoch', limits=NOT_NEGATIVE, effect=only_with('warmup_epochs'),
        unset='one step of an even rise from zero, so that no epoch is lost at zero')
    warmup_prefix: bool = setting(
        False, 'let the cosine begin after the warm-up, at its highest rate, instead of going on as if there had been '
        'none', effect=all_of(only_with('sched', 'cosine'), only_with('warmup_epochs')))
    wsd_cooldown: float = setting(0.4, 'share of the epochs, at the end, in which the rate falls evenly to zero',
                                  limits=PROBABILITY, effect=only_with('sched', 'wsd'))
    decay_epochs: float = setting(30, 'between decays', limits=AT_LEAST_1, effect=only_with('sched', 'step'))
    decay_milestones: tuple[int, ...] = setting(
        (60, 80), '1-based epochs from which the decays hold', limits=AT_LEAST_1, nargs=0,
        effect=only_with('sched', 'multistep'))
    decay_rate: float = setting(0.1, 'factor of a decay', limits=NOT_NEGATIVE,
                                effect=only_with('sched', 'step', 'multistep'))


@dataclass(frozen=True)
class AverageSettings(Settings):
    """An average of the weights, which is then what is evaluated."""

    title = 'averaged weights'
    of_training = True

    model_ema: bool = setting(False, 'keep, evaluate and save averaged weights (EMA)')
    model_ema_decay: float = setting(0.9998, 'share of the average that an update keeps', limits=PROBABILITY,
                                     effect=only_with('model_ema'))
    model_ema_warmup: bool = setting(False, 'begin with a smaller decay', effect=only_with('model_ema'))


def create_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Create one of timm's optimizers over the parameters of a model.

    With `decay_1d` biases and norm parameters are decayed too. timm's default leaves them out, and then an NBN layer's
    bias never turns away from the direction of its first step.

    Raises:
        InputError: Unknown optimizer or setting.
    """
    name = settings.opt
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name.lower() not in known:
        raise InputError(f"unknown --opt '{name}' (timm.optim.list_optimizers() lists them){nearest(name, known)}")
    try:
        return create_optimizer_v2(
            model, name, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum,
            filter_bias_and_bn=not settings.decay_1d, **settings.opt_kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer '{name}' does not take these settings ({error}): check --opt-kwargs, --lr, "
                         '--momentum and --weight-decay') from error


def create_scheduler(
        optimizer: torch.optim.Optimizer,
        settings: ScheduleSettings,
        updates_per_epoch: int,
) -> Scheduler:
    """Create one of timm's schedules.

    'linear' and 'wsd' (warm-up, stable, decay) fall linearly, from the end of the warm-up on or in the last
    `wsd_cooldown` of the run. As with the cosine, zero would be the step after the last.

    Args:
        optimizer: Whose learning rate is the schedule's highest.
        settings: The course.
        updates_per_epoch: Optimizer steps.

    Raises:
        InputError: The warm-up leaves no epoch to fall in.
    """
    on_updates = settings.sched_on_updates
    # timm counts t + 1 against the milestones. Per epoch that is the 1-based epoch; per update it is the first update
    # of the epoch, of which a half keeps clear of rounding.
    milestones: list[Any] = [
        epoch - 1 + 0.5 / updates_per_epoch if on_updates else epoch for epoch in settings.decay_milestones]
    warmup_lr = settings.warmup_lr
    if warmup_lr is None:
        warmup_steps = settings.warmup_epochs * (updates_per_epoch if on_updates else 1)
        warmup_lr = optimizer.param_groups[0]['lr'] / (warmup_steps + 1)
    if settings.sched in ('linear', 'wsd'):
        return _falling_to_zero(optimizer, settings, warmup_lr, updates_per_epoch if on_updates else 1)
    # timm counts the epochs of a schedule without the warm-up before it.
    epochs = max(settings.epochs - settings.warmup_epochs, 1) if settings.warmup_prefix else settings.epochs
    scheduler, _ = create_scheduler_v2(
        optimizer, settings.sched, epochs, decay_epochs=settings.decay_epochs, decay_milestones=milestones,
        decay_rate=settings.decay_rate, min_lr=settings.min_lr,
        warmup_epochs=settings.warmup_epochs, warmup_prefix=settings.warmup_prefix,
        warmup_lr=warmup_lr, step_on_epochs=not on_updates, updates_per_epoch=updates_per_epoch)
    return scheduler


def _falling_to_zero(
        optimizer: torch.optim.Optimizer,
        settings: ScheduleSettings,
        warmup_lr: float,
        steps_per_epoch: int,
) -> Scheduler:
    steps, warmup = settings.epochs * steps_per_epoch, settings.warmup_epochs * steps_per_epoch
    if warmup >= steps:
        raise InputError(f'--warmup-epochs {settings.warmup_epochs} leaves --sched {settings.sched} none of the '
                         f'{settings.epochs} epochs: give fewer, or more --epochs')
    falling = steps if settings.sched == 'linear' else max(1, round(settings.wsd_cooldown * steps))
    return WSDLRScheduler(optimizer, steps - warmup, min(falling, steps - warmup), decay_fn='linear', warmup_t=warmup,
                          warmup_lr_init=warmup_lr, t_in_epochs=not settings.sched_on_updates)

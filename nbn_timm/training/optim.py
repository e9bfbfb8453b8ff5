"""Optimizer and learning-rate schedule by name, both timm's."""
import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.optim import (
    Lookahead,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.wsd_lr import WSDLRScheduler
from torch import nn

from nbn_timm import timm_flags
from nbn_timm.errors import InputError, nearest
from nbn_timm.key_values import KeyValue, call, check_types, key_values, reason_of, refuse_owned, refuse_unknown
from nbn_timm.second_stages.classifier import classifier_of
from nbn_timm.settings import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Limits,
    Settings,
    Values,
    all_of,
    flag,
    not_with,
    only_with,
    setting,
)
from nbn_timm.training.optimizer_limits import annotated, check_values, with_floats


def _clips(name: str, others: Values) -> str | None:
    return 'has no effect without --clip-grad' if others.clip_grad is None else None


def _not_computed(name: str, others: Values) -> str | None:
    return 'has no effect with --lr-base, which --lr-base 0 turns off' if others.lr_base else None


def _has_momentum(name: str, others: Values) -> str | None:
    base = _base_optimizer(str(others.opt))
    if base in list_optimizers() and not get_optimizer_info(base).has_momentum:
        return f'has no effect on --opt {others.opt}, which has no such momentum'
    return None


_LOOKAHEAD = 'lookahead_'  # timm's prefix


_LIKE_ADAM = ('adam', 'adan', 'adopt', 'adabelief', 'adafactor', 'lamb', 'laprop', 'lion', 'mars')  # parts of names


def _base_optimizer(name: str) -> str:
    """Name of an optimizer in lower case, without timm's prefix for Lookahead around it."""
    return name.lower().removeprefix(_LOOKAHEAD)


def _by_epoch(name: str, others: Values) -> str | None:
    if others.sched == 'constant':
        return 'has no effect on --sched constant'
    return 'has no effect with --sched-on-updates' if others.sched_on_updates else None


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """What changes the weights."""

    title = 'optimizer'
    of_training = True

    opt: str = setting('momentum', "any of timm's; 'momentum' is SGD with plain, 'sgd' with Nesterov momentum; with "
                       "'lookahead_' before it, Lookahead goes around it", metavar='NAME')
    lr: float = setting(0.1, 'learning rate, the highest of the schedule', limits=NOT_NEGATIVE,
                        effect=_not_computed)
    classifier_lr: float | None = setting(
        None, "the classifier's own, the highest of the schedule too", limits=NOT_NEGATIVE, unset='--lr')
    lr_base: float | None = setting(
        None, 'learning rate of an update of --lr-base-size images; that of this run follows from its images per '
        'update', limits=NOT_NEGATIVE, unset='none, --lr holds')
    lr_base_size: int = setting(256, 'images of an update for which --lr-base holds', limits=AT_LEAST_1,
                                effect=only_with('lr_base'))
    lr_base_scale: str | None = setting(
        None, 'how the rate grows with the images of an update: in proportion to their number or to its square root',
        choices=('linear', 'sqrt'), effect=only_with('lr_base'),
        unset="sqrt for Adam's relatives and LAMB, else linear")
    momentum: float = setting(0.9, 'for optimizers that have one', limits=PROBABILITY, effect=_has_momentum)
    weight_decay: float = setting(5e-4, 'of all parameters', limits=NOT_NEGATIVE)
    decay_1d: bool = setting(True, "decay biases and norm parameters too, which NBN needs; --no-decay-1d is timm's "
                             'default', effect=only_with('weight_decay'))
    bias_lr_scale: float = setting(1.0, 'factor of the rate for all biases, those of norms among them',
                                   limits=NOT_NEGATIVE)
    norm_lr_scale: float = setting(1.0, 'factor of the rate for all other parameters of at most one dimension: weights '
                                   "of norms, and NBN's alpha", limits=NOT_NEGATIVE)
    opt_kwargs: Mapping[str, Any] = setting({}, "the optimizer's own settings")
    layer_decay: float | None = setting(
        None, 'factor of the rate from each layer to the one before it', limits=Limits(0, 1, above=True), unset='1',
        effect=not_with('stage'))
    sam_rho: float = setting(0.0, 'take the gradient at so far up the slope (SAM), which needs two passes a batch; 0 '
                             "for none, 0.05 in the paper", limits=NOT_NEGATIVE)
    clip_grad: float | None = setting(None, 'limit of the gradient', limits=POSITIVE)
    clip_mode: str = setting('norm', 'what is limited', choices=('norm', 'value', 'agc'), effect=_clips)

    def scale(self) -> str:
        """How the rate follows the batch: as given, or by timm's rule for this optimizer."""
        adaptive = any(part in self.opt.lower() for part in ('ada', 'lamb'))
        return self.lr_base_scale or ('sqrt' if adaptive else 'linear')

    @property
    def is_like_adam(self) -> bool:
        """Whether its step is about as long as the rate, whatever the gradient's length."""
        return any(part in _base_optimizer(self.opt) for part in _LIKE_ADAM)

    def for_batch(self, images: int) -> 'OptimizerSettings':
        """The settings with the learning rate of a run.

        That is --lr, or with --lr-base timm's rule: base * images / base size, or base * sqrt(images / base size).

        Args:
            images: Of an update, over all processes.
        """
        if not self.lr_base:
            return self
        ratio = images / self.lr_base_size
        return replace(self, lr=self.lr_base * (math.sqrt(ratio) if self.scale() == 'sqrt' else ratio))


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """The course of the learning rate."""

    title = 'schedule'
    of_training = True

    epochs: int = setting(90, 'of the run, warm-up included', limits=AT_LEAST_1)
    patience: int | None = setting(
        None, 'end the run when --eval-metric on the validation split has not become better for so many epochs',
        limits=AT_LEAST_1, unset='all epochs are trained')
    sched: str = setting('cosine', "course of the rate; 'linear' falls evenly to zero, 'wsd' does so at the end alone",
                         choices=('cosine', 'linear', 'wsd', 'step', 'multistep', 'constant'),
                         instead=timm_flags.SCHEDULES)
    sched_on_updates: bool = setting(False, 'change the rate at every update instead of every epoch',
                                     effect=only_with('sched', 'cosine', 'linear', 'wsd', 'step', 'multistep'))
    sched_ahead: int = setting(
        0, 'epochs by which the rate is ahead of its course: 1 skips the first rate and trains the last epoch with the '
        'one after the end, as where a schedule is stepped before every epoch', limits=NOT_NEGATIVE, effect=_by_epoch)
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
    decay_rate: float = setting(0.1, 'factor of a decay', limits=NOT_NEGATIVE, also=('--dr',),
                                effect=only_with('sched', 'step', 'multistep'))


@dataclass(frozen=True)
class AverageSettings(Settings):
    """An average of the weights, which is then what is evaluated."""

    title = 'averaged weights'
    of_training = True

    model_ema: bool = setting(False, 'keep, evaluate and save averaged weights (EMA)')
    model_ema_decay: float = setting(0.9998, 'share of the average that an update keeps, at most', limits=PROBABILITY,
                                     effect=only_with('model_ema'))
    model_ema_warmup: bool = setting(
        True, 'begin with a smaller decay, 1 - u ** (-2/3) at update u, so that the average of a short run follows '
        "too; --no-model-ema-warmup is timm's default", effect=only_with('model_ema'))
    swa_epochs: int = setting(
        0, 'evaluate and save the mean of the weights after each of the last so many epochs (SWA), with BatchNorm '
        'statistics of its own; 0 for none', limits=NOT_NEGATIVE, effect=not_with('model_ema'))

    @property
    def averages(self) -> bool:
        """Whether averaged weights are what is evaluated, those that --use-ema takes from a checkpoint."""
        return self.model_ema or self.swa_epochs > 0


def create_optimizer(
        model: nn.Module,
        settings: OptimizerSettings,
        rates: Mapping[nn.Module, float] | None = None,
) -> torch.optim.Optimizer:
    """Create one of timm's optimizers over the parameters of a model.

    With `decay_1d` biases and norm parameters are decayed too. timm's default leaves them out, and then an NBN layer's
    bias never turns away from the direction of its first step. What scales a rate scales the decay with it.

    What an optimizer refuses only when it steps is found by a step on stand-ins of the parameters.

    Args:
        model: Whose parameters it changes.
        settings: Of the optimizer.
        rates: Parts of the model whose learning rate is a multiple of the run's, and these multiples; None is
            `classifier_lr` for the classifier. The schedule keeps the multiples, from its first step on.

    Raises:
        InputError: Unknown optimizer or setting, a value that it cannot take, or an optimizer that cannot be had here.
    """
    what, own = f"optimizer '{settings.opt}'", key_values('--opt-kwargs', settings.opt_kwargs)
    refuse_owned(own, _OWNERS)
    known = _parameters(settings.opt)
    if known is not None:
        refuse_unknown(what, settings.opt_kwargs, known, sorted(known.keys() - _OWNERS.keys()))
        check_types(what, own, known)
        check_values(what, own, known)
    if settings.layer_decay is None:
        refuse_owned(own, _OF_LAYER_DECAY)

    rates = classifier_rate(model, settings) if rates is None else rates
    scaled = (settings.bias_lr_scale, settings.norm_lr_scale) != (1, 1)
    if settings.layer_decay is not None and rates:
        raise InputError("--layer-decay sets the learning rate of each layer, and so does a rate of the classifier's "
                         'own: leave one of the two out')
    if settings.layer_decay is not None and scaled:
        raise InputError('--layer-decay scales the rates by layer, --bias-lr-scale and --norm-lr-scale by kind: leave '
                         'one of them out')

    def make(opt: str = OptimizerSettings.opt, **given: Any) -> torch.optim.Optimizer:
        parameters = parameter_groups(model, settings, rates) if rates or scaled else model
        optimizer = create_optimizer_v2(parameters, opt, filter_bias_and_bn=not settings.decay_1d,
                                        layer_decay=settings.layer_decay, **given)
        step_on_stand_ins(optimizer)
        return optimizer

    flags = [KeyValue(name, value, f'{flag(name)} {value}') for name, value in (
        ('lr', settings.lr), ('weight_decay', settings.weight_decay), ('momentum', settings.momentum),
        ('opt', settings.opt))]
    return call(make, [*with_floats(own), *flags], what)


def classifier_rate(model: nn.Module, settings: OptimizerSettings) -> dict[nn.Module, float]:
    """The classifier of a model and the multiple of `lr` that `classifier_lr` is; nothing if it is not set.

    Raises:
        InputError: There is no classifier, or no rate to be a multiple of.
    """
    if settings.classifier_lr is None:
        return {}
    if not settings.lr:
        raise InputError('--classifier-lr is kept as a multiple of --lr, which is 0: give a small --lr')
    classifier = classifier_of(model)
    parts = [classifier] if isinstance(classifier, nn.Module) else classifier
    return dict.fromkeys(parts, settings.classifier_lr / settings.lr)


def parameter_groups(
        model: nn.Module,
        settings: OptimizerSettings,
        rates: Mapping[nn.Module, float],
) -> list[dict[str, Any]]:
    """The parameters of a model by weight decay and by learning rate, those with the run's rate first.

    `lr_scale` is what timm's schedulers multiply the rate of a group by: the multiple of the part, times that of the
    kind, `bias_lr_scale` or `norm_lr_scale`.
    """
    rate_of = {parameter: rate for part, rate in rates.items() for parameter in part.parameters()}
    kind_of = {parameter: _rate_of_kind(name, parameter, settings) for name, parameter in model.named_parameters()}
    keep: Any = getattr(model, 'no_weight_decay', tuple)()
    by_decay = param_groups_weight_decay(
        model, settings.weight_decay, weight_decay_exclude_1d=not settings.decay_1d,
        no_weight_decay_list=() if settings.decay_1d else keep)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in by_decay:
        for parameter in group['params']:
            rate = rate_of.get(parameter, 1.0) * kind_of[parameter]
            groups.setdefault((rate, group['weight_decay']), []).append(parameter)
    return [dict(params=parameters, weight_decay=decay, lr_scale=rate)
            for (rate, decay), parameters in sorted(groups.items(), key=lambda group: group[0][0] != 1)]


def _rate_of_kind(name: str, parameter: nn.Parameter, settings: OptimizerSettings) -> float:
    if name.rpartition('.')[2] == 'bias':
        return settings.bias_lr_scale
    return settings.norm_lr_scale if parameter.ndim <= 1 else 1.0


_OWNERS = {
    'opt': 'give --opt',
    'lr': 'give --lr',
    'weight_decay': 'give --weight-decay',
    'momentum': 'give --momentum',
    'filter_bias_and_bn': 'give --decay-1d or --no-decay-1d',
    'weight_decay_exclude_1d': 'give --decay-1d or --no-decay-1d',
    'layer_decay': 'give --layer-decay',
    'maximize': 'a loss is made smaller, so leave it out',
    'model_or_params': 'the parameters are those of the model, so leave it out',
    'param_group_fn': 'the parameters are grouped by --decay-1d, --classifier-lr, --bias-lr-scale, --norm-lr-scale '
                      'and --layer-decay, so leave it out',
}

_OF_LAYER_DECAY = dict.fromkeys(('layer_decay_min_scale', 'layer_decay_no_opt_scale'), 'give --layer-decay too')


def _parameters(name: str) -> dict[str, inspect.Parameter] | None:
    """What can be set of an optimizer; None if it takes anything.

    Raises:
        InputError: It is unknown, cannot be had here, or needs what this training does not compute.
    """
    known, base = [str(optimizer) for optimizer in list_optimizers()], _base_optimizer(name)
    if base not in known:
        raise InputError(f"unknown --opt '{name}' (timm.optim.list_optimizers() lists them){nearest(name, known)}")
    if get_optimizer_info(base).second_order:
        raise InputError(f'--opt {name} needs second derivatives, which this training does not compute: give another '
                         '--opt')
    try:
        optimizer_class: Any = get_optimizer_class(base, bind_defaults=False)
    except Exception as error:  # of importing somebody's package, which may not be there or not fit this machine
        raise InputError(f'--opt {name} cannot be had here ({reason_of(error)}): install what it needs, or give '
                         'another --opt') from error
    found = {**inspect.signature(create_optimizer_v2).parameters, **inspect.signature(optimizer_class).parameters}
    kinds = {parameter.kind for parameter in inspect.signature(optimizer_class).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    return {key: annotated(parameter) for key, parameter in found.items() if key not in ('kwargs', 'params')}


def step_on_stand_ins(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Let a copy of an optimizer take a step with gradients of zero on zeros in place of the parameters.

    Returns:
        The state that it then has, by the number of the parameter as in `state_dict`.
    """
    stand_ins = {id(parameter): torch.zeros_like(parameter).requires_grad_(parameter.requires_grad)
                 for group in optimizer.param_groups for parameter in group['params']}
    if isinstance(optimizer, Lookahead):  # of which a copy loses what it is around
        trial: torch.optim.Optimizer = Lookahead(copy.deepcopy(optimizer._base_optimizer, dict(stand_ins)))
    else:
        trial = copy.deepcopy(optimizer, dict(stand_ins))
    for stand_in in stand_ins.values():
        stand_in.grad = torch.zeros_like(stand_in)
    trial.step()
    end_lookahead(trial)
    return trial.state_dict()['state']


def end_lookahead(optimizer: torch.optim.Optimizer) -> None:
    """Let Lookahead end with its slow weights, as at the end of an epoch; other optimizers have none."""
    if not isinstance(optimizer, Lookahead):
        return
    without = [parameter for group in optimizer.param_groups for parameter in group['params']
               if parameter.requires_grad and parameter.grad is None]
    for parameter in without:  # timm passes over what has no gradient, as nothing has after a step
        parameter.grad = torch.zeros_like(parameter)
    optimizer.sync_lookahead()
    for parameter in without:
        parameter.grad = None


def scheduled_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that the schedule gives, without the multiples of layers and of kinds of parameters."""
    rates = [(group['lr'], group.get('lr_scale', 1.0)) for group in optimizer.param_groups]
    return next((rate for rate, scale in rates if scale == 1), rates[0][0] / (rates[0][1] or 1.0))


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

"""Optimizer and learning-rate schedule by name, both timm's."""
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from nbn_timm.errors import InputError, nearest


def create_optimizer(
        model: nn.Module,
        name: str = 'momentum',
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        decay_1d: bool = True,
        **kwargs: Any,
) -> torch.optim.Optimizer:
    """Create one of timm's optimizers.

    Args:
        model: Whose parameters are trained.
        name: As in timm, where 'momentum' is SGD with plain and 'sgd' with Nesterov momentum.
        lr: Learning rate.
        weight_decay: Of all parameters.
        momentum: For optimizers that have one.
        decay_1d: Decay biases and norm parameters too. timm's default leaves them out, and then an NBN layer's bias
            never turns away from the direction of its first step.
        kwargs: Further settings of the optimizer.

    Raises:
        InputError: Unknown optimizer or setting.
    """
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name.lower() not in known:
        raise InputError(f"unknown --opt '{name}' (timm.optim.list_optimizers() lists them){nearest(name, known)}")
    try:
        return create_optimizer_v2(model, name, lr=lr, weight_decay=weight_decay, momentum=momentum,
                                   filter_bias_and_bn=not decay_1d, **kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer '{name}' does not take these settings ({error}): check --opt-kwargs, --lr, "
                         '--momentum and --weight-decay') from error


def create_scheduler(
        optimizer: torch.optim.Optimizer,
        name: str,
        epochs: int,
        updates_per_epoch: int,
        on_updates: bool = False,
        min_lr: float = 0.0,
        warmup_epochs: int = 0,
        warmup_lr: float | None = None,
        decay_epochs: float = 30,
        decay_milestones: Sequence[int] = (60, 80),
        decay_rate: float = 0.1,
) -> Scheduler:
    """Create one of timm's schedules.

    Args:
        optimizer: Whose learning rate is the schedule's highest.
        name: 'cosine' to `min_lr`, 'step', 'multistep' or 'constant'.
        epochs: Of the run, warm-up included.
        updates_per_epoch: Optimizer steps.
        on_updates: Change the rate at every update instead of every epoch.
        min_lr: End of the cosine.
        warmup_epochs: The rate rises evenly from `warmup_lr` in the first epoch to its full value after these.
        warmup_lr: See `warmup_epochs`; None is one step of an even rise from zero, so that no epoch is lost at zero.
        decay_epochs: 'step': between decays.
        decay_milestones: 'multistep': 1-based epochs from which the decays hold.
        decay_rate: Factor of a decay.
    """
    # timm counts t + 1 against the milestones: per epoch that is the 1-based epoch, per update the end of the epoch.
    milestones = [epoch - on_updates for epoch in decay_milestones]
    if warmup_lr is None:
        warmup_steps = warmup_epochs * (updates_per_epoch if on_updates else 1)
        warmup_lr = optimizer.param_groups[0]['lr'] / (warmup_steps + 1)
    scheduler, _ = create_scheduler_v2(
        optimizer, name, epochs, decay_epochs=decay_epochs, decay_milestones=milestones, decay_rate=decay_rate,
        min_lr=min_lr, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, step_on_epochs=not on_updates,
        updates_per_epoch=updates_per_epoch)
    return scheduler

"""The mean of the weights after several epochs.

Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (SWA), UAI 2018.
"""
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from nbn_timm.data import TrainLoader
from nbn_timm.layers.frozen import keeps_statistics
from nbn_timm.training.distributed import seed_everything
from nbn_timm.training.optim import AverageSettings

if TYPE_CHECKING:  # a plan writes checkpoints, which hold such a mean
    from nbn_timm.training.plan import Plan


class EpochAverage(AveragedModel):
    """The mean of a model's weights at the ends of epochs, in the place where timm's tasks keep an EMA.

    Statistics of BatchNorm are the model's own, until they are measured.
    """

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """What timm calls after every update, and what does nothing here."""

    def take(self, model: nn.Module) -> None:
        """Add the weights of `model` to the mean."""
        self.update_parameters(model)

    def begin(self, averaged: int = 0) -> None:
        """Say of how many epochs the weights are the mean; of none, the next ones take their place."""
        self.n_averaged.fill_(averaged)


def epoch_average(task: TrainingTask) -> EpochAverage | None:
    """The mean that a task keeps, if there is one."""
    average = task.get_trainable_module(ema=True)
    return average if isinstance(average, EpochAverage) else None


def end_of_epoch(task: TrainingTask, plan: 'Plan', loader: TrainLoader, epoch: int) -> None:
    """Take the weights after `epoch` (0-based) into the mean, which begins in the first of the last `swa_epochs`.

    Before that the mean is the model itself. Where the mean is evaluated, and after the last epoch, its BatchNorm
    statistics are measured: the mean over all batches of the epoch's training images, without mixing.
    """
    average = epoch_average(task)
    if average is None:
        return
    settings = plan.settings
    first = settings.schedule.epochs - settings.average.swa_epochs
    if epoch <= first:
        average.begin()
    average.take(unwrap_model(task.get_trainable_module()))
    if epoch >= first and (plan.watched_after(epoch) is not None or epoch + 1 == settings.schedule.epochs):
        seed_everything(settings.run.seed, epoch, plan.world.rank)
        loader.set_epoch(epoch)
        amp_dtype = settings.precision.autocast
        with torch.autocast(plan.world.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            measure_statistics(average, (images.flatten(0, -4) for images, _ in loader))


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Let the BatchNorm statistics of a model be their means over some batches.

    As torch's `update_bn`, but layers whose statistics are fixed keep them, see `nbn_timm.layers.frozen`; that one
    would reset these too, and they never measure anything again.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and not keeps_statistics(module)]
    if not norms:
        return
    momenta, was_training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    model.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


def start_average(task: TrainingTask, average: AverageSettings) -> None:
    """Give a task the average of the weights that the settings ask for, if any."""
    if average.model_ema:
        task.setup_ema(average.model_ema_decay, average.model_ema_warmup)
    elif average.swa_epochs:
        model = task.get_trainable_module()
        assert model is not None
        task.trainable_module_ema = EpochAverage(unwrap_model(model))  # type: ignore[assignment]

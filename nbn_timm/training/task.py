"""timm's training tasks around a model: second stages, averaged weights, compilation, processes."""
import inspect
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationTask, TrainingTask
from timm.utils import distribute_bn, unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nbn_timm.data import TrainLoader, epoch_seed
from nbn_timm.data.part import WHOLE, Part
from nbn_timm.errors import InputError
from nbn_timm.mixing import Mixing
from nbn_timm.second_stages import TrainedSecondStage
from nbn_timm.training.adversarial import AdversarialTask
from nbn_timm.training.averages import epoch_average, start_average
from nbn_timm.training.cuda_graphs import GraphedBackward
from nbn_timm.training.distributed import World
from nbn_timm.training.optim import AverageSettings


class SecondStageTask(ClassificationTask):
    """Train the part of a finished network that a second stage trains.

    What is evaluated and saved is the stage's finished model, wherever possible an ordinary one. What a resumed run
    needs beyond that, as scales that are folded in it, is task state.

    Args:
        model: What the stage's `prepare` gave.
        criterion: The loss.
        stage: The second stage.
        freeze_statistics: Keep what is not trained in eval mode, so that BatchNorm statistics stay as they are. Else it
            is in training mode as in the released codes: it normalises by batch statistics and the running ones drift.
        device: Of everything.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module,
            stage: TrainedSecondStage,
            freeze_statistics: bool = True,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(model.requires_grad_(False), criterion, device=device, verbose=False)
        self.second_stage = stage
        self.freeze_statistics = freeze_statistics
        stage.trained(unwrap_model(model)).requires_grad_(True)

    def train(self, mode: bool = True) -> 'SecondStageTask':
        """Set the mode of what is trained, and of the rest as `freeze_statistics` says."""
        super().train(mode)
        if mode and self.freeze_statistics:
            self.second_stage.freeze(unwrap_model(self.trainable_module))
        return self

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] and targets to the loss, with whatever the stage does around it."""
        with self.second_stage.batch(unwrap_model(self.trainable_module), target):
            return super().forward(input, target)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The finished model of the stage."""
        model = super().get_eval_model(module, ema)
        if model is None:
            return None
        unwrapped = unwrap_model(model)
        finished = self.second_stage.finished(unwrapped)
        return model if finished is unwrapped else finished

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The entries of the model in training that the finished one does not have, or has otherwise.

        What the stage keeps for itself is under 'stage', once, beside the raw weights.
        """
        saved = unwrap_model(self.get_eval_model(module, ema)).state_dict()
        state: dict[str, Any] = {key: value for key, value in self._in_training(ema).state_dict().items()
                                 if key not in saved or not torch.equal(value, saved[key])}
        own = {} if ema else self.second_stage.state_dict()
        return state | ({'stage': own} if own else {})

    def load_checkpoint_state(
            self,
            state_dict: dict[str, Any],
            task_state: dict[str, Any] | None = None,
            ema: bool = False,
            strict: bool = True,
    ) -> None:
        """Load a finished model and the task state beside it.

        Raises:
            InputError: The task state is of another second stage.
        """
        model = self._in_training(ema)
        entries = state_dict | (task_state or {})
        missing = [key for key in model.state_dict() if key not in entries]
        if missing:
            raise InputError(f"the checkpoint has no '{missing[0]}', which this --stage trains: resume a run of the "
                             'same second stage, or start one with --initial-checkpoint')
        model.load_state_dict({key: entries[key] for key in model.state_dict()}, strict=strict)
        if not ema:
            self.second_stage.load_state_dict((task_state or {}).get('stage', {}))

    def _in_training(self, ema: bool) -> nn.Module:
        return unwrap_model(super().get_eval_model(ema=ema))


class _NetworkAndLoss(nn.Module):
    """What an optimizer trains together."""

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers do not decay, as the network tells them."""
        names: set[str] = getattr(self.network, 'no_weight_decay', set)()
        return {f'network.{name}' for name in names}


class LearningLossTask(ClassificationTask):
    """Train a network together with its loss, which has parameters or a state of its own.

    These are task state, under 'loss', so that checkpoints have the network's own keys.
    """

    criterion: nn.Module

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'LearningLossTask':
        """Spread the network over the processes, and let the loss have the same parameters in all of them."""
        super().prepare_distributed(device_ids, **ddp_kwargs)
        for parameter in self.criterion.parameters():
            dist.broadcast(parameter.data, 0)
            parameter.register_hook(_mean_over_processes)
        return self

    def modules_to_train(self) -> nn.Module:
        """Network and loss, for an optimizer over the parameters of both."""
        return _NetworkAndLoss(unwrap_model(self.trainable_module), self.criterion)

    def get_clip_parameters(self, exclude_head: bool = False) -> Any:
        """Parameters whose gradients are limited together."""
        return [*super().get_clip_parameters(exclude_head), *self.criterion.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The loss's state."""
        return {} if ema else {'loss': self.criterion.state_dict()}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Load the loss's state.

        Raises:
            InputError: It is of another loss.
        """
        if ema:
            return
        try:
            self.criterion.load_state_dict((state or {}).get('loss', {}), strict=strict)
        except RuntimeError as error:
            raise InputError('the checkpoint has not the state of this --loss, or of other --loss-kwargs: resume a run '
                             'with the same, or start one with --initial-checkpoint') from error


def _mean_over_processes(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient / dist.get_world_size()
    dist.all_reduce(gradient)
    return gradient


def begin_epoch(
        task: TrainingTask,
        loader: TrainLoader,
        mixing: Mixing | None,
        epoch: int,
        graphs: GraphedBackward | None = None,
        part: Part = WHOLE,
) -> None:
    """Tell all that depend on it that `epoch` (0-based) begins: loader, loss, stage, attack, mixing and CUDA graphs.

    The random generators must have been reseeded.
    """
    set_epoch = getattr(task.criterion, 'set_epoch', None)
    if set_epoch is not None:
        set_epoch(epoch)
    if isinstance(task, SecondStageTask):
        task.second_stage.set_epoch(epoch)
    if mixing is not None:
        mixing.set_epoch(epoch)
    if graphs is not None and set_epoch is not None:
        graphs.forget()
    begin_part(task, loader, mixing, epoch, part)


def begin_part(task: TrainingTask, loader: TrainLoader, mixing: Mixing | None, epoch: int, part: Part) -> None:
    """Tell all that read or draw that a part of `epoch` (0-based) begins; the generators must have been reseeded."""
    loader.set_epoch(epoch, part)
    if isinstance(task, AdversarialTask):
        task.set_epoch(epoch, part.begin)
    if task.has_ema() and epoch_average(task) is None:  # of bfloat16 weights, whose average is rounded at random
        average: Any = task.get_trainable_module(ema=True)
        average._sr_generator.manual_seed(epoch_seed(0, epoch, begin=part.begin) if part.begin else epoch)
    if mixing is not None and part != WHOLE:
        mixing.set_part(epoch, part)


def prepare_task(task: TrainingTask, world: World, average: AverageSettings, compile_backend: str | None) -> None:
    """Give the task its average of the weights, compile it and spread it over the processes, in timm's order.

    Args:
        task: Around a model on the world's device.
        world: This process.
        average: Of the weights.
        compile_backend: Of `torch.compile`; None does not compile.
    """
    start_average(task, average)
    if compile_backend:
        task.compile(backend=compile_backend)
    if world.distributed:
        # Each process keeps its own running statistics during an epoch; `share_statistics` unites them at its end.
        device_ids = [world.device.index] if world.device.type == 'cuda' else None
        # torch 2.13 renamed the switch.
        renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
        switch = 'forward_sync_buffers' if renamed else 'broadcast_buffers'
        task.prepare_distributed(device_ids=device_ids, **{switch: False})


def share_statistics(task: TrainingTask, world: World, reduce: bool = True) -> None:
    """Give all processes the same BatchNorm running statistics: their mean, or else the first one's."""
    if world.distributed:
        for module in (task.get_trainable_module(), task.get_trainable_module(ema=True)):
            if module is not None:
                distribute_bn(module, world.size, reduce=reduce)


def evaluation_model(task: TrainingTask) -> nn.Module:
    """The averaged weights if there are any, else the model itself, compiled or not, without its DDP wrapper."""
    model: Any = task.get_eval_model(ema=task.has_ema())
    return model.module if isinstance(model, DistributedDataParallel) else model

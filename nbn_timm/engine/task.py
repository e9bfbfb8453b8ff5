"""timm's training task around a model: averaged weights, compilation, several processes."""
import inspect
from typing import Any

from timm.task import TrainingTask
from timm.utils import distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nbn_timm.engine.distributed import World


def prepare_task(
        task: TrainingTask,
        world: World,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        compile_backend: str | None = None,
) -> None:
    """Give the task its average of the weights, compile it and spread it over the processes, in timm's order.

    Args:
        task: Around a model on the world's device.
        world: This process.
        ema_decay: Of the averaged weights; None keeps no average.
        ema_warmup: Begin with a smaller decay.
        compile_backend: Of `torch.compile`; None does not compile.
    """
    if ema_decay is not None:
        task.setup_ema(ema_decay, ema_warmup)
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

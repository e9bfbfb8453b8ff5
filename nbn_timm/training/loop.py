"""One epoch of training."""
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from nbn_timm.errors import InputError
from nbn_timm.mixing import Mixing
from nbn_timm.training.cuda_graphs import GraphedBackward
from nbn_timm.training.distributed import World
from nbn_timm.training.middle import BEGINNING, Middle
from nbn_timm.training.optim import OptimizerSettings, end_lookahead, scheduled_rate
from nbn_timm.training.profile import NoProfile
from nbn_timm.training.progress import Progress
from nbn_timm.training.progressive import ProgressiveSize
from nbn_timm.training.run_checkpoint import check_finite
from nbn_timm.training.sam import uphill
from nbn_timm.training.task import SecondStageTask

_ONE_VALUE = 'Expected more than 1 value per channel'  # of torch.nn.functional.batch_norm

T = TypeVar('T')
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LoopSettings:
    """How an update is computed."""

    accum_steps: int = 1  # batches per update
    amp_dtype: torch.dtype | None = None  # autocast to this; None computes in float32
    channels_last: bool = False
    clip_grad: float | None = None
    clip_mode: str = OptimizerSettings.clip_mode  # 'norm', 'value' or 'agc'
    drop_last: bool = False  # leave out an update of fewer batches
    sam_rho: float = 0.0  # 0 computes without SAM


@dataclass(frozen=True)
class EpochResult:
    """What an epoch of training gave, over all processes."""

    loss: float  # mean over the images
    lr: float  # of the last update
    images: int
    seconds: float


class LossMeter:
    """Mean loss of an epoch and the first update where it was not finite, kept on the device: no step waits for it."""

    def __init__(self, device: torch.device, begun: Middle = BEGINNING) -> None:
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.sum = torch.full((), begun.loss, dtype=dtype, device=device)
        self.images = begun.images
        self.bad_update = torch.full((), -1, device=device)

    def add(self, loss: torch.Tensor, images: int, update: int) -> None:
        """Add the mean loss of a batch."""
        loss = loss.detach()
        self.sum += loss.to(self.sum.dtype) * images
        self.images += images
        self.bad_update = torch.where(loss.isfinite() | (self.bad_update >= 0), self.bad_update, update)

    def mean(self) -> float:
        """Mean over this process's images so far."""
        return self.sum.item() / self.images

    def check(self, epoch: int) -> None:
        """Raise InputError if a loss was not finite on this process."""
        _refuse([int(self.bad_update)], epoch)

    def check_all(self, world: World, epoch: int) -> None:
        """Raise InputError if a loss was not finite on any process; all raise alike, so that none waits for another."""
        _refuse(world.gather(int(self.bad_update)), epoch)

    def reduce(self, world: World, epoch: int) -> tuple[float, int]:
        """Mean loss and number of images over all processes.

        Raises:
            InputError: A loss was not finite, on any process; all raise alike, so that none waits for another.
        """
        found = world.gather((self.sum.item(), self.images, int(self.bad_update)))
        _refuse([update for _, _, update in found], epoch)
        images = sum(number for _, number, _ in found)
        return math.fsum(loss for loss, _, _ in found) / images, images


def _refuse(bad_updates: Iterable[int], epoch: int) -> None:
    update = min((update for update in bad_updates if update >= 0), default=None)
    if update is not None:
        raise InputError(
            f'the loss became NaN or infinite in epoch {epoch + 1} at step {update + 1}: try a lower --lr, '
            '--warmup-epochs 5, --clip-grad 1.0, or --amp-dtype bfloat16 if float16 was used')


def train_one_epoch(
        task: TrainingTask,
        loader: Iterable[Batch],
        optimizer: torch.optim.Optimizer,
        settings: LoopSettings,
        progress: Progress,
        world: World,
        epoch: int,
        scheduler: Scheduler | None = None,
        scaler: GradScaler | None = None,
        mixing: Mixing | None = None,
        graphs: GraphedBackward | None = None,
        profile: NoProfile | None = None,
        resize: ProgressiveSize | None = None,
        begun: Middle = BEGINNING,
        pause: Callable[[Middle], None] | None = None,
) -> EpochResult:
    """Train `task` for one epoch, or for the rest of it.

    Args:
        task: Maps (images, target) to a dict with 'loss'; its EMA, if it has one, follows every update.
        loader: Batches on the device.
        optimizer: Over the task's parameters.
        settings: How an update is computed.
        progress: Times the epoch and shows its lines.
        world: This process.
        epoch: 0-based.
        scheduler: Is stepped per update; a schedule per epoch ignores that.
        scaler: For float16.
        mixing: Mixes each batch on the device.
        graphs: Computes loss and gradients of single batches as CUDA graphs.
        profile: Measures the parts of the epoch.
        resize: Scales the images of a batch, after mixing.
        begun: What has been done of the epoch; the loader gives the batches that follow.
        pause: Is called where the loader ends before the epoch does, and lets it begin with the batches that follow.

    Raises:
        InputError: The loss, a weight or a BatchNorm statistic became NaN or infinite, or there was no batch.
    """
    profile = profile or NoProfile()
    task.train()
    progress.start(epoch, begun.updates, begun.seconds)
    losses = LossMeter(world.device, begun)
    num_updates = epoch * progress.updates_per_epoch + begun.updates
    lr = 0.0

    def end_part(done: int) -> bool:
        if pause is None or done >= progress.updates_per_epoch:
            return True
        losses.check_all(world, epoch)
        check_finite(task, epoch, world)
        pause(Middle(done, losses.sum.item(), losses.images, progress.seconds))
        return False

    for update, batches in _numbered(
            lambda: batched(profile.input(loader), settings.accum_steps), begun.updates, end_part):
        if settings.drop_last and len(batches) < settings.accum_steps:
            break
        if mixing is not None:
            batches = [mixing(*batch) for batch in batches]
        if resize is not None:
            batches = [(resize(images), target) for images, target in batches]
        lr = scheduled_rate(optimizer)
        for loss, images in train_step(
                task, batches, optimizer, settings, world.device, scaler, graphs, profile):
            losses.add(loss, images, update)
        num_updates += 1
        task.update_ema(step=num_updates)
        if scheduler is not None:
            scheduler.step_update(num_updates)
        progress.advance(losses.images * world.size)
        if progress.due(update):
            losses.check(epoch)
            progress.show(update, losses.mean(), lr, losses.images * world.size)
    end_lookahead(optimizer)
    progress.end()
    if mixing is not None:
        mixing.end_epoch()
    if not losses.images:
        raise InputError('the training loader gave no batch: check that the training split is not empty')
    mean_loss, num_images = losses.reduce(world, epoch)
    check_finite(task, epoch, world)
    return EpochResult(mean_loss, lr, num_images, progress.seconds)


def train_step(
        task: TrainingTask,
        batches: list[Batch],
        optimizer: torch.optim.Optimizer,
        settings: LoopSettings,
        device: torch.device,
        scaler: GradScaler | None = None,
        graphs: GraphedBackward | None = None,
        profile: NoProfile | None = None,
) -> list[tuple[torch.Tensor, int]]:
    """Update the weights once, by the gradient of the mean loss over all images of `batches`.

    Each batch is weighted by its images, so that accumulation gives the gradient of the one large batch, also where
    the epoch ends with a smaller batch or fewer of them. Processes synchronise in the last batch only. With SAM the
    gradient is that of a second pass, uphill of the weights, and the losses are those of the first.

    Returns:
        Mean loss and number of images of each batch.
    """
    profile = profile or NoProfile()
    if graphs is not None:
        (images, target), = batches
        loss = graphs(images, target)
        _step(task, optimizer, settings, graphs=graphs)
        return [(loss, len(target))]
    losses = _backward(task, batches, settings, device, profile, scaler)
    if settings.sam_rho:
        with uphill(task, optimizer, settings.sam_rho):
            _backward(task, batches, settings, device, profile, scaler)
    with profile.part('optimizer'):
        _step(task, optimizer, settings, scaler)
    return losses


def _backward(
        task: TrainingTask,
        batches: list[Batch],
        settings: LoopSettings,
        device: torch.device,
        profile: NoProfile,
        scaler: GradScaler | None = None,
) -> list[tuple[torch.Tensor, int]]:
    """Add up the gradient of the mean loss over all images; returns mean loss and number of images of each batch."""
    total = sum(len(target) for _, target in batches)
    losses = []
    for step, (images, target) in enumerate(batches, start=1):
        is_last = step == len(batches)
        with nullcontext() if is_last else task.no_sync():
            with profile.part('forward'):
                loss = compute_loss(task, images, target, settings, device)
            losses.append((loss.detach(), len(target)))
            loss = loss * (len(target) / total)
            with profile.part('backward'):
                (loss if scaler is None else scaler.scale(loss)).backward()
    return losses


def compute_loss(
        task: TrainingTask,
        images: torch.Tensor,
        target: torch.Tensor,
        settings: LoopSettings,
        device: torch.device,
) -> torch.Tensor:
    """Mean loss of a batch, computed as the settings say."""
    if settings.channels_last:
        rows = images.flatten(0, -4)  # of several views, if there are
        images = rows.contiguous(memory_format=torch.channels_last).unflatten(0, images.shape[:-3])
    with (torch.autocast(device.type, dtype=settings.amp_dtype, enabled=settings.amp_dtype is not None),
          enough_values(images)):
        return task(images, target)['loss']


def graph_backward(task: TrainingTask, settings: LoopSettings, device: torch.device) -> GraphedBackward:
    """What computes loss and gradients of a batch as a CUDA graph.

    Raises:
        InputError: There is no such graph on this device, or of a second stage, several batches or processes.
    """
    if device.type != 'cuda':
        raise InputError(f'--cuda-graphs needs an NVIDIA GPU, and this run is on {device.type}: leave it out')
    if isinstance(task, SecondStageTask):
        raise InputError('--cuda-graphs is not for a --stage, which may do more around a batch than a graph holds: '
                         'leave it out')
    if settings.accum_steps > 1:
        raise InputError('--cuda-graphs takes one batch per update: give a larger --batch-size, or leave it out')
    if isinstance(task.trainable_module, DistributedDataParallel):
        raise InputError('--cuda-graphs is for one process: leave it out')
    if settings.sam_rho:
        raise InputError('--cuda-graphs does not hold the second pass of --sam-rho: leave one of them out')
    if settings.amp_dtype is torch.float16:
        raise InputError('--cuda-graphs does not go with float16: give --amp-dtype bfloat16, or leave it out')
    return GraphedBackward(partial(compute_loss, task, settings=settings, device=device), task)


@contextmanager
def enough_values(images: torch.Tensor) -> Iterator[None]:
    """Say what to do where torch's BatchNorm has a single value per channel, of which there is no variance.

    Any other error of the body stays what it is.

    Raises:
        InputError: That is so.
    """
    try:
        yield
    except Exception as error:  # a ValueError, which a compiler may have wrapped
        if _ONE_VALUE not in str(error):
            raise
        raise InputError(
            f'a BatchNorm layer is left with one value per channel of {len(images)} image{"s" * (len(images) > 1)} of '
            f'{images.shape[-2]}x{images.shape[-1]}, which has no variance: give a larger --batch-size or --img-size'
        ) from error


def _numbered(part: Callable[[], Iterable[T]], first: int, end_part: Callable[[int], bool]) -> Iterator[tuple[int, T]]:
    """The items of an epoch with their numbers, part after part.

    Args:
        part: Gives the items that follow.
        first: Number of the first one.
        end_part: Is told how many there have been, and says whether that was the last part.
    """
    number = first
    while True:
        for item in part():
            yield number, item
            number += 1
        if end_part(number):
            return


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items, the last one possibly shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _step(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        settings: LoopSettings,
        scaler: GradScaler | None = None,
        graphs: GraphedBackward | None = None,
) -> None:
    """Update the weights by their gradients, which the scaler has scaled or the graphs have computed."""
    if settings.clip_grad is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = task.get_clip_parameters(exclude_head=settings.clip_mode == 'agc')
        dispatch_clip_grad(parameters, settings.clip_grad, mode=settings.clip_mode)
    if graphs is not None:
        graphs.step(optimizer)
    elif scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()

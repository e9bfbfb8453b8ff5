"""Where in an epoch a run is: the parts that checkpoints divide an epoch into, and what such a checkpoint holds beyond
that of an epoch's end.

A part begins as an epoch does: the loaders start anew at its first batch, and all random generators are reseeded. So a
place between two parts is a number of updates, and nothing of a loader, a worker or a generator is written down. What
processes have each for themselves, and share at the end of an epoch alone, are the statistics of BatchNorm and the sum
of the losses.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from nbn_timm.data.part import Part
from nbn_timm.errors import InputError
from nbn_timm.training.distributed import World

MIDDLE = 'middle'  # key of a checkpoint in the middle of its epoch


@dataclass(frozen=True)
class Middle:
    """A place in an epoch, between two updates, and what this process has done of the epoch by then."""

    updates: int = 0
    loss: float = 0.0  # sum over the images
    images: int = 0
    seconds: float = 0.0


BEGINNING = Middle()


@dataclass(frozen=True)
class EpochParts:
    """The parts of each epoch.

    Args:
        interval: Updates of a part; 0 for one part.
        updates: Of an epoch.
        accum_steps: Batches of an update.
        global_size: Images of an update.
    """

    interval: int
    updates: int
    accum_steps: int
    global_size: int

    def part(self, begin: int) -> Part:
        """The part that begins after so many updates; they all end at multiples of the interval."""
        end = (begin // self.interval + 1) * self.interval if self.interval else self.updates
        return Part(begin * self.accum_steps, end * self.accum_steps if end < self.updates else None)

    def told(self, epoch: int, place: Middle) -> list[str]:
        """Where in an epoch (0-based) a run goes on, in a sentence; nothing of its beginning."""
        if not place.updates:
            return []
        return [f'The run goes on after update {place.updates} of {self.updates} of epoch {epoch + 1}.']


def middle_state(middle: Middle, parts: EpochParts, task: TrainingTask, world: World) -> dict[str, Any] | None:
    """What a checkpoint has under `MIDDLE`, on the first process; every process has to call it.

    Under `ranks` is what each process has for itself. The statistics of the first one are in the checkpoint's weights.
    """
    own: dict[str, Any] = {'loss': middle.loss, 'images': middle.images}
    if not world.is_primary:
        own |= {name: {key: value.cpu() for key, value in buffers.items()}
                for name, buffers in _statistics(task).items()}
    ranks = world.gather_to_primary(own)
    if ranks is None:
        return None
    return {'updates': middle.updates, 'updates_per_epoch': parts.updates, 'images_per_update': parts.global_size,
            'seconds': middle.seconds, 'ranks': ranks}


def find_middle(path: Path, state: Mapping[str, Any], parts: EpochParts, world: World) -> Middle:
    """The place that a checkpoint is of, for this process; the beginning of the next epoch if it is of an epoch's end.

    With another number of processes the first one takes over the sum of the losses.

    Raises:
        InputError: It is malformed, or of epochs with other updates.
    """
    found = state.get(MIDDLE)
    if found is None:
        return BEGINNING
    try:
        if not all(isinstance(rank, dict) for rank in found['ranks']):
            raise _malformed(path)
        place = found['updates'], found['updates_per_epoch'], found['images_per_update']
        sums = [(rank['loss'], rank['images']) for rank in found['ranks']]
        seconds = found['seconds']
    except (KeyError, TypeError, IndexError) as error:
        raise _malformed(path) from error
    if (not all(type(number) is int and 0 < number < 2 ** 63 for number in (*place, *(images for _, images in sums)))
            or not all(type(number) is float and math.isfinite(number)
                       for number in (seconds, *(loss for loss, _ in sums)))
            or not place[0] < place[1] or seconds < 0 or not sums):
        raise _malformed(path)
    # Other processes may have a last update more, or less: one whose images would have been too few.
    tolerated = 0 if len(sums) == world.size else 1
    if (place[2] != parts.global_size or abs(place[1] - parts.updates) > tolerated or place[0] >= parts.updates):
        raise InputError(
            f"'{path}' was written in the middle of an epoch of {place[1]} updates of {place[2]} images, and here an "
            f'epoch has {parts.updates} of {parts.global_size}: give the batch sizes and the data of that run, or '
            'remove that file, and --resume auto goes on after the last whole epoch')
    if len(sums) == world.size:
        loss, images = sums[world.rank]
    else:
        loss, images = (sum(column) for column in zip(*sums, strict=True)) if world.is_primary else (0.0, 0)
    return Middle(place[0], loss, images, seconds)


def restore_statistics(path: Path, state: Mapping[str, Any], task: TrainingTask, world: World) -> None:
    """Give this process the statistics that it had; with another number of processes all keep those of the first.

    Raises:
        InputError: The statistics are malformed, or of another model.
    """
    ranks = state[MIDDLE]['ranks']
    if len(ranks) != world.size:
        return
    for name, buffers in _statistics(task).items():
        saved = ranks[world.rank].get(name)
        if saved is None:  # they are in the weights
            continue
        if not isinstance(saved, dict) or saved.keys() != buffers.keys() or not all(
                isinstance(saved[key], torch.Tensor)
                and (saved[key].shape, saved[key].dtype) == (buffer.shape, buffer.dtype)
                for key, buffer in buffers.items()):
            raise _malformed(path)
        for key, value in saved.items():
            buffers[key].copy_(value)


def _malformed(path: Path) -> InputError:
    return InputError(f"no run can go on from '{path}', since its '{MIDDLE}' is not what a training writes there: "
                      'remove that file, and --resume auto goes on after the last whole epoch')


def _statistics(task: TrainingTask) -> dict[str, dict[str, torch.Tensor]]:
    """Buffers of the model and of its average that are saved with weights."""
    found = {}
    for name, averaged in (('buffers', False), ('buffers_ema', True)):
        if (module := task.get_trainable_module(ema=averaged)) is not None:
            model = unwrap_model(module)
            saved = model.state_dict().keys()
            found[name] = {key: buffer for key, buffer in model.named_buffers() if key in saved}
    return found

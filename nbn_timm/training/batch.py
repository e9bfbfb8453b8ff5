"""From the batch size of a recipe to that of one process."""
from dataclasses import dataclass

from nbn_timm.errors import InputError
from nbn_timm.settings import AT_LEAST_1, Settings, setting

DEFAULT_SIZE = 128


@dataclass(frozen=True)
class BatchSettings(Settings):
    """How many images make an update."""

    title = 'batch'

    batch_size: int | None = setting(None, 'images per process and step', limits=AT_LEAST_1, short='-b',
                                     unset=f'{DEFAULT_SIZE}, or what --global-batch-size amounts to')
    global_batch_size: int | None = setting(
        None, 'images per update over all processes; with --batch-size it sets the accumulation steps, else it is '
        'divided among the processes', limits=AT_LEAST_1, unset='what the others amount to')
    grad_accum_steps: int | None = setting(None, 'batches per update', limits=AT_LEAST_1, unset='1')
    drop_last: bool = setting(False, 'leave out the last, smaller update of an epoch, as some released codes do')
    validation_batch_size: int | None = setting(None, 'images per process in evaluation', limits=AT_LEAST_1,
                                                unset='that of training', kind='machine', short='-vb')


@dataclass(frozen=True)
class BatchPlan:
    """global_size = size * accum_steps * number of processes."""

    size: int  # images per process and forward pass
    accum_steps: int  # forward passes per update
    global_size: int  # images per update


def plan_batch(settings: BatchSettings, world_size: int) -> BatchPlan:
    """Complete the three numbers from those given; without a global size it is what the other two amount to.

    Raises:
        InputError: They contradict each other, or the global size does not divide evenly.
    """
    size, accum_steps, global_size = settings.batch_size, settings.grad_accum_steps, settings.global_batch_size
    if global_size is None:
        size, accum_steps = size or DEFAULT_SIZE, accum_steps or 1
        return BatchPlan(size, accum_steps, size * accum_steps * world_size)
    if size is None:
        accum_steps = accum_steps or 1
        size = global_size // (world_size * accum_steps)
    else:
        accum_steps = accum_steps or max(1, global_size // (world_size * size))
    if size * accum_steps * world_size != global_size:
        raise InputError(
            f'--global-batch-size {global_size} is not {world_size} processes x {size or "?"} images x {accum_steps} '
            'accumulation steps: change --batch-size, --grad-accum-steps or the number of processes')
    return BatchPlan(size, accum_steps, global_size)

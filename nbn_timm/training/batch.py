"""From the batch size of a recipe to that of one process."""
from dataclasses import dataclass

from nbn_timm.errors import InputError


@dataclass(frozen=True)
class BatchPlan:
    """global_size = size * accum_steps * number of processes."""

    size: int  # images per process and forward pass
    accum_steps: int  # forward passes per update
    global_size: int  # images per update


def plan_batch(
        world_size: int,
        size: int | None = None,
        accum_steps: int | None = None,
        global_size: int | None = None,
        default_size: int = 128,
) -> BatchPlan:
    """Complete the three numbers from those given; without a global size it is what the other two amount to.

    Raises:
        InputError: They contradict each other, or the global size does not divide evenly.
    """
    for name, value in (('batch-size', size), ('grad-accum-steps', accum_steps), ('global-batch-size', global_size)):
        if value is not None and value < 1:
            raise InputError(f'--{name} is {value}: it must be at least 1')
    if global_size is None:
        size, accum_steps = size or default_size, accum_steps or 1
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

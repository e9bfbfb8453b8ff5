"""What would make training steps on this processor faster, by a short measurement before the first epoch."""
import logging
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nbn_timm.computation import has_bfloat16
from nbn_timm.training.plan import Plan

IMAGES = 8  # of the batch that is timed
ROUNDS = 3
PATIENCE = 10.0  # seconds, after which no further round begins
WORTH_IT = 0.9  # a share of the time above which nothing is advised
LONG_RUN = 1000  # updates, from which a run is long enough to be told

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """A way to compute a step.

    Attributes:
        advice: What to give for it; '' for the way of the run, which comes first.
        channels_last, bfloat16: As the settings of those names.
        threads: Of torch.
    """

    advice: str
    channels_last: bool
    bfloat16: bool
    threads: int


def advise(plan: Plan, model: nn.Module, updates: int) -> None:
    """Say in one line what would make the steps of a long run on the CPU faster; the run itself stays as it is.

    It is silent where the memory format or the type was chosen, for short runs, for second stages, which train a part,
    and for several processes, whose measurements would disturb each other.

    Args:
        plan: Of the run.
        model: Is not touched, nor is a random generator.
        updates: That are to come.
    """
    precision = plan.settings.precision
    chosen = precision.channels_last or precision.amp or precision.model_dtype or precision.torchcompile
    alone = plan.world.device.type == 'cpu' and plan.world.size == 1
    if not alone or chosen or plan.settings.second_stage.stage or updates < LONG_RUN:
        return
    if line := best_advice(measure(steps_of(model, plan.input.input_size, possible_ways()))):
        _logger.info(line)


def possible_ways() -> list[Way]:
    """The way of a run that says nothing, and what might be faster on this processor."""
    usual = torch.get_num_threads()
    formats = [('', False, False), ('--channels-last', True, False)]
    if has_bfloat16():
        formats.append(('--channels-last --amp --amp-dtype bfloat16', True, True))
    counts = dict.fromkeys((usual, 1, cores()))
    return [Way(_advice(flags, threads if threads != usual else None), channels_last, bfloat16, threads)
            for threads in counts for flags, channels_last, bfloat16 in formats]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _advice(flags: str, threads: int | None) -> str:
    before = f'OMP_NUM_THREADS={threads} before the command' if threads else ''
    return ' and '.join(filter(None, (flags, before)))


def steps_of(
        model: nn.Module,
        input_size: tuple[int, int, int],
        ways: Sequence[Way],
) -> dict[Way, Callable[[], None]]:
    """A forward and backward pass of a copy of the model on random images, in each way; one copy for each format."""
    copies = {channels_last: _copy(model, input_size, channels_last)
              for channels_last in {way.channels_last for way in ways}}
    return {way: partial(_step, *copies[way.channels_last], way) for way in ways}


def _copy(model: nn.Module, input_size: tuple[int, int, int], channels_last: bool) -> tuple[nn.Module, torch.Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    copy = deepcopy(model).train().to(memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(IMAGES, *input_size, generator=torch.Generator().manual_seed(0))
    return copy, images.contiguous(memory_format=memory_format)


def _step(model: nn.Module, images: torch.Tensor, way: Way) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(way.threads)
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast('cpu', torch.bfloat16, enabled=way.bfloat16):
            model(images).float().mean().backward()
        model.zero_grad()
    finally:
        torch.set_num_threads(before)


def measure(steps: dict[Way, Callable[[], None]], clock: Callable[[], float] = time.perf_counter) -> dict[Way, float]:
    """The least seconds of each step over some rounds, in which they take turns, after one that does not count."""
    began = clock()
    found: dict[Way, list[float]] = {way: [] for way in steps}
    for turn in range(ROUNDS + 1):
        if turn > 1 and clock() - began > PATIENCE:
            break
        for way, step in steps.items():
            start = clock()
            step()
            if turn:
                found[way].append(clock() - start)
    return {way: min(seconds) for way, seconds in found.items()}


def best_advice(seconds: dict[Way, float]) -> str | None:
    """A sentence on the fastest way, if it is worth it."""
    usual = next(spent for way, spent in seconds.items() if not way.advice)
    best = min(seconds, key=seconds.__getitem__)
    if not best.advice or seconds[best] > WORTH_IT * usual:
        return None
    return (f'A step takes {seconds[best] / usual:.2f} of the time on this processor with {best.advice} '
            f'(measured on {IMAGES} images; the run goes on without).')

"""Where this process stands among the processes of a run, and the few things that they must do together."""
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from nbn_timm.data import epoch_seed
from nbn_timm.errors import InputError
from nbn_timm.key_values import reason_of


@dataclass(frozen=True)
class World:
    """This process among all processes of a run."""

    device: torch.device
    rank: int = 0  # among all nodes
    local_rank: int = 0  # on this node
    size: int = 1

    @property
    def distributed(self) -> bool:
        return self.size > 1

    @property
    def is_primary(self) -> bool:
        """True on the one process that prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.distributed:
            dist.barrier(device_ids=[self.device.index] if self.device.type == 'cuda' else None)

    def gather(self, value: Any) -> list[Any]:
        """The values that all processes give, by rank; plain data."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        with torch.cuda.device(self.device) if self.device.type == 'cuda' else nullcontext():
            dist.all_gather_object(values, value)
        return values

    def gather_to_primary(self, value: Any) -> list[Any] | None:
        """The values that all processes give, by rank, on the first process alone; plain data, however large."""
        if not self.distributed:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_primary else None
        with torch.cuda.device(self.device) if self.device.type == 'cuda' else nullcontext():
            dist.gather_object(value, values)
        return values

    @contextmanager
    def primary_first(self) -> Iterator[None]:
        """Run the body on the first process of each node before the others, as for a download."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()


def init_world(device: str | None = None) -> World:
    """Join the process group that `torchrun` (or Slurm) describes in the environment, if there is one.

    The backend is nccl on GPUs and gloo on the CPU.

    Args:
        device: 'cuda', 'cuda:1', 'cpu', ...; None takes a GPU if there is one. With several processes each takes the
            GPU of its local rank.

    Raises:
        InputError: The device does not exist, or a node has fewer GPUs than processes.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown --device '{device}': give cpu, cuda or cuda:N") from error
    if kind.type == 'cuda':
        index = int(device.partition(':')[2] or 0)  # torch.device wraps an index above 127 around
        needed = max(index + 1, int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
        if torch.cuda.device_count() < needed:
            raise InputError(f"--device '{device}' needs {needed} GPUs here and there are {torch.cuda.device_count()}: "
                             'give --device cpu, or start fewer processes per node')
    else:
        _try_device(device)
    info = init_distributed_device_so(device)
    return World(torch.device(info['device']), info['global_rank'], info['local_rank'], info['world_size'])


def _try_device(device: str) -> None:
    """Refuse a device that cannot compute.

    Raises:
        InputError: It cannot.
    """
    try:
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # of torch, which raises anything about devices that it was not built for
        raise InputError(f"--device '{device}' cannot be computed on ({reason_of(error)}): give cpu, cuda or cuda:N"
                         ) from error


def close_world(world: World) -> None:
    """Leave the process group."""
    if world.distributed:
        dist.destroy_process_group()


def seed_everything(seed: int, epoch: int = 0, rank: int = 0, begin: int = 0) -> None:
    """Reseed `random`, `numpy` and `torch` from these numbers alone, so that an epoch can be run again.

    `begin` is that of a part of the epoch.

    numpy takes 32 bits; the others all 63.
    """
    value = epoch_seed(seed, epoch, rank, begin)
    random.seed(value)
    np.random.seed(value % 2 ** 32)
    torch.manual_seed(value)

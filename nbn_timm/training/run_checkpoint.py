"""Checkpoints of a run: written whole or not at all, at every epoch's end, and what it takes to go on from one."""
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from timm.task import TrainingTask
from timm.utils import NativeScaler
from torch import nn

from nbn_timm.data import ClassCounts, Classes
from nbn_timm.errors import InputError
from nbn_timm.files import atomic_write
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.trained.record import recorded_classes
from nbn_timm.training.distributed import World
from nbn_timm.training.settings import TrainSettings

LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best epoch so far, by the validation split."""

    metric: float
    epoch: int


def is_better(metric: float, best: Best | None, name: str) -> bool:
    """Whether `metric` beats the best so far; for 'loss' lower is better."""
    if best is None:
        return True
    return metric < best.metric if name == 'loss' else metric > best.metric


def checkpoint_state(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        arch: str,
        settings: Mapping[str, Any],
        class_counts: ClassCounts | None = None,
        metric: float | None = None,
        best: Best | None = None,
        scaler: NativeScaler | None = None,
) -> dict[str, Any]:
    """Everything that a run needs to go on after `epoch`, in timm's layout; plain data, for `weights_only` loading."""
    state: dict[str, Any] = {
        'epoch': epoch,
        'arch': arch,
        'version': 2,
        'args': dict(settings),
        'metric': metric,
        'best': None if best is None else asdict(best),
        'class_counts': None if class_counts is None else class_counts.to_dict(),
        'optimizer': optimizer.state_dict(),
        **task.get_checkpoint_state(),
    }
    if task.has_ema():
        state |= task.get_checkpoint_state(ema=True)
    if scaler is not None:
        state[scaler.state_dict_key] = scaler.state_dict()
    return state


def fitted_state(
        model: nn.Module,
        arch: str,
        settings: Mapping[str, Any],
        class_counts: ClassCounts | None = None,
) -> dict[str, Any]:
    """What is kept of a model that was computed in one pass: there is nothing to go on from."""
    return {
        'arch': arch,
        'version': 2,
        'args': dict(settings),
        'class_counts': None if class_counts is None else class_counts.to_dict(),
        'state_dict': model.state_dict(),
    }


def save_checkpoint(folder: Path, state: Mapping[str, Any], is_best: bool = False) -> None:
    """Write `last.pth.tar`, and `model_best.pth.tar` before it if this epoch is the best.

    In that order a kill between the two leaves a best checkpoint newer than the last one, and the run that goes on
    from the last one writes it again; the other way round the best one would be lost.

    Raises:
        InputError: The disk is full or refuses; earlier checkpoints are intact.
    """
    for name in ([BEST] if is_best else []) + [LAST]:
        atomic_write(folder / name, lambda path: _write(state, path))


def _write(state: Mapping[str, Any], path: Path) -> None:
    with open(path, 'wb') as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            # torch's writer hides the system's refusal behind its own complaint about a file position.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def find_resume(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that a run starts from, None for a fresh start.

    Args:
        resume: None, a file, or 'auto' for the folder's last checkpoint if there is one.
        folder: Of the run.

    Raises:
        InputError: The file does not exist, or this run would overwrite the checkpoint of another one.
    """
    last = folder / LAST
    if resume == 'auto':
        return last if last.exists() else None
    if resume is not None:
        if not Path(resume).is_file():
            raise InputError(f"--resume '{resume}' does not exist: give a checkpoint, or auto")
        if last.exists() and not last.samefile(resume):
            raise InputError(f"'{folder}' already holds a run ({LAST}) that '{resume}' would overwrite: give another "
                             '--experiment')
        return Path(resume)
    if last.exists():
        raise InputError(f"'{folder}' already holds a run ({LAST}): give --resume auto to go on with it, "
                         'or another --experiment')
    return None


def resume_run(
        path: Path,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        arch: str,
        settings: Mapping[str, Any],
        class_counts: ClassCounts | None = None,
        scaler: NativeScaler | None = None,
) -> tuple[int, Best | None]:
    """Put a run into the state of a checkpoint.

    Returns:
        The next epoch (0-based) and the best one so far.

    Raises:
        InputError: The checkpoint is of another model or number of classes, or holds no training state.
    """
    state = read_checkpoint(path)
    for key in ('epoch', 'state_dict', 'optimizer'):
        if key not in state:
            raise InputError(f"'{path}' has no '{key}', so no run can go on from it: use --initial-checkpoint to start "
                             'from its weights')
    if state.get('arch', arch) != arch:
        raise InputError(f"'{path}' is of model '{state['arch']}' and not of '{arch}': give --model {state['arch']}, "
                         'or another --experiment')
    _check_shapes(path, state['state_dict'], task)
    before = recorded_classes(state)
    if before is not None and class_counts is not None:
        _check_classes(path, before, class_counts)
    _warn_of_changes(path, state.get('args') or {}, settings)

    task.load_checkpoint_state(state['state_dict'], state.get('task_state'))
    if task.has_ema():
        # A run that only now turns EMA on starts the average from its weights.
        averaged = '_ema' if 'state_dict_ema' in state else ''
        task.load_checkpoint_state(state[f'state_dict{averaged}'], state.get(f'task_state{averaged}'), ema=True)
    groups = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state['optimizer'])
    except ValueError as error:
        raise InputError(f"the optimizer state of '{path}' does not fit ({error}): keep --opt and --decay-1d as they "
                         'were, or start anew with --initial-checkpoint') from error
    for group, settings_now in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings_now)  # today's flags win over those of the checkpoint
    if scaler is not None and scaler.state_dict_key in state:
        scaler.load_state_dict(state[scaler.state_dict_key])
    best = state.get('best')
    return state['epoch'] + 1, None if best is None else Best(**best)


def load_best(folder: Path, model: nn.Module) -> int:
    """Load the best checkpoint's weights, averaged ones if it has them, and return its epoch (0-based).

    After a kill between the two files of `save_checkpoint` that epoch may differ from the one that the run remembers.
    """
    state = read_checkpoint(folder / BEST)
    model.load_state_dict(state.get('state_dict_ema', state['state_dict']))
    return state['epoch']


@contextmanager
def exclusive_run(folder: Path, world: World) -> Iterator[None]:
    """Keep other runs out of a folder, and clear away what a kill in the middle of a save has left there.

    Raises:
        InputError: Another run is at work in the folder, or the folder cannot be written.
    """
    if not world.is_primary:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / '.lock')
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another run is at work in '{folder}': wait for it or end it (also the workers that a killed "
                         'torchrun may have left), or give another --experiment') from error
    except OSError as error:
        raise InputError(f"the run folder '{folder}' cannot be written ({error.strerror}): choose another --output"
                         ) from error
    try:
        for name in (LAST, BEST):
            for leftover in folder.glob(f'.{name}.*.tmp'):
                leftover.unlink()
        yield
    finally:
        lock.release()


def _check_classes(path: Path, before: Classes, now: Classes) -> None:
    if before.counts != now.counts:
        raise InputError(f"'{path}' was trained on other class counts than {now.source} has: "
                         'give its dataset, or another --experiment')
    matching = before.match(now, now.source, f"'{path}'")
    matching.require_same()
    if matching.reordered:
        raise InputError(f"'{path}' was trained on the classes of {now.source} in another order: give the data of that "
                         'run, or another --experiment')


def _check_shapes(path: Path, saved: Mapping[str, torch.Tensor], task: TrainingTask) -> None:
    current = task.get_checkpoint_state()['state_dict']
    for key in sorted(saved.keys() | current.keys()):
        if key not in saved or key not in current:
            raise InputError(f"'{path}' and the model differ in '{key}': give the --model and --model-kwargs "
                             'of that run, or another --experiment')
        if saved[key].shape != current[key].shape:
            raise InputError(f"'{key}' is {list(saved[key].shape)} in '{path}' and {list(current[key].shape)} in the "
                             'model: give the --num-classes and --model-kwargs of that run, or another --experiment')


def _warn_of_changes(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changes = TrainSettings.changed(old, new)
    if changes:
        told = ', '.join(f'{name} {before} -> {now}' for name, (before, now) in sorted(changes.items()))
        _logger.warning("settings differ from those of '%s': %s", path, told)

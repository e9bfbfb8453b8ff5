"""Checkpoints of a run: written whole or not at all, at every epoch's end and if asked in its middle, and what it takes
to go on from one."""
import logging
import math
import os
import re
import shutil
import uuid
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from timm.task import TrainingTask
from timm.utils import NativeScaler
from torch import nn
from torch.amp import GradScaler

from nbn_timm.data import ClassCounts, Classes
from nbn_timm.data.defaults import INPUT_FORMAT
from nbn_timm.errors import InputError, in_words
from nbn_timm.evaluation.result import LOWER_IS_BETTER
from nbn_timm.files import atomic_write, file_sha256, open_regular, refuse_no_file
from nbn_timm.models.run_folder import BEST, LAST, RECOVERY, RESULTS
from nbn_timm.models.weight_files import check_weights, read_checkpoint
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training.agreement import agree, short
from nbn_timm.training.averages import epoch_average
from nbn_timm.training.distributed import World
from nbn_timm.training.middle import MIDDLE
from nbn_timm.training.optim import step_on_stand_ins
from nbn_timm.training.settings import TrainSettings

if TYPE_CHECKING:  # it has a plan, which writes checkpoints
    from nbn_timm.training.curriculum import Curriculum

_OLDER = re.compile(r'last-(\d+)\.pth\.tar')  # the one before the last is last-1
_AVERAGED_EPOCHS = 'averaged_epochs'  # of which the weights under 'state_dict_ema' are the mean
_LEVELS = 'curriculum'  # of the classes, see `nbn_timm.training.curriculum`
_LOOKAHEAD_STEP = 'lookahead_step'  # what timm's Lookahead counts in a group of parameters
_LOOKAHEAD_SLOW = 'lookahead_slow_buff'  # what it has of a parameter from its first slow step on

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best epoch so far, by the validation split."""

    metric: float
    epoch: int


def is_better(metric: float, best: Best | None, name: str) -> bool:
    """Whether `metric` beats the best so far; of a loss or an error lower is better."""
    if best is None:
        return True
    return metric < best.metric if name in LOWER_IS_BETTER else metric > best.metric


def checkpoint_state(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        arch: str,
        settings: Mapping[str, Any],
        class_counts: ClassCounts | None = None,
        metric: float | None = None,
        best: Best | None = None,
        scaler: GradScaler | None = None,
        curriculum: 'Curriculum | None' = None,
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
    if (average := epoch_average(task)) is not None:
        state[_AVERAGED_EPOCHS] = int(average.n_averaged)
    if scaler is not None:
        state[NativeScaler.state_dict_key] = scaler.state_dict()
    if curriculum is not None:
        state[_LEVELS] = curriculum.state()
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


def save_checkpoint(folder: Path, state: Mapping[str, Any], is_best: bool = False, history: int = 1) -> None:
    """Write `last.pth.tar`, and `model_best.pth.tar` before it if this epoch is the best; keep the previous last ones.

    In that order a kill between the two leaves a best checkpoint newer than the last one, and the run that goes on
    from the last one writes it again; the other way round the best one would be lost. The previous `last.pth.tar`
    becomes `last-1.pth.tar`, that one `last-2.pth.tar` and so on, after the new one is in place: at no moment is
    there less to go on from than before. What `save_recovery` has written is removed at last.

    Args:
        folder: Of the run.
        state: Of `checkpoint_state` or `fitted_state`.
        is_best: The epoch is the best so far.
        history: How many older checkpoints to keep beside the last one.

    Raises:
        InputError: The disk is full or refuses; earlier checkpoints are intact.
    """
    if is_best:
        save_file(folder / BEST, state)
    with _previous(folder, history):
        save_file(folder / LAST, state)
    (folder / RECOVERY).unlink(missing_ok=True)


def save_recovery(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the checkpoint of the middle of an epoch, in the place of one before.

    Raises:
        InputError: The disk is full or refuses; earlier checkpoints are intact.
    """
    save_file(folder / RECOVERY, state)


def save_file(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        InputError: The disk is full or refuses; what was there before is intact.
    """
    atomic_write(path, lambda temporary: write_state(state, temporary))


@contextmanager
def _previous(folder: Path, history: int) -> Iterator[None]:
    """Hold on to the last checkpoint while the body replaces it, then count the older ones on."""
    last, kept = folder / LAST, folder / f'.{LAST}.previous.tmp'
    kept.unlink(missing_ok=True)
    if history and last.exists():
        try:
            os.link(last, kept)
        except OSError:  # a file system without links
            shutil.copyfile(last, kept)
    try:
        yield
        older = [folder / _older(age) for age in range(1, history + 1)]
        for newer, place in reversed(list(zip([kept, *older], older, strict=False))):
            if newer.exists():
                os.replace(newer, place)
    finally:
        kept.unlink(missing_ok=True)
    for name in _older_names(folder)[history:]:
        (folder / name).unlink(missing_ok=True)


def _older(age: int) -> str:
    return f'last-{age}.pth.tar'


def _older_names(folder: Path) -> list[str]:
    """Names of the older checkpoints in a folder, the newest first."""
    ages = [int(match[1]) for path in folder.glob('last-*.pth.tar') if (match := _OLDER.fullmatch(path.name))]
    return [_older(age) for age in sorted(ages)]


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Save a checkpoint; what the system refuses is its own error."""
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
        resume: None, a file, the folder of a run for the newest whole checkpoint in it, or 'auto' for that in `folder`,
            if a run has been there.
        folder: Of the run.

    Raises:
        InputError: The file does not exist, this run would overwrite another one, or the checkpoints of the run in the
            folder are gone or damaged.
    """
    there = _checkpoints(folder)
    if resume == 'auto':
        return _newest_whole(folder, there)
    if resume is not None:
        if Path(resume).is_dir():
            resume = str(_newest_whole(Path(resume), _checkpoints(Path(resume))) or resume)
        if not Path(resume).is_file():
            refuse_no_file(resume, or_folder=True)
            lacking = 'has no checkpoint in it' if Path(resume).is_dir() else 'does not exist'
            raise InputError(f"--resume '{resume}' {lacking}: give a checkpoint, the folder of a run, or auto")
        if there and not any(path.samefile(resume) for path in there):
            raise InputError(f"'{folder}' already holds a run ({there[0].name}) that '{resume}' would overwrite: give "
                             'another --experiment')
        return Path(resume)
    if there:
        raise InputError(f"'{folder}' already holds a run ({there[0].name}): give --resume auto to go on with it, "
                         'or another --experiment')
    if trace := _trace(folder):
        raise InputError(f"'{folder}' already holds a run, whose checkpoints are gone ({trace}): give another "
                         '--experiment, or remove that folder')
    return None


def find_common_resume(resume: str | None, folder: Path, world: World) -> Path | None:
    """`find_resume` for a run of several processes, which must all see the same run folder and checkpoint.

    Every process has to call it, after the first one has made the folder.

    Raises:
        InputError: As `find_resume`, on all processes alike; or they see different folders or checkpoints.
    """
    if not world.distributed:
        return find_resume(resume, folder)
    _check_same_folder(folder, world)
    path: Path | None = None

    def look() -> dict[str, str]:
        nonlocal path
        path = find_resume(resume, folder)
        if path is None:
            return {}
        place = _place(read_checkpoint(path))
        return {f"the checkpoint to go on from in '{folder}'": f"{place} in '{path.name}', {short(file_sha256(path))}"}

    agree(world, look, 'give an --output on a disk that all nodes share')
    return path


def _check_same_folder(folder: Path, world: World) -> None:
    mark = folder / world.gather(f'.seen-{uuid.uuid4().hex}')[0]
    if world.is_primary:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    world.barrier()
    blind = [rank for rank, sees in enumerate(world.gather(mark.exists())) if not sees]
    if world.is_primary:
        mark.unlink(missing_ok=True)
    if blind:
        raise InputError(f"process {blind[0]} does not see the run folder '{folder}' of process 0: give an --output on "
                         'a disk that all nodes share')


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder: of the middle of an epoch, the last one, older ones, the best one."""
    return [folder / name for name in (RECOVERY, LAST, *_older_names(folder), BEST) if (folder / name).exists()]


def _newest_whole(folder: Path, there: list[Path]) -> Path | None:
    whole: list[tuple[_Place, Path]] = []
    damage: list[str] = []
    for path in there:
        try:
            whole.append((_place(read_checkpoint(path)), path))
        except InputError as error:
            damage.append(str(error))
        if path.name == LAST and any(known == path for _, known in whole):
            break  # all others are older
    if whole:
        place, newest = max(whole, key=lambda found: found[0])  # of equally new ones the first
        lost = damage[0] if damage else None if newest.name in (LAST, RECOVERY) else f"'{folder / LAST}' is gone"
        if lost:
            _logger.warning("%s. The run goes on from '%s' instead, after %s.", lost, newest.name, place)
        return newest
    trace = _trace(folder)
    if damage or trace:
        state = f'damaged: {damage[0].partition(": get it again")[0]}' if damage else f'gone ({trace})'
        raise InputError(f"the run in '{folder}' cannot go on, since its checkpoints are {state}; put an intact "
                         f'{LAST} there, or begin anew with another --experiment')
    return None


class _Place(NamedTuple):
    """How far a checkpoint is; later ones are larger."""

    epochs: int  # that are done; 0 also for a second stage of one pass
    updates: int  # of the next epoch that are done

    def __str__(self) -> str:
        return f'update {self.updates} of epoch {self.epochs + 1}' if self.updates else f'epoch {self.epochs}'


def _place(state: Mapping[str, Any]) -> _Place:
    epoch, middle = state.get('epoch'), state.get(MIDDLE)
    epochs = epoch if isinstance(epoch, int) else -1
    updates = middle.get('updates') if isinstance(middle, dict) else None
    return _Place(epochs, updates) if isinstance(updates, int) else _Place(epochs + 1, 0)


def _trace(folder: Path) -> str | None:
    """What tells that a run in the folder has written a checkpoint, None if nothing does.

    The log gets the row of an epoch just before its checkpoint, so that the first row alone is no sign.
    """
    for name in RESULTS:
        if (folder / name).exists():
            return f'it has left {name}'
    for name, before in (('log.jsonl', 0), ('summary.csv', 1)):
        with suppress(OSError), open_regular(folder / name) as file:
            rows = file.read().count(b'\n') - before
            if rows > 1:
                return f'{name} has {rows} epochs'
    return None


def resume_run(
        path: Path,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        arch: str,
        settings: Mapping[str, Any],
        class_counts: ClassCounts | None = None,
        scaler: GradScaler | None = None,
        curriculum: 'Curriculum | None' = None,
) -> tuple[int, Best | None]:
    """Put a run into the state of a checkpoint.

    Returns:
        The next epoch (0-based), or the one in whose middle the checkpoint was written, and the best one so far.

    Raises:
        InputError: The checkpoint is of another model or number of classes, or holds no training state.
    """
    state = read_checkpoint(path)
    _check_layout(path, state)
    before = NetworkRecord.of_checkpoint(state)
    if state.get('arch', arch) != arch:
        raise InputError(f"'{path}' is of model '{state['arch']}' and not of '{arch}': give --model {state['arch']}, "
                         'or another --experiment')
    for key in ('state_dict', 'state_dict_ema'):
        if state.get(key) is not None:
            _check_shapes(path, state[key], task)
    if before.classes is not None and class_counts is not None:
        _check_classes(path, before.classes, class_counts)
    _warn_of_changes(path, state.get('args'), before.arguments, settings)

    load_task(state, task)
    if (average := epoch_average(task)) is not None:
        average.begin(state.get(_AVERAGED_EPOCHS, 0))
    _load_optimizer(path, state, optimizer)
    if scaler is not None and NativeScaler.state_dict_key in state:
        _load_scaler(path, state[NativeScaler.state_dict_key], scaler)
    if curriculum is not None:
        curriculum.load_state(state.get(_LEVELS), path)
    best = state.get('best')
    epoch = state['epoch'] + (state.get(MIDDLE) is None)
    return epoch, None if best is None else Best(**best)


def load_task(state: Mapping[str, Any], task: TrainingTask) -> None:
    """Give a task the weights of a checkpoint, the average of them, and the state beside them."""
    task.load_checkpoint_state(state['state_dict'], state.get('task_state'))
    if task.has_ema():
        # A run that only now turns EMA on starts the average from its weights.
        averaged = '_ema' if state.get('state_dict_ema') is not None else ''
        task.load_checkpoint_state(state[f'state_dict{averaged}'], state.get(f'task_state{averaged}'), ema=True)


def _load_scaler(path: Path, saved: Any, scaler: GradScaler) -> None:
    """Put the scaler of float16 into the state of a checkpoint.

    Raises:
        InputError: It is none; with a scale that is no number every update would be left out.
    """
    keys = scaler.state_dict().keys()
    if not isinstance(saved, Mapping) or saved.keys() != keys or not all(
            isinstance(value, int | float) and 0 <= value < math.inf for value in saved.values()) or not saved['scale']:
        raise InputError(f"no run can go on from '{path}', since its '{NativeScaler.state_dict_key}' is not what a "
                         'training writes there: use --initial-checkpoint to start from its weights')
    scaler.load_state_dict(dict(saved))


def _load_optimizer(path: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Put an optimizer into the state of a checkpoint; today's settings win over those of the checkpoint.

    Raises:
        InputError: The state is of another optimizer, or of parameters in other groups or another order.
    """
    needed = step_on_stand_ins(optimizer)
    groups = [{key: value for key, value in group.items() if key not in ('params', _LOOKAHEAD_STEP)}
              for group in optimizer.param_groups]
    try:
        there, here = ([len(group['params']) for group in given] for given in (
            state['optimizer']['param_groups'], optimizer.param_groups))
        if there != here:
            raise ValueError(f'it has groups of {there} parameters, where this optimizer has groups of {here}')
        of_lookahead = all(_LOOKAHEAD_STEP in group for group in state['optimizer']['param_groups'])
        for number, saved in state['optimizer']['state'].items():
            if of_lookahead and _LOOKAHEAD_SLOW not in saved:
                needed.get(number, {}).pop(_LOOKAHEAD_SLOW, None)
            _check_parameter_state(needed.get(number, {}), saved)
        optimizer.load_state_dict(state['optimizer'])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = in_words(error)
        before = NetworkRecord.of_checkpoint(state).arguments.get('opt')
        raise InputError(
            f"the optimizer state of '{path}' does not fit ({reason}): keep --opt{f' {before}' if before else ''}, "
            '--opt-kwargs and --decay-1d as they were, or start anew with --initial-checkpoint') from error
    for group, settings_now in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings_now)


def _check_parameter_state(needed: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compare what an optimizer keeps of a parameter with what it is given; an empty state fits any.

    Raises:
        ValueError: They are of different kinds or shapes.
    """
    needed, saved = ({key: value for key, value in kept.items() if value is not None} for kept in (needed, saved))
    if not needed or not saved:
        return
    if needed.keys() != saved.keys():
        raise ValueError(f'it has {", ".join(map(str, saved))} of a parameter, where this optimizer has '
                         f'{", ".join(map(str, needed))}')
    for key, value in needed.items():
        there = saved[key]
        if isinstance(value, torch.Tensor) != isinstance(there, torch.Tensor):
            raise ValueError(f'the {key} of a parameter is a {type(there).__name__} there and a '
                             f'{type(value).__name__} here')
        if not isinstance(value, torch.Tensor):
            continue
        if value.shape != there.shape:
            raise ValueError(f'the {key} of a parameter has the shape {list(there.shape)} there and '
                             f'{list(value.shape)} here, so its groups of parameters are others')
        if value.is_floating_point() != there.is_floating_point() or value.is_complex() != there.is_complex():
            raise ValueError(f'the {key} of a parameter is of {there.dtype} there and of {value.dtype} here')
        if there.isnan().any():
            raise ValueError(f'the {key} of a parameter has values that are not numbers (NaN)')


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
        InputError: Another run is at work in the folder, it holds a pipe or a device, or it cannot be written.
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
        strange = next((path for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())),
                       None)
        if strange is not None:  # writing into a pipe would wait for its reader
            raise InputError(f"'{strange}' in the run folder is a pipe or a device: remove it, or give another "
                             '--experiment')
        for leftover in folder.glob('.*.tmp'):  # whoever wrote them had this lock, and is dead
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
        yield
    finally:
        lock.release()


def _check_classes(path: Path, before: Classes, now: Classes) -> None:
    if None not in (before.counts, now.counts) and before.counts != now.counts:
        raise InputError(f"'{path}' was trained on other class counts than {now.source} has: "
                         'give its dataset, or another --experiment')
    matching = before.match(now, now.source, f"'{path}'")
    matching.require_same()
    for note in matching.notes:
        _logger.info('%s', note)
    if matching.reordered:
        raise InputError(f"'{path}' was trained on the classes of {now.source} in another order: give the data of that "
                         'run, or another --experiment')


def check_finite(task: TrainingTask, epoch: int, world: World) -> None:
    """Refuse to go on with weights or BatchNorm statistics that are not finite, on all processes alike.

    Raises:
        InputError: One is not, on any process; it is named.
    """
    model: nn.Module | None = task.get_trainable_module()
    assert model is not None
    learned = _learned(model)
    finite = torch.stack([value.detach().isfinite().all() for value in learned.values()]).tolist()
    bad = next((name for name, good in zip(learned, finite, strict=True) if not good), None)
    bad = next((name for name in world.gather(bad) if name), None) if world.distributed else bad
    if bad is not None:
        raise InputError(f"'{bad}' became NaN or infinite in epoch {epoch + 1}, so no checkpoint of it was written: "
                         'try a lower --lr, --warmup-epochs 5, --clip-grad 1.0, or --amp-dtype bfloat16 if float16 was '
                         'used')


def _learned(model: nn.Module) -> dict[str, torch.Tensor]:
    statistics = ((name, value) for name, value in model.named_buffers()
                  if name.rpartition('.')[2] in ('running_mean', 'running_var'))
    return {**dict(model.named_parameters()), **dict(statistics)}


def _check_layout(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what is no training state, or a malformed one."""
    for key in ('epoch', 'state_dict', 'optimizer'):
        if key not in state:
            raise InputError(f"'{path}' has no '{key}', so no run can go on from it: use --initial-checkpoint to start "
                             'from its weights')
    wanted: dict[str, type | tuple[type, ...]] = {
        'epoch': int, 'state_dict': dict, 'optimizer': dict, 'state_dict_ema': dict, 'task_state': dict,
        'task_state_ema': dict, 'class_counts': dict, 'best': dict, _AVERAGED_EPOCHS: int}
    wrong = next((key for key, kind in wanted.items() if state.get(key) is not None and (
        not isinstance(state[key], kind) or isinstance(state[key], bool))), None)
    best = state.get('best')
    if not wrong and best and (best.keys() != {'metric', 'epoch'} or not all(
            isinstance(value, int | float) for value in best.values())):
        wrong = 'best'
    if wrong or state['epoch'] is None or state['epoch'] < 0:
        raise InputError(f"no run can go on from '{path}', since its '{wrong or 'epoch'}' is not what a training "
                         'writes there: use --initial-checkpoint to start from its weights')
    for key in ('state_dict', 'state_dict_ema'):
        if state.get(key) is not None:
            check_weights(state[key], path)


def _check_shapes(path: Path, saved: Mapping[str, torch.Tensor], task: TrainingTask) -> None:
    current = task.get_checkpoint_state()['state_dict']
    for key in sorted(saved.keys() | current.keys()):
        if key not in saved or key not in current:
            raise InputError(f"'{path}' and the model differ in '{key}': give the --model and --model-kwargs "
                             'of that run, or another --experiment')
        if saved[key].is_floating_point() != current[key].is_floating_point():
            raise InputError(f"'{key}' is of another kind of number in '{path}' than in the model: it is damaged, so "
                             'take an earlier checkpoint')
        if saved[key].shape != current[key].shape:
            raise InputError(f"'{key}' is {list(saved[key].shape)} in '{path}' and {list(current[key].shape)} in the "
                             'model: give the --num-classes and --model-kwargs of that run, or another --experiment')


def _warn_of_changes(path: Path, args: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    of_timm = isinstance(args, Namespace)  # which says nothing of what timm does not have
    unknown = {name: new.get(name) for name in new
               if old.get(name) is None and (name in INPUT_FORMAT or of_timm and name not in vars(args))}
    old = {**old, **unknown}
    changes = TrainSettings.changed(old, new)
    idle = [TrainSettings.from_record(record).without_effect(changes).keys() for record in (old, new)]
    changes = {name: change for name, change in changes.items() if not all(name in names for names in idle)}
    if changes:
        told = ', '.join(f'{name} {before} -> {now}' for name, (before, now) in sorted(changes.items()))
        _logger.warning("settings differ from those of '%s': %s", path, told)

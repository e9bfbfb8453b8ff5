"""The validation split that a run takes out of its training pictures: settled before the data are opened."""
import filecmp
from pathlib import Path
from typing import TypeVar

from nbn_timm.data.settings import DataSettings
from nbn_timm.data.val_split import SPLIT_FILE
from nbn_timm.datasets import draw_split_file, draws_validation
from nbn_timm.errors import InputError
from nbn_timm.files import atomic_write, refuse_no_file
from nbn_timm.settings import SettingGroups
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.training.distributed import World

GroupsT = TypeVar('GroupsT', bound=SettingGroups)


def settle_validation(
        settings: GroupsT,
        data: DataSettings,
        world: World,
        folder: Path,
        resume_from: Path | None = None,
) -> GroupsT:
    """The settings with the run's own split file in place of --val-fraction, which the first process draws.

    A run that goes on keeps the split that it has.

    Args:
        settings: Of the command.
        data: Those of the data among them.
        world: This process.
        folder: Of the run.
        resume_from: The checkpoint from which it goes on.

    Raises:
        InputError: Nothing can be drawn, or a run would go on with another split; on all processes alike.
    """
    refusal: InputError | None = None
    if world.is_primary:
        try:
            settled = _settle(data, folder, resume_from)
        except InputError as error:
            refusal = error
    else:
        settled = draws_validation(data)
    refusal = world.gather(refusal)[0]
    if refusal is not None:
        raise refusal
    return settings.with_values(split_file=str(folder / SPLIT_FILE)) if settled else settings


def _settle(data: DataSettings, folder: Path, resume_from: Path | None) -> bool:
    """Put the split file into the folder of the run; false where there is none."""
    own, given = folder / SPLIT_FILE, data.split_file
    if resume_from is not None:
        before = checkpoint_record(str(resume_from)).told(DataSettings)
        _refuse_another(data, before, resume_from)
        given = before.split_file
    elif not draws_validation(data):
        return False
    if given is None:
        if data.val_fraction is None or not draws_validation(data):
            return False
        draw_split_file(data, data.val_fraction, own)
        return True
    if not Path(given).is_file():
        refuse_no_file(given)
        raise InputError(f"the split file '{given}', which says which training pictures validate, is not there: put it "
                         'back, or give another --split-file or --val-fraction in a run of its own')
    if not (own.exists() and own.samefile(given)):
        content = Path(given).read_bytes()
        atomic_write(own, lambda path: _write(path, content))
    return True


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _refuse_another(data: DataSettings, before: DataSettings, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint with another validation split than its run had."""
    there, here = draws_validation(before), draws_validation(data)
    same = there == here
    if there and here and data.split_file and before.split_file:
        same = Path(before.split_file).is_file() and filecmp.cmp(data.split_file, before.split_file, shallow=False)
    elif there and here:
        same = _draw(data) == _draw(before)
    if not same:
        was = f'with {_told(before)}' if there else 'without --val-fraction'
        raise InputError(f"'{checkpoint}' was trained {was}, and the run would go on {'with' if here else 'without'} "
                         f"{_told(data) if here else 'that'}: give it as it was, or another --experiment")


def _draw(data: DataSettings) -> tuple[object, ...]:
    return data.val_fraction, data.val_seed, data.val_groups and Path(data.val_groups).name, data.group_column


def _told(data: DataSettings) -> str:
    if data.val_fraction is None:
        return f'--split-file {data.split_file}'
    return f'--val-fraction {data.val_fraction:g} --val-seed {data.val_seed}'

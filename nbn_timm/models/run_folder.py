"""The checkpoints that a run leaves in its folder, and which of them the folder stands for where a file is wanted."""
import os
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nbn_timm.errors import InputError, quoted
from nbn_timm.files import read_json_object, refuse_no_file

__all__ = ['ADJUSTED', 'BEST', 'LAST', 'RECOVERY', 'RESULTS', 'finished_file', 'has_controls', 'new_run_folder',
           'source_file']

LAST = 'last.pth.tar'
RECOVERY = 'recovery.pth.tar'  # of the middle of an epoch, until that epoch ends
BEST = 'model_best.pth.tar'
ADJUSTED = 'model_adjusted.pth.tar'  # the prior was taken off its logits after the training
RESULTS = ('test.json', 'val.json')  # what a run leaves when it ends

# What a folder may hold that no run has written, in timm's and the Hub's format.
_OF_OTHERS = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')

_LONGEST = 255  # bytes of a name, on nearly all file systems


def source_file(source: str | os.PathLike[str], finished: bool = False) -> Path:
    """The file of weights that a path names: itself, or of a folder the one that it stands for.

    Of a run that is its best checkpoint, or its last one where none was chosen.

    Args:
        source: A file or a folder.
        finished: What the run has come to is wanted, not what a training goes on from: first of all the file that was
            evaluated at its end, which may have the prior taken off its logits.

    Raises:
        InputError: There is none.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.is_file():
            refuse_no_file(path, or_folder=True)
            raise InputError(f'there is no file or folder {quoted(str(source))} of weights: correct the path')
        return path
    found = next((path / name for name in _names(path, finished) if (path / name).is_file()), None)
    if found is None and (path / RECOVERY).is_file():
        raise InputError(f'the run in {quoted(str(source))} has finished no epoch: give {quoted(str(path / RECOVERY))} '
                         'itself, or let --resume auto finish the epoch first')
    if found is None:
        raise InputError(f'the folder {quoted(str(source))} has no weights: give a file, or a folder with one of '
                         f'{", ".join((BEST, LAST, *_OF_OTHERS))}')
    return found


def new_run_folder(output: str, experiment: str | None, default: str) -> Path:
    """The folder of a run: `experiment`, or where it is None `default`, in the folder `output`.

    Raises:
        InputError: No folder can be called so, or it would lie elsewhere than its name says.
    """
    if not output.strip() or has_controls(output):
        raise InputError(f"--output {quoted(output)} is no name of a folder: give one, as '.' for this one")
    name = default if experiment is None else experiment
    if not name.strip('. ') or '/' in name or os.sep in name or has_controls(name):
        raise InputError(f'--experiment {quoted(name)} is no name of a folder in --output: give a name without slashes '
                         'and line breaks, and the path before it as --output')
    if len(os.fsencode(name)) > _LONGEST:
        raise InputError(f'the name of the run {quoted(name)} is too long: give an --experiment of at most {_LONGEST} '
                         'bytes')
    return Path(output, name)


def has_controls(name: str) -> bool:
    """Whether a name has characters that break lines or steer a terminal; no alphabet needs these."""
    return any(unicodedata.category(char) in ('Cc', 'Zl', 'Zp') for char in name)


def finished_file(source: str) -> str:
    """`source_file` of a finished run as text; what is no folder is left to whoever opens it."""
    return str(source_file(source, finished=True)) if Path(source).is_dir() else source


def _names(folder: Path, finished: bool) -> Iterator[str]:
    if finished:
        yield from _evaluated(folder)
        yield ADJUSTED
    yield from (BEST, LAST, *_OF_OTHERS)


def _evaluated(folder: Path) -> Iterator[str]:
    """The file that the results of a run are of, where they say so."""
    for name in RESULTS:
        with suppress(InputError):
            weights = read_json_object(folder / name, '', '').get('weights')
            if isinstance(weights, dict) and isinstance(weights.get('file'), str) and weights['file']:
                yield os.path.basename(weights['file'])

"""Reading checkpoints: always without running code from them, always with one sentence when something is wrong."""
import argparse
import pickle
import pickletools
import re
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
from timm.models import clean_state_dict

from nbn_timm.errors import InputError

from ._released import StateDict, recognize, to_model_format

__all__ = ['load_weights', 'read_checkpoint', 'read_state_dict']


class _Inert:
    """Stands in for an object beside the weights that nobody needs; it takes anything and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# RIDE's released checkpoints carry their configuration, with paths, and a number of numpy's.
_STAND_INS = [(_Inert, name) for name in (
    'parse_config.ConfigParser', 'pathlib.Path', 'pathlib.PosixPath', 'pathlib.WindowsPath', 'numpy.dtype',
    'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar')]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file, safetensors or torch, onto the CPU.

    Raises:
        InputError: The file is missing, damaged, no checkpoint, or a pickle that wants to run code; the objects it
            asks for are named and nothing of it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"the checkpoint '{path}' does not exist: check the path")
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        # timm's training checkpoints keep their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace, *_STAND_INS]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of pickle protocols, about files that are refused anyway
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # on bytes that are no checkpoint, torch's unpickler fails in any way, IndexError too
        raise InputError(_why_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds a {type(content).__name__}, no checkpoint: give a state dict or a training "
                         'checkpoint')
    return content


def read_state_dict(path: str | Path, use_ema: bool = True) -> StateDict:
    """The weights in a checkpoint file: of its EMA if wanted and there, without wrapper prefixes.

    Raises:
        InputError: As `read_checkpoint`, or the file has no weights.
    """
    content = read_checkpoint(path)
    keys = (('state_dict_ema', 'model_ema') if use_ema else ()) + ('state_dict', 'model')
    state_dict = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise InputError(f"'{path}' holds no weights: give a state dict or a training checkpoint")
    return clean_state_dict(state_dict)


def load_weights(model: nn.Module, path: str | Path, use_ema: bool = True) -> None:
    """Load a checkpoint of this package's, timm's or the released NBN format into a model of the same architecture.

    Raises:
        InputError: As `read_state_dict`, or the checkpoint is of another architecture or number of classes.
    """
    state_dict = read_state_dict(path, use_ema)
    there = recognize(state_dict)
    what = f"'{path}'" + (f' ({there})' if there else '')
    try:
        state_dict = to_model_format(state_dict, model)
    except InputError as error:
        raise InputError(f'{what} does not fit: {error}') from error
    here = model.state_dict()
    missing, unexpected = sorted(here.keys() - state_dict.keys()), sorted(state_dict.keys() - here.keys())
    shapes = [key for key in here.keys() & state_dict.keys() if here[key].shape != state_dict[key].shape]
    if not missing and not unexpected and not shapes:
        model.load_state_dict(state_dict)
        return
    name = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
    classes = getattr(model, 'num_classes', '?')
    differences = [f'{len(keys)} {kind} (first: {keys[0]})' for keys, kind in (
        (missing, 'missing'), (unexpected, 'unexpected'), (sorted(shapes), 'of another shape')) if keys]
    raise InputError(f'the weights in {what} do not fit {name} with {classes} classes: {", ".join(differences)}; '
                     'give the --model and --num-classes that the checkpoint was trained with')


def _why_unreadable(path: Path, error: Exception) -> str:
    wanted = _code_in_pickle(path, error)
    if wanted:
        shown = ', '.join(wanted[:3]) + (f' and {len(wanted) - 3} others' if len(wanted) > 3 else '')
        return (f"the checkpoint '{path}' was refused because it is a pickle that asks for code ({shown}), of which "
                'nothing was run: get the weights as safetensors or as a plain state dict')
    # torch's own text on a refused pickle is advice to load it unsafely.
    first_line = str(error).strip().partition('\n')[0]
    reason = type(error).__name__ if isinstance(error, pickle.UnpicklingError) or not first_line else first_line
    return f"the checkpoint '{path}' cannot be read ({reason}): it is damaged or no checkpoint, so get it again"


def _code_in_pickle(path: Path, error: Exception) -> list[str]:
    """Names of the functions and classes that a refused file asks for, those that can do harm first."""
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not in torch's zip format
        names = set(re.findall(r'GLOBAL ([\w.]+)', str(error))) | _globals_of_bare_pickle(path)
    return sorted(names, key=lambda name: (name.startswith(('torch.', 'timm.', 'collections.')), name))


def _globals_of_bare_pickle(path: Path) -> set[str]:
    strings: list[str] = []
    found: set[str] = set()
    try:
        with open(path, 'rb') as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == 'GLOBAL':
                    found.add(str(argument).replace(' ', '.'))
                elif opcode.name == 'STACK_GLOBAL':
                    found.add('.'.join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, OSError):  # no pickle, or one that breaks off
        pass
    return found

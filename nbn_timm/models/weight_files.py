"""Checkpoint files: read without running code from them, refused in one sentence if a single bit is wrong."""
import argparse
import hashlib
import pickle
import pickletools
import re
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
from safetensors import safe_open
from timm.models import clean_state_dict

from nbn_timm.errors import InputError
from nbn_timm.files import refuse_no_file

from ._released import StateDict, recognize, to_model_format

__all__ = ['DIGEST', 'check_weights', 'digest_of_source', 'load_weights', 'read_checkpoint', 'read_state_dict',
           'refuse_other_types', 'save_weights', 'weights_digest', 'weights_in']

DIGEST = 'weights_sha256'  # key of `weights_digest` in a file's metadata and in the record of a training

# What tensors of these names hold is learned or measured, so it is finite and of a floating type.
_LEARNED = ('weight', 'bias', 'running_mean', 'running_var', 'alpha')
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    The checksums in torch's files, which torch does not look at, are compared, and so is the digest in safetensors
    files of `save_weights`.

    Raises:
        InputError: The file is missing, damaged, no checkpoint, or a pickle that wants to run code; the objects it
            asks for are named and nothing of it is run.
    """
    path = Path(path)
    if not path.is_file():
        refuse_no_file(path)
        raise InputError(f"the checkpoint '{path}' does not exist: check the path")
    try:
        if path.suffix == '.safetensors':
            return _read_safetensors(path)
        _check_sums(path)
        # timm's training checkpoints keep their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace, *_STAND_INS]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of pickle protocols, about files that are refused anyway
            content = torch.load(path, map_location='cpu', weights_only=True)
    except InputError:
        raise
    except Exception as error:  # on bytes that are no checkpoint, torch's unpickler fails in any way, IndexError too
        raise InputError(_why_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds a {type(content).__name__}, no checkpoint: give a state dict or a training "
                         'checkpoint')
    return content


def _read_safetensors(path: Path) -> StateDict:
    with safe_open(path, framework='pt') as file:
        recorded = (file.metadata() or {}).get(DIGEST)
    content = safetensors.torch.load_file(path)
    if recorded is not None and recorded != weights_digest(content):
        raise InputError(_damaged(path, 'its weights are not those that were written'))
    return content


def _check_sums(path: Path) -> None:
    """Compare the checksums of a zip file, which torch's are since 1.6.

    Raises:
        InputError: One does not hold.
    """
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\x03\x04':  # as torch tells them from its older format
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if not any(member.CRC for member in members):  # written after torch.serialization.set_crc32_options(False)
                return
            for member in members:
                size = 0
                with archive.open(member) as file:
                    while block := file.read(1 << 20):
                        size += len(block)
                if size != member.file_size:
                    raise zipfile.BadZipFile('cut short')
    except Exception as error:  # a damaged header may ask for a password, another compression, any version or offset
        raise InputError(_damaged(path, 'its checksums do not hold')) from error


def weights_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 in hexadecimal over names, types, shapes and numbers, in whatever order and file format they are kept."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().cpu().contiguous()
        digest.update(f'{name} {value.dtype} {list(value.shape)}\n'.encode(errors='surrogatepass'))
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_source(source: str | Path | None, model: torch.nn.Module, use_ema: bool = False) -> str:
    """`weights_digest` by which results are bound to weights: as a file has them, else as the model does.

    Args:
        source: That the model was opened from.
        model: The model.
        use_ema: The averaged weights of a checkpoint are meant.
    """
    if source is not None and Path(source).is_file():
        return weights_digest(read_state_dict(source, use_ema))
    return weights_digest(model.state_dict())


def save_weights(state_dict: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write a safetensors file that carries the digest of its weights."""
    safetensors.torch.save_file(dict(state_dict), path, metadata={'format': 'pt', DIGEST: weights_digest(state_dict)})


def read_state_dict(path: str | Path, use_ema: bool = True) -> StateDict:
    """The weights in a checkpoint file: of its EMA if wanted and there, without wrapper prefixes.

    Raises:
        InputError: As `read_checkpoint`, or the file has no weights, or some that nothing can be computed with.
    """
    return weights_in(read_checkpoint(path), path, use_ema)


def weights_in(content: Mapping[str, Any], path: str | Path, use_ema: bool = True) -> StateDict:
    """The weights in what a checkpoint file holds, or in a state dict; see `read_state_dict`.

    Args:
        content: Of the file.
        path: Of the file, or what it is, for messages.
        use_ema: The averaged weights are wanted, if there are some.
    """
    keys = (('state_dict_ema', 'model_ema') if use_ema else ()) + ('state_dict', 'model')
    state_dict = next((content[key] for key in keys if isinstance(content.get(key), dict)
                       or (key != 'model' and content.get(key) is not None)), content)  # a name may stand there
    if not isinstance(state_dict, dict):
        raise InputError(f"'{path}' holds a {type(state_dict).__name__} in the place of weights: it is damaged, so "
                         'take an earlier checkpoint')
    check_weights(state_dict, path)
    return clean_state_dict(state_dict)


def check_weights(state_dict: Mapping[Any, Any], path: str | Path) -> None:
    """Refuse what is no state dict, or has weights that nothing can be computed with.

    Raises:
        InputError: A key is no name, or a tensor is sparse, quantised, complex, not finite or a negative variance; it
            is named.
    """
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise InputError(f"'{path}' holds no weights: give a state dict or a training checkpoint")
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise InputError(f"'{path}' holds no weights, as a tensor in it has {name!r} for a name: give a state dict "
                             'or a training checkpoint')
        fault = _fault(name, value)
        if fault:
            raise InputError(f"the weights in '{path}' cannot be used, as '{name}' {fault}")


def _fault(name: str, value: torch.Tensor) -> str | None:
    learned = name.rpartition('.')[2] in _LEARNED
    if value.is_quantized or value.layout is not torch.strided or value.is_nested or value.is_meta:
        kind = 'quantised' if value.is_quantized else 'empty' if value.is_meta else 'sparse or nested'
        return f'is a {kind} tensor: save it as an ordinary one, in float32'
    if value.is_complex() or (learned and value.dtype not in _FLOATS):
        return f'is of {_type(value)}: save the weights in float32'
    if value.dtype in _FLOATS and bool(value.isnan().any() if not learned else not value.isfinite().all()):
        return 'is NaN or infinite: the training has diverged, so take an earlier checkpoint'
    if name.rpartition('.')[2] == 'running_var' and bool((value < 0).any()):
        return 'is a negative variance: the file is damaged, so get it again or take an earlier checkpoint'
    return None


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
        for key, value in state_dict.items():
            if value.is_floating_point() != here[key].is_floating_point():
                raise InputError(f"the weights in {what} do not fit, as '{key}' is of {_type(value)} there and of "
                                 f'{_type(here[key])} in the model: save the weights in float32')
        model.load_state_dict(state_dict)
        return
    name = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
    classes = getattr(model, 'num_classes', '?')
    differences = [f'{len(keys)} {kind} (first: {keys[0]})' for keys, kind in (
        (missing, 'missing'), (unexpected, 'unexpected'), (sorted(shapes), 'of another shape')) if keys]
    raise InputError(f'the weights in {what} do not fit {name} with {classes} classes: {", ".join(differences)}; '
                     'give the --model and --num-classes that the checkpoint was trained with')


def refuse_other_types(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Hook before `load_state_dict`, of whosever reader: torch would cast whole and complex numbers without a word.

    Raises:
        InputError: A tensor of numbers that were learned or measured comes as whole, complex or quantised ones.
    """
    for name, own in chain(module.named_parameters(prefix.removesuffix('.')),
                           module.named_buffers(prefix.removesuffix('.'))):
        value = state_dict.get(name)
        if own.is_floating_point() and isinstance(value, torch.Tensor) and not value.is_floating_point():
            raise InputError(f"the weights for {type(module).__name__} cannot be used, as '{name}' is of "
                             f'{_type(value)}: save them in float32')


def _type(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix('torch.')


def _damaged(path: Path, reason: str) -> str:
    return f"the checkpoint '{path}' is damaged ({reason}): get it again, or take another one"


def _why_unreadable(path: Path, error: Exception) -> str:
    wanted = _code_in_pickle(path, error)
    if wanted:
        shown = ', '.join(wanted[:3]) + (f' and {len(wanted) - 3} others' if len(wanted) > 3 else '')
        return (f"the checkpoint '{path}' was refused because it is a pickle that asks for code ({shown}), of which "
                'nothing was run: get the weights as safetensors or as a plain state dict')
    # torch's own text on a refused pickle is advice to load it unsafely.
    first_line = str(error).strip().partition('\n')[0]
    says_something = any(map(str.isalpha, first_line)) and not isinstance(error, pickle.UnpicklingError | KeyError)
    reason = f' ({textwrap.shorten(first_line, 200)})' if says_something else ''
    return f"the checkpoint '{path}' cannot be read{reason}: it is damaged or no checkpoint, so get it again"


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

"""Models in timm's format, a folder or a repository with config.json and weights: read and checked before timm does."""
import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from nbn_timm.data.defaults import check_input_format
from nbn_timm.errors import InputError, in_words
from nbn_timm.seals import tell_changes

from ._released import StateDict
from .hub_files import hub_file
from .weight_files import read_state_dict

__all__ = ['FOLDER', 'HUB', 'WEIGHTS_NAMES', 'find_weights_file', 'is_model_folder', 'read_folder_config',
           'read_weights']

HUB, FOLDER = 'hf-hub:', 'local-dir:'

# In timm's order.
WEIGHTS_NAMES = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')


def is_model_folder(name: str) -> bool:
    """Whether a model's name is of a folder or a repository in timm's format."""
    return name.startswith((HUB, FOLDER))


def read_folder_config(source: str) -> dict[str, Any]:
    """config.json of 'local-dir:FOLDER' or 'hf-hub:user/repo[@revision]'.

    Raises:
        InputError: There is none, or it is no description of a model.
    """
    try:
        config = json.loads(_file(source, 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError, EntryNotFoundError) as error:
        reason = in_words(error)
        raise InputError(f"'{source}' has no config.json that can be read ({reason}): check the name and the "
                         'connection') from error
    if not isinstance(config, dict):
        raise InputError(f"the config.json of '{source}' is no object: give a model of timm's format")
    if not isinstance(config.get('architecture'), str):
        raise InputError(f"the config.json of '{source}' names no architecture: give a model of timm's format")
    for key, kind, what in (('pretrained_cfg', dict, 'object'), ('model_args', dict, 'object'),
                            ('num_classes', int, 'number'), ('label_names', list | dict, 'list')):
        if key in config and not isinstance(config[key], kind):
            raise InputError(f"'{key}' in the config.json of '{source}' is no {what}: correct it, or get it again")
    try:
        check_input_format(config.get('pretrained_cfg', config))
    except InputError as error:
        raise InputError(f"'{source}': {error}") from error
    tell_changes(config, f"the config.json of '{source}'")
    if config.get('num_classes', 0) < 0:  # timm would draw a new classifier
        raise InputError(f"'num_classes' in the config.json of '{source}' is negative: correct it, or get it again")
    of_weights = config.get('num_classes', config.get('pretrained_cfg', {}).get('num_classes'))
    asked = config.get('model_args', {}).get('num_classes', of_weights)
    if of_weights is not None and asked != of_weights:  # timm would draw a new classifier
        raise InputError(f"the config.json of '{source}' says that its weights have {of_weights!r:.40} classes, and "
                         f"asks for {asked!r:.40} in 'model_args': write the number of the weights in both places")
    return config


def read_weights(source: str) -> StateDict | None:
    """The weights in a folder or repository; None where they are in a file of a name that only timm knows.

    Raises:
        InputError: They cannot be had, are damaged, or nothing can be computed with them.
    """
    path = find_weights_file(source)
    return None if path is None else read_state_dict(path)


def find_weights_file(source: str, filename: str | None = None) -> Path | None:
    """The file of weights in a folder or repository, fetched if need be; None where only timm knows its name.

    Args:
        source: See `read_folder_config`.
        filename: Of the weights, where it is not one of the usual.

    Raises:
        InputError: It cannot be had.
    """
    for name in (filename,) if filename else WEIGHTS_NAMES:
        try:
            return _file(source, name)
        except (FileNotFoundError, EntryNotFoundError):
            continue
        except (OSError, HFValidationError) as error:
            reason = in_words(error)
            raise InputError(f"the weights of '{source}' cannot be had ({reason}): check the name and the "
                             'connection') from error
    return None


def _file(source: str, name: str) -> Path:
    scheme, _, place = source.partition(':')
    if f'{scheme}:' == FOLDER:
        path = Path(place, name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file '{path}'")
        return path
    repo_id, _, revision = place.partition('@')
    return hub_file(repo_id, name, revision or None)

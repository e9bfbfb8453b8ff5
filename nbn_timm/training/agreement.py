"""What all processes of a run must have alike: settings, files, weights and data.

Nodes may see other files under the same path. So each process tells what it has in words and digests, and all of them
stop with the same sentence where two differ. A single process computes none of this.
"""
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nbn_timm.data import Classes, Splits
from nbn_timm.data.dataset import ArraySamples, ImageSamples
from nbn_timm.data.shard_stream import ShardStream
from nbn_timm.data.splits import PARTS
from nbn_timm.errors import InputError
from nbn_timm.files import file_sha256
from nbn_timm.models.model_folder import FOLDER
from nbn_timm.models.run_folder import finished_file
from nbn_timm.models.weight_files import weights_digest
from nbn_timm.settings import SettingGroups, file_name, flag
from nbn_timm.training.distributed import World

__all__ = ['agree', 'agree_on_data', 'agree_on_published', 'agree_on_settings', 'agree_on_weights', 'check_alike',
           'short']

Seen = Mapping[str, str]

NOTHING = 'none'


def agree(world: World, look: Callable[[], Seen], remedy: str) -> None:
    """Go on where all processes see the same; every process has to call it.

    Args:
        world: This process; alone it agrees with itself, and does not look.
        look: Tells what is seen, by what it is called in a sentence.
        remedy: The end of the sentence.

    Raises:
        InputError: Two processes see different things, or one raises this while it looks; on all processes alike.
    """
    if not world.distributed:
        return
    seen: dict[str, str] | InputError
    try:
        seen = dict(look())
    except InputError as error:
        seen = error
    check_alike(world.gather(seen), remedy)


def check_alike(seen: Sequence[Seen | InputError], remedy: str) -> None:
    """Refuse unless all have seen the same; `seen` is of all processes, and so all raise alike."""
    errors = [(rank, found) for rank, found in enumerate(seen) if isinstance(found, InputError)]
    if errors and len({str(error) for _, error in errors}) == 1 and len(errors) == len(seen):
        raise errors[0][1]
    if errors:
        raise InputError(f'process {errors[0][0]} found: {errors[0][1]}')
    found = [one for one in seen if not isinstance(one, InputError)]
    for name in dict.fromkeys(name for one in found for name in one):
        told = [one.get(name, NOTHING) for one in found]
        other = next((rank for rank, words in enumerate(told) if words != told[0]), None)
        if other is not None:
            raise InputError(f'the processes differ in {name} (process 0: {told[0]}; process {other}: {told[other]}): '
                             f'{remedy}')


def agree_on_settings(world: World, settings: SettingGroups) -> None:
    """`agree` on all settings that decide the result, and on the content of the files that they name."""
    agree(world, lambda: _settings(settings), 'start all of them by the same command with the same config, and give '
          'the same files, as on a disk that all nodes share')


def agree_on_weights(world: World, model: nn.Module, name: str) -> None:
    """`agree` on the weights of a network in which nothing is drawn by chance."""
    agree(world, lambda: {f"the weights of '{name}'": short(weights_digest(model.state_dict()))},
          'give all nodes the same weights, as on a disk that they share')


def agree_on_published(world: World, model: Any, name: str) -> None:
    """`agree` on the file that published weights come from, where it is known; the classifier may begin anew."""
    file = (getattr(model, 'pretrained_cfg', None) or {}).get('file')
    agree(world, lambda: {f"the weights of '{name}'": _content(str(file)) if file else NOTHING},
          'give all nodes the same weights, as on a disk that they share')


def agree_on_data(world: World, splits: Splits, counts: Classes | None = None) -> None:
    """`agree` on the classes, and on the number, names and labels of the pictures of each split.

    Pictures in files of their own are not read for it. They may lie in another folder on each node.

    Args:
        world: This process.
        splits: What it has opened.
        counts: Classes with their training images, where they are not those of the splits.
    """
    agree(world, lambda: _data(splits, counts), 'give all nodes the same data, as on a disk that they share')


def short(digest: str) -> str:
    """A SHA-256 in words."""
    return f'SHA-256 {digest[:12]}'


def _settings(settings: SettingGroups) -> dict[str, str]:
    """The settings of kind 'recipe' by their flags, files first, as other settings may follow from them."""
    values, declared = settings.values(), type(settings).declared()
    of_result = {name: one.declaration for name, one in declared.items() if one.declaration.kind == 'recipe'}
    files = {flag(name): _content(str(values[name])) for name, declaration in of_result.items()
             if declaration.is_file and values[name] is not None}
    return files | {flag(name): json.dumps(values[name], sort_keys=True, default=str)
                    for name, declaration in of_result.items() if not declaration.is_file}


def _content(source: str) -> str:
    """What lies in a file, or in that of a folder of weights; of what is neither, its name without folders."""
    try:
        path = Path(finished_file(source.removeprefix(FOLDER)))
        return short(file_sha256(path)) if path.is_file() else file_name(source)  # a pipe could be read only once
    except InputError:  # a folder without weights
        return file_name(source)
    except OSError as error:
        return f'unreadable ({error.strerror})'


def _data(splits: Splits, counts: Classes | None) -> dict[str, str]:
    found = {}
    for name, classes in (('classes', splits.classes), ('training images per class', counts)):
        if classes is not None:
            digest = hashlib.sha256(json.dumps([classes.names, classes.counts]).encode())
            found[f'the {name}'] = f'{classes.num_classes} classes, {short(digest.hexdigest())}'
    for part in PARTS:
        dataset = getattr(splits, part)
        if dataset is not None:
            found[f'the {part} split'] = _pictures(dataset)
    return found


def _pictures(dataset: Any) -> str:
    """Number of the pictures of a split, and a digest over their labels and names, as far as these are known unread."""
    if not hasattr(dataset, '__len__'):
        return 'a stream'
    digest = hashlib.sha256()
    targets = getattr(dataset, 'targets', None)
    if isinstance(targets, np.ndarray):
        digest.update(np.ascontiguousarray(targets).data)
    if isinstance(dataset, ImageSamples):
        for path in dataset.stored_paths():
            digest.update(path.rpartition(b'/')[2] + b'\0')
    elif isinstance(dataset, ArraySamples):
        digest.update(np.ascontiguousarray(dataset.images).data)
    elif isinstance(dataset, ShardStream):
        index = dataset.index
        digest.update(json.dumps([[file_name(shard) for shard in index.shards], index.images.tolist()]).encode())
    return f'{len(dataset):,} pictures, {short(digest.hexdigest())}'

"""Tar shards in the form of webdataset: 'wds/', or 'wds/' with a name that is only shown."""
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nbn_timm.data.settings import DataSettings
from nbn_timm.data.shard_stream import ShardStream
from nbn_timm.data.shards import is_remote, open_index, shard_path, webdataset
from nbn_timm.data.splits import Source
from nbn_timm.datasets.named_dataset import NamedDataset, register_dataset
from nbn_timm.errors import InputError, in_words, quoted

_INFO = ('_info.json', 'info.json')  # of timm


@register_dataset('wds/')
class Shards(NamedDataset):
    """Shards in a folder or behind a URL, `--data-dir`.

    A split is a pattern of shards, `train-{0000..0146}.tar`; or what `_info.json` there calls so, as timm has it; or
    the files `NAME-*.tar`, `NAME/*.tar` and `NAME.tar` of the folder.
    """

    hint = 'tar shards'

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        if not settings.data_dir:
            raise InputError(f'the dataset {settings.dataset} needs the folder of its shards: give --data-dir')
        split_names = {'train': settings.train_split, 'val': settings.val_split, 'test': settings.test_split}
        source = Source()
        for part, split in split_names.items():
            if not split or not (part in parts or (part == 'train' and count)):
                continue
            try:
                shards = shards_of(settings.data_dir, split)
                index = open_index(settings.data_dir, shards, _index_name(split))
            except InputError:
                if part in parts:
                    raise
                continue
            source.datasets[part] = ShardStream(settings.data_dir, index)
        return source

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return frozenset({'data_dir', 'train_split', 'val_split', 'test_split'})

    def validates(self, settings: DataSettings) -> bool:
        return bool(settings.val_split)


def shards_of(root: str, split: str) -> list[str]:
    """The shards of a split, relative to the root, in order.

    Raises:
        InputError: There are none.
    """
    if '.tar' in split:
        return list(webdataset().shardlists.expand_urls(split.partition('|')[0]))
    info = _info(root)
    known = info.get('splits', {}) if isinstance(info, dict) else {}
    if split in known:
        if known[split].get('alt_label'):
            raise InputError(f"split '{split}' of {quoted(root)} has its labels in JSON files (alt_label), and here "
                             'they are read from .cls files: write the shards anew with them')
        return [str(name) for name in known[split]['filenames']]
    folder = Path(root)
    patterns = () if is_remote(root) else (f'{split}-*.tar', f'{split}/*.tar', f'{split}.tar')
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        also = f', and _info.json knows {", ".join(map(quoted, sorted(known)))}' if known else ''
        raise InputError(f"{quoted(root)} has no shards of split '{split}' ({split}-*.tar, {split}/*.tar or {split}.tar"
                         f'{also}): check --data-dir, or give a pattern such as {split}-{{0000..0099}}.tar')
    return [str(path.relative_to(folder)) for path in found]


def _info(root: str) -> Any:
    """What timm's description of the splits says; empty where there is none."""
    for name in _INFO:
        path = shard_path(root, name)
        try:
            if is_remote(root):
                with webdataset().gopen(path) as file:
                    return json.loads(file.read())
            if Path(path).exists():
                return json.loads(Path(path).read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            if not is_remote(root):
                raise InputError(f'{quoted(path)} cannot be read ({in_words(error)}): correct it, or remove it'
                                 ) from error
    return {}


def _index_name(split: str) -> str:
    return ''.join(letter if letter.isalnum() or letter in '-_' else '_' for letter in split)

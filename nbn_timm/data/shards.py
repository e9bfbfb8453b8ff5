"""Tar shards of pictures: an index with the label of every picture, and reading a shard from beginning to end.

A shard is a tar file in the form of webdataset: the files of a picture follow each other and share a name up to the
first dot of its last part, `000123.jpg` and `000123.cls`, where `.cls` holds the label as a decimal number.
"""
import base64
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.hub

from nbn_timm.data.lists import MAX_CLASSES, too_many
from nbn_timm.errors import InputError, in_words, quoted
from nbn_timm.files import open_regular, write_text_atomic

PICTURES = ('jpg', 'jpeg', 'png', 'webp')
LABEL = 'cls'
_FORM = 1


@dataclass(frozen=True)
class ShardIndex:
    """What is in the shards of a split.

    As a file it is JSON: `form` 1, `shards` (`file`, `bytes` or null where that cannot be told, `images`), `counts`
    (pictures by label), `label_type` ('<u2' or '<u4') and `labels`, the base64 form of all labels in that type, one
    after the other in the order of the shards.

    Attributes:
        shards: Files, relative to a root, or URLs.
        sizes: Bytes of each; None where that cannot be told.
        images: Pictures of each, int64 [S].
        targets: Label of each picture, shard after shard, int64 [N].
    """

    shards: tuple[str, ...]
    sizes: tuple[int | None, ...]
    images: np.ndarray
    targets: np.ndarray

    def write(self, path: Path) -> None:
        """Write it as a file.

        Raises:
            InputError: The file system refuses.
        """
        kind = '<u2' if self.targets.max(initial=0) < 2 ** 16 else '<u4'
        shards = [{'file': name, 'bytes': size, 'images': images}
                  for name, size, images in zip(self.shards, self.sizes, self.images.tolist(), strict=True)]
        write_text_atomic(path, json.dumps({
            'form': _FORM,
            'shards': shards,
            'counts': np.bincount(self.targets).tolist(),
            'label_type': kind,
            'labels': base64.b64encode(self.targets.astype(kind).tobytes()).decode(),
        }) + '\n')

    @classmethod
    def read(cls, path: Path) -> 'ShardIndex':
        """Read what `write` has written.

        Raises:
            InputError: The file is not of that form.
        """
        try:
            with open_regular(path) as file:
                data = json.load(file)
            if data['form'] != _FORM or data['label_type'] not in ('<u2', '<u4'):
                raise ValueError('another form')
            labels = np.frombuffer(base64.b64decode(data['labels'], validate=True), data['label_type'])
            images = np.array([shard['images'] for shard in data['shards']], dtype=np.int64)
            if images.min(initial=0) < 0 or images.sum() != len(labels) or (
                    labels.max(initial=0) >= max(len(data['counts']), 1)  # else a wrong bit is an array of gigabytes
                    or np.bincount(labels).tolist() != data['counts']):
                raise ValueError('its numbers disagree')
            return cls(tuple(str(shard['file']) for shard in data['shards']),
                       tuple(shard['bytes'] for shard in data['shards']), images, labels.astype(np.int64))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f'{quoted(str(path))} is no index of shards ({in_words(error)}): remove it, and it is '
                             'made anew') from error


def open_index(root: str, shards: Sequence[str], name: str) -> ShardIndex:
    """The index of some shards: as it was kept, or made now by reading their labels, and kept.

    It is kept in the folder of the shards as `NAME.index.json`. Where nothing can be written there, and for URLs, it
    is kept in torch's cache.

    Args:
        root: Folder or URL that the shards are relative to.
        shards: Files.
        name: What the index is called.

    Raises:
        InputError: A shard is missing or malformed.
    """
    place = [] if is_remote(root) else [Path(root, f'{name}.index.json')]
    digest = hashlib.sha256(json.dumps([os.path.abspath(root) if place else root, name]).encode()).hexdigest()[:16]
    place.append(Path(torch.hub.get_dir(), 'nbn_timm', 'shards', f'{name}-{digest}.index.json'))
    sizes = tuple(None if is_remote(root) else _size(root, shard) for shard in shards)
    for path in place:
        if path.exists():
            index = ShardIndex.read(path)
            if index.shards == tuple(shards) and index.sizes == sizes:
                return index
    labels = [_labels(shard_path(root, shard)) for shard in shards]
    index = ShardIndex(tuple(shards), sizes, np.array([len(part) for part in labels], dtype=np.int64),
                       np.concatenate([np.array(part, dtype=np.int64) for part in labels]))
    for path in place:
        try:
            index.write(path)
            break
        except InputError:
            if path is place[-1]:
                raise
    return index


def is_remote(root: str) -> bool:
    """Whether shards come from somewhere that webdataset opens, and not from a folder."""
    return '://' in root or root.startswith('pipe:')


def shard_path(root: str, shard: str) -> str:
    """Where a shard is."""
    return f'{root.rstrip("/")}/{shard}' if is_remote(root) else os.path.join(root, shard)


def read_samples(path: str, wanted: np.ndarray | None) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """The pictures of a shard that are wanted: number in the shard, name, and files by ending.

    Nothing is read behind the last one. In a local file what is not wanted is skipped.

    Args:
        path: The shard.
        wanted: Which pictures, true or above 0 [images]; None takes all, with no content but the label.

    Raises:
        InputError: The shard is missing, damaged or no tar file.
    """
    last = None if wanted is None else int(np.flatnonzero(wanted)[-1]) if np.any(wanted) else -1
    number, current, files = -1, None, {}  # type: ignore[var-annotated]
    chosen = False
    try:
        with closing(_open(path)) as file, tarfile.open(
                fileobj=file, mode='r|' if is_remote(path) else 'r:', tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it remembers all
                folder, slash, base = member.name.rpartition('/')
                stem, dot, ending = base.partition('.')
                if not (member.isfile() and stem and dot):
                    continue
                if (key := folder + slash + stem) != current:
                    if chosen:
                        yield number, str(current), files
                    number, current, files = number + 1, key, {}
                    if last is not None and number > last:
                        return
                    chosen = wanted is None or (number < len(wanted) and bool(wanted[number]))
                ending = ending.lower()
                if chosen:
                    needed = ending == LABEL or (wanted is not None and ending in PICTURES)
                    content = tar.extractfile(member) if needed else None
                    files[ending] = content.read() if content is not None else b''
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f'shard {quoted(path)} cannot be read ({in_words(error)}): replace it by an intact copy, or '
                         'correct --data-dir') from error
    if chosen:
        yield number, str(current), files


class _Member(tarfile.TarInfo):
    """A member of a shard; of a damaged header or a missing end, after a first member, tarfile would make an end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> '_Member':
        """Read the next one."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the blocks of zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f'{error} at byte {tar.offset:,}') from error


def _open(path: str) -> Any:
    """The shard as a file of bytes."""
    if not is_remote(path):
        return open(path, 'rb')
    return webdataset().gopen(path)


def webdataset() -> Any:
    """The library that opens URLs.

    Raises:
        InputError: It is not installed.
    """
    try:
        import webdataset as library
    except ImportError as error:
        raise InputError("shards behind a URL or a pattern need webdataset: pip install 'nbn_timm[streams]'"
                         ) from error
    return library


def _size(root: str, shard: str) -> int:
    try:
        return os.path.getsize(os.path.join(root, shard))
    except OSError as error:
        raise InputError(f"shard {quoted(os.path.join(root, shard))} is missing: check --data-dir and the name of the "
                         'split') from error


def _labels(path: str) -> list[int]:
    """Labels of the pictures of a shard."""
    labels = []
    seen: Counter[str] = Counter()
    for _, name, files in read_samples(path, None):
        seen[name] += 1
        if seen[name] > 1:
            raise InputError(f'the files of picture {quoted(name)} of shard {quoted(path)} do not follow each other: '
                             'write the shard anew, sorted by name')
        if not any(ending in files for ending in PICTURES):
            raise InputError(f'{quoted(name)} of shard {quoted(path)} has no picture ({", ".join(PICTURES)}): write '
                             'the shard anew')
        labels.append(label_of(path, name, files))
    return labels


def label_of(path: str, name: str, files: dict[str, bytes]) -> int:
    """The label of a picture of a shard.

    Raises:
        InputError: It has none.
    """
    text = files.get(LABEL, b'').strip()
    if not text.isdigit() or len(text) > 20:
        raise InputError(f'picture {quoted(name)} of shard {quoted(path)} has no .cls file with a label from 0: write '
                         'the shard anew')
    if int(text) >= MAX_CLASSES:
        raise InputError(too_many(int(text), f'picture {quoted(name)} of shard {quoted(path)}'))
    return int(text)

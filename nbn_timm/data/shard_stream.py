"""Pictures in tar shards as a data set: read from beginning to end, in the very numbers that a sampler asks for.

What makes a stream exact is the index of its shards, which has the label of every picture. A sampler draws an epoch
from these labels as it does for pictures in files. The stream then gives every picture as often as it was drawn; only
the order is its own.

The pictures of an epoch are one sequence: the shards in an order of that epoch, each picture as often as it was drawn.
Every worker of every process has a part of it that is decided before anything is read. So no process waits for another,
none has a batch more than another, and nothing depends on how many shards there are.
"""
import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from nbn_timm.data.dataset import Transform
from nbn_timm.data.decoders import FileTransform
from nbn_timm.data.pictures import to_mode
from nbn_timm.data.shards import PICTURES, ShardIndex, label_of, read_samples, shard_path
from nbn_timm.errors import InputError, quoted

SHUFFLED = 1024  # encoded pictures that a worker holds in training, of which it draws the next one

Piece = tuple[int, np.ndarray]  # a shard, and how often each of its pictures comes, int32


@runtime_checkable
class EpochDraw(Protocol):
    """What a stream needs of a sampler: the draw of an epoch over all processes, see `samplers.EpochSampler`."""

    seed: int
    epoch: int
    rank: int
    world_size: int

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""

    def epoch_indices(self) -> np.ndarray:
        """Its indices for all processes."""

    def __len__(self) -> int: ...


class ShardStream(IterableDataset):
    """The pictures of a split in shards; iterating gives all of them in order.

    Attributes:
        targets: Labels, int64 [N].
        mode: Of the PIL images, one of `pictures.MODES`; may be replaced at any time.
        transform: May be replaced at any time; None gives the PIL image.
    """

    def __init__(self, root: str, index: ShardIndex, transform: Transform | None = None) -> None:
        super().__init__()
        self.root = root
        self.index = index
        self.targets = index.targets
        self.transform = transform
        self.mode = 'RGB'
        self.first = np.cumsum(index.images) - index.images  # of each shard, among all pictures

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return iter(EvalReading(self))

    def divide(self, copies: np.ndarray, shards: Sequence[int], ends: Sequence[int]) -> list[list[Piece]]:
        """What lies between neighbouring `ends` of the sequence of all pictures, each as often as its copies say.

        Args:
            copies: Of each picture, integers [N].
            shards: In which order they follow each other.
            ends: Positions in that sequence, ascending.
        """
        before = np.concatenate([[0], np.cumsum(copies)])
        after = np.cumsum((before[self.first + self.index.images] - before[self.first])[list(shards)])
        parts = []
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            pieces: list[Piece] = []
            for place in range(int(np.searchsorted(after, begin, 'right')), len(after)):
                position = int(after[place - 1]) if place else 0
                if position >= end:
                    break
                first = int(self.first[shards[place]])
                here = copies[first:first + int(self.index.images[shards[place]])]
                reached = np.clip(position + np.cumsum(here), begin, end)
                pieces.append((shards[place], np.diff(reached, prepend=max(position, begin)).astype(np.int32)))
            parts.append(pieces)
        return parts

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[bytes, int, str]]:
        """The encoded pictures of some pieces, each as often as it says, with label and a name for messages.

        Raises:
            InputError: A shard cannot be read, or is not as its index says.
        """
        for shard, copies in pieces:
            path = shard_path(self.root, self.index.shards[shard])
            left = int(copies.sum())
            for number, name, files in read_samples(path, copies):
                label = label_of(path, name, files)
                if label != self.targets[self.first[shard] + number]:
                    break
                content = next((files[ending] for ending in PICTURES if ending in files), b'')
                left -= int(copies[number])
                for _ in range(int(copies[number])):
                    yield content, label, f'image {quoted(name)} of shard {quoted(path)}'
            if left:
                raise InputError(f'shard {quoted(path)} is not as its index says: remove the .index.json of the split, '
                                 'and it is made anew')

    def decode(self, content: bytes, name: str) -> Any:
        """A picture from its bytes, transformed.

        Raises:
            InputError: They are damaged.
        """
        if isinstance(self.transform, FileTransform):
            return self.transform.of_bytes(content, partial(self._picture, content, name))
        image = self._picture(content, name)
        return image if self.transform is None else self.transform(image)

    def _picture(self, content: bytes, name: str) -> Image.Image:
        try:
            with Image.open(io.BytesIO(content)) as opened:
                return to_mode(opened, self.mode, name)
        except InputError:
            raise
        except Exception as error:  # damaged files make Pillow's readers raise nearly anything
            raise InputError(f'{name} cannot be read ({type(error).__name__}: {error}): write the shard anew with an '
                             'intact copy') from error


class TrainReading(IterableDataset):
    """This process's part of the epochs that a sampler draws from a stream, in batches for workers.

    Which pictures an epoch has is a function of (seed, epoch) alone. Their order, and which process has which, depends
    on the numbers of processes and workers and on the batch size as well. A part of an epoch is a part of its sequence
    for all processes together, so which pictures are left does not depend on how many processes there are.

    Args:
        stream: The pictures.
        sampler: Draws the epochs.
        batch_size: Of the loader.
        drop_last: The loader leaves out a last, smaller batch.
        workers: Of the loader, 0 for none.
        shuffled: Pictures that a worker holds.

    Attributes:
        part: Which pictures of an epoch, in whole batches of this process, `set_epoch` chooses.
    """

    def __init__(
            self,
            stream: ShardStream,
            sampler: EpochDraw,
            batch_size: int,
            drop_last: bool,
            workers: int,
            shuffled: int = SHUFFLED,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.sampler = sampler
        self.shuffled = shuffled
        self.length = len(sampler) // batch_size * batch_size if drop_last else len(sampler)
        self.batch_size = batch_size
        self.workers = max(workers, 1)
        self.part = slice(None)
        self.pieces: list[list[Piece]] | None = None

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Draw an epoch; workers that are started from now on read it, or the chosen part of it."""
        sampler, stream = self.sampler, self.stream
        sampler.set_epoch(epoch)
        copies = np.bincount(sampler.epoch_indices(), minlength=len(stream))
        shards = np.random.default_rng((sampler.seed, epoch, 1)).permutation(len(stream.index.shards)).tolist()
        begin, end, _ = self.part.indices(len(sampler))
        first = begin * sampler.world_size + (end - begin) * sampler.rank
        ends = first + np.cumsum([0, *self._quotas(begin, min(end, self.length))])
        self.pieces = stream.divide(copies, shards, ends.tolist())

    def _quotas(self, begin: int, end: int) -> list[int]:
        """Pictures for each worker of those of this process; a loader takes the batches of its workers in turns."""
        sizes = np.minimum(self.batch_size, end - np.arange(begin, end, self.batch_size))
        return [int(sizes[worker::self.workers].sum()) for worker in range(self.workers)]

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if self.pieces is None:
            self.set_epoch(self.sampler.epoch)
        assert self.pieces is not None
        worker = _worker()
        begun = (self.part.start,) if self.part.start else ()
        rng = np.random.default_rng((self.sampler.seed, self.sampler.epoch, 2, self.sampler.rank, worker, *begun))
        for content, label, name in _shuffled(self.stream.read(self.pieces[worker]), self.shuffled, rng):
            yield self.stream.decode(content, name), label


class EvalReading(IterableDataset):
    """This process's pictures of a stream, each once, in order and without padding.

    Process r of P has the r-th of P equal parts. Its workers take batches in turns, so that the loader keeps the order;
    each of them goes through all shards of the part, and skips what the others read.
    """

    def __init__(
            self,
            stream: ShardStream,
            batch_size: int = 1,
            workers: int = 0,
            rank: int = 0,
            world_size: int = 1,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.begin, self.end = (len(stream) * place // world_size for place in (rank, rank + 1))
        self.batch_size = batch_size
        self.workers = max(workers, 1)
        if self.begin == self.end:
            raise InputError(f'a stream of {len(stream)} pictures cannot be evaluated by {world_size} processes: start '
                             'fewer')

    def __len__(self) -> int:
        return self.end - self.begin

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        places = np.arange(len(self))
        mine = self.begin + places[places // self.batch_size % self.workers == _worker()]
        copies = np.bincount(mine, minlength=len(self.stream))
        pieces, = self.stream.divide(copies, range(len(self.stream.index.shards)), [0, len(mine)])
        for content, label, name in self.stream.read(pieces):
            yield self.stream.decode(content, name), label


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id


def _shuffled(items: Iterator[Any], held: int, rng: np.random.Generator) -> Iterator[Any]:
    """The items in random order as far as holding so many of them allows."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < held:
            buffer.append(item)
            continue
        place = int(rng.integers(held))
        buffer[place], item = item, buffer[place]
        yield item
    for place in rng.permutation(len(buffer)).tolist():
        yield buffer[place]

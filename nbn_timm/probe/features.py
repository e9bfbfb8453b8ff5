"""Features of all images of a split: a pass through the network, kept in a file that no other pass can be taken for."""
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torchvision
from timm.task import evaluation_sample_limit
from torch import nn
from torch.utils.data import Dataset

import nbn_timm
from nbn_timm.computation import PrecisionSettings
from nbn_timm.data import DataDefaults, create_eval_loader
from nbn_timm.data.dataset import pictures_digest
from nbn_timm.data.settings import LoaderSettings
from nbn_timm.data.shard_stream import ShardStream
from nbn_timm.errors import InputError
from nbn_timm.evaluation.predictions import order_of_split
from nbn_timm.files import atomic_write
from nbn_timm.models.transfer import classifier_names
from nbn_timm.models.weight_files import read_checkpoint, save_weights, weights_digest
from nbn_timm.second_stages.classifier import classifier_of, vectors
from nbn_timm.training.classifier_inputs import inputs_of
from nbn_timm.training.distributed import World

BATCH_SIZE = 256

_TELL_AFTER = 20.0  # seconds between lines of a long pass


@dataclass(frozen=True)
class Features:
    """What the classifier of a network is given.

    Attributes:
        vectors: Of V views of N images, float32 [V, N, D]; the first view is the one that an evaluation sees.
        labels: int64 [N].
    """

    vectors: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Length of a vector, D."""
        return self.vectors.shape[2]

    @property
    def plain(self) -> torch.Tensor:
        """The view of an evaluation, [N, D]."""
        return self.vectors[0]

    def select(self, indices: torch.Tensor) -> 'Features':
        """The images at `indices`, in that order."""
        return Features(self.vectors[:, indices], self.labels[indices])

    def to(self, device: torch.device) -> 'Features':
        """The same on a device."""
        return Features(self.vectors.to(device), self.labels.to(device))


def extract_features(
        model: nn.Module,
        dataset: Dataset,
        input_format: DataDefaults,
        *,
        flips: bool = False,
        precision: PrecisionSettings | None = None,
        batch_size: int = BATCH_SIZE,
        workers: int = LoaderSettings.workers,
        world: World | None = None,
        tell: Callable[[str], None] | None = None,
) -> Features:
    """What the classifier of a network is given for the images of a split, under the transform of an evaluation.

    Args:
        model: A timm model with one classifier on feature vectors, on the device of `world`; it is put into eval mode.
        dataset: Images in an order of their own; its transform is set.
        input_format: Of the images.
        flips: Add the mirrored image as a second view.
        precision: Of the computation; the features are float32 in any case.
        batch_size: Images at a time and process.
        workers: Loading processes.
        world: Processes, each of which takes its share and gets all; None is the one process on the CPU.
        tell: Takes a line from time to time.

    Returns:
        On the CPU, in the order of the data set.

    Raises:
        InputError: The network has no single classifier, or another input than vectors; features are not finite.
    """
    world, precision = world or World(torch.device('cpu')), precision or PrecisionSettings()
    classifier = classifier_of(model)
    if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.ModuleList | nn.ModuleDict):
        raise InputError(f'{type(model).__name__} has several classifiers, and features are kept for one: give a '
                         'network with one classifier')
    loader = create_eval_loader(
        dataset, batch_size=batch_size, defaults=input_format, num_workers=workers, device=world.device,
        rank=world.rank, world_size=world.size, pin_memory=world.device.type == 'cuda')
    limit = evaluation_sample_limit(loader)
    views: list[list[torch.Tensor]] = [[], []] if flips else [[]]
    labels: list[torch.Tensor] = []
    passes = inputs_of(model.eval(), [classifier], _views(loader, len(views), tell), precision.autocast,
                       precision.channels_last)
    for number, ((inputs,), target) in enumerate(passes):
        view = number % len(views)
        views[view].append(vectors(inputs).cpu())
        if view == 0:
            labels.append(target.cpu())
    if not labels:
        raise InputError('there is no image to take features of: check the data')
    own = torch.stack([torch.cat(parts)[:limit] for parts in views]), torch.cat(labels)[:limit]
    parts = world.gather(own)
    order = torch.from_numpy(order_of_split([len(target) for _, target in parts],
                                             not isinstance(dataset, ShardStream)))
    return Features(torch.cat([part for part, _ in parts], dim=1)[:, order],
                    torch.cat([target for _, target in parts])[order])


def _views(loader: Any, views: int, tell: Callable[[str], None] | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each batch once for each view, and a line from time to time."""
    begun = told = time.monotonic()
    for done, (images, target) in enumerate(loader, start=1):
        yield images, target
        if views > 1:
            yield images.flip(-1), target
        now = time.monotonic()
        if tell is not None and now - told > _TELL_AFTER and done < len(loader):
            told = now
            left = (now - begun) / done * (len(loader) - done)
            tell(f'          {100 * done / len(loader):.0f} % of the images, {left:.0f} s left')


def feature_key(
        model: nn.Module,
        dataset: Dataset,
        input_format: DataDefaults,
        *,
        flips: bool = False,
        precision: PrecisionSettings | None = None,
        device: torch.device | None = None,
) -> str | None:
    """SHA-256 in hexadecimal over all that features depend on; None where the images cannot be told apart.

    That is the network without its classifier (layers and weights), the content of the images and their labels in
    their order, the format of the input, the views, the precision, the kind of device, and the versions of what
    computes.
    """
    images = pictures_digest(dataset)
    if images is None:
        return None
    precision = precision or PrecisionSettings()
    of_classifier = classifier_names(model)
    layers = [f'{name} {type(module).__name__} {module.extra_repr()}' for name, module in model.named_modules()
              if not _is_part(name, of_classifier)]
    weights = {key: value for key, value in model.state_dict().items() if not _is_part(key, of_classifier)}
    versions = [nbn_timm.__version__, *(module.__version__ for module in (torch, timm, torchvision, PIL))]
    facts = [*layers, weights_digest(weights), images, sorted(input_format.input_format().items()), flips,
             precision.autocast, precision.channels_last, precision.torchcompile, (device or torch.device('cpu')).type,
             versions]
    return hashlib.sha256('\n'.join(map(str, facts)).encode(errors='surrogatepass')).hexdigest()


def _is_part(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f'{module}.') for module in modules)


class FeatureFolder:
    """Keeps features in a folder, each in a file that is whole or not there and is named by its `feature_key`.

    Args:
        folder: Made when it is needed.
        world: All processes take part; the first one writes.
        tell: Takes a line about where features come from.
    """

    def __init__(self, folder: str | Path, world: World, tell: Callable[[str], None]) -> None:
        self.folder = Path(folder)
        self.world = world
        self.tell = tell

    def get(self, name: str, key: str | None, compute: Callable[[], Features]) -> Features:
        """The features of that key, from their file or computed.

        Args:
            name: For people, as 'train'.
            key: Of `feature_key`; None computes them and keeps nothing.
            compute: Gives them.

        Raises:
            InputError: They cannot be computed, or not be written.
        """
        path = self.folder / f'{name}-{(key or "")[:32]}.safetensors'
        found = self._read(path, key) if key is not None else None
        if all(self.world.gather(found is not None)):
            assert found is not None
            self.tell(f"features  {name}: those of {len(found):,} images in '{path}', made of the same weights, images "
                      'and input format')
            return found
        begun = time.monotonic()
        features = compute()
        seconds = time.monotonic() - begun
        rate = features.vectors.shape[0] * len(features) / max(seconds, 1e-9)
        line = f'features  {name}: {len(features):,} images in {seconds:.1f} s ({rate:,.0f} views/s)'
        if key is None:
            self.tell(f'{line}, not kept, since this data set does not tell its images by their files')
            return features
        if self.world.is_primary:
            contents = {'vectors': features.vectors.contiguous(), 'labels': features.labels, 'key': _as_tensor(key)}
            atomic_write(path, lambda temporary: save_weights(contents, temporary))
        self.tell(f"{line}, kept in '{path}'")
        self.world.barrier()
        return features

    def _read(self, path: Path, key: str) -> Features | None:
        """What a file holds; None if it is not there, or damaged or of another key, which is told."""
        if not os.path.exists(path):
            return None
        try:
            contents = read_checkpoint(path)
        except InputError as error:
            self.tell(f'{str(error).partition(": get it again")[0]}, so the features are computed again')
            return None
        vectors, labels = contents.get('vectors'), contents.get('labels')
        if (isinstance(vectors, torch.Tensor) and isinstance(labels, torch.Tensor) and vectors.ndim == 3
                and vectors.dtype == torch.float32 and labels.dtype == torch.int64
                and labels.shape == vectors.shape[1:2]
                and torch.equal(contents.get('key', _as_tensor(key)), _as_tensor(key))):  # earlier versions kept none
            return Features(vectors.clone(), labels.clone())  # in memory as torch aligns it, which sums depend on
        self.tell(f"'{path}' holds other things than these features, so they are computed again")
        return None


def _as_tensor(key: str) -> torch.Tensor:
    """A key in hexadecimal as its bytes, to be kept beside what it is of."""
    return torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)

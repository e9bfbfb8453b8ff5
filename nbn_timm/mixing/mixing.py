"""What all mixing methods share: their registry, when they mix, and soft targets.

A method is one file in this folder: a subclass of `Mixing` with its settings and one `@register_mixing` line.
"""
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from nbn_timm.data import ClassCounts, Splits, TrainLoader
from nbn_timm.data.part import Part
from nbn_timm.errors import InputError
from nbn_timm.registry import Registry
from nbn_timm.samplers import EpochSampler
from nbn_timm.settings import NOT_NEGATIVE, PROBABILITY, Settings, Values, fields_of, flag, is_on, setting

ALWAYS = range(sys.maxsize)  # all epochs


def _used_by_a_method(name: str, others: Values) -> str | None:
    methods = [method for method in MIXINGS.values()
               if any(is_on(getattr(others, switch)) for switch in method.switches)]
    if not methods:
        return 'has no effect without a mixing method such as --mixup'
    if not any(name in method.uses for method in methods):
        return f'has no effect on {flag(methods[0].switches[0])}'
    return None


@dataclass(frozen=True)
class MixingSettings(Settings):
    """What several methods have in common."""

    title = 'mixing'

    mixup_prob: float = setting(1.0, 'that a batch is mixed', limits=PROBABILITY, metavar='P', effect=_used_by_a_method)
    mixup_off_epoch: int = setting(0, 'no mixing from this epoch on; 0: never off', limits=NOT_NEGATIVE,
                                   effect=_used_by_a_method)

    @property
    def active(self) -> range:
        """The 0-based epochs in which batches are mixed."""
        return range(self.mixup_off_epoch) if self.mixup_off_epoch else ALWAYS


@dataclass(frozen=True)
class MixingRun:
    """What a method may use of its run.

    Attributes:
        common: What several methods have in common.
        num_classes: C.
        smoothing: Share of each target that is spread evenly over all classes.
        epochs: Of the run.
        batch_size: Images of a batch per process.
        splits: The data.
        loader: Of the batches that will be mixed.
        create_loader: Makes another loader, with the augmentation of training, from a dataset whose transform it sets,
            a sampler, the images of a batch per process, a seed, and the views of each image, 1 unless told.
        device: Of the batches.
        seed: Of the run.
        rank: Of this process.
        world_size: Number of processes.
        both_labels: The loss takes the shares of either label, see `takes_both_labels`.
    """

    common: MixingSettings
    num_classes: int
    smoothing: float
    epochs: int
    batch_size: int
    splits: Splits
    loader: TrainLoader
    create_loader: Callable[..., TrainLoader]
    device: torch.device
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    both_labels: bool = False

    def class_counts(self, switch: str) -> ClassCounts:
        """Training images per class.

        Raises:
            InputError: They are not known.
        """
        counts = self.splits.class_counts
        if counts is None:
            raise InputError(f'{flag(switch)} needs the training images per class, and this training set cannot be '
                             'counted: give them with --class-counts FILE')
        return counts

    def labelled_images(self, given: str) -> tuple[Dataset, np.ndarray, EpochSampler]:
        """The training images, their labels and the sampler of the batches that will be mixed, for another stream.

        Args:
            given: The flag that asks for it, for messages.

        Raises:
            InputError: The images cannot be drawn one by one by their labels.
        """
        images, targets, sampler = self.splits.train, self.splits.train_targets, self.loader.loader.sampler
        if isinstance(images, IterableDataset):
            raise InputError(f'{given} takes training images one by one, and this dataset is a stream: use a list or '
                             'folder dataset')
        if images is None or targets is None or not isinstance(sampler, EpochSampler):
            raise InputError(f'{given} needs the labels of all training images, which this dataset does not tell: use '
                             'a list or folder dataset')
        return images, targets, sampler


class Mixing(ABC):
    """Called with the images [B, 3, H, W] and labels [B] of a batch, gives images and soft targets [B, C].

    Of several views it takes images [views, B, 3, H, W], whose soft targets are the same.

    Where it mixes nothing, the targets are soft all the same. All randomness is from the global generators of NumPy
    and torch, which the training loop reseeds when an epoch starts, so that an epoch can be run again.

    Args:
        num_classes: C.
        smoothing: Share of each target that is spread evenly over all classes, in [0, 1].
        prob: That a batch is mixed.
        epochs: The 0-based epochs in which batches are mixed.

    Attributes:
        settings: The group with the method's settings.
        switches: Those of its settings that turn it on by being above 0.
        soft: It gives soft targets [B, C]; else labels [B, 2], of two streams.
        views: How many views of each image it mixes.
        uses: Of the settings that several methods have in common, those that have an effect on this one.
    """

    settings: ClassVar[type[Settings]]
    switches: ClassVar[tuple[str, ...]]
    soft: ClassVar[bool] = True
    views: ClassVar[int] = 1
    uses: ClassVar[tuple[str, ...]] = ('mixup_prob', 'mixup_off_epoch')

    def __init__(
            self,
            num_classes: int,
            smoothing: float = 0.0,
            prob: float = 1.0,
            epochs: range = ALWAYS,
    ) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.prob = prob
        self.epochs = epochs
        self.enabled = True

    @classmethod
    @abstractmethod
    def create(cls, settings: Any, run: MixingRun) -> 'Mixing':
        """The method of a run, from its group of settings.

        Raises:
            InputError: It cannot be had on this run.
        """

    @classmethod
    def switched_on(cls, settings: Settings) -> list[str]:
        """The switches that are on."""
        return [name for name in cls.switches if is_on(getattr(settings, name))]

    @abstractmethod
    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch."""

    def connect(self, network: nn.Module) -> None:  # noqa: B027  # most methods change what the network is given
        """Get to know the network, on its device, before it is compiled or spread over processes."""

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based); the generators must have been reseeded."""
        self.enabled = epoch in self.epochs

    def set_part(self, epoch: int, part: Part) -> None:  # noqa: B027  # most methods read nothing
        """Go on with a part of `epoch`, which has begun."""

    def end_epoch(self) -> None:  # noqa: B027  # most methods hold nothing
        """Let go of what the epoch needed."""

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.enabled and np.random.rand() < self.prob:
            return self.mix(images, target)
        return images, self.soft_target(target)

    def soft_target(self, target: torch.Tensor) -> torch.Tensor:
        """Labels [B] as smoothed targets, float32 [B, C]."""
        one_hot = F.one_hot(target, self.num_classes).float()
        return one_hot * (1 - self.smoothing) + self.smoothing / self.num_classes


MixingT = TypeVar('MixingT', bound=Mixing)
MIXINGS: Registry[Mixing] = Registry('mixing method')


class StreamMixing(Mixing):
    """A mixing with batches of a second stream of images beside those that it is given.

    The stream is loaded for the epochs in which it mixes, and only for them. `set_epoch` must be called before each.

    Args:
        others: Loader of the second stream, with batches as large as those beside it, and as many.
        num_classes, smoothing, prob, epochs: See `Mixing`.
    """

    def __init__(
            self,
            others: TrainLoader,
            num_classes: int,
            smoothing: float = 0.0,
            prob: float = 1.0,
            epochs: range = ALWAYS,
    ) -> None:
        super().__init__(num_classes, smoothing, prob, epochs)
        self.others = others
        self.stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.enabled:
            self.others.set_epoch(epoch)
            self.stream = iter(self.others)

    def set_part(self, epoch: int, part: Part) -> None:
        if self.enabled:
            self.others.set_epoch(epoch, part)
            self.stream = iter(self.others)

    def end_epoch(self) -> None:
        self.stream = iter(())  # its loading processes end with it


def register_mixing(name: str, settings: type[Settings], *switches: str) -> Callable[[type[MixingT]], type[MixingT]]:
    """Class decorator: make a mixing method available to `train.py`, with the flags that its settings declare.

    Args:
        name: Of the method.
        settings: The group with its settings.
        switches: Those settings that turn it on by being above 0; by default the one called `name`.
    """
    switches = switches or (name,)
    known = {declared.name for declared in fields_of(settings)}
    if not known.issuperset(switches):
        raise ValueError(f"the settings of mixing '{name}' do not declare its switch: {', '.join(switches)}")

    def register(method: type[MixingT]) -> type[MixingT]:
        method.settings = settings
        method.switches = switches
        return MIXINGS.register(name)(method)
    return register


def mixing_settings() -> set[str]:
    """Names of all settings of mixing."""
    groups: list[type[Settings]] = [MixingSettings, *(method.settings for method in MIXINGS.values())]
    return {declared.name for group in groups for declared in fields_of(group)}

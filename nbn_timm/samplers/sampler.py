"""The samplers by name, and what all of them share: one seeded stream per epoch, dealt out to the ranks."""
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch.utils.data

from nbn_timm.data.classes import ClassCounts
from nbn_timm.data.label_sets import as_targets, is_label_sets
from nbn_timm.errors import InputError
from nbn_timm.key_values import check_types, key_values, refuse_unknown
from nbn_timm.registry import Registry
from nbn_timm.samplers.groups import ClassGroups

FLAG = '--sampler-kwargs'


class EpochSampler(torch.utils.data.Sampler[int]):
    """Base of all samplers: `draw` gives one epoch of dataset indices, the same on every rank.

    The epoch is a function of (seed, epoch) alone, so a run resumed at an epoch boundary sees what an uninterrupted
    one would have seen. Rank r of w takes entries r, r + w, ... As in torch's DistributedSampler, an epoch that does
    not divide evenly is padded with entries from its own beginning, so that every rank has the same number.

    A step of w ranks with batches of B therefore sees the same w B entries of the stream as a step of one process with
    a batch of w B, in whatever order a sampler emits them.

    A subclass with settings of its own takes them as keywords beside these arguments.

    Args:
        targets: Labels [N] of the training set, in dataset order, or its label sets [N, C].
        class_counts: The training set's, for samplers that need it.
        seed: Of the run; the same on every rank.
        rank: Of this process.
        world_size: Number of processes.
        epochs: Of the whole run, for samplers that change over it; None where it is unknown.

    Attributes:
        part: Which of its images of the epoch this rank gives; may be replaced at any time.

    Raises:
        InputError: There is no image, or an image can be of several classes, which the sampler does not take.
    """

    second_stage: str | None = None  # the second stage that teaches the sampler; None for those that do not learn
    balances: ClassVar[bool] = False  # it draws rare classes more often than they occur, by a rule of its own
    label_sets: ClassVar[bool] = False  # it takes images of several classes too

    def __init__(
            self,
            targets: np.ndarray,
            class_counts: ClassCounts | None = None,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            epochs: int | None = None,
    ) -> None:
        if len(targets) == 0:
            raise InputError('the training set is empty: check its list or folder')
        self.targets = as_targets(targets)
        if is_label_sets(self.targets):
            if not self.label_sets:
                raise InputError(f"sampler '{_name_of(type(self))}' draws images by their one class, and here an image "
                                 f'can be of several: give {", ".join(takers_of_label_sets())}')
            if not self.targets.any():
                raise InputError('no training image is of any class: check the column of the labels')
        self.class_counts = class_counts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epochs = epochs
        self.epoch = 0
        self.part = slice(None)

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return one epoch of dataset indices, int64 [epoch_length]."""

    @property
    def epoch_length(self) -> int:
        """Images per epoch over all ranks, the same in every epoch; N unless a sampler says otherwise."""
        return len(self.targets)

    @cached_property
    def groups(self) -> ClassGroups:
        """The images by class."""
        return ClassGroups.from_targets(self.targets)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0-based) that the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.epoch_length // self.world_size)

    def epoch_indices(self) -> np.ndarray:
        """The epoch of all ranks, padded to an equal number of each, int64 [world_size * len(self)]."""
        indices = self.draw(np.random.default_rng((self.seed, self.epoch)))
        if len(indices) != self.epoch_length:
            raise ValueError(f'{type(self).__name__}.draw gave {len(indices)} indices instead of {self.epoch_length}: '
                             'let it draw epoch_length of them, or override that property')
        return with_length(indices, len(self) * self.world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.epoch_indices()[self.rank::self.world_size][self.part].tolist())


def with_length(indices: np.ndarray, length: int) -> np.ndarray:
    """What `np.resize` gives, of an epoch that is cut or filled up a little, with less memory."""
    more = length - len(indices)
    return np.concatenate((indices, np.resize(indices[:more], more))) if more > 0 else indices[:length]


SAMPLERS: Registry[EpochSampler] = Registry('sampler')


def takers_of_label_sets() -> list[str]:
    """Names of the samplers that take images of several classes."""
    return sorted(name for name, sampler in SAMPLERS.items() if sampler.label_sets)


def _name_of(sampler_class: type[EpochSampler]) -> str:
    return next((name for name, known in SAMPLERS.items() if known is sampler_class), sampler_class.__name__)


def register_sampler(name: str) -> Callable[[type[EpochSampler]], type[EpochSampler]]:
    """Class decorator: make the sampler available to `create_sampler` and `train.py --sampler` under `name`."""
    return SAMPLERS.register(name)


def create_sampler(
        name: str,
        targets: np.ndarray,
        class_counts: ClassCounts | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        **kwargs: Any,
) -> EpochSampler:
    """Create a sampler by name; see `EpochSampler` for the arguments, `kwargs` are the sampler's own settings.

    Raises:
        InputError: Unknown name, an unknown or impossible setting, or an empty training set.
    """
    check_sampler_settings(name, kwargs)
    return SAMPLERS[name](targets, class_counts, seed, rank, world_size, epochs, **kwargs)


def check_sampler_settings(name: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that a sampler does not have, and values of another type than they have.

    Raises:
        InputError: There is one, or no sampler of that name.
    """
    settings = sampler_settings(SAMPLERS.find(name))
    refuse_unknown(f"sampler '{name}'", given, settings)
    check_types(f"sampler '{name}'", key_values(FLAG, given), settings)


def sampler_settings(sampler_class: type[EpochSampler]) -> dict[str, inspect.Parameter]:
    """The settings that a sampler has beside the arguments of `EpochSampler`, by name."""
    common = inspect.signature(EpochSampler).parameters
    return {key: parameter for key, parameter in inspect.signature(sampler_class).parameters.items()
            if key not in common and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)}

"""A second stream of images beside the first, drawn by a sampler of its own, for losses on two streams as BBN's."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from nbn_timm.data import TrainLoader
from nbn_timm.errors import InputError
from nbn_timm.mixing.cmo import patch_seed
from nbn_timm.mixing.mixing import Mixing, MixingRun, register_mixing
from nbn_timm.samplers import SAMPLERS, EpochSampler, create_sampler
from nbn_timm.settings import Settings, setting


@dataclass(frozen=True)
class SecondStreamSettings(Settings):
    """A second stream of images."""

    title = 'second stream'

    second_stream: str | None = setting(
        None, "sampler of a second stream of images, for losses that take two; BBN's is reverse",
        choices=lambda: SAMPLERS)


@register_mixing('second_stream', SecondStreamSettings)
class SecondStream(Mixing):
    """Put a batch of a second stream beside each batch: images [2, B, 3, H, W] and labels [B, 2]; nothing is mixed.

    Args:
        others: Loader of the second stream, with batches as large as those beside it, and as many.
        num_classes: C.
    """

    uses = ()
    soft = False

    def __init__(self, others: TrainLoader, num_classes: int) -> None:
        super().__init__(num_classes)
        self.others = others
        self.stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())

    @classmethod
    def create(cls, settings: Any, run: MixingRun) -> 'SecondStream':
        """The second stream of a run, of its training images."""
        splits, first = run.splits, run.loader.loader.sampler
        if splits.train is None or splits.train_targets is None or isinstance(splits.train, IterableDataset) or (
                not isinstance(first, EpochSampler)):
            raise InputError('--second-stream draws training images one by one by their labels, which this dataset '
                             'does not tell or give: use a list or folder dataset')
        seed = patch_seed(run.seed)  # with the run's own both streams would make the same draws
        sampler = create_sampler(settings.second_stream, splits.train_targets, splits.class_counts, seed, run.rank,
                                 run.world_size, run.epochs)
        if sampler.second_stage is not None:
            raise InputError(f'--second-stream {settings.second_stream} learns in a second stage, and here would stay '
                             'as it began: give another sampler')
        if len(sampler) != len(first):
            raise InputError(f'--second-stream {settings.second_stream} has epochs of {sampler.epoch_length} images, '
                             f'and --sampler those of {first.epoch_length}: give samplers with epochs of one length')
        return cls(run.create_loader(splits.train, sampler, run.batch_size, seed), run.num_classes)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.others.set_epoch(epoch)
        self.stream = iter(self.others)

    def end_epoch(self) -> None:
        self.stream = iter(())  # its loading processes end with it

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others, other_target = next(self.stream)
        return torch.stack([images, others[:len(images)]]), torch.stack([target, other_target[:len(target)]], dim=1)

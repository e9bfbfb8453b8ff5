"""A second stream of images beside the first, drawn by a sampler of its own, for losses on two streams as BBN's."""
from dataclasses import dataclass
from typing import Any

import torch

from nbn_timm.errors import InputError
from nbn_timm.mixing.cmo import patch_seed
from nbn_timm.mixing.mixing import MixingRun, StreamMixing, register_mixing
from nbn_timm.samplers import SAMPLERS, create_sampler
from nbn_timm.settings import Settings, setting


@dataclass(frozen=True)
class SecondStreamSettings(Settings):
    """A second stream of images."""

    title = 'second stream'

    second_stream: str | None = setting(
        None, "sampler of a second stream of images, for losses that take two; BBN's is reverse",
        choices=lambda: SAMPLERS)


@register_mixing('second_stream', SecondStreamSettings)
class SecondStream(StreamMixing):
    """Put a batch of a second stream beside each batch: images [2, B, 3, H, W] and labels [B, 2]; nothing is mixed.

    Args:
        others: Loader of the second stream, see `StreamMixing`.
        num_classes: C.
    """

    uses = ()
    soft = False

    @classmethod
    def create(cls, settings: Any, run: MixingRun) -> 'SecondStream':
        """The second stream of a run, of its training images."""
        images, targets, first = run.labelled_images('--second-stream')
        seed = patch_seed(run.seed)
        sampler = create_sampler(settings.second_stream, targets, run.splits.class_counts, seed, run.rank,
                                 run.world_size, run.epochs)
        if sampler.second_stage is not None:
            raise InputError(f'--second-stream {settings.second_stream} learns in a second stage, and here would stay '
                             'as it began: give another sampler')
        if len(sampler) != len(first):
            raise InputError(f'--second-stream {settings.second_stream} has epochs of {sampler.epoch_length} images, '
                             f'and --sampler those of {first.epoch_length}: give samplers with epochs of one length')
        return cls(run.create_loader(images, sampler, run.batch_size, seed), run.num_classes)

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others, other_target = next(self.stream)
        return torch.stack([images, others[:len(images)]]), torch.stack([target, other_target[:len(target)]], dim=1)

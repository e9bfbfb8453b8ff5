"""Deferred re-sampling, DRS (Cao et al., "LDAM", NeurIPS 2019; Zhang et al., "Bag of Tricks for
Long-Tailed Visual Recognition", AAAI 2021)."""
from typing import Any

import numpy as np

from nbn_timm.errors import InputError
from nbn_timm.key_values import check_number
from nbn_timm.samplers.instance_balanced import InstanceBalanced
from nbn_timm.samplers.sampler import FLAG, EpochSampler, create_sampler, register_sampler


@register_sampler('deferred')
class DeferredSampler(EpochSampler):
    """Instance-balanced at first, another sampler later.

    Args:
        start_epoch: Number of epochs before the other sampler takes over.
        sampler: Name of the other sampler. It is told the epoch of the whole run, so that a progressively balanced one
            is already on its way.
        settings: Of the other sampler.

    Raises:
        InputError: `start_epoch` is no number from 0, or the other sampler cannot be had or has epochs of another
            length, for which the learning-rate schedule would not hold.
    """

    def __init__(
            self,
            *args: Any,
            start_epoch: int = 160,
            sampler: str = 'class_balanced',
            settings: dict[str, Any] | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("sampler 'deferred'", FLAG, 'start_epoch', start_epoch, whole=True)
        common = (self.targets, self.class_counts, self.seed, self.rank, self.world_size, self.epochs)
        self.start_epoch = start_epoch
        self.first = InstanceBalanced(*common)
        self.then = create_sampler(sampler, *common, **(settings or {}))
        self.second_stage = self.then.second_stage
        if self.then.epoch_length != self.epoch_length:
            raise InputError(f"sampler '{sampler}' cannot be deferred, because its epochs have "
                             f'{self.then.epoch_length} images and the ones before {self.epoch_length}: choose another')

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.then.set_epoch(epoch)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return (self.first if self.epoch < self.start_epoch else self.then).draw(rng)

"""CMO (Park et al., "The Majority Can Help the Minority: Context-rich Minority Oversampling", CVPR 2022)."""
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam

from nbn_timm.data import TrainLoader
from nbn_timm.errors import InputError
from nbn_timm.mixing.mixing import ALWAYS, MixingRun, StreamMixing, register_mixing
from nbn_timm.samplers import EpochSampler
from nbn_timm.settings import NOT_NEGATIVE, PROBABILITY, Settings, only_with, setting


@dataclass(frozen=True)
class CmoSettings(Settings):
    """CMO."""

    title = 'CMO'

    cmo: float = setting(0.0, 'CutMix with patches from a second stream of images, in which rare classes are frequent: '
                         'parameter of its Beta distribution; 0 for none', limits=NOT_NEGATIVE, metavar='ALPHA')
    cmo_prob: float = setting(0.5, 'that a batch is mixed', limits=PROBABILITY, metavar='P', effect=only_with('cmo'))
    cmo_power: float = setting(1.0, 'the second stream draws class c in proportion to n_c ** -R', metavar='R',
                               limits=NOT_NEGATIVE, effect=only_with('cmo'))
    cmo_skip_first: int = setting(4, 'epochs without it at the beginning', limits=NOT_NEGATIVE, effect=only_with('cmo'))
    cmo_skip_last: int = setting(3, 'and at the end', limits=NOT_NEGATIVE, effect=only_with('cmo'))


class PatchSampler(EpochSampler):
    """Independent draws: class c with probability proportional to n_c ** -power, then one of its images uniformly.

    Args:
        targets, seed, rank, world_size: See `EpochSampler`; the seed must not be that of the sampler beside it.
        per_rank: Draws for each rank, as many as the sampler beside it gives.
        power: r of the paper's q(r, k); -1 draws all images equally often.
    """

    def __init__(
            self,
            targets: np.ndarray,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            *,
            per_rank: int,
            power: float = CmoSettings.cmo_power,
    ) -> None:
        super().__init__(targets, seed=seed, rank=rank, world_size=world_size)
        self.per_rank = per_rank
        self.power = power

    @property
    def epoch_length(self) -> int:
        """Draws per epoch over all ranks."""
        return self.per_rank * self.world_size

    def __len__(self) -> int:
        return self.per_rank

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        counts = np.bincount(self.targets)[self.targets]
        weights = (counts.min() / counts) ** (self.power + 1)  # of an image: one of the n_c of its class
        return rng.choice(len(counts), self.epoch_length, p=weights / weights.sum())


def patch_seed(seed: int) -> int:
    """Seed of the second stream of a run: with the run's own both streams would make the same draws."""
    return int(np.random.SeedSequence(seed).spawn(1)[0].generate_state(1)[0])


def patch_loader(run: MixingRun, given: str, power: float, views: int = 1) -> TrainLoader:
    """Loader of a second stream of a run's training images, with batches like those beside it, and as many.

    Args:
        run: The run.
        given: The flag that asks for it.
        power: Of `PatchSampler`.
        views: Of each image.

    Raises:
        InputError: The images cannot be drawn one by one by their labels.
    """
    images, targets, sampler = run.labelled_images(given)
    seed = patch_seed(run.seed)
    patches = PatchSampler(targets, seed, run.rank, run.world_size, per_rank=len(sampler), power=power)
    return run.create_loader(images, patches, run.batch_size, seed, views)


@register_mixing('cmo', CmoSettings)
class CMO(StreamMixing):
    """CutMix whose patches come from a second stream of images, in which rare classes are frequent.

    Of a batch (x, y) and one of the second stream (x', y') it makes

        M x + (1 - M) x'    with labels    lam y + (1 - lam) y'

    where M is zero in one box for the whole batch, of an area of 1 - lam, lam from Beta(alpha, alpha). A box that
    crosses the border is cut off, and lam is corrected to what is left of it. Rare objects thus get the varied
    backgrounds of frequent classes.

    Args:
        others: Loader of the second stream, see `StreamMixing`.
        num_classes: C.
        alpha: Of the Beta distribution.
        smoothing, prob, epochs: See `Mixing`.
        both_labels: Give the shares of either label [B, 2, C], of which the soft targets are the sum.
    """

    uses = ('mixup_off_epoch',)

    def __init__(
            self,
            others: TrainLoader,
            num_classes: int,
            alpha: float = 1.0,
            smoothing: float = 0.0,
            prob: float = CmoSettings.cmo_prob,
            epochs: range = ALWAYS,
            both_labels: bool = False,
    ) -> None:
        super().__init__(others, num_classes, smoothing, prob, epochs)
        self.alpha = alpha
        self.both_labels = both_labels

    @classmethod
    def create(cls, settings: Any, run: MixingRun) -> 'CMO':
        """CMO of a run, with a second stream of its training images."""
        first, last = settings.cmo_skip_first, settings.cmo_skip_last
        epochs = range(first, min(run.epochs - last, run.common.active.stop))
        if not epochs:
            raise InputError(f'--cmo would mix in none of the {run.epochs} epochs, as it leaves out the first {first} '
                             f'and the last {last}: give more --epochs, or smaller --cmo-skip-first and '
                             '--cmo-skip-last')
        loader = patch_loader(run, '--cmo', settings.cmo_power)
        return cls(loader, run.num_classes, settings.cmo, run.smoothing, settings.cmo_prob, epochs, run.both_labels)

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, soft = super().__call__(images, target)
        if self.both_labels and soft.ndim == 2:  # as they come: all is of the first label
            soft = torch.stack([soft, torch.zeros_like(soft)], dim=1)
        return images, soft

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others, other_target = next(self.stream)
        others, other_target = others[:len(images)], other_target[:len(images)]
        (top, bottom, left, right), kept = cutmix_bbox_and_lam(images.shape, np.random.beta(self.alpha, self.alpha))
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        lam = float(kept)
        shares = self.soft_target(target) * lam, self.soft_target(other_target) * (1 - lam)
        return mixed, torch.stack(shares, dim=1) if self.both_labels else shares[0] + shares[1]

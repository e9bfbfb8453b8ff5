"""CMO (Park et al., "The Majority Can Help the Minority: Context-rich Minority Oversampling", CVPR 2022)."""
from collections.abc import Iterator

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam

from nbn_timm.data import TrainLoader
from nbn_timm.mixing.mixing import ALWAYS, Mixing
from nbn_timm.samplers import EpochSampler


class PatchSampler(EpochSampler):
    """Independent draws: class c with probability proportional to n_c ** -power, then one of its images uniformly.

    Args:
        targets, seed, rank, world_size: See `EpochSampler`; the seed must not be that of the sampler beside it.
        per_rank: Draws for each rank, as many as the sampler beside it gives.
        power: r of the paper's q(r, k).
    """

    def __init__(
            self,
            targets: np.ndarray,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            *,
            per_rank: int,
            power: float = 1.0,
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


class CMO(Mixing):
    """CutMix whose patches come from a second stream of images, in which rare classes are frequent.

    Of a batch (x, y) and one of the second stream (x', y') it makes

        M x + (1 - M) x'    with labels    lam y + (1 - lam) y'

    where M is zero in one box for the whole batch, of an area of 1 - lam, lam from Beta(alpha, alpha). A box that
    crosses the border is cut off, and lam is corrected to what is left of it. Rare objects thus get the varied
    backgrounds of frequent classes.

    The second stream is loaded for the batches that are mixed, and only for them. `set_epoch` must be called before
    each epoch.

    Args:
        patches: Loader of the second stream, with batches as large as those that are mixed, and as many.
        num_classes: C.
        alpha: Of the Beta distribution.
        smoothing, prob, epochs: See `Mixing`.
    """

    def __init__(
            self,
            patches: TrainLoader,
            num_classes: int,
            alpha: float = 1.0,
            smoothing: float = 0.0,
            prob: float = 0.5,
            epochs: range = ALWAYS,
    ) -> None:
        super().__init__(num_classes, smoothing, prob, epochs)
        self.patches = patches
        self.alpha = alpha
        self.stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.enabled:
            self.patches.set_epoch(epoch)
            self.stream = iter(self.patches)

    def end_epoch(self) -> None:
        self.stream = iter(())  # its loading processes end with it

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others, other_target = next(self.stream)
        others, other_target = others[:len(images)], other_target[:len(images)]
        (top, bottom, left, right), kept = cutmix_bbox_and_lam(images.shape, np.random.beta(self.alpha, self.alpha))
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        lam = float(kept)
        return mixed, self.soft_target(target) * lam + self.soft_target(other_target) * (1 - lam)

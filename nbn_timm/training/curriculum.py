"""CUDA: how strongly the pictures of a class are augmented follows what the network knows of that class.

Source: Ahn et al., "CUDA: Curriculum of Data Augmentation for Long-tailed Recognition", ICLR 2023, and its authors'
code (sumyeongahn/CUDA_LTR, commit f4c8d35). The operations are in `nbn_timm.data.class_strength`.
"""
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nbn_timm.data.class_strength import TOP_LEVEL, CurriculumSettings, LevelledImages
from nbn_timm.data.dataset import LabelledImages
from nbn_timm.errors import InputError
from nbn_timm.layers import ExpertHead
from nbn_timm.training.distributed import seed_everything
from nbn_timm.training.plan import Plan

_logger = logging.getLogger(__name__)


class Curriculum:
    """The levels of the classes, from 0 to 10, which the trials before each epoch move by one.

    A class of level L is tried on `curriculum_trials` (l + 1) of its training pictures, drawn with replacement, at each
    level l from 0 to L, with all augmentation of training. Where more than a share `curriculum_accept` of them is right
    at each of these levels, it rises by one, and else it falls by one. Of experts each must be right, where the loss
    takes their logits, as the authors have it for RIDE.

    An epoch's trials are a function of (seed, epoch, rank, number of processes and of workers); processes divide the
    pictures and add up what was right, so that all have the same levels.

    Args:
        plan: Of the run, with `LevelledImages`.
    """

    def __init__(self, plan: Plan) -> None:
        assert isinstance(plan.splits.train, LevelledImages)
        self.plan = plan
        self.images = plan.splits.train
        self.settings: CurriculumSettings = plan.settings.curriculum
        targets = self.images.targets
        self.pictures = [np.flatnonzero(targets == label) for label in range(len(self.images.levels))]
        self.seed = int(np.random.SeedSequence(plan.settings.run.seed, spawn_key=(1,)).generate_state(1)[0])

    def set_epoch(self, network: nn.Module, epoch: int) -> None:
        """Move the levels before `epoch` (0-based), by what the network says of augmented pictures.

        It leaves the network in eval mode, and reseeds the global generators.
        """
        levels = self.images.levels
        seen, right = self._counts(network, self.draw(epoch), epoch)
        tried = seen > 0
        passed = (right / np.maximum(seen, 1) > self.settings.curriculum_accept) | ~tried
        moved = np.where(passed.all(axis=1), 1, -1) * tried.any(axis=1)
        levels[:] = np.clip(levels + moved, 0, TOP_LEVEL)
        if self.plan.world.is_primary:
            _logger.info('Levels of augmentation: %d to %d, %.2f on average', levels.min(), levels.max(), levels.mean())

    def draw(self, epoch: int) -> list[tuple[int, int]]:
        """Index and level of the pictures of an epoch's trials, on all processes."""
        rng = np.random.default_rng((self.seed, epoch))
        trials: list[tuple[int, int]] = []
        for pictures, top in zip(self.pictures, self.images.levels.tolist(), strict=True):
            for level in range(top + 1 if len(pictures) else 0):
                drawn = rng.choice(pictures, self.settings.curriculum_trials * (level + 1))
                trials += [(index, level) for index in drawn.tolist()]
        return trials

    def _counts(self, network: nn.Module, trials: list[tuple[int, int]], epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """How many pictures of each class and level were tried, and how many were right, [C, levels], of all."""
        world, precision = self.plan.world, self.plan.settings.precision
        own: Any = trials[world.rank::world.size]
        counts = np.zeros((2, len(self.pictures), TOP_LEVEL + 1), np.int64)
        if own:
            seed_everything(self.seed, epoch, world.rank)
            loader = self.plan.train_loader(_copy(self.images), own, self.plan.batch.size, self.seed, drop_last=False)
            loader.set_epoch(epoch)
            hits = []
            with torch.no_grad(), _experts_apart(network), torch.autocast(
                    world.device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
                for images, target in loader:
                    if precision.channels_last:
                        images = images.contiguous(memory_format=torch.channels_last)
                    answers = network(images).argmax(dim=-1).view(len(target), -1)  # of each expert, or one
                    hits.append((answers == target[:, None]).all(dim=1))
            classes, levels = self.images.targets[[index for index, _ in own]], [level for _, level in own]
            np.add.at(counts[0], (classes, levels), 1)
            np.add.at(counts[1], (classes, levels), torch.cat(hits).cpu().numpy())
        seen, right = sum(world.gather(counts))
        return seen, right

    def state(self) -> list[int]:
        """The levels, for a checkpoint."""
        return self.images.levels.tolist()

    def load_state(self, levels: Any, path: Any) -> None:
        """Take the levels of a checkpoint.

        Raises:
            InputError: They are not the levels of these classes.
        """
        if not isinstance(levels, list) or len(levels) != len(self.images.levels) or not all(
                type(level) is int and 0 <= level <= TOP_LEVEL for level in levels):
            raise InputError(f"'{path}' has no levels of --curriculum for these classes: resume a run that has "
                             'them, or start one with --initial-checkpoint')
        self.images.levels[:] = levels


def _copy(images: LevelledImages) -> LevelledImages:
    """One that takes a transform of its own, and has the same levels."""
    twin = copy(images)
    twin.samples = copy(images.samples)
    return twin


@contextmanager
def _experts_apart(network: nn.Module) -> Iterator[None]:
    """The network in eval mode, but that its experts give their logits one by one where they do so in training."""
    network.eval()
    heads = [module for module in network.modules() if isinstance(module, ExpertHead)]
    for head in heads:
        head.training = True  # of the head alone, not of the classifiers in it
    yield
    network.eval()


def with_levels(plan: Plan) -> Plan:
    """The plan with training images that are augmented by the levels of their classes, where the settings say so.

    Raises:
        InputError: They do not come one by one with their labels.
    """
    train = plan.splits.train
    if not plan.settings.augment.curriculum or train is None:
        return plan
    if not isinstance(train, LabelledImages):
        raise InputError('--curriculum tries pictures of each class before an epoch, and this dataset does not give '
                         'them one by one with their labels: use a list or folder dataset')
    images = LevelledImages(train, plan.num_classes, plan.settings.curriculum.curriculum_prob)
    return replace(plan, splits=replace(plan.splits, train=images))


def build_curriculum(plan: Plan) -> Curriculum | None:
    """What moves the levels of the classes, if they have any."""
    return Curriculum(plan) if isinstance(plan.splits.train, LevelledImages) else None

"""What all mixing methods share: when they mix, and soft targets."""
import sys
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F

ALWAYS = range(sys.maxsize)  # all epochs


class Mixing(ABC):
    """Called with the images [B, 3, H, W] and labels [B] of a batch, gives images and soft targets [B, C].

    Where it mixes nothing, the targets are soft all the same. All randomness is from the global generators of NumPy
    and torch, which the training loop reseeds when an epoch starts, so that an epoch can be run again.

    Args:
        num_classes: C.
        smoothing: Share of each target that is spread evenly over all classes, in [0, 1].
        prob: That a batch is mixed.
        epochs: The 0-based epochs in which batches are mixed.
    """

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

    @abstractmethod
    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch."""

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based); the generators must have been reseeded."""
        self.enabled = epoch in self.epochs

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

"""Robust accuracy: that on the pictures which attacks make, with many, medium and few as on the pictures themselves."""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nbn_timm.attacks import Attack, PixelNetwork, under_attack
from nbn_timm.data import epoch_seed
from nbn_timm.evaluation.result import EvalResult

SHOWN = ('top1', 'mean_class', 'many', 'medium', 'few')


def start_noise(indices: range, shape: torch.Size, seed: int) -> torch.Tensor:
    """Numbers in [-1, 1] for each picture, [B, ...], which its place in the split decides and no batch does."""
    noise = [torch.rand(shape, generator=torch.Generator().manual_seed(epoch_seed(seed, index))) for index in indices]
    return torch.stack(noise) * 2 - 1


class AttackedLoader:
    """An evaluation loader whose pictures are changed by an attack; what is padding there stays padding.

    Args:
        loader: Gives normalised images and labels.
        attack: Changes the images.
        network: Is attacked; its weights and statistics stay as they are.
        rank: Of this process.
        world_size: Number of processes, which have the pictures of the split in turn.
    """

    def __init__(
            self, loader: Any, attack: Attack, network: PixelNetwork, rank: int = 0, world_size: int = 1,
    ) -> None:
        self.loader = loader
        self.attack = attack
        self.network = network
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__['loader'], name)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        done = 0
        for images, target in self.loader:
            first = done * self.world_size + self.rank
            done += len(images)
            indices = range(first, done * self.world_size + self.rank, self.world_size)
            yield self._attacked(images, target, indices), target

    @torch.inference_mode(False)
    def _attacked(self, images: torch.Tensor, target: torch.Tensor, indices: range) -> torch.Tensor:
        to_pixels = self.network.pixels
        pixels, target = to_pixels.of(images.clone()), target.clone()  # what inference mode has made, autograd refuses
        noise = start_noise(indices, pixels.shape[1:], self.attack.bound.seed).to(pixels.device)
        with torch.enable_grad(), under_attack(self.network):
            changed = self.attack(self.network, pixels, target, noise)
        return to_pixels.images(changed.detach(), images.dtype)


@dataclass(frozen=True)
class RobustAccuracy:
    """Results by attack; 'clean' is that on the pictures themselves, the same ones."""

    eps: float
    labels: Mapping[str, str]  # for people
    results: Mapping[str, EvalResult]

    def to_dict(self) -> dict[str, Any]:
        """Accuracies by attack, as plain data."""
        found: dict[str, Any] = {'eps': self.eps, 'images': self.results['clean'].num_samples}
        for name, result in self.results.items():
            metrics = result.metrics()
            found[name] = {metric: metrics[metric] for metric in SHOWN}
        return found

    def table(self) -> str:
        """One row per attack, for people."""
        heads = ''.join(f'{head:>12}' for head in ('all', 'mean class', 'many', 'medium', 'few'))
        lines = [f'{f"Under attack ({self.eps * 255:.4g}/255)":<24}{heads}']
        for name, result in self.results.items():
            metrics = result.metrics()
            values = ('n/a' if metrics[metric] is None else f'{metrics[metric]:.2f}' for metric in SHOWN)
            lines.append(f'{self.labels.get(name, "Clean"):<24}' + ''.join(f'{value:>12}' for value in values))
        return '\n'.join(lines)

"""What contrastive losses share: projection heads, queues of earlier vectors, the class prior on logits.

Such a loss has parameters or a state of its own, see `register_loss`.
"""
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.errors import InputError


def without_autocast(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator of a loss's `forward`: heads and products of vectors are computed in the precision of their input."""
    @wraps(forward)
    def wrapped(self: nn.Module, output: Any, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(target.device.type, enabled=False):
            return forward(self, output, target)
    return wrapped


def projection(sizes: Iterable[int], norm: bool = False) -> nn.Sequential:
    """Linear layers from each size to the next, with ReLU between them, after BatchNorm if `norm`."""
    layers: list[nn.Module] = []
    given = list(sizes)
    for before, after in zip(given[:-1], given[1:], strict=True):
        if layers:
            layers += [nn.BatchNorm1d(before)] * norm + [nn.ReLU()]
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


def on_sphere(head: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """What a head makes of features [..., D], scaled to length 1, [..., d]; all rows pass it together, in float32."""
    vectors = head(features.float().flatten(0, -2))
    return F.normalize(vectors, dim=1).unflatten(0, features.shape[:-1])


def classifier_of(network: Any, loss: str) -> Any:
    """The one classifier of a network, with a weight [C, D].

    Raises:
        InputError: It has several, or one that has no such weight.
    """
    classifier = network.get_classifier()
    if getattr(getattr(classifier, 'weight', None), 'ndim', 0) != 2:
        raise InputError(f"loss '{loss}' is for a network with one classifier on its features, and "
                         f'{type(network).__name__} has a {type(classifier).__name__}: give another --model or --loss')
    return classifier


class Queue(nn.Module):
    """The latest vectors of earlier batches with their labels; at first random ones.

    As in the code of MoCo and PaCo the first vectors are random, and each of their dimensions, not each vector, is
    scaled to length 1 over the queue.

    Args:
        size: K, how many there are.
        dim: Of a vector.
        num_classes: Of the labels.
    """

    vectors: torch.Tensor
    labels: torch.Tensor
    place: torch.Tensor

    def __init__(self, size: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer('vectors', F.normalize(torch.randn(size, dim), dim=0))
        self.register_buffer('labels', torch.randint(num_classes, (size,)))
        self.register_buffer('place', torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, vectors: torch.Tensor, labels: torch.Tensor) -> None:
        """Put vectors [B, d] and labels [B] in the place of the oldest ones; of more than K the last K."""
        size = len(self.labels)
        vectors, labels = vectors[-size:], labels[-size:]
        places = (self.place + torch.arange(len(labels), device=labels.device)) % size
        # Copies: a loss before may need what was there for its gradient.
        self.vectors = self.vectors.index_copy(0, places, vectors.detach().to(self.vectors.dtype))
        self.labels = self.labels.index_copy(0, places, labels)
        self.place = (self.place + len(labels)) % size

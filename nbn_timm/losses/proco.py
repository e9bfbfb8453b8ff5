"""ProCo (Du et al., "Probabilistic Contrastive Learning for Long-Tailed Visual Recognition", TPAMI 2024)."""
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number, check_whole
from nbn_timm.losses.contrast import on_sphere, projection, without_autocast
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.prior import log_prior
from nbn_timm.losses.targets import refuse_soft_targets

_START = 0.9  # length of the means at first, which then have random directions
_GREATEST = 1e5  # of a concentration
_TERMS = 6  # of the expansion of Bessel functions


@register_loss('proco', features=True, views=3, soft_targets=False, balances=True)
class ProCo(nn.Module):
    """CE(z + log prior, y) on the first view + weight times the mean of CE(l(f) + log prior, y) over the two others.

    Called with the logits [3, B, C] and features [3, B, D] of three views. f is what a head (Linear, BatchNorm, ReLU,
    Linear) makes of the features, scaled to length 1. Each class has a von Mises-Fisher distribution of such vectors,
    by the running mean of its own, and l_c(f) is the log of the expected exp(f'v / temperature) over vectors v of class
    c, see `ClassDirections`. The classifier learns from the first term alone. The means of an epoch begin as those of
    the epoch before, with their number of images, and go on; until a class has an image its direction is random.

    Source: the authors' code (LeapLabTHU/ProCo, commit af9e78e). It takes Bessel functions by a recurrence that is too
    short for large arguments; here they are exact to 1e-7.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        weight: Of the contrastive term.
        temperature: Of the products.
        hidden: Width of the head's first layer.
        dim: Of the vectors that are compared.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    log_prior: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            weight: float = 1.0,
            temperature: float = 0.1,
            hidden: int = 512,
            dim: int = 128,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, 'proco')
        self.weight = check_number('proco', 'weight', weight)
        self.temperature = check_number('proco', 'temperature', temperature, above=True)
        self.hidden = check_whole('proco', 'hidden', hidden)
        self.dim = check_whole('proco', 'dim', dim, low=16)  # the expansion is for high dimensions
        self.register_buffer('log_prior', log_prior(counts).float(), persistent=False)

    def prepare(self, network: Any) -> None:
        """Make the head and the statistics of the classes."""
        self.head = projection((network.head_hidden_size, self.hidden, self.dim), norm=True)
        self.classes = ClassDirections(len(self.log_prior), self.dim)  # what is used
        self.next_classes = ClassDirections(len(self.log_prior), self.dim)  # what is collected in this epoch alone

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`: go on with what the one before has collected."""
        self.classes.take_over(self.next_classes)
        self.next_classes.reset()

    @without_autocast
    def forward(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'proco')
        logits, features = output
        loss = F.cross_entropy(logits[0].float() + self.log_prior, target)
        views = on_sphere(self.head, features)[1:]
        for vectors in views:
            self.classes.add(vectors, target)
            self.next_classes.add(vectors, target)
            expected = self.classes.log_expected(vectors, self.temperature)
            loss = loss + self.weight / len(views) * F.cross_entropy(expected + self.log_prior, target)
        return loss


class ClassDirections(nn.Module):
    """A von Mises-Fisher distribution of unit vectors for each class, by the mean of its vectors.

    With a class's mean a of length R < 1 in p dimensions, the direction is a / R and the concentration is
    kappa = p R / (1 - R²).

    Args:
        num_classes: C.
        dim: p.
    """

    mean: torch.Tensor
    count: torch.Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer('mean', torch.zeros(num_classes, dim))
        self.register_buffer('count', torch.zeros(num_classes))
        self.reset()

    def reset(self) -> None:
        """Forget all: means of length 0.9 in random directions, which the first vectors of a class replace."""
        self.mean.copy_(_START * F.normalize(torch.randn(self.mean.shape), dim=1))
        self.count.zero_()

    def take_over(self, other: 'ClassDirections') -> None:
        """Be as another one is."""
        self.mean.copy_(other.mean)
        self.count.copy_(other.count)

    @torch.no_grad()
    def add(self, vectors: torch.Tensor, target: torch.Tensor) -> None:
        """Take vectors [B, p] with labels [B] into the means of their classes."""
        member = F.one_hot(target, len(self.mean)).to(vectors.dtype)  # [B, C]
        number = member.sum(dim=0)
        batch_mean = member.T @ vectors / number.clamp(min=1)[:, None]
        share = (number / (number + self.count).clamp(min=1))[:, None]
        self.mean.lerp_(batch_mean, share)
        self.count.add_(number)

    def log_expected(self, vectors: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log of the expected exp(f'v / temperature) over v of each class, for vectors f [B, p], float32 [B, C].

        It is A(|kappa mu + f / temperature|) - A(kappa) with A of `log_bessel`. The gradient is that of f alone.
        """
        exact = torch.float32 if vectors.device.type == 'mps' else torch.float64
        mean, dim = self.mean.to(exact), self.mean.shape[1]
        length = torch.linalg.vector_norm(mean, dim=1)
        kappa = dim * length / (1 - length.square())
        kappa = torch.where((kappa >= 0) & (kappa <= _GREATEST), kappa, _GREATEST)
        scaled = vectors.to(exact) / temperature
        products = scaled @ (kappa[:, None] * F.normalize(mean, dim=1)).T
        squares = kappa.square() + 2 * products + scaled.square().sum(dim=1, keepdim=True)
        joint = squares.clamp(min=1e-12).sqrt()
        order = dim / 2 - 1
        return (log_bessel(joint, order) - log_bessel(kappa, order)).float()


def log_bessel(k: torch.Tensor, order: float) -> torch.Tensor:
    """log I(k) - order log k, with I the modified Bessel function of the first kind of that order, also at k = 0.

    By its uniform expansion for large orders (NIST DLMF, 10.41.3), of which six terms have a relative error below 1e-7
    from order 7 on, for every k.
    """
    z = k / order
    root = (1 + z.square()).sqrt()
    series = sum(_polynomial(_COEFFICIENTS[term], 1 / root) / order ** term for term in range(_TERMS + 1))
    return (order * (root - (1 + root).log() - math.log(order)) - 0.5 * math.log(2 * math.pi * order)
            - 0.5 * root.log() + torch.log(series))  # type: ignore[arg-type]


def _polynomial(coefficients: np.ndarray, t: torch.Tensor) -> torch.Tensor:
    value = torch.zeros_like(t)
    for coefficient in reversed(coefficients.tolist()):
        value = value * t + coefficient
    return value


def _expansion(terms: int) -> list[np.ndarray]:
    """Coefficients of the polynomials u_0, u_1, ... (DLMF 10.41.9)."""
    u, found = Polynomial([1.0]), []
    for _ in range(terms + 1):
        found.append(u.coef)
        u = Polynomial([0, 0, 0.5, 0, -0.5]) * u.deriv() + (Polynomial([1.0, 0, -5.0]) * u).integ() / 8
    return found


_COEFFICIENTS = _expansion(_TERMS)

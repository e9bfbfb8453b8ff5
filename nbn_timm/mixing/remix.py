"""Remix (Chou et al., "Remix: Rebalanced Mixup", ECCV 2020 workshops)."""
import numpy as np
import torch

from nbn_timm.data.classes import ClassCounts
from nbn_timm.mixing.mixing import ALWAYS, Mixing


def remix_label_share(
        lam: float,
        count: torch.Tensor,
        partner_count: torch.Tensor,
        kappa: float = 3.0,
        tau: float = 0.5,
) -> torch.Tensor:
    """The share of its own label in each mixed image (eq. 10).

    The rarer class of a pair gets the whole label, if it is rarer by a factor of at least kappa and the other class
    has less than tau of the image:

        0    where n_i / n_j >= kappa and lam < tau
        1    where n_i / n_j <= 1 / kappa and 1 - lam < tau
        lam  elsewhere

    Args:
        lam: Share of the image itself; the partner has the rest.
        count: n_i, training images of the class of each image, [B].
        partner_count: n_j, of its partner's, [B].
        kappa: From 1.
        tau: In [0, 1].

    Returns:
        float32 [B].
    """
    share = torch.full_like(count, lam, dtype=torch.float32)
    if 1 - lam < tau:
        share = share.masked_fill(count * kappa <= partner_count, 1.0)
    if lam < tau:
        share = share.masked_fill(count >= partner_count * kappa, 0.0)
    return share


class Remix(Mixing):
    """Mixup with a lambda of its own for the labels, in favour of the rarer class.

    The images are mixup's: lam x_i + (1 - lam) x_j, with one lam from Beta(alpha, alpha) for the batch, and j from a
    random permutation of it. The labels are mixed with `remix_label_share`, image by image.

    Args:
        class_counts: Training images per class, which say what is rare.
        num_classes: C.
        alpha: Of the Beta distribution.
        kappa, tau: See `remix_label_share`; the paper's values.
        smoothing, prob, epochs: See `Mixing`.
        device: Of the batches.
    """

    def __init__(
            self,
            class_counts: ClassCounts,
            num_classes: int,
            alpha: float = 1.0,
            kappa: float = 3.0,
            tau: float = 0.5,
            smoothing: float = 0.0,
            prob: float = 1.0,
            epochs: range = ALWAYS,
            device: torch.device | str = 'cpu',
    ) -> None:
        super().__init__(num_classes, smoothing, prob, epochs)
        self.counts = class_counts.tensor().float().to(device)
        self.alpha = alpha
        self.kappa = kappa
        self.tau = tau

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lam = np.random.beta(self.alpha, self.alpha)
        partner = torch.randperm(len(target)).to(target.device)
        counts = self.counts[target]
        share = remix_label_share(lam, counts, counts[partner], self.kappa, self.tau)[:, None]
        soft = self.soft_target(target)
        mixed = images * lam + images[partner] * (1 - lam)
        return mixed, soft * share + soft[partner] * (1 - share)

"""PaCo and GPaCo.

Sources: Cui et al., "Parametric Contrastive Learning", ICCV 2021; Cui et al., "Generalized Parametric Contrastive
Learning", TPAMI 2023; their code (dvlab-research/Parametric-Contrastive-Learning, commit fe56535).
"""
from typing import Any

import torch
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.layers import SlowCopy
from nbn_timm.losses.checks import check_number, check_whole
from nbn_timm.losses.contrast import Queue, on_sphere, projection, without_autocast
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.prior import log_prior
from nbn_timm.losses.targets import as_distribution, refuse_soft_targets

_EPS = 1e-9  # which the authors add to the prior


class _Parametric(nn.Module):
    """What the two have in common.

    Args:
        name: Of the loss, for messages.
        class_counts: Training images per class.
        alpha, temperature, queue_size, dim: See `PaCo`.
    """

    log_prior: torch.Tensor
    queue: Queue

    def __init__(
            self,
            name: str,
            class_counts: ClassCounts | None,
            alpha: float,
            temperature: float,
            queue_size: int,
            dim: int,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, name)
        self.alpha = check_number(name, 'alpha', alpha)
        self.temperature = check_number(name, 'temperature', temperature, above=True)
        self.queue_size = check_whole(name, 'queue_size', queue_size)
        self.dim = check_whole(name, 'dim', dim)
        self.register_buffer('log_prior', log_prior(counts, epsilon=_EPS).float(), persistent=False)

    def contrast(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            anchors: torch.Tensor,
            others: torch.Tensor,
            others_target: torch.Tensor,
    ) -> torch.Tensor:
        """`parametric_contrast` of anchors [A, d] with themselves, others [K, d] and the queue.

        Args:
            logits: Of the anchors [A, C], without the prior.
            target: Of the anchors over the classes, float [A, C].
            anchors, others: Of length 1.
            others_target: As `target`, of the others.
        """
        vectors = torch.cat([anchors, others, self.queue.vectors])
        labels = torch.cat([target.argmax(1), others_target.argmax(1), self.queue.labels])
        shifted = logits.float() + self.log_prior
        return parametric_contrast(shifted, target, vectors, labels, self.alpha, self.temperature)


@register_loss('paco', features=True, views=2, slow_views=1, soft_targets=False, balances=True)
class PaCo(_Parametric):
    """Contrast of the first view with the second, a queue, and the logits of the classes as one parametric centre each.

    The first view passes the network and a head (Linear, BatchNorm, ReLU, Linear), the second a slow copy of both.
    `parametric_contrast` is the formula.

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        alpha: Weight of a vector of the same class, where the class's centre has 1.
        temperature: Of the products of vectors.
        momentum: Of the slow copy.
        queue_size: How many vectors of earlier batches there are.
        dim: Of the vectors.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    def __init__(
            self,
            class_counts: ClassCounts | None,
            alpha: float = 0.01,
            temperature: float = 0.05,
            momentum: float = 0.999,
            queue_size: int = 1024,
            dim: int = 32,
    ) -> None:
        super().__init__('paco', class_counts, alpha, temperature, queue_size, dim)
        self.momentum = check_number('paco', 'momentum', momentum, high=1)

    def prepare(self, network: Any) -> None:
        """Make the head, its slow copy and the queue."""
        width = network.head_hidden_size
        self.head = projection((width, width, self.dim), norm=True)
        self.slow_head = SlowCopy(self.head, self.momentum)
        self.queue = Queue(self.queue_size, self.dim, len(self.log_prior))

    @without_autocast
    def forward(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'paco')
        logits, features = output
        queries = on_sphere(self.head, features[0])
        self.slow_head.follow(self.head)
        keys = on_sphere(self.slow_head, features[1])
        labels = as_distribution(target, logits.shape[2])
        loss = self.contrast(logits[0], labels, queries, keys, labels)
        self.queue.push(keys, target)
        return loss


@register_loss('gpaco', features=True, views=2, soft_targets=False, balances=True)
class GPaCo(_Parametric):
    """PaCo without a slow copy: both views pass the network and the head, with gradient, and both are anchors.

    The head is of three linear layers without BatchNorm. In the authors' code the views pass the network one after the
    other; here both pass it at once, so that BatchNorm sees them together.

    Args:
        class_counts, alpha, temperature, queue_size, dim: As of `PaCo`.
        smooth: Share of an image's label that goes to the other classes, in [0, 1), as in their code.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    def __init__(
            self,
            class_counts: ClassCounts | None,
            alpha: float = 0.01,
            temperature: float = 0.07,
            queue_size: int = 1024,
            dim: int = 128,
            smooth: float = 0.0,
    ) -> None:
        super().__init__('gpaco', class_counts, alpha, temperature, queue_size, dim)
        self.smooth = check_number('gpaco', 'smooth', smooth, high=1, below=True)

    def prepare(self, network: Any) -> None:
        """Make the head and the queue."""
        width = network.head_hidden_size
        self.head = projection((width, width, width, self.dim))
        self.queue = Queue(self.queue_size, self.dim, len(self.log_prior))

    @without_autocast
    def forward(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'gpaco')
        logits, features = output
        vectors = on_sphere(self.head, features)
        num_classes = logits.shape[2]
        # What is spread over all classes gives the label a part of it back.
        spread = self.smooth * num_classes / max(num_classes - 1, 1)
        labels = as_distribution(target, num_classes, spread).repeat(2, 1)
        loss = self.contrast(logits.flatten(0, 1), labels, vectors.flatten(0, 1), vectors[0, :0], labels[:0])
        self.queue.push(vectors[1], target)
        return loss


def parametric_contrast(
        logits: torch.Tensor,
        target: torch.Tensor,
        vectors: torch.Tensor,
        labels: torch.Tensor,
        alpha: float,
        temperature: float,
) -> torch.Tensor:
    """Mean over the anchors i, the first vectors, of

        - [ sum over classes c of t_c (u_c - l) + alpha sum over the P vectors j != i of i's class of (s_ij - l) ]
        / (1 + alpha P),  l = log( sum over c of exp u_c + sum over j != i of exp s_ij ).

    Args:
        logits: u of the anchors [A, C].
        target: t of the anchors [A, C].
        vectors: Of anchors and others [N, d], of length 1; s are their products over the temperature.
        labels: Of the vectors [N].
        alpha: Weight of the vectors.
        temperature: Of the products.
    """
    anchors = vectors[:len(logits)]
    similarity = anchors @ vectors.T / temperature
    itself = torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    total = torch.cat([logits, similarity.masked_fill(itself, -torch.inf)], dim=1).logsumexp(dim=1, keepdim=True)
    same = (labels[:len(anchors), None] == labels) & ~itself
    by_class = (target * (logits - total)).sum(dim=1)
    by_vector = ((similarity - total) * same).sum(dim=1)
    return -((by_class + alpha * by_vector) / (1 + alpha * same.sum(dim=1))).mean()

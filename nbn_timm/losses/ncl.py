"""NCL (Li et al., "Nested Collaborative Learning for Long-Tailed Visual Recognition", CVPR 2022)."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.layers import SlowCopy
from nbn_timm.losses.checks import check_number, check_whole
from nbn_timm.losses.contrast import Queue, on_sphere, projection, without_autocast
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import refuse_soft_targets

_EPS = 1e-9  # which the authors add to probabilities


@register_loss('ncl', experts=True, soft_targets=False, balances=True)
class NCL(nn.Module):
    """Experts that learn one by one and from each other, of all classes and of the hardest ones [B, E, C].

    With a_e = z_e + log n, and h_e the same where all logits but those of the hardest classes are 0, the loss is

        sum over e of CE(a_e, y) + CE(h_e, y) + D(a) + D(h),
        D(v) = mutual / (E - 1) sum over pairs e != j of KL(softmax v_j || softmax v_e).

    The hardest classes of an image are those of the greatest plain logits of the first expert, and its label; they are
    the same for all experts. No gradient is held back. As in the authors' code (Bazinga699/NCL, commit f64fddb) easy
    classes have the logit 0 and still compete. The experts of the paper are complete networks
    (`--model-kwargs complete=True`).

    Args:
        class_counts: Training images per class; a class without any counts as having one.
        share: Of the classes, how many are hardest; at least one is.
        hard_weight: Of CE(h_e, y).
        mutual: Of the divergences.

    Raises:
        InputError: No class counts, or a setting out of range.
    """

    name = 'ncl'
    log_counts: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            share: float = 0.3,
            hard_weight: float = 1.0,
            mutual: float = 0.6,
    ) -> None:
        super().__init__()
        counts = require_counts(class_counts, self.name)
        self.hardest = max(1, round(check_number(self.name, 'share', share, high=1, above=True) * counts.num_classes))
        self.hard_weight = check_number(self.name, 'hard_weight', hard_weight)
        self.mutual = check_number(self.name, 'mutual', mutual)
        self.register_buffer('log_counts', counts.tensor().clamp(min=1).log().float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, self.name)
        logits = logits.float()
        first = logits[:, 0].detach().scatter(1, target[:, None], torch.inf)
        hard = torch.zeros_like(first).scatter(1, first.topk(self.hardest, dim=1).indices, 1)
        every = logits + self.log_counts
        hardest = every * hard[:, None]
        return (self._cross_entropy(every, target) + self.hard_weight * self._cross_entropy(hardest, target)
                + self.mutual * (mutual_divergence(every) + mutual_divergence(hardest)))

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Sum over the experts, mean over the images."""
        num_experts = logits.shape[1]
        return num_experts * F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(num_experts))


def mutual_divergence(logits: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of experts of KL(one || other), over one less than the experts, mean over the images [B, E, C]."""
    batch, num_experts = logits.shape[:2]
    exact_log = logits.log_softmax(dim=2)
    p = exact_log.exp()
    log_p = (p + _EPS).log()
    own = (p * exact_log).sum()
    # Of each pair sum p_j log p_j - p_j log q_e; pairs of an expert with itself are taken out again.
    every_pair = num_experts * own - (p.sum(dim=1) * log_p.sum(dim=1)).sum()
    with_itself = own - (p * log_p).sum()
    return (every_pair - with_itself) / (batch * max(num_experts - 1, 1))


@register_loss('ncl_contrast', experts=True, features=True, views=2, slow_views=1, soft_targets=False, balances=True)
class NCLContrast(NCL):
    """NCL on the first view + contrast times, for each expert, its contrast with the second view and a queue.

    The first view's features pass a head of each expert (Linear, ReLU, Linear), those of the second, of a slow copy of
    the network, a slow copy of the head. The term is the cross-entropy that the two vectors of an image, among the
    products of the first with all those in the expert's queue, belong together (MoCo).

    Args:
        class_counts, share, hard_weight, mutual: As of `NCL`.
        contrast: Weight of the contrastive term.
        temperature: Of the products.
        momentum: Of the slow copies.
        queue_size: How many vectors of earlier batches each expert has.
        dim: Of the vectors.

    Raises:
        InputError: No class counts, a setting out of range, or, in training, a network without experts.
    """

    name = 'ncl_contrast'

    def __init__(
            self,
            class_counts: ClassCounts | None,
            share: float = 0.3,
            hard_weight: float = 1.0,
            mutual: float = 0.6,
            contrast: float = 1.0,
            temperature: float = 0.2,
            momentum: float = 0.999,
            queue_size: int = 1024,
            dim: int = 64,
    ) -> None:
        super().__init__(class_counts, share, hard_weight, mutual)
        self.contrast = check_number(self.name, 'contrast', contrast)
        self.temperature = check_number(self.name, 'temperature', temperature, above=True)
        self.momentum = check_number(self.name, 'momentum', momentum, high=1)
        self.queue_size = check_whole(self.name, 'queue_size', queue_size)
        self.dim = check_whole(self.name, 'dim', dim)

    def prepare(self, network: Any) -> None:
        """Make a head, its slow copy and a queue for each expert."""
        num_experts = getattr(network, 'num_experts', None)
        if num_experts is None:
            raise InputError(f"loss 'ncl_contrast' is for the experts of a network, and {type(network).__name__} has "
                             'none: give --model resnet32_ride')
        width = network.head_hidden_size // num_experts
        self.heads = nn.ModuleList(projection((width, width, self.dim)) for _ in range(num_experts))
        self.slow_heads = nn.ModuleList(SlowCopy(head, self.momentum) for head in self.heads)
        self.queues = nn.ModuleList(Queue(self.queue_size, self.dim, len(self.log_counts)) for _ in self.heads)

    @without_autocast
    def forward(  # type: ignore[override]
            self,
            output: tuple[torch.Tensor, torch.Tensor],
            target: torch.Tensor,
    ) -> torch.Tensor:
        refuse_soft_targets(target, self.name)
        logits, features = output
        loss = super().forward(logits[0], target)
        fast, slow = features.unflatten(2, (len(self.heads), -1)).unbind(0)
        parts: Any = zip(self.heads, self.slow_heads, self.queues, strict=True)
        for expert, (head, slow_head, queue) in enumerate(parts):
            slow_head.follow(head)
            queries, keys = on_sphere(head, fast[:, expert]), on_sphere(slow_head, slow[:, expert])
            loss = loss + self.contrast * momentum_contrast(queries, keys, queue.vectors, self.temperature)
            queue.push(keys, target)
        return loss


def momentum_contrast(
        queries: torch.Tensor,
        keys: torch.Tensor,
        queue: torch.Tensor,
        temperature: float,
) -> torch.Tensor:
    """MoCo's loss: mean cross-entropy of each query's [B, d] product with its key among those with a queue [K, d]."""
    own = (queries * keys).sum(dim=1, keepdim=True)
    products = torch.cat([own, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(products, torch.zeros(len(queries), dtype=torch.long, device=queries.device))

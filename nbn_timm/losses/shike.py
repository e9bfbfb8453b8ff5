"""SHIKE's loss on experts: each learns from the others, and from the best of all in what an image is not.

Source: Jin et al., "Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation", CVPR
2023, and its code (jinyan-06/SHIKE, commit 2b04b62).
"""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.losses.checks import check_number
from nbn_timm.losses.loss import register_loss
from nbn_timm.losses.targets import refuse_soft_targets


@register_loss('shike', experts=True, soft_targets=False)
class Shike(nn.Module):
    """Σ over experts of CE(z_e, y) + suppression K(t || s_e) + mutual Σ over other experts j of K(z_j || z_e).

    For the logits of each expert [B, E, C] of a cosine head. K(a || b) is KL(softmax a || softmax b), summed over the
    images and divided by B C, as in the authors' code: a divergence per image counts 1/C. The teacher t has for every
    class the greatest of the experts' logits, but for the hardest wrong class, which is the first by their mean, that
    mean; t_y is 0. The student s_e is z_e with -scale at y. Both teachers learn as well: nothing is a constant.

    Args:
        class_counts: Not used; every loss takes it first.
        suppression: Weight of the hardest wrong class's suppression.
        mutual: Weight of the experts' mutual distillation.
        scale: Of the cosine head, whose lowest logit is -scale.

    Raises:
        InputError: A setting out of range, or soft targets in training.
    """

    def __init__(
            self,
            class_counts: ClassCounts | None = None,
            suppression: float = 10.0,
            mutual: float = 1.0,
            scale: float = 30.0,
    ) -> None:
        super().__init__()
        self.suppression = check_number('shike', 'suppression', suppression)
        self.mutual = check_number('shike', 'mutual', mutual)
        self.scale = check_number('shike', 'scale', scale, above=True)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        refuse_soft_targets(target, 'shike', 'takes one class as right and all others as wrong')
        logits = logits.float()
        log_p = logits.log_softmax(dim=2)
        label = F.one_hot(target, logits.shape[2]).bool()
        teacher = wrong_classes_at_best(logits, label).log_softmax(dim=1)
        students = logits.masked_fill(label[:, None], -self.scale).log_softmax(dim=2)
        cross_entropy = -log_p.sum(dim=1).gather(1, target[:, None]).mean()
        suppression = mean_divergence(teacher[:, None], students)
        mutual = mean_divergence(log_p[:, None], log_p[:, :, None])  # of each pair; an expert from itself has none
        return cross_entropy + self.suppression * suppression + self.mutual * mutual


def wrong_classes_at_best(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The teacher's logits [B, C], see `Shike`.

    Args:
        logits: Of each expert, [B, E, C].
        label: True at the label, bool [B, C].
    """
    mean = logits.mean(dim=1)
    hardest = mean.masked_fill(label, -torch.inf).argmax(dim=1, keepdim=True)
    greatest = logits.max(dim=1).values.masked_fill(label, 0)
    return greatest.scatter(1, hardest, mean.gather(1, hardest))


def mean_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Sum of p (log p - log q) over all that the two, which are broadcast, have, divided by B C.

    Args:
        log_p, log_q: Logarithms of distributions, [B, ..., C].
    """
    return (log_p.exp() * (log_p - log_q)).sum() / (log_p.shape[0] * log_p.shape[-1])

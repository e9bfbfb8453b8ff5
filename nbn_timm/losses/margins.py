"""Cross-entropy with a margin of each class, for labels and for mixtures of them."""
import torch
import torch.nn.functional as F

from nbn_timm.losses.targets import mean_by_weight, sum_of_labels


def subtract_margin(logits: torch.Tensor, target: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Logits [B, C] whose entry of the target class [B] is lowered by that class's margin."""
    return logits - F.one_hot(target, logits.shape[1]) * margins


def margin_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        margins: torch.Tensor,
        weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over the batch of L(y) = CE(z - m_y at y, y), which lowers the label's logit by its class's margin.

    Soft targets t mix the losses of their classes, each with its own margin: sum of t_c L(c). For mixup's targets that
    is lambda L(y) + (1 - lambda) L(y'), as in code that calls such a loss twice.

    Args:
        logits: [B, C], float32.
        target: Labels [B], soft targets [B, C], or the shares of either label [B, 2, C].
        margins: Of each class [C], in logits.
        weight: Of each class [C]; the mean is then that of `mean_by_weight`.
    """
    if not target.is_floating_point():
        return F.cross_entropy(subtract_margin(logits, target, margins), target, weight)
    losses = margin_losses(logits, margins)
    if weight is None:
        return (sum_of_labels(target) * losses).sum() / len(logits)
    return mean_by_weight(losses, target, weight)


def margin_losses(logits: torch.Tensor, margins: torch.Tensor | float) -> torch.Tensor:
    """L(c) of `margin_cross_entropy` for every class c as the label, [B, C].

    Args:
        logits: [B, C], float32.
        margins: Of each class [C], or of all, in logits.
    """
    return F.softplus(log_sum_of_others(logits) - (logits - margins))


def log_sum_of_others(logits: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp z_k over k != c, for each class c, [B, C].

    log(1 - p_c) loses all digits where p_c is nearly 1, which only the highest class can have: its sum is written out.
    """
    total = logits.logsumexp(dim=1, keepdim=True)
    highest = F.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
    beside_highest = logits.masked_fill(highest, -torch.inf).logsumexp(dim=1, keepdim=True)
    others = total + torch.log1p(-(logits - total).exp().masked_fill(highest, 0))
    return torch.where(highest, beside_highest, others)

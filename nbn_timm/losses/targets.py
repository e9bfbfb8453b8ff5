"""Labels and soft targets as losses take them."""
import torch
import torch.nn.functional as F

from nbn_timm.errors import InputError

TINY = torch.finfo(torch.float32).tiny  # a label without a share has no weight


def as_distribution(target: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """Labels [B] or soft targets [B, C] as distributions over the classes, float32 [B, C].

    Args:
        target: As a loss is given it.
        num_classes: C.
        smoothing: Share of each target that is spread evenly over all classes.
    """
    target = target.float() if target.is_floating_point() else F.one_hot(target, num_classes).float()
    return target * (1 - smoothing) + smoothing / num_classes if smoothing else target


def mean_by_weight(losses: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of losses by class weights, which divide by their sum over the batch: sum of w_y L(y) / sum of w_y.

    Soft targets t give every class its share, sum of t_c w_c L(c) / sum of t_c w_c. Of two labels y and y' of each
    image, with the shares lambda and 1 - lambda, either has a mean of its own, as in code that calls such a loss twice:
    lambda L(y) + (1 - lambda) L(y'), of which L(y) divides by the weights of y alone.

    Args:
        losses: Of each class as the label [B, C].
        target: Soft targets [B, C], or the shares of either label [B, 2, C].
        weight: Of each class [C].
    """
    weighted = target * weight
    if target.ndim == 2:
        return (weighted * losses).sum() / weighted.sum()
    share = target.sum(dim=(0, 2)) / len(target)
    of_label = (weighted * losses[:, None]).sum(dim=(0, 2)) / weighted.sum(dim=(0, 2)).clamp(min=TINY)
    return (share * of_label).sum()


def sum_of_labels(target: torch.Tensor) -> torch.Tensor:
    """Targets [B, 2, C], the shares of either label, as soft targets [B, C]; others as they are."""
    return target.sum(dim=1) if target.ndim == 3 else target


def as_members(target: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Labels [B], label sets [B, C] or soft targets [B, C] as numbers, float32 [B, C]; 1 where an image is of it."""
    return (target if target.ndim == 2 else F.one_hot(target, num_classes)).float()


def refuse_soft_targets(
        target: torch.Tensor,
        loss: str,
        because: str = 'is defined for one label an image, and mixed targets have several',
) -> None:
    """Stop before a formula that is defined for labels alone is given a mixture of classes."""
    if target.is_floating_point():
        raise InputError(f"loss '{loss}' {because}: leave out --mixup, --cutmix, --remix and --cmo")

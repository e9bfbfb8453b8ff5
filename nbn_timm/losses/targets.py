"""Labels and soft targets as losses take them."""
import torch
import torch.nn.functional as F

from nbn_timm.errors import InputError


def as_distribution(target: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """Labels [B] or soft targets [B, C] as distributions over the classes, float32 [B, C].

    Args:
        target: As a loss is given it.
        num_classes: C.
        smoothing: Share of each target that is spread evenly over all classes.
    """
    target = target.float() if target.is_floating_point() else F.one_hot(target, num_classes).float()
    return target * (1 - smoothing) + smoothing / num_classes if smoothing else target


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

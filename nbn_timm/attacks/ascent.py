"""Steps uphill inside a bound on every pixel: what all gradient attacks here have in common, and what they climb.

Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (PGD), ICLR 2018.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

Objective = Callable[[torch.Tensor], torch.Tensor]  # pixels [B, C, H, W] to a number


def project(changed: torch.Tensor, pixels: torch.Tensor, eps: float) -> torch.Tensor:
    """The nearest pictures that differ from `pixels` by at most `eps` in each value, and lie in [0, 1]."""
    return torch.min(torch.max(changed, pixels - eps), pixels + eps).clamp(0, 1)


def ascend(
        objective: Objective,
        pixels: torch.Tensor,
        start: torch.Tensor,
        eps: float,
        step: float,
        steps: int,
        direction: Callable[[torch.Tensor], torch.Tensor] = torch.sign,
) -> torch.Tensor:
    """Climb an objective from `start`, each time by `step` in a direction made of the gradient, inside the bound.

    The sum over the pictures serves as well as the mean: the direction does not depend on the length of a gradient.

    Args:
        objective: What is to grow.
        pixels: In [0, 1], float32 [B, C, H, W].
        start: Where to begin, of the same shape; it is taken as it is.
        eps: Largest change of a value.
        step: Length of a step.
        steps: How many.
        direction: Of a gradient.

    Returns:
        Pictures without a gradient.
    """
    changed = start.detach()
    for _ in range(steps):
        changed.requires_grad_()
        with torch.enable_grad():
            value = objective(changed)
        gradient, = torch.autograd.grad(value, changed)
        changed = project(changed.detach() + step * direction(gradient), pixels, eps)
    return changed


def margin(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far the highest other logit stands above the label's, [B, C] and [B] to [B]: CW's objective."""
    label = F.one_hot(target, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).amax(dim=1) - logits.gather(1, target[:, None])[:, 0]


def agreement(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(softmax(reference) || softmax(logits)) of each picture, [B, C] and [B, C] to [B]."""
    expected = reference.log_softmax(dim=1)
    return F.kl_div(logits.log_softmax(dim=1), expected, reduction='none', log_target=True).sum(dim=1)

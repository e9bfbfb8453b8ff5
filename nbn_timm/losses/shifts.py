"""Cross-entropy of experts whose logits are shifted, each expert's by its own numbers."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def shifted_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        shifts: Sequence[torch.Tensor],
        smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean over experts and images of the cross-entropy of z_e + s_e.

    Args:
        logits: Of each expert [B, E, C].
        target: Labels [B] or soft targets [B, C], the same for all experts.
        shifts: s_e [C] of each expert, float32.
        smoothing: Label smoothing, in [0, 1].
    """
    shifted = logits.float() + torch.stack(tuple(shifts))
    return F.cross_entropy(shifted.flatten(0, 1), target.repeat_interleave(len(shifts), dim=0),
                           label_smoothing=smoothing)

"""Deferred losses, DRW (Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS
2019, algorithm 1; as a trick for other losses in Zhang et al., "Bag of Tricks for Long-Tailed Visual Recognition", AAAI
2021).
"""
import torch
from torch import nn

from nbn_timm.losses.targets import sum_of_labels


class DeferredLoss(nn.Module):
    """One loss in the first epochs, another one afterwards. `create_loss` makes it of the setting `start_epoch`.

    Which of them holds is a function of the epoch, so that a resumed run needs no state.

    Args:
        before: Takes logits [B, C].
        after: Takes what the loss by that name takes, logits or logits and features.
        start_epoch: Number of epochs of `before`. `after` holds from epoch `start_epoch` on, counted from 0.
    """

    def __init__(self, before: nn.Module, after: nn.Module, start_epoch: int) -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.start_epoch = start_epoch
        self.started = False

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` (0-based)."""
        self.started = epoch >= self.start_epoch

    def forward(
            self,
            output: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
            target: torch.Tensor,
    ) -> torch.Tensor:
        if self.started:
            return self.after(output, target)
        return self.before(output if isinstance(output, torch.Tensor) else output[0], sum_of_labels(target))

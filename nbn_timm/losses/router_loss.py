"""The loss of RIDE's second stage, which trains a router and no classifier: it has no name for `--loss`."""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.errors import InputError

POS_WEIGHT = 100.0


class RoutingLoss(nn.Module):
    """Binary cross-entropy of the router's decisions, the mean over images and decisions.

    After expert i the next one should be asked if the mean of the first i is wrong and the mean of some larger number
    of experts is right. Source: RIDE's code (frank-xwang/RIDE-LongTailRecognition, commit ab8be5c), `EAResNet`.

    Args:
        pos_weight: Weight of the images that should be passed on, of which there are few. A larger one asks more
            experts.
    """

    def __init__(self, pos_weight: float = POS_WEIGHT) -> None:
        super().__init__()
        if pos_weight <= 0:
            raise InputError(f'pos_weight is {pos_weight}: give a number above 0')
        self.pos_weight = pos_weight

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """The loss of the training output of `RoutedExperts`: decisions [B, E - 1] and experts' logits [B, E, C]."""
        decisions, logits = output
        wanted = should_ask(logits, target).float()
        return F.binary_cross_entropy_with_logits(
            decisions.float(), wanted, pos_weight=decisions.new_tensor(self.pos_weight, dtype=torch.float32))


def should_ask(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Whether asking on is of use after each expert but the last: experts' logits [B, E, C], labels [B] to
    bool [B, E - 1].
    """
    correct = logits.float().cumsum(dim=1).argmax(dim=2) == target[:, None]  # a sum has the mean's greatest entry
    later = correct[:, 1:].flip(1).cumsum(dim=1).flip(1) > 0  # some larger number of experts is right
    return ~correct[:, :-1] & later

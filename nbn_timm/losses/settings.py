"""Settings of the loss."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbn_timm.losses.loss import LOSSES
from nbn_timm.settings import PROBABILITY, Settings, not_with, setting


@dataclass(frozen=True)
class LossSettings(Settings):
    """Which loss."""

    title = 'loss'
    of_training = True

    loss: str = setting('cross_entropy', 'by name', choices=lambda: LOSSES, effect=not_with('imbalance'))
    smoothing: float = setting(0.0, 'label smoothing', limits=PROBABILITY)
    loss_kwargs: Mapping[str, Any] = setting({}, "the loss's own settings", effect=not_with('imbalance'))

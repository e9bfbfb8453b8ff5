"""Settings of what answers to unequal classes."""
from dataclasses import dataclass

from nbn_timm.imbalance.target import BALANCED
from nbn_timm.settings import Limits, Settings, only_with, setting


@dataclass(frozen=True)
class ImbalanceSettings(Settings):
    """Leave it to the data."""

    title = 'imbalance'
    of_training = True

    imbalance: str | None = setting(
        None, 'auto: choose the loss and the sampler from the class counts, and after training the strength of logit '
        'adjustment on the validation split', choices=('auto',))
    target: str = setting(
        BALANCED, 'what the network is to be good at: balanced (all classes count alike), natural (as often as in '
        'training), or a file of a share or number per class', metavar='TARGET', is_file=True,
        effect=only_with('imbalance'))
    allowed_drop: float | None = setting(
        None, 'percentage points of overall accuracy that may be given up for the target', limits=Limits(0, 100),
        unset='any number', effect=only_with('imbalance'))

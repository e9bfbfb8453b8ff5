"""What a format is given to write."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from nbn_timm.errors import InputError
from nbn_timm.trained.opening import TrainedModel
from nbn_timm.trained.record import NetworkRecord

__all__ = ['METADATA_FILE', 'Artefact', 'FormatUnavailable']

METADATA_FILE = 'nbn_timm.json'  # inside .pt and .pt2 archives


class FormatUnavailable(InputError):
    """A format cannot be written of this network, or by this installation."""


@dataclass(frozen=True)
class Artefact:
    """A network and what goes with it.

    Attributes:
        trained: As it was opened.
        record: Of `network`, without places of this machine.
        network: Folded, with one classifier, normalisation inside if wanted; in eval mode, without gradients.
        example: Input of `network`, [2, C, H, W].
        metadata: Plain data that go into the files: the model's name, its input format, class names and training
            images per class, and the record of its training.
        calibration: Input of `network` from training images [N, C, H, W], for formats that need its range.
    """

    trained: TrainedModel
    record: NetworkRecord
    network: nn.Module
    example: torch.Tensor
    metadata: Mapping[str, Any]
    calibration: torch.Tensor | None = None

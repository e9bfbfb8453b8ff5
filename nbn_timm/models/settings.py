"""Settings of the model."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbn_timm.settings import PROBABILITY, Settings, not_with, setting


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which network."""

    title = 'model'

    model: str = setting('', 'any timm model, or one of nbn_timm', metavar='NAME', short='-m',
                         unset='that of the finished network, if there is one', inherited=True)
    add_nbn: bool = setting(False, 'put NBN into the last stage of a timm model with BatchNorm', inherited=True)
    model_kwargs: Mapping[str, Any] = setting({}, 'for the constructor', inherited=True)


@dataclass(frozen=True)
class StartSettings(Settings):
    """From which weights training starts, and what is set of the network for training alone."""

    title = 'start of training'

    pretrained: bool = setting(False, "from the model's published weights", effect=not_with('initial_checkpoint'))
    initial_checkpoint: str | None = setting(None, 'from these weights', metavar='FILE', is_file=True)
    drop: float | None = setting(None, 'dropout rate', limits=PROBABILITY, metavar='P', unset="the model's")
    drop_path: float | None = setting(None, 'drop path rate', limits=PROBABILITY, metavar='P', unset="the model's")
    grad_checkpointing: bool = setting(
        False, 'keep fewer activations for the backward pass and compute them again there: less memory, more time',
        kind='machine')
    bn_momentum: float | None = setting(None, 'momentum of all BatchNorm layers', limits=PROBABILITY,
                                        unset="the model's")

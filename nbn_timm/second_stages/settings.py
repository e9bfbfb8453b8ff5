"""Settings of the second stage."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbn_timm.second_stages.second_stage import SECOND_STAGES
from nbn_timm.settings import Settings, only_with, setting


@dataclass(frozen=True)
class SecondStageSettings(Settings):
    """What to make of a finished network."""

    title = 'second stage'

    stage: str | None = setting(
        None, 'what to make of the finished network of --initial-checkpoint, by name; docs/second_stages.md says more',
        choices=lambda: SECOND_STAGES)
    stage_kwargs: Mapping[str, Any] = setting({}, "the stage's own settings", effect=only_with('stage'))
    freeze_bn: bool = setting(
        True, 'of a stage that trains a part: keep the rest in eval mode, BatchNorm statistics included; '
        '--no-freeze-bn lets them drift, as in the released codes', effect=only_with('stage'))

"""Settings of the sampler."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbn_timm.samplers.sampler import SAMPLERS
from nbn_timm.settings import Settings, not_with, setting


@dataclass(frozen=True)
class SamplerSettings(Settings):
    """In which order, and how often, training sees its images."""

    title = 'sampler'
    of_training = True

    sampler: str = setting('instance_balanced', 'by name', choices=lambda: SAMPLERS, effect=not_with('imbalance'))
    sampler_kwargs: Mapping[str, Any] = setting({}, "the sampler's own settings", effect=not_with('imbalance'))

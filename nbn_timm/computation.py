"""On what is computed, and how precisely."""
from dataclasses import dataclass

import torch

from nbn_timm.settings import Settings, only_with, setting


@dataclass(frozen=True)
class PrecisionSettings(Settings):
    """On what is computed, and how precisely."""

    title = 'precision and devices'

    device: str | None = setting(None, "cpu, cuda, cuda:1, ...", metavar='NAME', kind='machine',
                                 unset='a GPU if there is one')
    amp: bool = setting(False, 'autocast')
    amp_dtype: str = setting('float16', 'of autocast', choices=('float16', 'bfloat16'), effect=only_with('amp'))
    channels_last: bool = setting(False, 'memory format of images and weights')
    torchcompile: str | None = setting(None, 'compile the model', nargs='?', const='inductor', metavar='BACKEND')

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of autocast, None without."""
        return getattr(torch, self.amp_dtype) if self.amp else None

"""Mixing images and labels of a batch; every module of this folder is imported, and registers its method."""
from nbn_timm.mixing.mixing import (
    ALWAYS,
    MIXINGS,
    Mixing,
    MixingRun,
    MixingSettings,
    mixing_settings,
    register_mixing,
)
from nbn_timm.registry import import_modules

import_modules(__name__, __path__)

from nbn_timm.mixing.cmo import CMO, PatchSampler, patch_seed  # noqa: E402
from nbn_timm.mixing.remix import Remix, remix_label_share  # noqa: E402
from nbn_timm.mixing.timm_mixup import TimmMixup  # noqa: E402

__all__ = ['ALWAYS', 'CMO', 'MIXINGS', 'Mixing', 'MixingRun', 'MixingSettings', 'PatchSampler', 'Remix', 'TimmMixup',
           'mixing_settings', 'patch_seed', 'register_mixing', 'remix_label_share']

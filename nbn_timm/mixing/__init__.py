"""Mixing the images and labels of a training batch; one method per file."""
from nbn_timm.mixing.cmo import CMO, PatchSampler, patch_seed
from nbn_timm.mixing.mixing import ALWAYS, Mixing
from nbn_timm.mixing.remix import Remix, remix_label_share
from nbn_timm.mixing.timm_mixup import TimmMixup

__all__ = ['ALWAYS', 'CMO', 'Mixing', 'PatchSampler', 'Remix', 'TimmMixup', 'patch_seed', 'remix_label_share']

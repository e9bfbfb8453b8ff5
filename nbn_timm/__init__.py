"""NBN for timm: long-tailed image recognition. Importing the package registers its models with timm."""
from nbn_timm.errors import InputError
from nbn_timm.layers import (
    CosineLinear,
    NormalizedBatchNorm2d,
    RectifiedLinear,
    add_nbn,
    convert_sync_batchnorm,
    fold_nbn,
    freeze_nbn,
    merge_experts,
)
from nbn_timm.models import ResNetCifar, ResNetCifarRide, ResNetNbn, ResNetRide

__version__ = '0.1.0'

__all__ = [
    'CosineLinear', 'InputError', 'NormalizedBatchNorm2d', 'RectifiedLinear', 'ResNetCifar', 'ResNetCifarRide',
    'ResNetNbn', 'ResNetRide', 'add_nbn', 'convert_sync_batchnorm', 'fold_nbn', 'freeze_nbn',
    'merge_experts',
]

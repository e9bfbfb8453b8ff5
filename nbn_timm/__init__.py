"""NBN for timm: long-tailed image recognition. Importing the package registers its models with timm."""
from nbn_timm.errors import InputError
from nbn_timm.layers import NormalizedBatchNorm2d, RectifiedLinear, add_nbn, convert_sync_batchnorm, fold_nbn
from nbn_timm.models import ResNetCifar, ResNetNbn

__version__ = '0.1.0'

__all__ = [
    'InputError', 'NormalizedBatchNorm2d', 'RectifiedLinear', 'ResNetCifar', 'ResNetNbn', 'add_nbn',
    'convert_sync_batchnorm', 'fold_nbn',
]

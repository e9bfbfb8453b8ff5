"""NBN layers, rectified heads, and the conversions between them and plain layers."""
from .convert import add_nbn, convert_sync_batchnorm, fold_nbn, nbn_layers
from .head import RectifiedLinear
from .norm import (
    NormalizedBatchNorm2d,
    NormalizedBatchNormAct2d,
    SyncNormalizedBatchNorm2d,
    SyncNormalizedBatchNormAct2d,
    share_scale,
)

__all__ = [
    'NormalizedBatchNorm2d', 'NormalizedBatchNormAct2d', 'SyncNormalizedBatchNorm2d', 'SyncNormalizedBatchNormAct2d',
    'RectifiedLinear', 'add_nbn', 'convert_sync_batchnorm', 'fold_nbn', 'nbn_layers', 'share_scale',
]

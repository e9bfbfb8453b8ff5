"""NBN layers, classifier heads, experts, and the conversions between them and plain layers."""
from .affine import NormalizedAffine, share_scale
from .conversion import add_nbn, convert_sync_batchnorm, fold_nbn, nbn_layers
from .experts import ExpertBlock, ExpertHead, ExpertStage, merge_experts
from .frozen import freeze_nbn
from .head import HEADS, BottleneckLinear, ClassVectors, CosineLinear, CosPlusLinear, RectifiedLinear, convert_head
from .layer_norm import NormalizedGroupNorm, NormalizedLayerNorm, NormalizedRmsNorm
from .norm import (
    NormalizedBatchNorm2d,
    NormalizedBatchNormAct2d,
    SyncNormalizedBatchNorm2d,
    SyncNormalizedBatchNormAct2d,
)
from .slow_copy import SlowCopy

__all__ = [
    'NormalizedBatchNorm2d', 'NormalizedBatchNormAct2d', 'SyncNormalizedBatchNorm2d', 'SyncNormalizedBatchNormAct2d',
    'NormalizedAffine', 'NormalizedGroupNorm', 'NormalizedLayerNorm', 'NormalizedRmsNorm',
    'HEADS', 'BottleneckLinear', 'ClassVectors', 'CosPlusLinear', 'CosineLinear', 'RectifiedLinear', 'convert_head',
    'ExpertBlock', 'ExpertHead', 'ExpertStage', 'add_nbn', 'convert_sync_batchnorm', 'fold_nbn', 'freeze_nbn',
    'merge_experts', 'nbn_layers', 'share_scale', 'SlowCopy',
]

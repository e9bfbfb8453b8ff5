"""Heads on cached features: a network is run once over the images, and heads are trained on what it gives."""
from nbn_timm.probe.auto import auto_head
from nbn_timm.probe.comparison import ComparedHead, Comparison, compare_heads
from nbn_timm.probe.features import FeatureFolder, Features, extract_features, feature_key
from nbn_timm.probe.heads import head_logits, train_head
from nbn_timm.probe.methods import METHODS, HeadMethod, head_method
from nbn_timm.probe.settings import HeadSettings, ProbeSettings

__all__ = ['METHODS', 'ComparedHead', 'Comparison', 'FeatureFolder', 'Features', 'HeadMethod', 'HeadSettings',
           'ProbeSettings', 'auto_head', 'compare_heads', 'extract_features', 'feature_key', 'head_logits',
           'head_method', 'train_head']

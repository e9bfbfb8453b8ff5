"""Datasets, class counts and loaders for long-tailed recognition."""
from nbn_timm.data.batched import MemoryImages, keep_in_memory
from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, ClassCounts, Classes, Matching, ShotSplit, read_counts
from nbn_timm.data.dataset import ArraySamples, ImageSamples
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.factory import DATASETS, Splits, create_splits
from nbn_timm.data.loader import TrainLoader, create_eval_loader, create_train_loader, epoch_seed
from nbn_timm.data.settings import AugmentSettings, DataSettings
from nbn_timm.data.transforms import create_transform

__all__ = [
    'DATASETS',
    'FEW_BELOW',
    'MANY_ABOVE',
    'ArraySamples',
    'AugmentSettings',
    'ClassCounts',
    'Classes',
    'DataDefaults',
    'DataSettings',
    'ImageSamples',
    'Matching',
    'MemoryImages',
    'ShotSplit',
    'Splits',
    'TrainLoader',
    'create_eval_loader',
    'create_splits',
    'create_train_loader',
    'create_transform',
    'epoch_seed',
    'keep_in_memory',
    'read_counts',
]

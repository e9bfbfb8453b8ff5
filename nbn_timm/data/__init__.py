"""Reading, class counts, long-tailed draws, transforms and loaders; the datasets by name are in `nbn_timm.datasets`."""
from typing import TYPE_CHECKING, Any

from nbn_timm.data.batched import MemoryImages, keep_in_memory
from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, ClassCounts, Classes, Matching, ShotSplit, read_counts
from nbn_timm.data.dataset import ArraySamples, ImageSamples
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.loader import TrainLoader, create_eval_loader, create_train_loader, epoch_seed
from nbn_timm.data.settings import AugmentSettings, DataSettings
from nbn_timm.data.splits import Source, Splits
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
    'Source',
    'Splits',
    'TrainLoader',
    'create_eval_loader',
    'create_train_loader',
    'create_transform',
    'epoch_seed',
    'keep_in_memory',
    'read_counts',
]

if not TYPE_CHECKING:  # names of earlier versions; that package is made of this one, so it cannot be imported above
    def __getattr__(name: str) -> Any:
        if name in ('DATASETS', 'create_splits'):
            from nbn_timm import datasets
            return getattr(datasets, name)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

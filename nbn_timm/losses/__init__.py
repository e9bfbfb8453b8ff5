"""Losses that train.py chooses by name; every module of this folder is imported, and registers its losses."""
import importlib
import pkgutil

from nbn_timm.losses.loss import (
    LOSSES,
    create_loss,
    is_deferrable,
    register_loss,
    takes_experts,
    takes_features,
    takes_soft_targets,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

__all__ = ['LOSSES', 'create_loss', 'is_deferrable', 'register_loss', 'takes_experts', 'takes_features',
           'takes_soft_targets']

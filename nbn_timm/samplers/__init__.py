"""Samplers that train.py chooses by name; every module of this folder is imported, and registers its samplers."""
import importlib
import pkgutil

from nbn_timm.samplers.sampler import SAMPLERS, EpochSampler, create_sampler, register_sampler

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

__all__ = ['SAMPLERS', 'EpochSampler', 'create_sampler', 'register_sampler']

"""Samplers that train.py chooses by name; every module of this folder is imported, and registers its samplers."""
from nbn_timm.registry import import_modules
from nbn_timm.samplers.sampler import SAMPLERS, EpochSampler, create_sampler, register_sampler

import_modules(__name__, __path__)

__all__ = ['SAMPLERS', 'EpochSampler', 'create_sampler', 'register_sampler']

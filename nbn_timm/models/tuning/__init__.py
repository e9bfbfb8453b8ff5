"""Ways to fine-tune a small part of a network, or a few new parameters; every module of this folder is imported."""
from nbn_timm.registry import import_modules

from .classifier import start_from_vectors, with_head
from .settings import TuneSettings
from .tuning import TUNINGS, Tuning, apply_tuning, create_tuning, has_adapters, learn_only_tuned, register_tuning

import_modules(__name__, __path__)

__all__ = ['TUNINGS', 'TuneSettings', 'Tuning', 'apply_tuning', 'create_tuning', 'has_adapters', 'learn_only_tuned',
           'register_tuning', 'start_from_vectors', 'with_head']

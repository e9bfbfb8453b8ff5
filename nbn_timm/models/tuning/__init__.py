"""Ways to fine-tune a small part of a network, or a few new parameters; every module of this folder is imported."""
from nbn_timm.registry import import_modules

from .adapter_file import AdapterFile, load_adapter, read_adapter, save_adapter
from .classifier import start_from_vectors, with_head
from .settings import TuneSettings
from .tuning import TUNINGS, Tuning, apply_tuning, create_tuning, has_adapters, learn_only_tuned, register_tuning

import_modules(__name__, __path__)

__all__ = ['TUNINGS', 'AdapterFile', 'TuneSettings', 'Tuning', 'apply_tuning', 'create_tuning', 'has_adapters',
           'learn_only_tuned', 'load_adapter', 'read_adapter', 'register_tuning', 'save_adapter', 'start_from_vectors',
           'with_head']

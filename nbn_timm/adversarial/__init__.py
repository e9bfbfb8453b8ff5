"""Training on attacked pictures; every module of this folder is imported, and registers its method."""
from nbn_timm.adversarial.adversarial import ADVERSARIAL, STARTS, AdversarialTraining, Output, register_adversarial
from nbn_timm.registry import import_modules

import_modules(__name__, __path__)

__all__ = ['ADVERSARIAL', 'STARTS', 'AdversarialTraining', 'Output', 'register_adversarial']

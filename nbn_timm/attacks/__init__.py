"""Pictures that are changed within a small bound so that a network errs; every module here registers its attack."""
from nbn_timm.attacks.ascent import agreement, ascend, margin, project
from nbn_timm.attacks.attack import ATTACKS, Attack, attack_names, create_attack, register_attack
from nbn_timm.attacks.network import STATISTICS, PixelNetwork, under_attack
from nbn_timm.attacks.pixels import EPS, STEP, Pixels
from nbn_timm.registry import import_modules

import_modules(__name__, __path__)

__all__ = ['ATTACKS', 'EPS', 'STATISTICS', 'STEP', 'Attack', 'PixelNetwork', 'Pixels', 'agreement', 'ascend',
           'attack_names', 'create_attack', 'margin', 'project', 'register_attack', 'under_attack']

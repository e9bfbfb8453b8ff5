"""How training and decision answer to unequal classes: the target, what is chosen for it, and the strength of logit
adjustment that validation data ask for.
"""
from nbn_timm.imbalance.choice import TrainingChoice, choose_training
from nbn_timm.imbalance.strength import TAUS, ChosenStrength, StrengthCurve
from nbn_timm.imbalance.target import target_shares

__all__ = ['TAUS', 'ChosenStrength', 'StrengthCurve', 'TrainingChoice', 'choose_training', 'target_shares']

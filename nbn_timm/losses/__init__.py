"""Losses that train.py chooses by name; every module of this folder is imported, and registers its losses."""
from nbn_timm.losses.loss import (
    LOSSES,
    balances_classes,
    create_loss,
    is_deferrable,
    learns_in_parallel,
    needed_mixing,
    number_of_slow_views,
    number_of_views,
    register_loss,
    takes_both_labels,
    takes_experts,
    takes_features,
    takes_label_sets,
    takes_soft_targets,
    takes_streams,
    takes_views_apart,
)
from nbn_timm.registry import import_modules

import_modules(__name__, __path__)

__all__ = ['LOSSES', 'balances_classes', 'create_loss', 'is_deferrable', 'learns_in_parallel', 'needed_mixing',
           'number_of_slow_views', 'number_of_views', 'register_loss', 'takes_both_labels', 'takes_experts',
           'takes_features', 'takes_label_sets', 'takes_soft_targets', 'takes_streams', 'takes_views_apart']

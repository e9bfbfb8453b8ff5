"""Second stages that train.py chooses by name; every module of this folder is imported, and registers its stages."""
import importlib
import pkgutil

from nbn_timm.second_stages.second_stage import (
    STAGES,
    FitData,
    FitReport,
    FittedStage,
    Stage,
    StageRun,
    TrainedStage,
    create_stage,
    register_stage,
    restore_stages,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

__all__ = ['STAGES', 'FitData', 'FitReport', 'FittedStage', 'Stage', 'StageRun', 'TrainedStage', 'create_stage',
           'register_stage', 'restore_stages']

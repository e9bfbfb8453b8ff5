"""Second stages that train.py chooses by name; every module of this folder is imported, and registers its stages."""
from nbn_timm.registry import import_modules
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

import_modules(__name__, __path__)

__all__ = ['STAGES', 'FitData', 'FitReport', 'FittedStage', 'Stage', 'StageRun', 'TrainedStage', 'create_stage',
           'register_stage', 'restore_stages']

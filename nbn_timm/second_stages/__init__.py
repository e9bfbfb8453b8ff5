"""Second stages that train.py chooses by name; every module of this folder is imported, and registers its stages."""
from nbn_timm.registry import import_modules
from nbn_timm.second_stages.second_stage import (
    SECOND_STAGES,
    FitData,
    FitReport,
    FittedSecondStage,
    SecondStage,
    SecondStageRun,
    TrainedSecondStage,
    create_second_stage,
    register_second_stage,
    restore_second_stages,
)

import_modules(__name__, __path__)

__all__ = ['SECOND_STAGES', 'FitData', 'FitReport', 'FittedSecondStage', 'SecondStage', 'SecondStageRun',
           'TrainedSecondStage', 'create_second_stage', 'register_second_stage', 'restore_second_stages']

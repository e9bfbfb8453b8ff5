"""Command lines of second stages, from what each of them declares: one that is added is found by the tests."""
from inspect import signature

import timm

from nbn_timm.errors import InputError
from nbn_timm.second_stages import STAGES, TrainedStage, create_stage
from nbn_timm.settings import flag

TRAINED = sorted(name for name, stage in STAGES.items() if issubclass(stage, TrainedStage))
FITTED = sorted(STAGES.keys() - set(TRAINED))
USUAL = {'epochs': 2, 'sampler': 'class_balanced', 'loss': 'balanced_softmax'}  # where a stage leaves them open


def stage_flags(stage: str, classes: int = 4) -> list[str]:
    """Flags with which a stage runs on few classes, but for the network; its whole numbers reach as far as these."""
    kind = STAGES[stage]
    given = USUAL | dict(kind.needs) if issubclass(kind, TrainedStage) else {}
    words = [word for key, value in given.items() if value is not None and key not in kind.unused
             for word in (flag(key), str(value))]
    numbers = [f'{key}={classes}' for key, parameter in signature(kind).parameters.items()
               if type(parameter.default) is int and parameter.default > classes]
    return [*words, *(['--stage-kwargs', *numbers] if numbers else [])]


def takes_network(stage: str, model: str, classes: int = 4) -> bool:
    """Whether a stage is for a network of this name."""
    kind = STAGES[stage]
    if not issubclass(kind, TrainedStage):
        return stage != 'expert_aggregation' or '_ride' in model
    numbers = {word.partition('=')[0]: classes for word in stage_flags(stage, classes) if '=' in word}
    try:
        create_stage(stage, **numbers).prepare(timm.create_model(model, num_classes=classes))
    except InputError:
        return False
    return True

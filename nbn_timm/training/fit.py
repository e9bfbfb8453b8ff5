"""A run without training: a second stage that is computed in one pass over data."""
import logging
from typing import Any

from nbn_timm.errors import InputError
from nbn_timm.files import write_bytes_atomic, write_text_atomic
from nbn_timm.second_stages import FittedSecondStage
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.classifier_inputs import fit_data
from nbn_timm.training.plan import Plan
from nbn_timm.training.report import SETTINGS_FILE, announce, report_on, write_settings
from nbn_timm.training.run_checkpoint import LAST, fitted_state, save_checkpoint

_logger = logging.getLogger(__name__)


def fit(plan: Plan, stage: FittedSecondStage, model: Any) -> None:
    """Let the stage change the model, keep what it gives, and report on it.

    An interrupted pass is repeated from its beginning.

    Raises:
        InputError: Something given is wrong.
    """
    settings, splits, world = plan.settings, plan.splits, plan.world
    name = settings.second_stage.stage
    if settings.run.resume not in (None, 'auto'):
        raise InputError(f'--stage {name} is one pass, which cannot go on from a checkpoint: leave out --resume')
    write_settings(plan)
    announce(plan, model)

    found = stage.fit(model.eval(), fit_data(plan))
    if world.is_primary:
        for file, content in found.pictures:
            write_bytes_atomic(plan.folder / file, content)
        for file, text in found.files.items():
            write_text_atomic(plan.folder / file, text)
        save_checkpoint(plan.folder, fitted_state(
            model, settings.model.model, plan.record(), splits.classes))
        _logger.info('\n'.join(found.lines))
    world.barrier()
    report_on(plan, model, EvaluatedWeights(LAST, second_stage=name), [SETTINGS_FILE, *found.files, LAST])

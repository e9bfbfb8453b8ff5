"""`--imbalance auto`: what a run is trained with, and the logit adjustment that it ends with."""
import logging
from dataclasses import replace
from pathlib import Path

from timm.utils import unwrap_model
from torch import nn

from nbn_timm.data import Splits
from nbn_timm.errors import InputError
from nbn_timm.imbalance import choose_training, target_shares
from nbn_timm.models.run_folder import ADJUSTED
from nbn_timm.second_stages.logit_adjustment import LogitAdjustment, why_not_adjustable
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.classifier_inputs import fit_data
from nbn_timm.training.plan import Plan
from nbn_timm.training.run_checkpoint import fitted_state, save_file
from nbn_timm.training.settings import TrainSettings

STAGE = 'logit_adjustment'

_logger = logging.getLogger(__name__)


def with_choice(settings: TrainSettings, splits: Splits) -> TrainSettings:
    """The settings with the loss and the sampler that `--imbalance auto` takes for these data, and a note in `splits`.

    Raises:
        InputError: The training images per class are not known, or the target is of other classes.
    """
    if settings.imbalance.imbalance is None:
        return settings
    target = settings.imbalance.target
    choice = choose_training(splits.class_counts, target)
    assert splits.class_counts is not None
    target_shares(target, splits.class_counts)  # a wrong file is told before training
    splits.notes.append(choice.line())
    return settings.with_values(**choice.settings())


def tell_adjustment(plan: Plan, model: nn.Module) -> list[str]:
    """What will follow the training, in a sentence; nothing without `--imbalance auto`."""
    if plan.settings.imbalance.imbalance is None:
        return []
    reason = why_not_adjustable(model)
    if reason:
        return [f'The strength of logit adjustment will not be chosen, since {reason}.']
    if plan.splits.val is None:
        return ['There is no validation split to choose the strength of logit adjustment on, so it will be 1.']
    return ['The strength of logit adjustment will be chosen on the validation split after training.']


def adjusted(plan: Plan, model: nn.Module, weights: EvaluatedWeights) -> EvaluatedWeights:
    """The model that a run ends with after logit adjustment, in place, with a checkpoint of its own if that changes it.

    Args:
        plan: Of the run.
        model: With its final weights; changed in place.
        weights: Which ones these are.

    Returns:
        Which weights the model has now.
    """
    chosen_by, network = plan.settings.imbalance, unwrap_model(model)
    file: Path = plan.folder / ADJUSTED
    choice = choose_training(plan.splits.class_counts, chosen_by.target)
    stage = LogitAdjustment(None, chosen_by.target, choice.trained_tau, chosen_by.allowed_drop)
    if why_not_adjustable(network):
        return weights
    try:
        chosen = stage.choose(network.eval(), fit_data(plan))
    except InputError as error:
        _logger.info('The strength of logit adjustment was not chosen: %s.', error)
        return weights
    changes = bool(chosen.offset.abs().max() > 1e-6)
    if plan.world.is_primary:
        _logger.info('%s%s', '\n'.join(chosen.lines()), '' if changes else '; the network stays as it is')
    if changes:
        stage.write(network, chosen)
    if plan.world.is_primary and changes:
        of_stage = {'tau': chosen.tau, 'target': chosen_by.target, 'trained_tau': choice.trained_tau}
        record = plan.record() | {'stage': STAGE, 'stage_kwargs': of_stage}
        save_file(file, fitted_state(network, plan.settings.model.model, record, plan.splits.classes))
    elif plan.world.is_primary:
        file.unlink(missing_ok=True)  # of an earlier end of this run
    plan.world.barrier()
    return replace(weights, file=ADJUSTED, second_stage=STAGE) if changes else weights

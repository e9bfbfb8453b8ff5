"""A training on pictures of several classes: what goes with them, and the thresholds that it ends with."""
import logging

from torch import nn

from nbn_timm.data.settings import DataSettings
from nbn_timm.datasets import find_dataset
from nbn_timm.errors import InputError
from nbn_timm.evaluation import label_sets
from nbn_timm.evaluation.result import FURTHER_METRICS, METRICS
from nbn_timm.evaluation.thresholds import Thresholds
from nbn_timm.losses import LOSSES, takes_label_sets
from nbn_timm.mixing import MIXINGS
from nbn_timm.samplers import SAMPLERS
from nbn_timm.samplers.sampler import takers_of_label_sets
from nbn_timm.second_stages import SecondStage
from nbn_timm.settings import flag
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.calibrating import write_thresholds
from nbn_timm.training.plan import Plan
from nbn_timm.training.settings import TrainSettings

BEST_BY = 'map'  # chooses checkpoints where the settings leave it at a metric of one class for an image

_logger = logging.getLogger(__name__)


def for_label_sets(settings: TrainSettings, stage: SecondStage | None) -> TrainSettings:
    """The settings as they are for the kind of targets that the data have.

    Raises:
        InputError: Something is for pictures of one class and these can be of several, or the other way round.
    """
    metric = settings.run.eval_metric
    if not has_label_sets(settings.data):
        if metric not in (*METRICS, *FURTHER_METRICS):
            raise InputError(f'--eval-metric {metric} is for pictures of several classes, and those of '
                             f'{settings.data.dataset} are of one here: give another metric')
        return settings
    several = f'pictures of several classes, as {settings.data.dataset} has them here'
    mixings = (method.switched_on(settings.methods[name]) for name, method in MIXINGS.items())
    switched_on = [flag(switches[0]) for switches in mixings if switches]
    for given, what in (
            (stage, f'--stage {settings.second_stage.stage}'),
            (settings.imbalance.imbalance, f'--imbalance {settings.imbalance.imbalance}'),
            (settings.distillation.kd_checkpoint, '--kd-checkpoint'), (settings.more_train.more_train, '--more-train'),
            (settings.adversarial.adversarial, f'--adversarial {settings.adversarial.adversarial}'),
            (settings.augment.curriculum, '--curriculum'),
            (switched_on, ', '.join(switched_on))):
        if given:
            raise InputError(f'{what} is not for {several}: leave it out')
    loss, sampler = settings.loss.loss, settings.sampler.sampler
    LOSSES.find(loss)
    if not takes_label_sets(loss):
        raise InputError(f"loss '{loss}' is not for {several}: give --loss "
                         f'{" or ".join(sorted(filter(takes_label_sets, LOSSES)))}')
    if not SAMPLERS.find(sampler).label_sets:
        raise InputError(f"sampler '{sampler}' is not for {several}: give --sampler "
                         f'{" or ".join(takers_of_label_sets())}')
    if metric == type(settings.run).eval_metric:
        return settings.with_values(eval_metric=BEST_BY)
    if metric not in label_sets.METRICS:
        raise InputError(f'--eval-metric {metric} is not for {several}: give one of {", ".join(label_sets.METRICS)}')
    return settings


def has_label_sets(data: DataSettings) -> bool:
    """Whether the pictures of the data can be of several classes."""
    return bool(data.dataset) and find_dataset(data.dataset).label_sets(data)


def settle_thresholds(plan: Plan, model: nn.Module, weights: EvaluatedWeights) -> Thresholds:
    """The thresholds that the settings ask for, the same on every process; chosen ones are kept in the checkpoint."""
    chosen: Thresholds | None = None
    if plan.settings.answers.thresholds == 'per_class' and plan.splits.val is not None:
        logits, sets = plan.logits(model, plan.splits.val)
        if plan.world.is_primary:
            chosen = Thresholds.chosen(logits.numpy(), sets.numpy(), 'val', plan.settings.average.averages)
            write_thresholds(plan.folder / weights.file, chosen)
            _logger.info('Answers: %s.', chosen.in_words())
    return plan.world.gather(chosen)[0] or Thresholds.fixed()

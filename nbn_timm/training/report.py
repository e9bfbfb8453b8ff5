"""What a run says of itself: before it begins, after each epoch, and of the model that it ends with."""
import logging
from collections.abc import Collection

import yaml
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from nbn_timm.evaluation import EvalResult
from nbn_timm.files import write_text_atomic
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.keeper import Keeper
from nbn_timm.training.plan import Plan
from nbn_timm.training.profile import NoProfile
from nbn_timm.training.run_checkpoint import BEST, LAST, load_best
from nbn_timm.training.settings import TrainSettings
from nbn_timm.training.task import evaluation_model

SETTINGS_FILE = 'args.yaml'

_logger = logging.getLogger(__name__)


def write_settings(plan: Plan) -> None:
    """Write args.yaml, from which `--config` repeats the run."""
    if plan.world.is_primary:
        write_text_atomic(plan.folder / SETTINGS_FILE, config_text(plan.settings))


def config_text(settings: TrainSettings) -> str:
    """All settings as a config that `--config` reads."""
    known = {key: value for key, value in settings.values().items() if key not in ('config', 'resume')}
    return '# Settings of this run; `--config` reads this file.\n' + yaml.safe_dump(known, sort_keys=False)


def announce(plan: Plan, model: nn.Module, start_epoch: int | None = None) -> None:
    """Say what is about to run; without a start epoch it is a second stage of one pass."""
    settings, batch, counts = plan.settings, plan.batch, plan.splits.class_counts
    parameters = sum(parameter.numel() for parameter in model.parameters())
    runs = (f'--stage {settings.second_stage.stage}' if start_epoch is None else
            f'epochs {start_epoch + 1} to {settings.schedule.epochs}')
    lines = [
        f'model     {settings.model.model}, {parameters:,} parameters',
        f'data      {settings.data.dataset}' + ('' if counts is None else
            f': {counts.total:,} training images of {counts.num_classes} classes, '
            f'imbalance factor {counts.imbalance_factor:.4g} ({counts.source})'),
        f'batch     {batch.global_size} = {plan.world.size} processes x {batch.size} images x {batch.accum_steps} '
        f'steps, on {plan.world.device.type}',
        f'run       {plan.folder}, {runs}, seed {settings.run.seed}',
        *plan.splits.notes,
    ]
    if settings.average.model_ema:
        lines.append(f'Averaged weights (EMA, decay {settings.average.model_ema_decay}) are what is evaluated.')
    run, validated = settings.run, plan.splits.val is not None
    if run.watch_test and validated:
        lines.append('--watch-test has no effect here, since there is a validation split.')
    if run.eval_metric != type(run).eval_metric and not validated and start_epoch is not None:
        lines.append('--eval-metric has no effect here, since there is no validation split to choose a checkpoint by.')
    lines += filter(None, [settings.precision.advice(plan.world.device)])
    _logger.info('\n'.join(lines))


def show_epoch(epoch: int, epochs: int, result: EvalResult | None) -> None:
    """Say how an epoch (0-based) went."""
    if result is not None:
        shown = '  '.join(f'{name} {"n/a" if value is None else format(value, ".2f")}'
                          for name, value in result.metrics().items())
        _logger.info('epoch %d/%d  evaluation  %s', epoch + 1, epochs, shown)


def show_profile(profile: NoProfile) -> None:
    """Say where the time of the epochs went, if that was measured."""
    if (table := profile.table()) is not None:
        _logger.info('\n%s', table)


def report_run(plan: Plan, task: TrainingTask, keeper: Keeper, start_epoch: int) -> None:
    """Report on the best checkpoint, or on the last one where none was chosen."""
    model = evaluation_model(task)
    epochs = max(start_epoch, plan.settings.schedule.epochs)
    if keeper.best is not None:
        epoch = load_best(plan.folder, unwrap_model(model)) + 1
        metric = plan.settings.run.eval_metric
        weights = EvaluatedWeights(BEST, epoch, epochs, chosen_by=f'validation {metric}')
    else:
        weights = EvaluatedWeights(LAST, epochs, epochs)
    files = [SETTINGS_FILE, 'summary.csv', 'log.jsonl', LAST, *([BEST] if keeper.best else [])]
    report_on(plan, model, weights, files)


def report_on(plan: Plan, model: nn.Module, weights: EvaluatedWeights, files: Collection[str]) -> None:
    """Evaluate the model that the run ends with on the test split, once, and say so.

    Args:
        plan: Of the run.
        model: What is evaluated.
        weights: Which ones they are.
        files: What the run has written so far.
    """
    splits, folder = plan.splits, plan.folder
    dataset, split = (splits.test, 'test') if splits.test is not None else (splits.val, 'val')
    if dataset is None:
        _logger.info('There is no test or validation split, so nothing was evaluated; the run is in %s', folder)
        return
    result = plan.evaluate(model, dataset)
    if not plan.world.is_primary:
        return
    settings = plan.settings
    result.write_json(
        folder / f'{split}.json', model=settings.model.model, dataset=settings.data.dataset, split=split,
        checkpoint=weights.in_words(), weights=weights.to_dict(), use_ema=settings.average.model_ema,
        precision=settings.precision.amp_dtype if settings.precision.amp else 'float32')
    files = [*files, f'{split}.json']
    if splits.class_counts is not None:
        result.write_per_class_csv(folder / f'{split}_per_class.csv', splits.class_counts)
        files.append(f'{split}_per_class.csv')
    _logger.info('\n%s split, %s\n%s\n\nin %s: %s', split, weights.in_words(), result.table(), folder, ', '.join(files))

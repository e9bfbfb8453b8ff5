"""What a run says of itself: before it begins, after each epoch, and of the model that it ends with."""
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import yaml
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import Dataset

from nbn_timm.data.dataset import pictures_digest
from nbn_timm.data.val_split import SPLIT_FILE
from nbn_timm.datasets import draws_validation, has_validation
from nbn_timm.errors import InputError
from nbn_timm.evaluation import Result
from nbn_timm.evaluation.temperature import FittedTemperature, calibrate
from nbn_timm.files import write_text_atomic
from nbn_timm.models.run_folder import ADJUSTED, BEST, LAST
from nbn_timm.models.tuning import AdapterFile, save_adapter
from nbn_timm.models.weight_files import DIGEST, digest_of_source
from nbn_timm.report import norm_sizes, read_run, write_report
from nbn_timm.seals import sealed_text
from nbn_timm.settings import SettingGroups
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.adjust import adjusted
from nbn_timm.training.calibrating import in_words, write_calibration
from nbn_timm.training.keeper import Keeper
from nbn_timm.training.label_sets import settle_thresholds
from nbn_timm.training.plan import Plan
from nbn_timm.training.profile import NoProfile
from nbn_timm.training.run_checkpoint import load_best
from nbn_timm.training.settings import TrainSettings, public_record
from nbn_timm.training.task import evaluation_model

SETTINGS_FILE = 'args.yaml'
REPORT = 'report.html'
ADAPTER_FILE = 'adapter.safetensors'

_logger = logging.getLogger(__name__)


def write_settings(plan: Plan) -> None:
    """Write args.yaml, from which `--config` repeats the run."""
    if plan.world.is_primary:
        write_text_atomic(plan.folder / SETTINGS_FILE, config_text(plan.settings))


def config_text(settings: SettingGroups) -> str:
    """All settings as a config that `--config` reads."""
    known = {key: value for key, value in settings.values().items() if key not in ('config', 'resume')}
    return '# Settings of this run; `--config` reads this file.\n' + sealed_text(yaml.safe_dump(known, sort_keys=False))


def announce(plan: Plan, model: nn.Module, start_epoch: int | None = None, more: Collection[str] = ()) -> None:
    """Say what is about to run, and `more`; without a start epoch it is a second stage of one pass."""
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
        *more,
    ]
    if settings.average.model_ema:
        average = settings.average
        up_to = 'growing up to ' if average.model_ema_warmup else ''
        lines.append(f'Averaged weights (EMA, decay {up_to}{average.model_ema_decay}) are what is evaluated.')
    if settings.average.swa_epochs:
        lines.append(f'The mean of the weights after the last {settings.average.swa_epochs} epochs (SWA) is what is '
                     'evaluated.')
    optimizer = settings.optimizer
    if optimizer.lr_base and start_epoch is not None:
        lines.append(f'Learning rate {optimizer.for_batch(batch.global_size).lr:.6g}, from --lr-base '
                     f'{optimizer.lr_base:g} for {optimizer.lr_base_size} images per update ({optimizer.scale()}).')
    if has_validation(settings.data) is None:  # else it has been told
        lines += _unwatched(settings, plan.splits.val is not None, start_epoch is not None)
    lines += filter(None, [settings.precision.advice(plan.world.device)])
    _logger.info('\n'.join(lines))


def _unwatched(settings: TrainSettings, validated: bool, trains: bool) -> list[str]:
    """Settings that have no effect for what the data have shown: there is a validation split, or there is none."""
    run, none = settings.run, 'since there is no validation split'
    found = {
        '--watch-test': run.watch_test and validated and 'since there is a validation split',
        '--patience': settings.schedule.patience and trains and not validated and none,
        '--eval-metric': run.eval_metric != type(run).eval_metric and trains and not validated
        and f'{none} to choose a checkpoint by'}
    return [f'{name} has no effect here, {reason}.' for name, reason in found.items() if reason]


def write_page(
        folder: Path,
        groups: type[SettingGroups],
        model: nn.Module,
        dataset: Dataset | None,
        processes: int,
) -> None:
    """Write report.html, of what a run with such settings has left in its folder."""
    try:
        norms = norm_sizes(unwrap_model(model))
    except InputError:  # a network without BatchNorm
        norms = None
    write_report(folder / REPORT, read_run(folder), groups, dataset, norms, processes)


def show_epoch(epoch: int, epochs: int, result: Result | None) -> None:
    """Say how an epoch (0-based) went."""
    if result is not None:
        shown = '  '.join(f'{name} {"n/a" if value is None else format(value, ".2f")}'
                          for name, value in result.headline().items())
        _logger.info('epoch %d/%d  evaluation  %s', epoch + 1, epochs, shown)


def show_profile(profile: NoProfile) -> None:
    """Say where the time of the epochs went, if that was measured."""
    if (table := profile.table()) is not None:
        _logger.info('\n%s', table)


def report_run(plan: Plan, task: TrainingTask, keeper: Keeper, epochs: int) -> None:
    """Report on the best checkpoint, or on the last one where none was chosen.

    Args:
        plan: Of the run.
        task: With the weights of the last epoch.
        keeper: Knows the best one.
        epochs: That were trained.
    """
    model, settings = evaluation_model(task), plan.settings
    if keeper.best is not None:
        epoch = load_best(plan.folder, unwrap_model(model)) + 1
        by = f'validation {settings.run.eval_metric}'
        if settings.run.kept_epoch == 'last':
            by = f'--kept-epoch last and not by {by}'
        weights = EvaluatedWeights(BEST, epoch, epochs, chosen_by=by)
    else:
        weights = EvaluatedWeights(LAST, epochs, epochs)
    divided = [SPLIT_FILE] if draws_validation(plan.settings.data) else []
    files = [SETTINGS_FILE, *divided, 'summary.csv', 'log.jsonl', LAST, *([BEST] if keeper.best else [])]
    if settings.imbalance.imbalance:
        weights = adjusted(plan, model, weights)
        files += [weights.file] if weights.file == ADJUSTED else []
    if keep_adapter(plan, unwrap_model(model), weights.file):
        files.append(ADAPTER_FILE)
    report_on(plan, model, weights, files)


def keep_adapter(plan: Plan, model: nn.Module, file: str) -> bool:
    """Write what a run with --tune has trained as a file that goes onto the plain network; returns whether it did.

    Args:
        plan: Of the run.
        model: With the weights that the run ends with.
        file: In the run's folder, which has these weights and the record.
    """
    settings, tuning = plan.settings, plan.settings.tuning
    if tuning.tune is None or settings.model.add_nbn or settings.second_stage.stage:
        return False
    if plan.world.is_primary:
        save_adapter(model, plan.folder / ADAPTER_FILE, AdapterFile(
            settings.model.model, plan.num_classes, tuning.tune, tuning.tune_kwargs, tuning.head, tuning.head_kwargs,
            {**settings.input.as_model_kwargs(), **settings.model.model_kwargs},
            record=public_record(checkpoint_record(str(plan.folder / file))).to_dict()))
    return True


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
    thresholds = settle_thresholds(plan, model, weights) if splits.label_sets else None
    calibration = None if splits.label_sets else calibrate_run(plan, model, weights)
    result, predictions = plan.evaluate_and_keep(model, dataset, thresholds)
    if predictions is None:
        return
    settings = plan.settings
    answers = {} if thresholds is None else {'thresholds': thresholds.to_dict()}
    # A run that had nothing left to train has no file.
    digest = digest_of_source(folder / weights.file, unwrap_model(model), averaged(plan, weights))
    result.write_json(
        folder / f'{split}.json', model=settings.model.model, dataset=settings.data.dataset, split=split,
        checkpoint=weights.in_words(), weights=weights.to_dict(), use_ema=averaged(plan, weights),
        precision=settings.precision.name, calibration=None if calibration is None else calibration.to_dict(),
        **{DIGEST: digest}, **answers)
    replace(predictions, digest=pictures_digest(dataset)).write(folder / f'{split}_predictions.npz')
    files = [*files, f'{split}.json', f'{split}_predictions.npz']
    if splits.classes is not None:
        result.write_per_class_csv(folder / f'{split}_per_class.csv', splits.classes)
        files.append(f'{split}_per_class.csv')
    if settings.run.report:
        write_page(folder, TrainSettings, model, dataset, plan.world.size)
        files.append(REPORT)
    _logger.info('\n%s split, %s\n%s\n\n%s\n\nin %s: %s', split, weights.in_words(), result.table(),
                 result.further_table(), folder, ', '.join(files))


def averaged(plan: Plan, weights: EvaluatedWeights) -> bool:
    """Whether the weights that a run ends with lie as averaged ones in their file, which a second stage's do not."""
    return plan.settings.average.averages and weights.second_stage is None


def calibrate_run(plan: Plan, model: nn.Module, weights: EvaluatedWeights) -> FittedTemperature | None:
    """Fit a temperature on the validation split, if there is one, and keep it in the checkpoint of the run."""
    if plan.splits.val is None:
        return None
    logits, labels = plan.logits(model, plan.splits.val)
    if not plan.world.is_primary:
        return None
    found = calibrate(logits, labels, 'val', averaged(plan, weights))
    if found is not None:
        write_calibration(plan.folder / weights.file, found)
    _logger.info(in_words(found, len(labels)))
    return found

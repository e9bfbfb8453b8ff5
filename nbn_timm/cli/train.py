"""Train a model for long-tailed recognition: parse, build, run.

    nbn-train                                                  # the quick start
    torchrun --nproc-per-node 8 train.py --config configs/resnext50_nbn.yaml --data-dir /data/imagenet
"""
import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from timm.task import TrainingTask
from timm.utils import NativeScaler, unwrap_model
from torch import nn
from torch.utils.data import Dataset

from nbn_timm.cli.train_args import build_parser
from nbn_timm.config import parse_args
from nbn_timm.data import Splits
from nbn_timm.datasets import create_splits
from nbn_timm.errors import InputError, run_cli
from nbn_timm.evaluation import EvalResult
from nbn_timm.files import write_text_atomic
from nbn_timm.models.create import model_settings
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.second_stages import FittedStage, TrainedStage
from nbn_timm.training.batch import BatchPlan, plan_batch
from nbn_timm.training.build import (
    amp_dtype,
    build_evaluator,
    build_model,
    build_optimizer,
    build_scheduler,
    build_stage,
    build_task,
    build_train_loader,
    connect_stage,
    data_settings,
    input_format,
    keep_small_images,
)
from nbn_timm.training.build_mixing import build_mixing
from nbn_timm.training.distributed import World, close_world, init_world, seed_everything
from nbn_timm.training.fit import fit
from nbn_timm.training.log import RunLog, setup_logging
from nbn_timm.training.loop import EpochResult, LoopSettings, train_one_epoch
from nbn_timm.training.progress import Progress
from nbn_timm.training.run_checkpoint import (
    BEST,
    LAST,
    Best,
    checkpoint_state,
    exclusive_run,
    find_resume,
    is_better,
    load_best,
    resume_run,
    save_checkpoint,
)
from nbn_timm.training.task import begin_epoch, evaluation_model, prepare_task, share_statistics

_logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; see `--help`.

    Raises:
        InputError: Something given is wrong.
    """
    args = parse_train_args(argv)
    world = init_world(args.device)
    setup_logging(world.is_primary)
    folder = Path(args.output, args.experiment or default_experiment(args))
    with exclusive_run(folder, world):
        train(args, world, folder)
        world.barrier()  # torch 2.7's gloo can hang when the group is closed right after a reduction
    close_world(world)


def console() -> int:
    """Entry point of the command `nbn-train`."""
    return run_cli(main, 'nbn-train')


def parse_train_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags and config; with neither a config nor anything to train (on), take the quick start.

    A second stage takes the model of its initial checkpoint, unless told otherwise.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(build_parser(), argv)
    if not any((args.config, args.dataset, args.data_dir, args.train_list, args.model)):
        args = parse_args(build_parser(), ['--config', 'quickstart', *argv])
    if args.stage and args.initial_checkpoint:
        args.model, args.add_nbn, args.model_kwargs = model_settings(
            args.model, args.add_nbn or None, args.model_kwargs, read_checkpoint(args.initial_checkpoint))
    for name in ('dataset', 'model'):
        if getattr(args, name) is None:
            if args.stage and name == 'model':
                raise InputError(f'--stage {args.stage} begins with a finished network: give its --initial-checkpoint')
            raise InputError(f'there is no --{name}: give one, or a --config that has it')
    return args


def train(args: argparse.Namespace, world: World, folder: Path) -> None:
    """Build everything in the order in which the data flows, then train and report."""
    resume_from = find_resume(args.resume, folder)
    batch = plan_batch(world.size, args.batch_size, args.grad_accum_steps, args.global_batch_size)
    seed_everything(args.seed)
    if world.device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True

    with world.primary_first():
        splits = create_splits(data_settings(args, batch))
    check_eval_metric(args.eval_metric, splits)
    stage = build_stage(args, build_parser().get_default)
    model = build_model(args, splits, world, stage)
    defaults = input_format(args, splits.defaults, model)
    settings = {**vars(args), 'world_size': world.size, **asdict(defaults)}
    evaluate_split = build_evaluator(args, splits, defaults, model.num_classes, batch, world)
    if isinstance(stage, FittedStage):
        if world.is_primary:
            write_text_atomic(folder / 'args.yaml', config_text(args))
        announce(args, folder, splits, model, batch, world)
        which, files = fit(args, stage, splits, defaults, model, batch, world, folder, settings)
        report_on(args, folder, splits, model, which, ['args.yaml', *files], evaluate_split, world)
        return
    assert stage is None or isinstance(stage, TrainedStage)
    splits = keep_small_images(args, splits, defaults)
    loader = build_train_loader(args, splits, defaults, batch, world, model)
    updates_per_epoch = -(-len(loader) // batch.accum_steps)
    mixing = build_mixing(args, splits, defaults, batch, world, loader, model.num_classes)
    task = build_task(args, model, splits, defaults, mixing, world, stage)
    optimizer = build_optimizer(args, model, stage)
    if stage is not None:
        connect_stage(args, stage, splits, defaults, loader, task, optimizer, world)
    scheduler = build_scheduler(args, optimizer, updates_per_epoch)
    scaler = NativeScaler(world.device.type) if args.amp and args.amp_dtype == 'float16' else None
    ema_decay = args.model_ema_decay if args.model_ema else None
    prepare_task(task, world, ema_decay, args.model_ema_warmup, args.torchcompile)

    start_epoch, best = 0, None
    if resume_from:
        start_epoch, best = resume_run(
            resume_from, task, optimizer, args.model, settings, splits.class_counts, scaler)
        goes_on_here = resume_from.resolve() == (folder / LAST).resolve() and (folder / BEST).exists()
        best = best if goes_on_here else None
    log = None
    if world.is_primary:
        write_text_atomic(folder / 'args.yaml', config_text(args))
        wandb_project = args.wandb_project if args.log_wandb else None
        log = RunLog(folder, start_epoch, args.log_tensorboard, wandb_project, settings)
    announce(args, folder, splits, model, batch, world, start_epoch)

    watched = splits.val or (splits.test if args.watch_test else None)
    loop = LoopSettings(batch.accum_steps, amp_dtype(args), args.channels_last, args.clip_grad, args.clip_mode)
    progress = Progress(args.epochs, updates_per_epoch, args.log_interval, _logger.info if world.is_primary else None)
    for epoch in range(start_epoch, args.epochs):
        seed_everything(args.seed, epoch, world.rank)
        loader.set_epoch(epoch)
        begin_epoch(task, epoch)
        scheduler.step(epoch)
        scheduler.step_update(epoch * updates_per_epoch)
        if mixing is not None:
            mixing.set_epoch(epoch)
        trained = train_one_epoch(
            task, loader, optimizer, loop, progress, world, epoch, scheduler, scaler, mixing)
        share_statistics(task, world, reduce=args.dist_bn == 'reduce')
        result = evaluate_split(evaluation_model(task), watched) if watched is not None else None
        metric = result.metrics()[args.eval_metric] if result and splits.val is not None else None
        is_best = False
        if metric is not None and is_better(metric, best, args.eval_metric):
            best, is_best = Best(metric, epoch), True
        if log is not None:
            log_epoch(log, epoch, args.epochs, trained, result)
            save_checkpoint(folder, checkpoint_state(
                task, optimizer, epoch, args.model, settings, splits.class_counts, metric, best, scaler), is_best)
    if log is not None:
        log.close()
    world.barrier()
    report(args, folder, splits, task, max(start_epoch, args.epochs), best, evaluate_split, world)


def default_experiment(args: argparse.Namespace) -> str:
    """Name of a run by what it trains: model, data, what is unusual about its loss, sampler, mixing and stage, seed."""
    mixing = [name for name in ('mixup', 'cutmix', 'remix', 'cmo') if getattr(args, name)]
    unusual = [name for name in (args.loss, args.sampler, *mixing, args.stage,
                                 'distilled' if args.kd_checkpoint else None)
               if name not in ('cross_entropy', 'instance_balanced', None)]
    return '-'.join([args.model, args.dataset, *unusual, f's{args.seed}']).replace('/', '_')


def check_eval_metric(name: str, splits: Splits) -> None:
    """Refuse to choose checkpoints by the accuracy of a split that has no classes."""
    if splits.val is None or name not in ('many', 'medium', 'few'):
        return
    if splits.class_counts is None:
        raise InputError(f'--eval-metric {name} needs the training images per class: give --class-counts FILE')
    if not dict(splits.class_counts.shot_split().items())[name]:
        raise InputError(f'--eval-metric {name} is of no use: no class of {splits.class_counts.source} is {name}-shot')


def announce(
        args: argparse.Namespace,
        folder: Path,
        splits: Splits,
        model: nn.Module,
        batch: BatchPlan,
        world: World,
        start_epoch: int | None = None,
) -> None:
    """Say what is about to run; without a start epoch it is a stage of one pass."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counts = splits.class_counts
    runs = f'--stage {args.stage}' if start_epoch is None else f'epochs {start_epoch + 1} to {args.epochs}'
    lines = [
        f'model     {args.model}, {parameters:,} parameters',
        f'data      {args.dataset}' + ('' if counts is None else
            f': {counts.total:,} training images of {counts.num_classes} classes, '
            f'imbalance factor {counts.imbalance_factor:.4g} ({counts.source})'),
        f'batch     {batch.global_size} = {world.size} processes x {batch.size} images x {batch.accum_steps} steps, '
        f'on {world.device.type}',
        f'run       {folder}, {runs}, seed {args.seed}',
        *splits.notes,
    ]
    if args.model_ema:
        lines.append(f'Averaged weights (EMA, decay {args.model_ema_decay}) are what is evaluated.')
    _logger.info('\n'.join(lines))


def config_text(args: argparse.Namespace) -> str:
    """All settings as a config that `--config` reads."""
    known = {key: value for key, value in vars(args).items() if key not in ('config', 'resume')}
    return '# Settings of this run; `--config` reads this file.\n' + yaml.safe_dump(known, sort_keys=False)


def log_epoch(log: RunLog, epoch: int, epochs: int, trained: EpochResult, result: EvalResult | None) -> None:
    """Log an epoch and say how it went."""
    metrics = result.metrics() if result else None
    rate = trained.images / trained.seconds
    log.write(epoch, {'loss': trained.loss, 'images_per_second': round(rate, 1)}, metrics, trained.lr)
    if metrics is not None:
        shown = '  '.join(f'{name} {"n/a" if value is None else format(value, ".2f")}'
                          for name, value in metrics.items())
        _logger.info('epoch %d/%d  evaluation  %s', epoch + 1, epochs, shown)


def report(
        args: argparse.Namespace,
        folder: Path,
        splits: Splits,
        task: TrainingTask,
        epochs: int,
        best: Best | None,
        evaluate_split: Callable[[nn.Module, Dataset], EvalResult],
        world: World,
) -> None:
    """Report on the best checkpoint, or on the last one where none was chosen."""
    model = evaluation_model(task)
    if best is not None:
        epoch = load_best(folder, unwrap_model(model))
        which = f'epoch {epoch + 1} of {epochs} ({BEST}), chosen by validation {args.eval_metric}'
    else:
        which = f'epoch {epochs} ({LAST}), the last one, since there is no validation split to choose by'
    files = ['args.yaml', 'summary.csv', 'log.jsonl', LAST, *([BEST] if best else [])]
    report_on(args, folder, splits, model, which, files, evaluate_split, world)


def report_on(
        args: argparse.Namespace,
        folder: Path,
        splits: Splits,
        model: nn.Module,
        which: str,
        files: list[str],
        evaluate_split: Callable[[nn.Module, Dataset], EvalResult],
        world: World,
) -> None:
    """Evaluate the model that the run ends with on the test split, once, and say so.

    Args:
        args: The flags.
        folder: Of the run.
        splits: The data.
        model: What is evaluated.
        which: Its checkpoint, in words.
        files: What the run has written so far.
        evaluate_split: Evaluates a model on a split.
        world: This process.
    """
    dataset, split = (splits.test, 'test') if splits.test is not None else (splits.val, 'val')
    if dataset is None:
        _logger.info('There is no test or validation split, so nothing was evaluated; the run is in %s', folder)
        return
    result = evaluate_split(model, dataset)
    if not world.is_primary:
        return
    result.write_json(folder / f'{split}.json', model=args.model, dataset=args.dataset, split=split, checkpoint=which)
    files = [*files, f'{split}.json']
    if splits.class_counts is not None:
        result.write_per_class_csv(folder / f'{split}_per_class.csv', splits.class_counts)
        files.append(f'{split}_per_class.csv')
    _logger.info('\n%s split, %s\n%s\n\nin %s: %s', split, which, result.table(), folder, ', '.join(files))


if __name__ == '__main__':
    sys.exit(console())

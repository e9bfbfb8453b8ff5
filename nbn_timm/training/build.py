"""The parts of a training run from its flags."""
import argparse
import logging
from collections.abc import Callable, Sized
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Sampler

from nbn_timm.data import (
    AugmentSettings,
    DataDefaults,
    DataSettings,
    MemoryImages,
    Splits,
    TrainLoader,
    create_eval_loader,
    create_train_loader,
    keep_in_memory,
)
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult, LongTailEvaluator, RoutingEvaluator, evaluate
from nbn_timm.layers import RectifiedLinear, convert_sync_batchnorm
from nbn_timm.losses import create_loss, takes_experts, takes_features, takes_soft_targets
from nbn_timm.losses.deferred_loss import Deferred
from nbn_timm.mixing import Mixing
from nbn_timm.models import MultiExpert, RoutedExperts
from nbn_timm.models.create import check_input_size, create_model, model_settings, training_arguments
from nbn_timm.models.weight_files import load_weights, read_checkpoint
from nbn_timm.samplers import create_sampler
from nbn_timm.second_stages import Stage, StageRun, TrainedStage, create_stage
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.distributed import World
from nbn_timm.training.features import WithFeatures
from nbn_timm.training.optim import create_optimizer, create_scheduler
from nbn_timm.training.task import DistillationTask, StageTask

_logger = logging.getLogger(__name__)


def data_settings(args: argparse.Namespace, batch: BatchPlan) -> DataSettings:
    """What to read."""
    names = [field.name for field in fields(DataSettings) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names}
    return DataSettings(**{**given, 'class_counts_file': args.class_counts, 'batch_size': batch.size})


def build_stage(args: argparse.Namespace, default: Callable[[str], Any]) -> Stage | None:
    """The second stage, if there is one.

    Args:
        args: The flags.
        default: Of a flag.

    Raises:
        InputError: Flags are given that the stage, or the lack of one, would leave without effect.
    """
    if args.stage is None:
        for name in ('stage_kwargs', 'freeze_bn'):
            if getattr(args, name) != default(name):
                raise InputError(f'{flag(name)} is for a second stage: give a --stage or leave it out')
        return None
    stage = create_stage(args.stage, **args.stage_kwargs)
    if not (args.initial_checkpoint or args.pretrained):
        raise InputError(f'--stage {args.stage} begins with a finished network: give its --initial-checkpoint')
    unused = [name for name in stage.unused if getattr(args, name) != default(name)]
    if unused and isinstance(stage, TrainedStage):
        raise InputError(f'{flag(unused[0])} would have no effect on --stage {args.stage}: leave it out')
    needs = stage.needs if isinstance(stage, TrainedStage) else {}
    for name, value in needs.items():
        if getattr(args, name) != value:
            remedy = f'give {flag(name)} {value}' if value else 'leave it out'
            raise InputError(f'--stage {args.stage} is not for {flag(name)} {getattr(args, name)}: {remedy}')
    if unused:  # the config of the first stage says how to train, and to read its data it may be given here as well
        _logger.info('--stage %s trains nothing, so these settings have no effect: %s', args.stage, ', '.join(unused))
    if args.clip_grad and args.clip_mode == 'agc':
        raise InputError('--clip-mode agc leaves the classifier out, and a --stage trains little else: give norm or '
                         'value')
    return stage


def build_model(args: argparse.Namespace, splits: Splits, world: World, stage: Stage | None = None) -> Any:
    """The model on the device, with its initial weights, and of several experts set to what the loss takes.

    Raises:
        InputError: Something given is wrong.
    """
    num_classes = args.num_classes or splits.num_classes
    with world.primary_first():
        model = create_model(args.model, num_classes, args.pretrained, args.drop, args.drop_path, args.bn_momentum,
                             args.add_nbn, **args.model_kwargs)
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint)
    if isinstance(stage, TrainedStage):
        model = stage.prepare(model)
    if takes_experts(args.loss):
        if not isinstance(model, MultiExpert):
            raise InputError(f"loss '{args.loss}' is for the experts of a RIDE network, and '{args.model}' has none: "
                             "give --model with _ride in its name, or another --loss")
        model.set_expert_logits()
    if args.sync_bn:
        if world.device.type == 'cpu':
            raise InputError('--sync-bn needs GPUs: torch has no synchronised BatchNorm on the CPU')
        model = convert_sync_batchnorm(model)
    model.to(world.device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def input_format(args: argparse.Namespace, published: DataDefaults, model: Any) -> DataDefaults:
    """The benchmark's input format, or the model's for images of one's own, at the size that was asked for."""
    defaults = published.for_model(model.pretrained_cfg)
    channels = defaults.input_size[0]
    defaults = defaults.override(input_size=(channels, args.img_size, args.img_size) if args.img_size else None)
    check_input_size(model, args.model, defaults.input_size)
    return defaults


def augment_settings(args: argparse.Namespace) -> AugmentSettings:
    """The departures from the published augmentation."""
    return AugmentSettings(
        args.no_aug, pair(args.scale), pair(args.ratio), args.hflip, args.vflip, args.rotation, args.color_jitter,
        force_color_jitter=args.force_color_jitter, aa=args.aa, interpolation=args.train_interpolation,
        reprob=args.reprob, remode=args.remode, recount=args.recount, cutout=args.cutout)


def keep_small_images(args: argparse.Namespace, splits: Splits, defaults: DataDefaults) -> Splits:
    """The splits that every epoch reads, in memory where their images are small and of one size."""
    def keep(dataset: Dataset | None) -> Dataset | None:
        return dataset and keep_in_memory(dataset, defaults, augment_settings(args), args.in_memory, args.workers)

    train = keep(splits.train)
    if not isinstance(train, MemoryImages):
        return splits
    watched_test = keep(splits.test) if args.watch_test and splits.val is None else splits.test
    return replace(splits, train=train, val=keep(splits.val), test=watched_test)


def build_train_loader(
        args: argparse.Namespace,
        splits: Splits,
        defaults: DataDefaults,
        batch: BatchPlan,
        world: World,
        model: nn.Module,
) -> TrainLoader:
    """The training loader around the sampler, for `model`; a streamed dataset comes in its own order."""
    if splits.train is None:
        raise InputError(f"dataset '{args.dataset}' has no training split here: give --train-list or --data-dir")
    rectified = any(isinstance(module, RectifiedLinear) for module in model.modules())
    if rectified and batch.size == 1 and not (args.sync_bn and world.size > 1):
        raise InputError(f"model '{args.model}' normalises its logits over the batch, which takes more than one image "
                         'per process: give a --batch-size of at least 2')
    sampler, dataset, targets = None, splits.train, splits.train_targets
    if targets is None and args.sampler != 'instance_balanced':
        raise InputError(f"--sampler {args.sampler} needs the labels of all training images, which '{args.dataset}' "
                         'does not tell: use a list or folder dataset')
    if not isinstance(dataset, IterableDataset) and isinstance(dataset, Sized):
        # A permutation needs the number of images alone.
        targets = np.zeros(len(dataset), dtype=np.int64) if targets is None else targets
        sampler = create_sampler(args.sampler, targets, splits.class_counts, args.seed, world.rank, world.size,
                                 args.epochs, **args.sampler_kwargs)
        if sampler.stage not in (None, args.stage):
            raise InputError(f"sampler '{args.sampler}' learns in the second stage '{sampler.stage}', and without it "
                             'would stay as it began: give another --sampler')
    elif args.sampler_kwargs:
        raise InputError(f"'{args.dataset}' comes in an order of its own, so --sampler-kwargs would have no effect: "
                         'leave them out')
    return train_loader(args, defaults, world, dataset, sampler, batch.size, args.seed)


def train_loader(
        args: argparse.Namespace,
        defaults: DataDefaults,
        world: World,
        dataset: Dataset,
        sampler: Sampler | None,
        batch_size: int,
        seed: int,
) -> TrainLoader:
    """A loader of training images, augmented as the flags say; some methods need more than one."""
    return create_train_loader(
        dataset, sampler, batch_size=batch_size, defaults=defaults, augment=augment_settings(args),
        num_workers=args.workers, device=world.device, seed=seed, rank=world.rank, pin_memory=args.pin_mem)


def build_task(
        args: argparse.Namespace,
        model: nn.Module,
        splits: Splits,
        defaults: DataDefaults,
        mixing: Mixing | None,
        world: World,
        stage: TrainedStage | None = None,
) -> ClassificationTask:
    """The model and its loss, and a teacher or a second stage if there is one."""
    loss = (stage and stage.loss()) or build_loss(args, splits, mixing)
    if takes_features(args.loss):
        for other, given in (('--stage', args.stage), ('--kd-checkpoint', args.kd_checkpoint)):
            if given:
                raise InputError(f"loss '{args.loss}' takes features, which training with {other} does not hand on: "
                                 f'leave out {other}, or give another --loss')
        model = WithFeatures(model)
    if stage is not None:
        return StageTask(model, loss, stage, args.freeze_bn is not False, world.device)
    if not args.kd_checkpoint:
        for name in ('kd_model_name', 'kd_model_kwargs', 'kd_temperature', 'distill_loss_weight', 'kd_target',
                     'kd_teacher_mode'):
            if getattr(args, name) not in (None, {}):
                raise InputError(f'{flag(name)} is for a teacher, and there is none: give its --kd-checkpoint')
        return ClassificationTask(model, loss, device=world.device, verbose=False)
    teacher = build_teacher(args, model, defaults)
    return DistillationTask(
        model, teacher, loss, args.kd_target or 'mean',
        1.0 if args.distill_loss_weight is None else args.distill_loss_weight, args.kd_temperature or 1.5,
        args.kd_teacher_mode == 'train', world.device)


def build_loss(args: argparse.Namespace, splits: Splits, mixing: Mixing | None) -> nn.Module:
    """The loss; where targets are mixed, they come smoothed."""
    if mixing is not None and not takes_soft_targets(args.loss):
        raise InputError(f"loss '{args.loss}' takes labels and no mixed targets: leave out --mixup, --cutmix, --remix "
                         'and --cmo, or give another --loss')
    settings = dict(args.loss_kwargs)
    if args.smoothing and mixing is None:
        if 'smoothing' in settings:
            raise InputError('the label smoothing is given twice, as --smoothing and in --loss-kwargs: keep one')
        settings['smoothing'] = args.smoothing
    for key in ('name', 'class_counts'):
        if key in settings:
            raise InputError(f"--loss-kwargs has '{key}', which is no setting of a loss: use --loss and --class-counts")
    loss = create_loss(args.loss, splits.class_counts, **settings)
    if isinstance(loss, Deferred) and loss.start_epoch >= args.epochs:
        _logger.info("loss '%s' starts after %d epochs, and this run ends after %d: it will never be used",
                     args.loss, loss.start_epoch, args.epochs)
    return loss


def build_teacher(args: argparse.Namespace, student: Any, defaults: DataDefaults) -> nn.Module:
    """The teacher of --kd-checkpoint with its weights (averaged ones, if it has them).

    Raises:
        InputError: It cannot be had, or was trained on other images or classes.
    """
    checkpoint = read_checkpoint(args.kd_checkpoint)
    name, nbn, kwargs = model_settings(
        args.kd_model_name, None, args.kd_model_kwargs, checkpoint, '--kd-model-name')
    teacher = create_model(name, student.num_classes, nbn=nbn, **kwargs)
    load_weights(teacher, args.kd_checkpoint)
    recorded = training_arguments(checkpoint)
    for key in ('mean', 'std'):
        if recorded.get(key) is not None and tuple(recorded[key]) != tuple(getattr(defaults, key)):
            raise InputError(f"the teacher '{args.kd_checkpoint}' was trained on images of {key} {recorded[key]}, and "
                             f'these have {getattr(defaults, key)}: give a teacher of the same data')
    return teacher.to(memory_format=torch.channels_last) if args.channels_last else teacher


def build_optimizer(
        args: argparse.Namespace,
        model: nn.Module,
        stage: TrainedStage | None = None,
) -> torch.optim.Optimizer:
    """The optimizer, of what is trained."""
    trained = model if stage is None else stage.trained(model)
    return create_optimizer(
        trained, args.opt, args.lr, args.weight_decay, args.momentum, args.decay_1d, **args.opt_kwargs)


def connect_stage(
        args: argparse.Namespace,
        stage: TrainedStage,
        splits: Splits,
        defaults: DataDefaults,
        loader: TrainLoader,
        task: ClassificationTask,
        optimizer: torch.optim.Optimizer,
        world: World,
) -> None:
    """Let the stage know the run."""
    stage.connect(StageRun(
        splits, loader, partial(train_loader, args, defaults, world), task.criterion, optimizer, world.device,
        world.rank, world.size, args.seed))


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """The learning-rate schedule."""
    return create_scheduler(
        optimizer, args.sched, args.epochs, updates_per_epoch, args.sched_on_updates, args.min_lr, args.warmup_epochs,
        args.warmup_lr, args.decay_epochs, args.decay_milestones, args.decay_rate)


def build_evaluator(
        args: argparse.Namespace,
        splits: Splits,
        defaults: DataDefaults,
        num_classes: int,
        batch: BatchPlan,
        world: World,
) -> Callable[[nn.Module, Dataset], EvalResult]:
    """A function that evaluates a model on a split."""
    def evaluate_split(model: nn.Module, dataset: Dataset) -> EvalResult:
        loader = create_eval_loader(
            dataset, batch_size=args.validation_batch_size or batch.size, defaults=defaults, num_workers=args.workers,
            device=world.device, rank=world.rank, world_size=world.size, pin_memory=args.pin_mem)
        counting = (num_classes, splits.class_counts, world.device)
        unwrapped = unwrap_model(model)
        evaluator = (RoutingEvaluator(unwrapped.multiply_adds(defaults.input_size), *counting)
                     if isinstance(unwrapped, RoutedExperts) else LongTailEvaluator(*counting))
        return evaluate(model, loader, evaluator, world.device, amp_dtype(args), args.channels_last, world.distributed)

    return evaluate_split


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type of autocast, None without."""
    return getattr(torch, args.amp_dtype) if args.amp else None


def pair(values: list[float] | None) -> tuple[float, float] | None:
    """Two numbers of a flag."""
    return None if values is None else (values[0], values[1])


def flag(name: str) -> str:
    """A flag by its name in a config."""
    return f"--{name.replace('_', '-')}"

"""The parts of a training run from its flags."""
import argparse
from collections.abc import Callable, Sized
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from nbn_timm.data import (
    AugmentSettings,
    DataDefaults,
    DataSettings,
    Splits,
    TrainLoader,
    create_eval_loader,
    create_train_loader,
)
from nbn_timm.engine.batch import BatchPlan
from nbn_timm.engine.distributed import World
from nbn_timm.engine.model import check_input_size, create_model
from nbn_timm.engine.optim import create_optimizer, create_scheduler
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult, LongTailEvaluator, evaluate
from nbn_timm.layers import RectifiedLinear, convert_sync_batchnorm
from nbn_timm.losses import create_loss
from nbn_timm.models.checkpoint import load_weights
from nbn_timm.samplers import create_sampler


def data_settings(args: argparse.Namespace, batch: BatchPlan) -> DataSettings:
    """What to read."""
    names = [field.name for field in fields(DataSettings) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names}
    return DataSettings(**{**given, 'class_counts_file': args.class_counts, 'batch_size': batch.size})


def build_model(args: argparse.Namespace, splits: Splits, world: World) -> Any:
    """The model on the device, with its initial weights."""
    num_classes = args.num_classes or splits.num_classes
    with world.primary_first():
        model = create_model(args.model, num_classes, args.pretrained, args.drop, args.drop_path, args.bn_momentum,
                             args.add_nbn, **args.model_kwargs)
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint)
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
        sampler = create_sampler(args.sampler, targets, splits.class_counts, args.seed, world.rank, world.size)
    augment = AugmentSettings(
        args.no_aug, pair(args.scale), pair(args.ratio), args.hflip, args.vflip, args.color_jitter, aa=args.aa,
        interpolation=args.train_interpolation, reprob=args.reprob, remode=args.remode, recount=args.recount)
    return create_train_loader(
        dataset, sampler, batch_size=batch.size, defaults=defaults, augment=augment, num_workers=args.workers,
        device=world.device, seed=args.seed, rank=world.rank, pin_memory=args.pin_mem)


def build_mixup(args: argparse.Namespace, num_classes: int, batch: BatchPlan) -> Mixup | None:
    """Mixup and CutMix on the device, with the label smoothing, or None."""
    if not (args.mixup or args.cutmix):
        return None
    if batch.size < 2:
        raise InputError('--mixup and --cutmix mix pairs of images: give a --batch-size of at least 2')
    return Mixup(args.mixup, args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
                 mode=args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes)


def build_loss(args: argparse.Namespace, splits: Splits, mixup: Mixup | None) -> nn.Module:
    """The loss; where targets are mixed, they come smoothed."""
    smoothing = {'smoothing': args.smoothing} if args.smoothing and mixup is None else {}
    return create_loss(args.loss, splits.class_counts, **smoothing)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer."""
    return create_optimizer(
        model, args.opt, args.lr, args.weight_decay, args.momentum, args.decay_1d, **args.opt_kwargs)


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
        evaluator = LongTailEvaluator(num_classes, splits.class_counts, world.device)
        return evaluate(model, loader, evaluator, world.device, amp_dtype(args), args.channels_last, world.distributed)

    return evaluate_split


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type of autocast, None without."""
    return getattr(torch, args.amp_dtype) if args.amp else None


def pair(values: list[float] | None) -> tuple[float, float] | None:
    """Two numbers of a flag."""
    return None if values is None else (values[0], values[1])

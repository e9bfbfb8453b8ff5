"""The parts of a training run from its plan, each where the data flows next."""
import logging
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import IterableDataset

from nbn_timm.data import Splits, TrainLoader
from nbn_timm.data.shard_stream import ShardStream
from nbn_timm.errors import InputError
from nbn_timm.layers import BottleneckLinear, RectifiedLinear, SlowCopy, convert_sync_batchnorm
from nbn_timm.losses import (
    create_loss,
    learns_in_parallel,
    number_of_slow_views,
    number_of_views,
    takes_both_labels,
    takes_experts,
    takes_features,
    takes_streams,
    takes_views_apart,
)
from nbn_timm.losses.deferred_loss import DeferredLoss
from nbn_timm.mixing import MIXINGS, Mixing, MixingRun
from nbn_timm.models import MultiExpert, ResNetCifarBbn
from nbn_timm.models.create import init_by_torch
from nbn_timm.models.settings import StartSettings
from nbn_timm.models.transfer import find_weights, load_pretrained_file, start_model
from nbn_timm.models.tuning import TuneSettings, apply_tuning, has_adapters, learn_only_tuned, with_head
from nbn_timm.models.weight_files import load_weights
from nbn_timm.samplers import create_sampler
from nbn_timm.second_stages import SecondStage, SecondStageRun, TrainedSecondStage, create_second_stage
from nbn_timm.settings import flag
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.training.adversarial import AdversarialTask, build_attack
from nbn_timm.training.agreement import agree_on_published
from nbn_timm.training.checkpointing import checkpoint_gradients
from nbn_timm.training.combinations import chosen_mixing, loss_settings
from nbn_timm.training.distillation import DistillationTask, build_teacher
from nbn_timm.training.distributed import World
from nbn_timm.training.features import WithFeatures
from nbn_timm.training.freezing import BACKBONE, Freezing
from nbn_timm.training.middle import EpochParts
from nbn_timm.training.plan import Plan
from nbn_timm.training.settings import TrainSettings
from nbn_timm.training.task import LearningLossTask, SecondStageTask
from nbn_timm.training.views import WithViews

_logger = logging.getLogger(__name__)


def build_second_stage(settings: TrainSettings) -> SecondStage | None:
    """The second stage, if there is one.

    Raises:
        InputError: It needs other settings than these.
    """
    name = settings.second_stage.stage
    if name is None:
        return None
    stage = create_second_stage(name, **settings.second_stage.stage_kwargs)
    if not (settings.start.initial_checkpoint or settings.start.pretrained):
        raise InputError(f'--stage {name} begins with a finished network: give its --initial-checkpoint')
    values = settings.values()
    for needed, value in (stage.needs.items() if isinstance(stage, TrainedSecondStage) else ()):
        if values[needed] != value:
            remedy = f'give {flag(needed)} {value}' if value else 'leave it out'
            raise InputError(f'--stage {name} is not for {flag(needed)} {values[needed]}: {remedy}')
    if settings.optimizer.clip_grad and settings.optimizer.clip_mode == 'agc':
        raise InputError('--clip-mode agc leaves the classifier out, and a --stage trains little else: give norm or '
                         'value')
    return stage


def build_model(settings: TrainSettings, splits: Splits, world: World, stage: SecondStage | None = None) -> Any:
    """The model on the device, with its initial weights, and of several experts set to what the loss takes.

    Raises:
        InputError: Something given is wrong.
    """
    of_model, start, loss = settings.model, settings.start, settings.loss.loss
    num_classes = settings.data.num_classes or splits.num_classes
    own_run = start.initial_checkpoint
    goes_on = own_run if stage is not None else None  # with the very network
    file = None if goes_on else own_run or start.pretrained_path
    rows = _rows_kept(own_run, splits) if own_run and not goes_on else None
    tuned = file is not None and (own_run is not None and _is_tuned(own_run) or has_adapters(find_weights(file)))
    with world.primary_first():
        model, notes = start_model(
            of_model.model, num_classes, None if tuned else file, rows,
            pretrained=start.pretrained and not own_run, nbn=of_model.add_nbn,
            keeps_statistics=start.keep_bn_stats or start.freeze == BACKBONE, drop=start.drop,
            drop_path=start.drop_path, bn_momentum=start.bn_momentum, model_kwargs=of_model.model_kwargs,
            in_chans=settings.input.channels)
    if start.pretrained and not own_run:
        agree_on_published(world, model, of_model.model)
    splits.notes.extend(notes)
    if start.init != StartSettings.init and not (start.pretrained or own_run or start.pretrained_path):
        init_by_torch(model, classifier_alone=start.init == 'torch_classifier')
    tuning = settings.tuning
    model = apply_tuning(with_head(model, tuning.head, tuning.head_kwargs), tuning.tune, tuning.tune_kwargs)
    if tuned and file is not None and (told := load_pretrained_file(model, file, rows)) and rows != ():
        splits.notes.append(f"'{file}' gives {told}")
    if goes_on and stage is not None and not stage.keeps_classifier:
        # The classifier may be of another kind, or for other classes.
        if told := load_pretrained_file(model, goes_on):
            splits.notes.append(f"'{goes_on}' gives {told}")
    elif goes_on:
        load_weights(model, goes_on)
    if isinstance(stage, TrainedSecondStage):
        model = stage.prepare(model)
    if takes_experts(loss):
        if not isinstance(model, MultiExpert):
            raise InputError(f"loss '{loss}' is for the experts of a network, and '{of_model.model}' has none: "
                             "give --model with _ride or _shike in its name, or another --loss")
        model.set_expert_logits()
    if takes_streams(loss):
        if not isinstance(model, ResNetCifarBbn):
            raise InputError(f"loss '{loss}' is for a network of two branches, and '{of_model.model}' is none: give "
                             '--model resnet32_bbn, or another --loss')
        model.set_branch_logits()
    if settings.processes.sync_bn:
        if world.device.type == 'cpu':
            raise InputError('--sync-bn needs GPUs: torch has no synchronised BatchNorm on the CPU')
        model = convert_sync_batchnorm(model)
    if start.grad_checkpointing:
        checkpoint_gradients(model, of_model.model)
    if tuning.tune and stage is None:
        learn_only_tuned(model, tuning.tune, tuning.tune_kwargs)
    model.to(world.device, settings.precision.dtype)
    return model.to(memory_format=torch.channels_last) if settings.precision.channels_last else model


def _is_tuned(file: str) -> bool:
    """Whether a checkpoint is of a network into which parameters or another classifier were put."""
    record = checkpoint_record(file).told(TuneSettings)
    return bool(record.tune or record.head)


def _rows_kept(file: str, splits: Splits) -> list[tuple[int, int]] | None:
    """Labels here and in a checkpoint of the classes that both have by name; None if the classifier fits as it is."""
    theirs, ours = checkpoint_record(file).classes, splits.classes
    if theirs is None or ours is None or theirs.names == ours.names or not (theirs.named and ours.named):
        return None
    labels = {name: label for label, name in enumerate(theirs.names)}
    return [(label, labels[name]) for label, name in enumerate(ours.names) if name in labels]


def build_freezing(settings: TrainSettings, model: nn.Module, world: World) -> Freezing | None:
    """What freezes parts of the model by the epoch, if anything is to be frozen.

    Raises:
        InputError: It cannot be had on this run.
    """
    start = settings.start
    if start.freeze is None and not start.freeze_epochs and not start.keep_bn_stats:
        return None
    if start.freeze_epochs and (world.distributed or settings.gpu.cuda_graphs):
        raise InputError('--freeze-epochs changes what is trained in the middle of a run, which several processes and '
                         'CUDA graphs cannot follow: leave it out, or train on one process without --cuda-graphs')
    return Freezing(model, start.freeze, start.freeze_epochs, start.keep_bn_stats)


def build_train_loader(plan: Plan, model: nn.Module) -> TrainLoader:
    """The training loader around the sampler, for `model`; a streamed dataset comes in its own order."""
    settings, splits, world = plan.settings, plan.splits, plan.world
    if splits.train is None:
        raise InputError(f"dataset '{settings.data.dataset}' has no training split here: give --train-list or "
                         '--data-dir')
    normalises = any(isinstance(module, RectifiedLinear | BottleneckLinear) for module in model.modules())
    if normalises and plan.batch.size == 1 and not (settings.processes.sync_bn and world.size > 1):
        raise InputError(f"model '{settings.model.model}' normalises in its classifier over the batch, which takes "
                         'more than one image per process: give a --batch-size of at least 2')
    name, sampler, dataset, targets = settings.sampler.sampler, None, splits.train, splits.train_targets
    if targets is None and name != type(settings.sampler).sampler:
        raise InputError(f"--sampler {name} needs the labels of all training images, which '{settings.data.dataset}' "
                         'does not tell: use a list or folder dataset')
    if isinstance(dataset, ShardStream) or (not isinstance(dataset, IterableDataset) and isinstance(dataset, Sized)):
        # A permutation needs the number of images alone.
        targets = np.zeros(len(dataset), dtype=np.int64) if targets is None else targets
        sampler = create_sampler(name, targets, splits.class_counts, settings.run.seed, world.rank, world.size,
                                 settings.schedule.epochs, **settings.sampler.sampler_kwargs)
        if sampler.second_stage not in (None, settings.second_stage.stage):
            raise InputError(f"sampler '{name}' learns in the second stage '{sampler.second_stage}', and without it "
                             'would stay as it began: give another --sampler')
        if sampler.second_stage and isinstance(dataset, ShardStream):
            raise InputError(f"sampler '{name}' takes pictures one by one, and shards are read from beginning to end: "
                             'give the pictures as class folders or lists')
    elif settings.sampler.sampler_kwargs:
        raise InputError(f"'{settings.data.dataset}' comes in an order of its own, so --sampler-kwargs would have no "
                         'effect: leave them out')
    return plan.train_loader(dataset, sampler, plan.batch.size, settings.run.seed, number_of_views(settings.loss.loss),
                             settings.batch.drop_last or None)


def build_parts(plan: Plan, loader: TrainLoader, stage: TrainedSecondStage | None = None) -> EpochParts:
    """The parts that checkpoints divide the epochs of a loader into.

    Raises:
        InputError: There are to be some, and no run could go on with them.
    """
    settings, batch = plan.settings, plan.batch
    interval, rounded = settings.keeping.recovery_interval, 0 if settings.batch.drop_last else batch.accum_steps - 1
    parts = EpochParts(interval, (len(loader) + rounded) // batch.accum_steps, batch.accum_steps, batch.global_size)
    if not interval:
        return parts
    if not loader.has_parts:
        raise InputError(f"'{settings.data.dataset}' comes in an order of its own, in whose middle no run can go on: "
                         'leave out --recovery-interval, or write the images as tar shards and give --dataset wds/')
    if stage is not None and not stage.goes_on:
        raise InputError(f'--stage {settings.second_stage.stage} reads images of its own in an epoch, in whose middle '
                         'it cannot go on: leave out --recovery-interval')
    return parts


def build_mixing(plan: Plan, loader: TrainLoader, stage: TrainedSecondStage | None = None) -> Mixing | None:
    """What mixes the batches of `loader` on the device, with the label smoothing, or None.

    Raises:
        InputError: Two methods are on, or one cannot be had on this run.
    """
    settings = plan.settings
    name = chosen_mixing(settings, stage)
    if name is None:
        return None
    run = MixingRun(settings.mixing, plan.num_classes, settings.loss.smoothing, settings.schedule.epochs,
                    plan.batch.size, plan.splits, loader, plan.train_loader, plan.world.device, settings.run.seed,
                    plan.world.rank, plan.world.size,
                    takes_both_labels(settings.loss.loss) and (stage is None or stage.loss() is None))
    return MIXINGS[name].create(settings.methods[name], run)


def build_task(
        plan: Plan,
        model: nn.Module,
        mixing: Mixing | None,
        stage: TrainedSecondStage | None,
) -> ClassificationTask:
    """The model and its loss, and an attack, a teacher or a second stage if there is one."""
    settings, device = plan.settings, plan.world.device
    loss = (stage and stage.loss()) or build_loss(settings, plan.splits, mixing)
    teacher_file, name = settings.distillation.kd_checkpoint, settings.loss.loss
    prepare_loss(loss, model)
    if takes_features(name):
        model = WithFeatures(model)
    if slow_views := number_of_slow_views(name):
        loss.slow_network = SlowCopy(model, loss.momentum)  # type: ignore[arg-type]
    if number_of_views(name) > 1:
        slow: Any = loss.slow_network if slow_views else None
        model = WithViews(model, slow, slow_views, takes_views_apart(name))
    if loss.state_dict():
        check_lone_loss(settings, plan.world)
        return LearningLossTask(model, loss, device=device, verbose=False)
    if settings.adversarial.adversarial:
        attack = build_attack(settings.adversarial, plan.input, settings.run.seed, plan.world)
        return AdversarialTask(model, loss, attack, device)
    if stage is not None:
        return SecondStageTask(model, loss, stage, settings.second_stage.freeze_bn, device)
    if not teacher_file:
        return ClassificationTask(model, loss, device=device, verbose=False)
    distillation = settings.distillation
    teacher = build_teacher(
        distillation, plan.num_classes, plan.splits.classes, plan.input, settings.precision.channels_last)
    teacher.to(settings.precision.dtype)
    return DistillationTask(
        model, teacher, loss, distillation.kd_target, distillation.distill_loss_weight, distillation.kd_temperature,
        distillation.kd_power, distillation.kd_label_weight, distillation.kd_teacher_mode == 'train', device)


def prepare_loss(loss: nn.Module, network: nn.Module) -> None:
    """Let a loss that has parameters or a state of its own make them for a network."""
    prepare = getattr(loss, 'prepare', None)
    if prepare is not None:
        prepare(network)


def check_lone_loss(settings: TrainSettings, world: World) -> None:
    """Refuse what a loss with a state of its own does not go with.

    Raises:
        InputError: There is something.
    """
    name = settings.loss.loss
    alone = not learns_in_parallel(name)
    for other, given in (('--stage', settings.second_stage.stage), ('--kd-checkpoint',
                         settings.distillation.kd_checkpoint), ('--adversarial', settings.adversarial.adversarial)):
        if given:
            raise InputError(f"loss '{name}' has parameters or buffers of its own, which training with {other} does "
                             f'not keep: leave out {other}, or register buffers that never change with '
                             'persistent=False')
    if world.distributed and alone:
        raise InputError(f"loss '{name}' compares all images of a batch and has a state of its own, so it is for one "
                         'process: start one')
    if settings.optimizer.sam_rho and alone:
        raise InputError(f"loss '{name}' has a state of its own, which would count each batch twice with --sam-rho: "
                         'leave one of them out')
    if settings.optimizer.layer_decay is not None:
        raise InputError(f"loss '{name}' has parameters of its own, which are in no layer of --layer-decay: leave it "
                         'out')
    if settings.gpu.cuda_graphs:
        raise InputError(f"loss '{name}' has a state of its own, which --cuda-graphs does not hold: leave it out")


def build_loss(settings: TrainSettings, splits: Splits, mixing: Mixing | None) -> nn.Module:
    """The loss; where targets are mixed, they come smoothed."""
    name = settings.loss.loss
    mixed = mixing is not None and mixing.soft
    loss = create_loss(name, splits.class_counts, **loss_settings(settings, mixed))
    if isinstance(loss, DeferredLoss) and loss.start_epoch >= settings.schedule.epochs:
        _logger.info("loss '%s' starts after %d epochs, and this run ends after %d: it will never be used",
                     name, loss.start_epoch, settings.schedule.epochs)
    return loss


def parts_to_train(task: ClassificationTask, model: nn.Module, stage: TrainedSecondStage | None) -> nn.Module:
    """What the optimizer changes: the model, the part of it that a second stage trains, or the model and its loss."""
    if isinstance(task, LearningLossTask):
        return task.modules_to_train()
    return model if stage is None else stage.trained(model)


def connect_second_stage(
        plan: Plan,
        stage: TrainedSecondStage | None,
        loader: TrainLoader,
        task: ClassificationTask,
        optimizer: torch.optim.Optimizer,
) -> None:
    """Let a second stage know the run."""
    if stage is not None:
        world = plan.world
        stage.connect(SecondStageRun(
            plan.splits, loader, plan.train_loader, task.criterion, optimizer, world.device, world.rank, world.size,
            plan.settings.run.seed))


def build_scaler(plan: Plan) -> GradScaler | None:
    """The gradient scaler that float16 needs."""
    return GradScaler(plan.world.device.type) if plan.settings.precision.autocast is torch.float16 else None

"""A run from its settings to its report: the table of contents of training."""
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.amp import GradScaler

from nbn_timm.bars import on_terminal
from nbn_timm.data import TrainLoader
from nbn_timm.mixing import Mixing
from nbn_timm.second_stages import FittedSecondStage, TrainedSecondStage
from nbn_timm.training import averages
from nbn_timm.training.adjust import tell_adjustment, with_choice
from nbn_timm.training.agreement import agree_on_settings
from nbn_timm.training.batch import plan_batch
from nbn_timm.training.build import (
    build_freezing,
    build_mixing,
    build_model,
    build_parts,
    build_scaler,
    build_second_stage,
    build_task,
    build_train_loader,
    connect_second_stage,
    parts_to_train,
)
from nbn_timm.training.combinations import check_combinations, doubtful
from nbn_timm.training.cpu_advice import advise
from nbn_timm.training.cuda_graphs import GraphedBackward
from nbn_timm.training.curriculum import Curriculum, build_curriculum, with_levels
from nbn_timm.training.distributed import World, seed_everything
from nbn_timm.training.fit import fit
from nbn_timm.training.freezing import Freezing
from nbn_timm.training.gpu import prepare_gpu
from nbn_timm.training.head_start import start_classifier
from nbn_timm.training.keeper import Keeper
from nbn_timm.training.label_sets import for_label_sets
from nbn_timm.training.loop import LoopSettings, graph_backward, train_one_epoch
from nbn_timm.training.middle import BEGINNING, EpochParts, Middle
from nbn_timm.training.optim import classifier_rate, create_optimizer, create_scheduler
from nbn_timm.training.plan import Plan, input_format, open_training_data
from nbn_timm.training.profile import NoProfile, Profile
from nbn_timm.training.progress import Progress
from nbn_timm.training.progressive import ProgressiveSize, build_progressive_size
from nbn_timm.training.report import announce, report_run, show_epoch, show_profile, write_settings
from nbn_timm.training.run_checkpoint import find_common_resume
from nbn_timm.training.settings import TrainSettings
from nbn_timm.training.task import begin_epoch, begin_part, evaluation_model, prepare_task, share_statistics
from nbn_timm.training.validation_part import settle_validation

_logger = logging.getLogger(__name__)


def train(settings: TrainSettings, world: World, folder: Path) -> None:
    """Build everything in the order in which the data flows, then train and report."""
    agree_on_settings(world, settings)
    resume_from = find_common_resume(settings.run.resume, folder, world)
    settings = settle_validation(settings, settings.data, world, folder, resume_from)
    batch = plan_batch(settings.batch, world.size)
    seed_everything(settings.run.seed)
    prepare_gpu(settings.gpu, world.device)

    stage = build_second_stage(settings)
    settings = for_label_sets(settings, stage)
    check_combinations(settings, stage)
    splits = open_training_data(settings, batch, world, stage)
    settings = with_choice(settings, splits)
    model = build_model(settings, splits, world, stage)
    plan = Plan(settings, world, folder, batch, splits, input_format(settings, splits.defaults, model),
                model.num_classes)
    if isinstance(stage, FittedSecondStage):
        fit(plan, stage, model)
        return
    assert stage is None or isinstance(stage, TrainedSecondStage)
    if resume_from is None and stage is None:
        start_classifier(plan, model)
    plan = with_levels(plan.with_small_images_in_memory())
    loader = build_train_loader(plan, model)
    parts = build_parts(plan, loader, stage)
    mixing = build_mixing(plan, loader, stage)
    if mixing is not None:
        mixing.connect(model)
    resize = build_progressive_size(
        settings.progressive, settings.schedule.epochs, plan.input.input_size, model, settings.model.model)
    task = build_task(plan, model, mixing, stage)
    freezing = build_freezing(settings, model, world) if stage is None else None
    of_batch = settings.optimizer.for_batch(batch.global_size)
    rates = classifier_rate(model, of_batch) if stage is None else stage.rates(model)
    optimizer = create_optimizer(parts_to_train(task, model, stage), of_batch, rates)
    connect_second_stage(plan, stage, loader, task, optimizer)
    scheduler = create_scheduler(optimizer, settings.schedule, parts.updates)
    scaler, curriculum = build_scaler(plan), build_curriculum(plan)
    prepare_task(task, world, settings.average, settings.precision.torchcompile)

    keeper = Keeper(plan, task, optimizer, parts, scaler, curriculum)
    (start_epoch, begun), epochs = keeper.resume(resume_from), settings.schedule.epochs
    write_settings(plan)
    announce(plan, model, start_epoch, [
        *parts.told(start_epoch, begun), *doubtful(settings, stage), *tell_adjustment(plan, model)])
    advise(plan, model, (epochs - start_epoch) * parts.updates)
    loop = LoopSettings(batch.accum_steps, settings.precision.autocast, settings.precision.channels_last,
                        settings.optimizer.clip_grad, settings.optimizer.clip_mode, settings.batch.drop_last,
                        settings.optimizer.sam_rho)
    graphs = graph_backward(task, loop, world.device) if settings.gpu.cuda_graphs else None
    progress = Progress(epochs, parts.updates, settings.keeping.log_interval,
                        _logger.info if world.is_primary else None, with_bar=world.is_primary and on_terminal())
    profile = Profile(world.device) if settings.keeping.profile else NoProfile()
    done = train_epochs(Parts(
        plan, task, loader, optimizer, scheduler, keeper, parts, loop, progress, profile, scaler, mixing, graphs,
        freezing, resize, curriculum), start_epoch, begun)
    keeper.close()
    show_profile(profile)
    report_run(plan, task, keeper, done)


@dataclass(frozen=True)
class Parts:
    """What a run trains with; None is what it does without."""

    plan: Plan
    task: TrainingTask
    loader: TrainLoader
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    keeper: Keeper
    epoch: EpochParts
    loop: LoopSettings
    progress: Progress
    profile: NoProfile
    scaler: GradScaler | None
    mixing: Mixing | None
    graphs: GraphedBackward | None
    freezing: Freezing | None
    resize: ProgressiveSize | None
    curriculum: Curriculum | None


def train_epochs(parts: Parts, start_epoch: int, begun: Middle = BEGINNING) -> int:
    """Train, evaluate and keep one epoch after the other; returns how many epochs there were in all.

    Args:
        parts: What to train with.
        start_epoch: 0-based.
        begun: Where in that epoch.
    """
    plan, task, profile = parts.plan, parts.task, parts.profile
    settings, world, epochs = plan.settings, plan.world, plan.settings.schedule.epochs
    for epoch in range(start_epoch, epochs):
        if parts.keeper.gave_up(epoch):
            return epoch
        profile.start()
        if parts.curriculum is not None and not begun.updates:
            parts.curriculum.set_epoch(unwrap_model(task.get_trainable_module()), epoch)
        seed_everything(settings.run.seed, epoch, world.rank)
        if parts.freezing is not None:
            parts.freezing.set_epoch(epoch)
        begin_epoch(task, parts.loader, parts.mixing, epoch, parts.graphs, parts.epoch.part(0))
        if parts.resize is not None:
            parts.resize.set_epoch(epoch)
        parts.scheduler.step(epoch + settings.schedule.sched_ahead)
        parts.scheduler.step_update(epoch * parts.epoch.updates + begun.updates)
        if begun.updates:
            parts.keeper.restore()
            go_on(parts, epoch, begun)
        pause = partial(keep_and_go_on, parts, epoch) if parts.epoch.interval else None
        trained = train_one_epoch(
            task, parts.loader, parts.optimizer, parts.loop, parts.progress, world, epoch, parts.scheduler,
            parts.scaler, parts.mixing, parts.graphs, profile, parts.resize, begun, pause)
        begun = BEGINNING
        averages.end_of_epoch(task, plan, parts.loader, epoch)
        share_statistics(task, world, reduce=settings.processes.dist_bn == 'reduce')
        watched = plan.watched_after(epoch)
        with profile.part('evaluation'):
            result = plan.evaluate(evaluation_model(task), watched) if watched is not None else None
        show_epoch(epoch, epochs, result)
        parts.keeper.keep(epoch, trained, result, profile.seconds())
        profile.finish()
    return max(start_epoch, epochs)


def keep_and_go_on(parts: Parts, epoch: int, middle: Middle) -> None:
    """Write a checkpoint in the middle of an epoch, and begin the part that follows as a resumed run does."""
    parts.keeper.keep_middle(epoch, middle)
    go_on(parts, epoch, middle)


def go_on(parts: Parts, epoch: int, middle: Middle) -> None:
    """Begin the part of an epoch that follows a place in it."""
    part = parts.epoch.part(middle.updates)
    seed_everything(parts.plan.settings.run.seed, epoch, parts.plan.world.rank, part.begin)
    begin_part(parts.task, parts.loader, parts.mixing, epoch, part)

"""What a run has settled before anything is built: settings, data, input format, batch and processes."""
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import Dataset, RandomSampler, Sampler

from nbn_timm.data import (
    DataDefaults,
    MemoryImages,
    Splits,
    TrainLoader,
    create_eval_loader,
    create_train_loader,
    create_transform,
    epoch_seed,
    keep_in_memory,
)
from nbn_timm.data.loader import check_divisible
from nbn_timm.data.more_train import with_more_pictures
from nbn_timm.data.quick_look import quick_look
from nbn_timm.data.shard_stream import ShardStream
from nbn_timm.data.splits import Known, by_position
from nbn_timm.datasets import create_splits, with_shifted_test
from nbn_timm.errors import InputError
from nbn_timm.evaluation import LabelSetEvaluator, LongTailEvaluator, Result, RoutingEvaluator, evaluate
from nbn_timm.evaluation.evaluator import Evaluator
from nbn_timm.evaluation.label_sets import LabelSetPredictions
from nbn_timm.evaluation.predictions import Predictions
from nbn_timm.evaluation.thresholds import Thresholds
from nbn_timm.models import RoutedExperts
from nbn_timm.models.create import check_input_size
from nbn_timm.second_stages import SecondStage
from nbn_timm.second_stages.second_stage import ViewSteps
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.trained.record import training_arguments
from nbn_timm.training.agreement import agree_on_data
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.calibrating import gather_logits
from nbn_timm.training.distributed import World, seed_everything
from nbn_timm.training.settings import TrainSettings


@dataclass(frozen=True)
class Plan:
    """What all parts of a run share.

    Attributes:
        settings: Of the run.
        world: This process.
        folder: Of the run.
        batch: Images per process, step and update.
        splits: The data.
        input: Format of the images.
        num_classes: Of the model.
    """

    settings: TrainSettings
    world: World
    folder: Path
    batch: BatchPlan
    splits: Splits
    input: DataDefaults
    num_classes: int

    @property
    def watched(self) -> Dataset | None:
        """The split that is evaluated after every epoch."""
        return self.splits.val or (self.splits.test if self.settings.run.watch_test else None)

    def watched_after(self, epoch: int) -> Dataset | None:
        """What is evaluated after an epoch (0-based): the watched split, every --val-interval epochs and at the end."""
        number, settings = epoch + 1, self.settings
        due = number % settings.keeping.val_interval == 0 or number == settings.schedule.epochs
        return self.watched if due else None

    def record(self) -> dict[str, Any]:
        """What checkpoints keep of the training: all settings, and what they came to."""
        return training_arguments(self.settings, self.world.size, self.input)

    def with_small_images_in_memory(self) -> 'Plan':
        """The plan with the splits that every epoch reads in memory, where their images are small and of one size."""
        settings, splits = self.settings, self.splits

        def keep(dataset: Dataset | None) -> Dataset | None:
            return dataset and keep_in_memory(
                dataset, self.input, settings.augment, settings.memory.in_memory, settings.loader.workers,
                settings.augment.of_other_views())

        train = keep(splits.train)
        if not isinstance(train, MemoryImages):
            return self
        watched_test = keep(splits.test) if settings.run.watch_test and splits.val is None else splits.test
        return replace(self, splits=replace(splits, train=train, val=keep(splits.val), test=watched_test))

    def train_loader(
            self,
            dataset: Dataset,
            sampler: Sampler | None,
            batch_size: int,
            seed: int,
            views: int = 1,
            drop_last: bool | None = None,
    ) -> TrainLoader:
        """A loader of training images, augmented as the settings say; some methods need more than one."""
        return create_train_loader(
            dataset, sampler, batch_size=batch_size, defaults=self.input, augment=self.settings.augment,
            num_workers=self.settings.loader.workers, device=self.world.device, seed=seed, rank=self.world.rank,
            drop_last=drop_last, pin_memory=self.settings.loader.pin_mem, views=views,
            other_views=self.settings.augment.of_other_views(), dtype=self.settings.precision.dtype,
            decoder=self.settings.decoding.decoder)

    def two_views(
            self,
            dataset: Dataset,
            view: ViewSteps,
            batch_size: int,
            epoch: int,
    ) -> Iterator[torch.Tensor]:
        """Batches of two views [2, B, 3, H, W] of each image, in an order of that epoch, the same in every process.

        Args:
            dataset: Of images; it keeps its transform.
            view: What is done to a picture.
            batch_size: B.
            epoch: 0-based.
        """
        transform = create_transform(self.input)
        transform.transforms[:-1] = view(transform.transforms[:-1], self.input.input_size[1:])
        seed = self.settings.run.seed
        seed_everything(seed, epoch)
        order = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        loader = create_train_loader(
            copy(dataset), RandomSampler(dataset, generator=order), batch_size=batch_size,  # type: ignore[arg-type]
            defaults=self.input, num_workers=self.settings.loader.workers, device=self.world.device, seed=seed,
            drop_last=False, pin_memory=self.settings.loader.pin_mem, views=2, transform=transform,
            dtype=self.settings.precision.dtype)
        loader.set_epoch(epoch)
        for images, _ in loader:
            yield images

    def eval_loader(self, dataset: Dataset) -> Any:
        """A loader of a split in order, for evaluation."""
        return create_eval_loader(
            dataset, batch_size=self.settings.batch.validation_batch_size or self.batch.size, defaults=self.input,
            num_workers=self.settings.loader.workers, device=self.world.device, rank=self.world.rank,
            world_size=self.world.size, pin_memory=self.settings.loader.pin_mem, dtype=self.settings.precision.dtype)

    def evaluator(self, model: nn.Module | None = None) -> LongTailEvaluator:
        """What counts the hits of a model, and of routed experts their number."""
        counting = (self.num_classes, self.splits.class_counts, self.world.device, None, *self.splits.shot_limits)
        if isinstance(model, RoutedExperts):
            return RoutingEvaluator(model.multiply_adds(self.input.input_size), *counting)
        return LongTailEvaluator(*counting)

    def label_set_evaluator(self, thresholds: Thresholds | None = None) -> LabelSetEvaluator:
        """What judges a model of pictures that can be of several classes."""
        return LabelSetEvaluator(self.num_classes, self.splits.class_counts, self.world.device, None,
                                 *self.splits.shot_limits, thresholds)

    def evaluate(self, model: nn.Module, dataset: Dataset, evaluator: Evaluator[Result] | None = None) -> Result:
        """Evaluate a model on a split, by the given evaluator or the one for the model and the targets."""
        evaluator = evaluator or (
            self.label_set_evaluator() if self.splits.label_sets else self.evaluator(unwrap_model(model)))
        precision = self.settings.precision
        return evaluate(model, self.eval_loader(dataset), evaluator, self.world.device, precision.autocast,
                        precision.channels_last, self.world.distributed)

    def logits(self, model: nn.Module, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, C] and targets of a split in its order; on processes but the first, of their own images."""
        evaluator: LongTailEvaluator | LabelSetEvaluator
        if self.splits.label_sets:
            evaluator = self.label_set_evaluator()
        else:
            evaluator = self.evaluator(unwrap_model(model))
            evaluator.keep_logits()
        self.evaluate(model, dataset, evaluator)
        return gather_logits(evaluator, self.world, not isinstance(dataset, ShardStream))

    def evaluate_and_keep(
            self,
            model: nn.Module,
            dataset: Dataset,
            thresholds: Thresholds | None = None,
    ) -> tuple[Result, Predictions | LabelSetPredictions | None]:
        """Evaluate a model on a split, and keep what it says of each picture, in the order of the split.

        On processes but the first, nothing is kept. The thresholds are for pictures that can be of several classes.
        """
        in_turn = not isinstance(dataset, ShardStream)
        if self.splits.label_sets:
            judge = self.label_set_evaluator(thresholds)
            outcome = self.evaluate(model, dataset, judge)
            logits, sets = gather_logits(judge, self.world, in_turn)
            kept = LabelSetPredictions(sets.numpy(), logits.numpy()) if self.world.is_primary else None
            return outcome, kept
        evaluator = self.evaluator(unwrap_model(model))
        evaluator.keep_predictions()
        result = self.evaluate(model, dataset, evaluator)
        found = self.world.gather_to_primary(evaluator.predictions())
        if found is None:
            return result, None
        return result, Predictions.in_order(found, in_turn)


def open_training_data(
        settings: TrainSettings,
        batch: BatchPlan,
        world: World,
        stage: SecondStage | None = None,
) -> Splits:
    """The splits of the data set, with the classes in the order of the network of --initial-checkpoint.

    Where its classifier stays, the data may have no other classes.

    Raises:
        InputError: Something given is wrong, checkpoints are to be chosen by what there is not, or the processes see
            other data.
    """
    known, initial = None, settings.start.initial_checkpoint
    if initial and (classes := checkpoint_record(initial).classes) is not None:
        known = Known(classes, f"checkpoint '{initial}'", binding=stage is not None and stage.keeps_classifier)
    with world.primary_first():
        splits = create_splits(replace(settings.data, batch_size=batch.size, seed=settings.run.seed), known=known,
                               label_sets=True)
    for evaluated in filter(None, (splits.val, splits.test)):
        check_divisible(evaluated, world.size)  # now, and not when the first epoch has passed
    if initial and known is None:
        splits.notes.extend(by_position(f"checkpoint '{initial}'", splits.classes))
    if world.is_primary:
        splits.notes.extend(quick_look(splits))
    check_eval_metric(settings.run.eval_metric, splits)
    splits = with_more_pictures(settings.more_train, splits)
    splits = with_shifted_test(settings.data, splits, splits.class_counts)
    agree_on_data(world, splits)
    return splits


def check_eval_metric(name: str, splits: Splits) -> None:
    """Refuse to choose checkpoints by the accuracy of a split that has no classes."""
    shot = name.removeprefix('ece_').removeprefix('map_')
    if splits.val is None or shot not in ('many', 'medium', 'few'):
        return
    if splits.class_counts is None:
        raise InputError(f'--eval-metric {name} needs the training images per class: give --class-counts FILE')
    if not dict(splits.class_counts.shot_split(*splits.shot_limits).items())[shot]:
        raise InputError(f'--eval-metric {name} is of no use: no class of {splits.class_counts.source} is {shot}-shot')


def input_format(settings: TrainSettings, published: DataDefaults, model: Any) -> DataDefaults:
    """The benchmark's input format, or the model's for images of one's own, with what the settings say."""
    defaults = published.for_model(model.pretrained_cfg).as_trained(settings.input)
    check_input_size(model, settings.model.model, defaults.input_size, settings.model.model_kwargs)
    return defaults

"""What a network and its training cost: parameters, multiply-adds of an image, and operations of a whole recipe.

Operations are those of convolutions, linear layers and products of matrices, by torch's FlopCounterMode, which counts
two for a multiply-add. A backward pass counts as two forward passes (Kaplan et al., arXiv 2001.08361, section 2.1).
An optimizer's own operations are not counted; only Muon has many.
"""
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nbn_timm.datasets.named_dataset import find_dataset
from nbn_timm.errors import InputError
from nbn_timm.losses import number_of_slow_views, number_of_views, takes_streams
from nbn_timm.models.create import create_model
from nbn_timm.second_stages import SECOND_STAGES, FittedSecondStage
from nbn_timm.training.settings import TrainSettings

WITH_MORE_PASSES = ('balms', 'expert_aggregation', 'h2t', 'ncm')  # second stages: of a meta batch, views, ...


class UncountedError(InputError):
    """A recipe has passes that are not counted."""


def multiply_adds(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Of the forward pass of one image [C, H, W] in evaluation. The network is not changed and nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deepcopy(model).to('meta').eval()(torch.zeros(1, *size, device='meta'))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_of(settings: TrainSettings, num_classes: int) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image in evaluation, of the network of a recipe."""
    model = _network(settings, num_classes)
    return parameters(model), multiply_adds(model, _image_size(settings, model))


def training_flop(settings: TrainSettings, num_classes: int, images: int) -> float:
    """Operations of a whole training on so many images, without those of a first stage.

    Three forward passes for each view of what is trained, one of frozen networks and slow copies; SAM doubles them.
    Small images first, and a pass for the statistics of SWA, are counted. Heads of losses are not. An epoch is one pass
    over the images, which samplers with another number of draws change.

    Raises:
        UncountedError: The recipe has other passes, see `check_counted`.
    """
    check_counted(settings)
    model = _network(settings, num_classes)
    size = _image_size(settings, model)
    once = 2 * multiply_adds(model, size) * images
    stage = settings.second_stage.stage
    if stage and issubclass(SECOND_STAGES[stage], FittedSecondStage):
        return float(once)
    slow = number_of_slow_views(settings.loss.loss)
    passes = 1.0 if stage else 3.0 * (number_of_views(settings.loss.loss) - slow) + slow
    passes *= 2 if settings.optimizer.sam_rho else 1
    side, epochs = settings.progressive.progressive_size, settings.schedule.epochs
    first = small = 0
    if side:
        first = round(settings.progressive.progressive_epochs * epochs)
        small = 2 * multiply_adds(model, (size[0], side, side)) * images
    return passes * (once * (epochs - first) + small * first) + (once if settings.average.swa_epochs else 0)


def check_counted(settings: TrainSettings) -> None:
    """Refuse a recipe with passes that `training_flop` does not count.

    Raises:
        UncountedError: It has some.
    """
    stage, start, tuning = settings.second_stage.stage, settings.start, settings.tuning
    for what, given in (
            ('--kd-checkpoint', settings.distillation.kd_checkpoint), ('--curriculum', settings.augment.curriculum),
            ('--adversarial', settings.adversarial.adversarial), ('two streams', takes_streams(settings.loss.loss)),
            (f'--stage {stage}', stage in WITH_MORE_PASSES), ('--freeze', start.freeze),
            ('--freeze-epochs', start.freeze_epochs), ('--grad-checkpointing', start.grad_checkpointing),
            ('--tune', tuning.tune), ('--head-start class_means', tuning.head_start == 'class_means')):
        if given:
            raise UncountedError(f'the operations of a recipe with {what} are not counted here: leave it out of the '
                                 'list')


def _network(settings: TrainSettings, num_classes: int) -> nn.Module:
    return create_model(settings.model.model, num_classes, nbn=settings.model.add_nbn,
                        model_kwargs=settings.model.model_kwargs)


def _image_size(settings: TrainSettings, model: Any) -> tuple[int, int, int]:
    """That of the benchmark, or for images of one's own the model's, as train.py has it."""
    defaults = find_dataset(settings.data.dataset or 'folder').defaults
    return defaults.for_model(model.pretrained_cfg).as_trained(settings.input).input_size

"""The class vectors that a run's classifier starts with, as --head-start says."""
from copy import copy
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from nbn_timm.data import create_eval_loader
from nbn_timm.errors import InputError
from nbn_timm.models.tuning.classifier import read_vectors, start_from_vectors
from nbn_timm.models.tuning.prompts import without_prompts
from nbn_timm.second_stages.classifier import classifier_of, vectors
from nbn_timm.training.classifier_inputs import inputs_of
from nbn_timm.training.plan import Plan


def start_classifier(plan: Plan, model: nn.Module) -> None:
    """Let the classifier of a run that begins start with the vectors that the settings ask for.

    Raises:
        InputError: They cannot be had, or do not fit.
    """
    tuning = plan.settings.tuning
    if tuning.head_start == 'class_means':
        start_from_vectors(model, class_means(plan, model))
        plan.splits.notes.append('The classifier starts with the mean features of the training images of each class.')
    elif tuning.head_start == 'file':
        if tuning.head_file is None:
            raise InputError('--head-start file takes the class vectors from a file: give it with --head-file')
        start_from_vectors(model, read_vectors(tuning.head_file).to(plan.world.device))
        plan.splits.notes.append(f"The classifier starts with the class vectors in '{tuning.head_file}'.")


@torch.no_grad()
def class_means(plan: Plan, model: nn.Module) -> torch.Tensor:
    """Mean feature of the training images of each class, [C, D]; zero of a class without.

    As in LIFT (shijxcs/LIFT at 661ead9, `init_head_class_mean`), the shorter side of a picture takes the size of the
    input and its centre is cut out; the features are float32, and those of the network without prompts.

    Raises:
        InputError: There are no training images, or the classifier is not on feature vectors.
    """
    assert plan.splits.train is not None
    world, settings = plan.world, plan.settings
    loader = create_eval_loader(
        copy(plan.splits.train), batch_size=settings.batch.validation_batch_size or plan.batch.size,
        defaults=replace(plan.input, crop_pct=1.0), num_workers=settings.loader.workers, device=world.device,
        rank=world.rank, world_size=world.size, pin_memory=settings.loader.pin_mem, dtype=settings.precision.dtype)
    classifier = classifier_of(model)
    counts = torch.zeros(plan.num_classes, dtype=torch.float64, device=world.device)
    sums: torch.Tensor | None = None
    training = model.training
    with without_prompts(model.eval()):
        for (inputs,), target in inputs_of(model, [classifier], loader):
            features = vectors(inputs).double()
            sums = counts.new_zeros(plan.num_classes, features.shape[1]) if sums is None else sums
            sums.index_add_(0, target, features)
            counts += torch.bincount(target, minlength=plan.num_classes)
    model.train(training)
    if sums is None:
        raise InputError('there is no training image to take features of: check the data')
    if world.distributed:
        for total in (sums, counts):
            dist.all_reduce(total)
    return (sums / counts.clamp(min=1)[:, None]).to(classifier.weight.dtype)

"""H2T (Li et al., "Feature Fusion from Head to Tail for Long-Tailed Visual Recognition", AAAI 2024): the classifier is
trained further on maps of class-balanced draws in which some channels are those of other images.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from nbn_timm.data import TrainLoader, epoch_seed
from nbn_timm.errors import InputError
from nbn_timm.key_values import check_number
from nbn_timm.samplers import EpochSampler, create_sampler
from nbn_timm.second_stages.crt import ClassifierRetraining
from nbn_timm.second_stages.second_stage import FLAG, SecondStageRun, register_second_stage


@register_second_stage('h2t')
class HeadToTail(ClassifierRetraining):
    """Train the classifier further, with a share of the channels of each image's last maps from another image.

    The images are those of `--sampler`, which is class-balanced in the paper; the others are a stream of the training
    images as they are, in which frequent classes are frequent. Which channels are replaced is drawn anew for every
    batch, and the label stays that of the image. So rare classes, which are drawn often, are seen among features of
    frequent ones. The network has no gradient; in the authors' code its BatchNorm statistics drift (`--no-freeze-bn`),
    with those of the other images after the images' own. Source: Keke921/H2T, commit 3dafa70.

    The result is an ordinary model of the same architecture. Of several experts the channels of all are replaced alike.

    Args:
        share: Of the channels that are replaced, rounded down; the authors have 0.25 for CIFAR-100-LT at factor 100.

    Raises:
        InputError: A setting out of range.
    """

    needs = {'torchcompile': None, 'sam_rho': 0.0}
    goes_on = False

    def __init__(self, share: float = 0.25) -> None:
        super().__init__(reinit=False)
        self.share = check_number('--stage h2t', FLAG, 'share', share, high=1)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is, which must pool maps."""
        poolings = [module for module in model.modules() if isinstance(module, SelectAdaptivePool2d)]
        if not poolings or not hasattr(model, 'forward_features'):
            raise InputError(f'{type(model).__name__} pools no maps before its classifier, whose channels --stage h2t '
                             'replaces: use a convolutional network, or another second stage, such as crt')
        self.pooling = poolings[-1]
        return super().prepare(model)

    def connect(self, run: SecondStageRun) -> None:
        """Open the loader of the other images."""
        splits, first = run.splits, run.loader.loader.sampler
        if splits.train_targets is None or not isinstance(first, EpochSampler):
            raise InputError('--stage h2t takes training images one by one, and this dataset is a stream: use a list '
                             'or folder dataset')
        seed = epoch_seed(run.seed, 0)  # with the run's own both streams might be the same
        sampler = create_sampler('instance_balanced', splits.train_targets, splits.class_counts, seed, run.rank,
                                 run.world_size)
        if len(sampler) != len(first):
            raise InputError(f'--stage h2t puts as many images beside those of --sampler as there are, '
                             f'{sampler.epoch_length}, and that draws {first.epoch_length}: give another sampler')
        # A copy, because an evaluation sets its own transform.
        self.others: TrainLoader = run.create_loader(
            copy(splits.train), sampler, run.loader.loader.batch_size or 1, seed)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Begin the epoch of the other images."""
        self.others.set_epoch(epoch)
        self.stream = iter(self.others)

    @contextmanager
    def batch(self, model: nn.Module, target: torch.Tensor) -> Iterator[None]:
        """Replace channels of the maps that the pooling is given by those of the next other images."""
        network: Any = model
        others, _ = next(self.stream)

        def fuse(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (fused(inputs[0], network.forward_features(others[:len(target)]), self.share), *inputs[1:])

        hook = self.pooling.register_forward_pre_hook(fuse)
        try:
            yield
        finally:
            hook.remove()


def fused(maps: torch.Tensor, others: torch.Tensor, share: float) -> torch.Tensor:
    """Maps [B, F, H, W] of which int(share F) channels, drawn by the global generator, are those of other maps."""
    channels = torch.randperm(maps.shape[1])[:int(share * maps.shape[1])].to(maps.device)
    return maps.index_copy(1, channels, others[:, channels].to(maps.dtype))

"""Heads on features: trained in seconds with the losses, samplers and second stages of this package.

Features are brought to zero mean and unit variance for the training (of a cosine head to zero mean), because their
dimensions differ widely in size. What comes out is folded: a head on the features as the network gives them.
"""
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from nbn_timm.data import Classes, Splits
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.errors import InputError
from nbn_timm.evaluation import LongTailEvaluator, logit_offset
from nbn_timm.layers.head import HEADS, LINEAR, CosineLinear
from nbn_timm.losses import create_loss, takes_features
from nbn_timm.probe.features import Features
from nbn_timm.probe.methods import HeadMethod
from nbn_timm.probe.settings import HeadSettings
from nbn_timm.samplers import create_sampler
from nbn_timm.second_stages import FitData, FittedSecondStage, create_second_stage
from nbn_timm.second_stages.classifier import linear_form
from nbn_timm.second_stages.ncm import CentroidLinear
from nbn_timm.second_stages.tau_norm import normalized_form
from nbn_timm.training.optim import OptimizerSettings, ScheduleSettings, create_optimizer, create_scheduler

Head = nn.Linear | CentroidLinear

TAUS = tuple(round(0.1 * step, 1) for step in range(21))  # 0 to 2, as the authors of tau-normalisation take them

_FLOOR = 0.01  # share of the mean variance that is added to that of each dimension, of which some hardly vary


@dataclass(frozen=True)
class TrainedHead:
    """A head before folding, and the map of the features that it was trained on: (x - mean) / std."""

    head: nn.Module
    mean: torch.Tensor
    std: torch.Tensor

    def folded(self) -> Head:
        """The head on features as they are."""
        if isinstance(self.head, CentroidLinear):
            return self.head
        if isinstance(self.head, CosineLinear):
            cosine = CentroidLinear(self.head.in_features, self.head.out_features)
            with torch.no_grad():
                cosine.weight.copy_(self.head.scale * nn.functional.normalize(self.head.weight, dim=1))
                cosine.bias.zero_()
                cosine.mean.copy_(self.mean)
            return cosine.eval()
        weight, bias = linear_form(self.head)
        return _linear(*self._raw(weight, bias))

    def normalized(self, tau: float) -> Head:
        """Folded after tau-normalisation; the bias is dropped, as published."""
        weight, bias = normalized_form(self.head, tau, keep_bias=False)
        return _linear(*self._raw(weight, bias))

    def _raw(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        raw = weight.double() / self.std.double()
        shift = raw @ self.mean.double()
        return raw, (0 if bias is None else bias.double()) - shift


def train_head(
        features: Features,
        classes: Classes,
        loss: str = 'cross_entropy',
        *,
        kind: str = LINEAR,
        loss_kwargs: Mapping[str, Any] | None = None,
        sampler: str = 'instance_balanced',
        settings: HeadSettings | None = None,
        seed: int = 42,
) -> Head:
    """Train a head on features.

    The same features, settings and seed give the same head. Of several views of an image an epoch takes one by chance.

    Args:
        features: Of the training images.
        classes: With the training images per class.
        loss: A name in `LOSSES`; none that takes several experts or views.
        kind: A key of `HEADS`.
        loss_kwargs: The loss's own settings.
        sampler: A name in `SAMPLERS`.
        settings: Of the training.
        seed: Of the initial weights, the order and the views.

    Returns:
        A head on the features as they are, in eval mode: an `nn.Linear`, or of kind 'cosine' a `CentroidLinear`.

    Raises:
        InputError: A setting is wrong, or there are fewer than two images.
    """
    method = HeadMethod(kind=kind, loss=loss, loss_kwargs=dict(loss_kwargs or {}), sampler=sampler)
    return fit_head(features, classes, method, settings or HeadSettings(), seed).folded()


def fit_head(
        features: Features,
        classes: Classes,
        method: HeadMethod,
        settings: HeadSettings,
        seed: int = 42,
) -> TrainedHead:
    """A head by any method but for its adjustment, see `train_head`."""
    if method.second_stage is not None:
        return _of_second_stage(features, classes, method.second_stage, seed)
    if len(features) < 2:
        raise InputError('there are fewer than two training images, of which no head can learn: give more')
    mean, std = _moments(features.vectors)
    if method.kind == 'cosine':
        std = torch.ones_like(std)
    x, labels = (features.vectors - mean) / std, features.labels
    loss = create_loss(method.loss, classes, **method.loss_kwargs).to(x.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = HEADS[method.kind](features.size, classes.num_classes).to(x.device)
        settings = settings.for_features(len(features), features.size)
        epochs, batch, rate, decay = (settings.head_epochs, settings.head_batch_size, settings.head_lr,
                                      settings.head_weight_decay)
        assert epochs is not None and batch is not None and rate is not None and decay is not None
        sampler = create_sampler(method.sampler, labels.cpu().numpy(), classes, seed, epochs=epochs)
        updates = max(len(sampler) // batch, 1)
        _begin(head, x[0], labels)
        if method.kind == LINEAR and not takes_features(method.loss):
            _begin_bias(head.bias, loss, labels[torch.tensor(list(sampler))])  # type: ignore[arg-type]
        optimizer = create_optimizer(head, OptimizerSettings(
            opt='adamw', lr=rate, weight_decay=decay, decay_1d=False))
        scheduler = create_scheduler(
            optimizer, ScheduleSettings(epochs=epochs, sched='cosine', sched_on_updates=True), updates)
        for epoch in range(epochs):
            if hasattr(loss, 'set_epoch'):
                loss.set_epoch(epoch)  # type: ignore[operator]
            for number, indices in enumerate(_batches(sampler, epoch, batch)):
                scheduler.step_update(epoch * updates + number)
                view = torch.randint(len(x), (len(indices),))
                inputs, target = x[view, indices], labels[indices]
                logits = head(inputs)
                value = loss((logits, inputs) if takes_features(method.loss) else logits, target)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    if not all(bool(parameter.isfinite().all()) for parameter in head.parameters()):
        raise InputError(f"the head '{method.loss}' became NaN or infinite: give a lower --head-lr")
    return TrainedHead(head.eval().requires_grad_(False), mean, std)


def adjusted(head: TrainedHead, method: HeadMethod, classes: Classes, tau: float | None) -> Head:
    """A head as it is judged and saved: adjusted with a strength, where the method has an adjustment, and folded."""
    if method.adjust == 'tau_norm':
        return head.normalized(tau or 0.0)
    folded = head.folded()
    offset = logit_offset(classes, tau or 0.0) if method.adjust == 'logit_adjustment' else None
    if offset is not None:
        with torch.no_grad():
            folded.bias += offset.to(folded.bias)
    return folded


@torch.no_grad()
def head_logits(head: Head, features: torch.Tensor) -> torch.Tensor:
    """Logits [N, C] of features [N, D], in parts."""
    return torch.cat([head(part) for part in features.split(4096)])


class _FeatureModel(nn.Module):
    """A network that begins with its features, for second stages."""

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(size, num_classes)

    def get_classifier(self) -> nn.Module:
        """As timm's models."""
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class _OfFeatures(Dataset):
    """Stands for the images that features are of."""


def _of_second_stage(features: Features, classes: Classes, name: str, seed: int) -> TrainedHead:
    """What a second stage of one pass makes of the classifier."""
    stage = create_second_stage(name)
    assert isinstance(stage, FittedSecondStage)
    device = features.vectors.device
    model = _FeatureModel(features.size, classes.num_classes).to(device).eval()
    splits = Splits(_OfFeatures(), None, None, classes, OWN_IMAGES, classes.num_classes)

    def inputs(*_: Any) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        for view in features.vectors:
            yield [view], features.labels

    evaluator: Callable[[], LongTailEvaluator] = lambda: LongTailEvaluator(classes.num_classes, classes)  # noqa: E731
    stage.fit(model, FitData(splits, inputs, evaluator, device, 'mean_class', seed=seed))
    head = model.get_classifier().requires_grad_(False)
    return TrainedHead(head, torch.zeros(features.size, device=device), torch.ones(features.size, device=device))


def _moments(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [D] over all images and views, the latter not near zero."""
    flat = vectors.flatten(0, 1).double()
    mean, variance = flat.mean(dim=0), flat.var(dim=0, correction=0)
    std = (variance + _FLOOR * variance.mean()).sqrt()
    return mean.float(), torch.where(std > 0, std, torch.ones_like(std)).float()


@torch.no_grad()
def _begin(head: Any, x: torch.Tensor, labels: torch.Tensor) -> None:
    """Initial weights: zeros of a linear head, else the directions of the classes' means, as chance takes long to turn.

    Args:
        head: Whose loss is convex if it is linear.
        x: [N, D], with mean zero.
        labels: [N].
    """
    if isinstance(head, nn.Linear):
        head.weight.zero_()
        head.bias.zero_()
        return
    sums = torch.zeros_like(head.weight).index_add_(0, labels, x)
    there = torch.bincount(labels, minlength=head.out_features) > 0
    head.weight[there] = nn.functional.normalize(sums[there], dim=1)


def _begin_bias(bias: nn.Parameter, loss: nn.Module, labels: torch.Tensor) -> None:
    """The best constant logits, which small steps would take long to reach: of cross-entropy, the logarithmic prior.

    Args:
        bias: [C]; changed in place.
        loss: In its first epoch.
        labels: Of an epoch.
    """
    optimizer = torch.optim.LBFGS([bias], max_iter=50, line_search_fn='strong_wolfe')

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = loss(bias.expand(len(labels), -1), labels)
        # A class without images has no best constant: its logit would fall for ever.
        value = value + 1e-6 * bias.square().sum()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


def _batches(sampler: Any, epoch: int, size: int) -> Iterator[torch.Tensor]:
    """Indices of an epoch; what is left over is dropped, unless there is nothing else."""
    sampler.set_epoch(epoch)
    indices = torch.tensor(list(sampler))
    whole = len(indices) // size * size or len(indices)
    yield from indices[:whole].split(size)


@torch.no_grad()
def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device).eval().requires_grad_(False)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear

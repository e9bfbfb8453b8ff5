"""Balanced Meta-Softmax (Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020,
section 3.2): the classifier is trained anew with balanced softmax on batches whose sampler learns beside it.
"""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.func import vmap

from nbn_timm.data import epoch_seed
from nbn_timm.data.timm_datasets import dataset_targets
from nbn_timm.errors import InputError
from nbn_timm.key_values import check_choice, check_number
from nbn_timm.layers import ExpertHead
from nbn_timm.samplers.bilevel import meta_update, pick_noise
from nbn_timm.samplers.class_aware import ClassAware
from nbn_timm.samplers.meta import MetaSampler
from nbn_timm.second_stages.crt import ClassifierRetraining
from nbn_timm.second_stages.second_stage import FLAG, SecondStageRun, register_second_stage


@register_second_stage('balms')
class BalancedMetaSoftmax(ClassifierRetraining):
    """Classifier re-training on batches of `MetaSampler`, whose rates learn from every batch.

    Between the forward pass of a batch and the step of its classifier, `meta_update` looks ahead, by the step of SGD
    that the classifier's optimizer is about to take: with the learning rate of the moment, and with its momentum and
    weight decay, as in the released code. Of an optimizer other than SGD the step is one of plain SGD. The gradient,
    from the cross-entropy on a meta batch, goes to Adam. Meta batches go through the classes in turn, one image a
    visit, as there. An epoch is drawn from the rates at its
    beginning; the noise is that of these rates, and the gradient is taken at the present ones. With accumulation the
    rates learn from every batch and the classifier from their sum. Several processes learn from the gathered batches of
    all and keep the same rates.

    The result is an ordinary model; the rates and Adam's state are in the checkpoint's task state.

    Args:
        reinit: See `ClassifierRetraining`.
        meta_lr: Learning rate of Adam; 0.01 where a recipe of the release names none, as those for CIFAR, 0.001 in
            those for ImageNet-LT and Places-LT.
        meta_batch_size: Images of a meta batch per process; None is twice the batch, as in the released recipes for
            ImageNet-LT and Places-LT. Those for CIFAR have the batch itself.
        meta_split: Where meta batches come from, 'train' or 'val', with the augmentation of training. The release has
            'val' for ImageNet-LT and Places-LT, 'train' for CIFAR; a split that has taught the rates is no clean one to
            choose an epoch by.

    Raises:
        InputError: A setting is impossible.
    """

    takes_mixing = False
    needs = {'sampler': 'meta', 'loss': 'balanced_softmax', 'torchcompile': None}
    goes_on = False

    def __init__(
            self,
            reinit: bool = True,
            meta_lr: float = 0.01,
            meta_batch_size: int | None = None,
            meta_split: str = 'train',
    ) -> None:
        super().__init__(reinit)
        if meta_batch_size is not None:
            check_number('--stage balms', FLAG, 'meta_batch_size', meta_batch_size, low=1, whole=True)
        self.meta_lr = check_number('--stage balms', FLAG, 'meta_lr', meta_lr)
        self.meta_batch_size = meta_batch_size
        self.meta_split = check_choice('--stage balms', FLAG, 'meta_split', meta_split, ('train', 'val'))

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with a new classifier, which takes one vector per image."""
        classifier = self.trained(model)
        if isinstance(classifier, (nn.ModuleList, nn.Conv2d, ExpertHead)):
            raise InputError(f'the classifier of {type(model).__name__} is a {type(classifier).__name__}, and balms is '
                             'for a single one of feature vectors: use another second stage, such as crt')
        return super().prepare(model)

    def connect(self, run: SecondStageRun) -> None:
        """Take the sampler, whose rates Adam now has, and open a loader of meta batches."""
        sampler = run.loader.loader.sampler
        assert isinstance(sampler, MetaSampler)  # as `needs` says
        self.run = run
        self.sampler = sampler
        self.counts = torch.from_numpy(np.bincount(sampler.targets, minlength=len(sampler.rate_logits)))
        self.adam = torch.optim.Adam([sampler.rate_logits], lr=self.meta_lr)
        dataset, targets = run.splits.train, sampler.targets
        if self.meta_split == 'val':
            if run.splits.val is None:
                raise InputError('--stage balms has meta_split=val and there is no validation split: give one, or '
                                 'meta_split=train')
            dataset, val_targets = run.splits.val, dataset_targets(run.splits.val)
            if val_targets is None:
                raise InputError('--stage balms has meta_split=val, and the validation split does not tell its '
                                 'labels: give meta_split=train')
            targets = val_targets
        self.seed = epoch_seed(run.seed, 0)  # of streams that are independent of the training loader's
        size = self.meta_batch_size or 2 * (run.loader.loader.batch_size or 1)
        meta_sampler = MetaBatches(
            len(run.loader) * size, targets, seed=self.seed, rank=run.rank, world_size=run.world_size)
        # A copy, because an evaluation sets its own transform.
        self.meta_loader = run.create_loader(copy(dataset), meta_sampler, size, self.seed)  # type: ignore[arg-type]
        self.generator = torch.Generator(run.device)

    def set_epoch(self, epoch: int) -> None:
        """Begin the epoch's meta batches and noise, and keep the rates that its training batches are drawn from."""
        self.meta_loader.set_epoch(epoch)
        self.meta_batches = iter(self.meta_loader)
        self.generator.manual_seed(epoch_seed(self.seed, epoch))
        self.drawn_from = self.sampler.rate_logits.detach().clone()

    @contextmanager
    def batch(self, model: nn.Module, target: torch.Tensor) -> Iterator[None]:
        """Teach the rates by the batch that goes through the model."""
        classifier = self.trained(model)
        with recorded_inputs(classifier) as features:
            yield
        # After the ordinary pass: autocast would otherwise keep a cast weight that has no gradient.
        images, meta_target = next(self.meta_batches)
        with torch.no_grad(), recorded_inputs(classifier) as meta_features:
            classifier.eval()  # the logits of meta batches, which nobody reads, have no part in running statistics
            model(images)
            classifier.train()
        self.learn(classifier, *map(self.gathered, (features[0], target, meta_features[0], meta_target)))

    def learn(
            self,
            classifier: nn.Module,
            features: torch.Tensor,
            target: torch.Tensor,
            meta_features: torch.Tensor,
            meta_target: torch.Tensor,
    ) -> None:
        """One step of Adam on the rates.

        Args:
            classifier: As it is before its step on the batch.
            features: Of a training batch, [B, D].
            target: Its classes, int64 [B].
            meta_features: Of a meta batch, [M, D].
            meta_target: Its classes, int64 [M].
        """
        noise = pick_noise(self.drawn_from, self.counts, target, self.generator)
        gradient, _ = meta_update(
            self.sampler.rate_logits, classifier, features, target, noise, meta_features, meta_target,
            self.losses, **step_of(self.run.optimizer, classifier))
        if self.run.world_size > 1:  # a GPU's sums may differ in the last bit
            shared = gradient.to(self.run.device)
            dist.broadcast(shared, 0)
            gradient = shared.to(gradient.device)
        self.sampler.rate_logits.grad = gradient
        self.adam.step()

    def losses(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The run's loss of each image [B], from logits [B, C] and labels [B]."""
        return vmap(lambda row, label: self.run.criterion(row[None], label[None]))(logits, target)

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, which have equally many."""
        tensor = tensor.detach()
        if self.run.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.run.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """The rates and Adam's state."""
        return {'sampler': self.sampler.state_dict(), 'adam': self.adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; the learning rate stays that of the settings.

        Raises:
            InputError: It is not of this stage, or of another number of classes.
        """
        if not state.keys() >= {'sampler', 'adam'}:
            raise InputError('the checkpoint has no sampling rates, which --stage balms learns: resume a run of the '
                             'same second stage, or start one with --initial-checkpoint')
        self.sampler.load_state_dict(state['sampler'])
        self.adam.load_state_dict(state['adam'])
        self.adam.param_groups[0]['lr'] = self.meta_lr


def step_of(optimizer: torch.optim.Optimizer, classifier: nn.Module) -> dict[str, Any]:
    """The next step of an optimizer as `meta_update` takes it; of one other than SGD its learning rate alone."""
    first = optimizer.param_groups[0]
    if not isinstance(optimizer, torch.optim.SGD):
        return dict(lr=first['lr'])
    decay_of = {parameter: group['weight_decay'] for group in optimizer.param_groups for parameter in group['params']}
    parameters = {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    buffers = {name: optimizer.state.get(parameter, {}).get('momentum_buffer')
               for name, parameter in parameters.items()}
    return dict(lr=first['lr'], momentum=first['momentum'], nesterov=first['nesterov'],
                weight_decay={name: decay_of[parameter] for name, parameter in parameters.items()},
                velocity={name: buffer for name, buffer in buffers.items() if buffer is not None})


class MetaBatches(ClassAware):
    """All classes in turn, one image a visit, so many images per process and epoch."""

    def __init__(self, images: int, targets: np.ndarray, **kwargs: Any) -> None:
        self.images = images  # first, since the length of an epoch is asked for while the sampler is made
        super().__init__(targets, k=1, **kwargs)

    @property
    def epoch_length(self) -> int:
        return self.images * self.world_size


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that takes what the module is called with."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()

"""Test-time aggregation of experts (Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic
Long-Tailed Recognition" (SADE), NeurIPS 2022, section 4.2).
"""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms

from nbn_timm.errors import InputError, nearest
from nbn_timm.layers import ExpertHead
from nbn_timm.second_stages.classifier import classifier_of
from nbn_timm.second_stages.second_stage import FitData, FitReport, FittedSecondStage, register_second_stage

_ENOUGH = 0.05  # an expert with a smaller weight, rounded to two digits, ends the search
_SMALL = 64  # pixels; on larger images a view is cut out as for ImageNet
VIEWS = ('cifar', 'imagenet')  # those of the authors' test_training_cifar.py and of test_training_imagenet.py


@register_second_stage('expert_aggregation')
class ExpertAggregation(FittedSecondStage):
    """Weigh the experts for the distribution of the test images, by these images without their labels.

    Weights w are the softmax of v, which begins with equal entries. SGD with Nesterov momentum 0.9 makes the
    predictions softmax(sum of w_e z_e) on two augmented views of an image alike, see `agreement_loss`: which classes
    are frequent among the test images shows in which expert is steady on them. It ends after `epochs`, or after one in
    which a weight is below 0.05. Source: the authors' code (Vanint/SADE-AgnosticLT, commit cba11b8).

    A view is jittered in its colours, made grey, blurred and flipped, each by chance. For small pictures (`cifar`)
    before that it is cut from the evaluation's picture, padded by an eighth, and one in five is blurred; for others
    (`imagenet`) it is a random resized crop of the whole picture, and every second one is blurred.

    The result is the network whose output is the weighted sum of its experts' logits instead of their mean; its
    checkpoint has one entry more, `expert_weights`, by which `validate.py` knows it.

    Args:
        epochs: Passes over the test images at most.
        lr: Learning rate.
        weight_decay: On v, as in the authors' code.
        batch_size: Images of an update.
        view: 'cifar' or 'imagenet'; by default the first where images are up to 64 pixels high or wide.
        scale: Least area of a random resized crop, as a share; 0.08 in the authors' code for iNaturalist 2018.
        entropy: Weight of the entropy of both views' predictions, summed and divided by the number of classes, which is
            to be high; 0.01 in the authors' code for iNaturalist 2018.

    Raises:
        InputError: A setting out of range.
    """

    def __init__(
            self,
            epochs: int = 5,
            lr: float = 0.1,
            weight_decay: float = 5e-4,
            batch_size: int = 128,
            view: str | None = None,
            scale: float = 0.2,
            entropy: float = 0.0,
    ) -> None:
        for name, value, low in (('epochs', epochs, 1), ('batch_size', batch_size, 1), ('lr', lr, 0),
                                 ('weight_decay', weight_decay, 0), ('entropy', entropy, 0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < low:
                raise InputError(f'--stage expert_aggregation has {name}={value!r}: give a number from {low}')
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 1:
            raise InputError(f'--stage expert_aggregation has scale={scale!r}: give a share above 0, up to 1')
        if view not in (None, *VIEWS):
            raise InputError(f"--stage expert_aggregation has view={view!r}: give one of {', '.join(VIEWS)}"
                             f'{nearest(str(view), VIEWS)}')
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.view = view
        self.scale = scale
        self.entropy = entropy

    @classmethod
    def restore(cls, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model with a place for the weights that a checkpoint has, if it has them."""
        for name, module in model.named_modules():
            if isinstance(module, ExpertHead) and f'{name}.expert_weights' in state_dict:
                module.expert_weights = torch.full((module.num_experts,), 1 / module.num_experts)
        return model

    def fit(self, model: nn.Module, data: FitData) -> FitReport:
        """Find the weights on the test images and give them to the head."""
        head = classifier_of(model)
        if not isinstance(head, ExpertHead) or head.num_experts < 2:
            raise InputError(f'{type(model).__name__} has no experts to weigh: expert_aggregation takes a RIDE network '
                             'with at least 2')
        if data.splits.test is None:
            raise InputError('expert_aggregation looks at the test images, without their labels, and there are none: '
                             'give --test-list')
        assert data.two_views is not None
        v = torch.full((head.num_experts,), 1 / head.num_experts, device=data.device, requires_grad=True)
        optimizer = torch.optim.SGD([v], self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True)
        for epoch in range(self.epochs):
            for views in data.two_views(data.splits.test, self.view_steps, self.batch_size, epoch):
                first, second = (expert_logits(model, view) for view in views)
                optimizer.zero_grad()
                agreement_loss(first, second, v, self.entropy).backward()
                optimizer.step()
            weights = v.detach().softmax(dim=0)
            if weights.round(decimals=2).min() < _ENOUGH:
                break
        if data.distributed:
            dist.broadcast(weights, 0)
        head.expert_weights = weights
        told = ', '.join(f'{weight:.2f}' for weight in weights.tolist())
        return FitReport([f'weights   {told} of the experts, after {epoch + 1} passes over the test images'])


    def view_steps(self, evaluation: Sequence[Any], size: tuple[int, int]) -> list[Any]:
        """What makes a view of a picture.

        Args:
            evaluation: Steps that resize and crop it as in evaluation.
            size: Of what comes out, [H, W].
        """
        small = self.view == 'cifar' if self.view else min(size) <= _SMALL
        cut = [*evaluation, padded_crop] if small else [transforms.RandomResizedCrop(size, (self.scale, 1.0))]
        return [
            *cut,
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.2 if small else 0.5),
            transforms.RandomHorizontalFlip(),
        ]


def padded_crop(image: Image.Image) -> Image.Image:
    """A random crop of the same size after zero padding by an eighth."""
    width, height = image.size
    return transforms.RandomCrop((height, width), padding=min(height, width) // 8)(image)


def blur(image: Image.Image) -> Image.Image:
    """Gaussian blur with a radius from 0.1 to 2 pixels."""
    return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2).item()))


@torch.no_grad()
def expert_logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Logits of each expert [B, E, C] of a network in evaluation mode, in float32."""
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    return model.get_classifier().expert_logits(features).float()


def agreement_loss(first: torch.Tensor, second: torch.Tensor, v: torch.Tensor, entropy: float = 0.0) -> torch.Tensor:
    """Minus the mean cosine of the weighted predictions p and q on two views, and minus `entropy` times their entropy.

    Args:
        first, second: Logits of each expert [B, E, C] on either view.
        v: [E], whose softmax weighs the experts.
        entropy: Weight of -mean(p log p) - mean(q log q), over images and classes.
    """
    weights = v.softmax(dim=0)[:, None]
    mixed = [(logits * weights).sum(dim=1) for logits in (first, second)]
    one, other = (logits.softmax(dim=1) for logits in mixed)
    loss = -F.cosine_similarity(one, other, dim=1, eps=1e-6).mean()
    if entropy:
        loss = loss + entropy * sum((logits.softmax(dim=1) * logits.log_softmax(dim=1)).mean() for logits in mixed)
    return loss

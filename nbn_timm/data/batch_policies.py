"""Random changes of colour and form for whole batches, distributed as torchvision's and timm's for single images.

A policy gives each image a short row of operations with arguments; `batch_ops` carries them out. All draws come from
torch's global generator on the CPU, wherever the images are.
"""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment as timm_policies
from torchvision import transforms

from nbn_timm.data.batch_ops import OPERATIONS, Warp, operate
from nbn_timm.data.simclr import SIGMA, Blur

Policy = Callable[[torch.Tensor], torch.Tensor]  # uint8 [B, 3, H, W] to others
Operations = tuple[torch.Tensor, torch.Tensor]  # operations and their arguments, [B, steps], for `operate`


def batch_policy(transform: Any, size: tuple[int, int]) -> Policy | None:
    """What changes whole batches as `transform` changes single images; None where nothing here does.

    Args:
        transform: torchvision's `ColorJitter`, `RandomGrayscale` or `AutoAugment`, SimCLR's `Blur`, `RandomApply` of
            one of them, timm's `RandAugment` or `AutoAugment`.
        size: Height and width of the images.
    """
    match transform:
        case transforms.RandomApply():
            policies = [batch_policy(each, size) for each in transform.transforms]
            return None if None in policies else SometimesApply(policies, transform.p)  # type: ignore[arg-type]
        case transforms.ColorJitter():
            return ColorJitter(transform.brightness, transform.contrast, transform.saturation, transform.hue)
        case transforms.RandomGrayscale():
            return SometimesApply([Drawn('color', 0.0, 0.0)], transform.p)
        case Blur():
            return Drawn('blur', *SIGMA)
        case transforms.AutoAugment() if transform.interpolation is transforms.InterpolationMode.NEAREST:
            return AutoAugment(transform.policies, transform.fill or (0, 0, 0), size)
        case timm_policies.RandAugment() if _known(transform.ops):
            return TimmOperations(transform.ops, _independent(transform), size)
        case timm_policies.AutoAugment() if _known(sum(transform.policy, [])):
            return TimmOperations(sum(transform.policy, []), _in_groups(transform.policy), size)
    return None


class SometimesApply:
    """Changes each image with a probability."""

    def __init__(self, policies: Sequence[Policy], probability: float) -> None:
        self.policies = policies
        self.probability = probability

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, 3, H, W] to others."""
        chosen = (torch.rand(len(images)) <= self.probability).nonzero()[:, 0].to(images.device)
        changed = images.index_select(0, chosen)
        for policy in self.policies:
            changed = policy(changed)
        return images.index_copy(0, chosen, changed)


class PlannedPolicy:
    """Changes each image by a row of operations that `plan` draws."""

    warp = Warp()

    def plan(self, count: int) -> Operations:
        """Draw operations, int64 [count, steps], -1 for none, and their arguments, float64 of the same shape."""
        raise NotImplementedError

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, 3, H, W] to others."""
        for operations, arguments in zip(*(part.unbind(1) for part in self.plan(len(images))), strict=True):
            images = operate(images, operations, arguments, self.warp)
        return images


class ColorJitter(PlannedPolicy):
    """Brightness, contrast and saturation by a factor each, and hue, in random order, as torchvision's.

    Args:
        brightness, contrast, saturation: Least and greatest factor; None leaves it as it is.
        hue: Least and greatest part of a turn; None leaves it as it is.
    """

    def __init__(
            self,
            brightness: tuple[float, float] | None,
            contrast: tuple[float, float] | None,
            saturation: tuple[float, float] | None,
            hue: tuple[float, float] | None = None,
    ) -> None:
        given = dict(brightness=brightness, contrast=contrast, color=saturation, hue=hue)
        self.ranges = {OPERATIONS.index(name): limits for name, limits in given.items() if limits is not None}

    def plan(self, count: int) -> Operations:
        order = torch.rand(count, len(self.ranges)).argsort(1)
        factors = torch.empty(count, len(self.ranges))  # none of too small a strength
        for column, limits in enumerate(self.ranges.values()):
            factors[:, column] = torch.empty(count).uniform_(*limits)
        return torch.tensor(list(self.ranges), dtype=torch.int64)[order], factors.gather(1, order).double()


class Drawn(PlannedPolicy):
    """One operation on every image, with an argument that is drawn evenly.

    Args:
        operation: One of `OPERATIONS`.
        low, high: Ends of the argument.
    """

    def __init__(self, operation: str, low: float, high: float) -> None:
        self.operation = OPERATIONS.index(operation)
        self.low = low
        self.high = high

    def plan(self, count: int) -> Operations:
        arguments = torch.empty(count, 1).uniform_(self.low, self.high).double()
        return torch.full((count, 1), self.operation), arguments


class AutoAugment(PlannedPolicy):
    """torchvision's `AutoAugment`: one of many pairs of operations, each with a probability and a random sign.

    Args:
        policies: Pairs of (torchvision's name, probability, level from 0 to 9 or None).
        fill: Colour of what moves in from outside.
        size: Height and width of the images; distances of translations go with it.
    """

    def __init__(
            self,
            policies: Sequence[Sequence[tuple[str, float, int | None]]],
            fill: Sequence[float],
            size: tuple[int, int],
    ) -> None:
        self.warp = Warp(tuple(int(value) for value in fill))
        self.operations = torch.tensor([[OPERATIONS.index(_TORCHVISION[name][0]) for name, _, _ in row]
                                        for row in policies])
        self.probabilities = torch.tensor([[probability for _, probability, _ in row] for row in policies])
        self.arguments = torch.tensor([[[_torchvision_argument(name, level, sign, size) for sign in (-1, 1)]
                                        for name, _, level in row] for row in policies], dtype=torch.float64)

    def plan(self, count: int) -> Operations:
        pairs = torch.randint(len(self.operations), (count,))
        return self.planned(pairs, torch.rand(count, 2), torch.randint(2, (count, 2)))

    def planned(self, pairs: torch.Tensor, chances: torch.Tensor, signs: torch.Tensor) -> Operations:
        """The plan of these draws: int64 [B], from [0, 1) [B, 2], and 0 (minus) or 1 [B, 2]."""
        happens = chances <= self.probabilities[pairs]
        arguments = self.arguments[pairs].gather(2, signs[..., None])[..., 0]
        return torch.where(happens, self.operations[pairs], -1), arguments


# torchvision's operations: ours, the argument at levels 0 and 9, and whether its sign is random. The distances of
# translations are shares of the image.
_TORCHVISION: dict[str, tuple[str, tuple[float, float], bool]] = {
    'ShearX': ('shear_x', (0, 0.3), True),
    'ShearY': ('shear_y', (0, 0.3), True),
    'TranslateX': ('translate_x', (0, 150 / 331), True),
    'TranslateY': ('translate_y', (0, 150 / 331), True),
    'Rotate': ('rotate', (0, 30), True),
    'Brightness': ('brightness', (0, 0.9), True),
    'Color': ('color', (0, 0.9), True),
    'Contrast': ('contrast', (0, 0.9), True),
    'Sharpness': ('sharpness', (0, 0.9), True),
    'Posterize': ('posterize', (8, 4), False),
    'Solarize': ('solarize', (255, 0), False),
    'AutoContrast': ('autocontrast', (0, 0), False),
    'Equalize': ('equalize', (0, 0), False),
    'Invert': ('invert', (0, 0), False),
}
_LEVELS = 10


def _torchvision_argument(name: str, level: int | None, sign: int, size: tuple[int, int]) -> float:
    operation, (least, greatest), signed = _TORCHVISION[name]
    extent = {'translate_x': size[1], 'translate_y': size[0]}.get(operation, 1)
    value = float(torch.linspace(least, extent * greatest, _LEVELS)[level or 0])  # single precision, as torchvision's
    value = sign * value if signed else value
    if operation in ('brightness', 'color', 'contrast', 'sharpness'):
        return 1 + value
    if operation == 'posterize':
        return round(value)
    return int(value) if extent != 1 else value


class TimmOperations(PlannedPolicy):
    """timm's `AugmentOp`s with their probabilities and random magnitudes.

    Args:
        operations: Of which each image gets some.
        choose: From a number of images to indices into `operations`, int64 [B, steps].
        size: Height and width of the images.
    """

    def __init__(
            self,
            operations: Sequence[timm_policies.AugmentOp],
            choose: Callable[[int], torch.Tensor],
            size: tuple[int, int],
    ) -> None:
        self.choose = choose
        self.names = [operation.name for operation in operations]
        self.size = size
        self.probabilities = torch.tensor([operation.prob for operation in operations])
        self.magnitudes = torch.tensor([operation.magnitude for operation in operations], dtype=torch.float64)
        first = operations[0]  # what timm gives to all of a policy
        self.spread = first.magnitude_std
        self.greatest = first.magnitude_max or 10
        self.warp = Warp(tuple(first.kwargs['fillcolor']), _PIL_INTERPOLATIONS[first.kwargs['resample']])

    def plan(self, count: int) -> Operations:
        chosen = self.choose(count)
        happens = torch.rand(chosen.shape) <= self.probabilities[chosen]
        magnitudes = self.magnitudes[chosen]
        if self.spread == math.inf:
            magnitudes = magnitudes * torch.rand(chosen.shape, dtype=torch.float64)
        elif self.spread > 0:
            magnitudes = magnitudes + self.spread * torch.randn(chosen.shape, dtype=torch.float64)
        signs = 1 - 2 * torch.randint(2, chosen.shape)
        return self.planned(chosen, happens, magnitudes, signs)

    def planned(
            self,
            chosen: torch.Tensor,
            happens: torch.Tensor,
            magnitudes: torch.Tensor,
            signs: torch.Tensor,
    ) -> Operations:
        """The plan of these draws, [B, steps] each; signs are -1 and 1."""
        share = magnitudes.clamp(0, self.greatest) / 10
        operations, arguments = torch.full_like(chosen, -1), torch.zeros_like(share)
        for index, name in enumerate(self.names):
            here = happens & (chosen == index)
            operation, argument = _TIMM[name]
            extent = {'translate_x': self.size[1], 'translate_y': self.size[0]}.get(operation, 1)
            operations[here] = OPERATIONS.index(operation)
            arguments[here] = extent * argument(share[here], signs[here])
        return operations, arguments


def _enhanced(share: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return share * 1.8 + 0.1


def _increasing(share: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    return (1 + share * 0.9 * signs).clamp(min=0.1)


def _nothing(share: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(share)


def _bits(share: torch.Tensor) -> torch.Tensor:
    return (share * 4).trunc()


def _threshold(share: torch.Tensor) -> torch.Tensor:
    return (share * 256).trunc().clamp(max=256)


# timm's operations: ours, and the argument from the magnitude in tenths and the sign.
_TIMM: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    'AutoContrast': ('autocontrast', _nothing),
    'Equalize': ('equalize', _nothing),
    'Invert': ('invert', _nothing),
    'Rotate': ('rotate', lambda share, signs: share * 30 * signs),
    'Posterize': ('posterize', lambda share, _: _bits(share).clamp(max=8)),
    'PosterizeIncreasing': ('posterize', lambda share, _: (4 - _bits(share)).clamp(min=0)),
    'PosterizeOriginal': ('posterize', lambda share, _: (4 + _bits(share)).clamp(max=8)),
    'Solarize': ('solarize', lambda share, _: _threshold(share)),
    'SolarizeIncreasing': ('solarize', lambda share, _: 256 - _threshold(share)),
    'SolarizeAdd': ('solarize_add', lambda share, _: (share * 110).trunc().clamp(max=128)),
    **{name: (name.lower(), _enhanced) for name in ('Color', 'Contrast', 'Brightness', 'Sharpness')},
    **{f'{name}Increasing': (name.lower(), _increasing) for name in ('Color', 'Contrast', 'Brightness', 'Sharpness')},
    'ShearX': ('shear_x', lambda share, signs: share * 0.3 * signs),
    'ShearY': ('shear_y', lambda share, signs: share * 0.3 * signs),
    'TranslateXRel': ('translate_x', lambda share, signs: share * -0.45 * signs),
    'TranslateYRel': ('translate_y', lambda share, signs: share * -0.45 * signs),
}
_PIL_INTERPOLATIONS: dict[Any, str] = {
    Image.Resampling.NEAREST: 'nearest',
    Image.Resampling.BILINEAR: 'bilinear',
    Image.Resampling.BICUBIC: 'bicubic',
}


def _known(operations: Sequence[timm_policies.AugmentOp]) -> bool:
    """Whether all of timm's operations and their interpolation are here."""
    return all(each.name in _TIMM and each.kwargs['resample'] in _PIL_INTERPOLATIONS for each in operations)


def _independent(policy: timm_policies.RandAugment) -> Callable[[int], torch.Tensor]:
    """Operations with replacement, or by weight and without."""
    number, steps = len(policy.ops), policy.num_layers
    if policy.choice_weights is None:
        return lambda count: torch.randint(number, (count, steps))
    weights = torch.from_numpy(policy.choice_weights)
    return lambda count: torch.multinomial(weights.expand(count, -1), steps)


def _in_groups(policy: Sequence[Sequence[timm_policies.AugmentOp]]) -> Callable[[int], torch.Tensor]:
    """All operations of one group, in their order; timm's groups are pairs."""
    groups = torch.arange(sum(map(len, policy))).view(len(policy), -1)
    return lambda count: groups[torch.randint(len(policy), (count,))]

"""Which linear layers and convolutions read what a layer gives, found by watching one image go through the network."""
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from nbn_timm.errors import InputError
from nbn_timm.key_values import reason_of
from nbn_timm.layers.layer_norm import channel_axis
from nbn_timm.layers.try_images import try_images

__all__ = ['Reader', 'linear_readers']

NOT_KEPT = 'leave out --add-nbn, or the weights with which it is to begin; add_nbn in Python can leave layers out'

# What only moves numbers about.
_MOVES = {'view', 'reshape', 'permute', 'transpose', 'flatten', 'unflatten', 'roll', 'contiguous', '__getitem__',
          'squeeze', 'unsqueeze'}


@dataclass(frozen=True)
class Reader:
    """A linear layer or a convolution that reads what a normalisation gives."""

    layer: nn.Linear | nn.Conv2d

    @torch.no_grad()
    def take_up(self, factor: float, missing: torch.Tensor | None) -> None:
        """Give the same for an input that is `factor` times (what it was less `missing`).

        Args:
            missing: By channel; None for nothing.
        """
        if missing is not None and self.layer.bias is not None:
            weight = self.layer.weight.double()
            groups = getattr(self.layer, 'groups', 1)
            per_channel = weight.sum(dim=(2, 3)) if weight.ndim == 4 else weight  # over the places
            of_group = missing.unflatten(0, (groups, -1)).repeat_interleave(len(weight) // groups, dim=0)
            self.layer.bias += (per_channel * of_group).sum(dim=1)
        self.layer.weight /= factor

    def why_not(self, has_bias: bool) -> str | None:
        """Why it cannot take up a bias."""
        if has_bias and self.layer.bias is None:
            return 'has no bias'
        if has_bias and isinstance(self.layer, nn.Conv2d) and any(self.layer.padding):
            return 'pads what it reads'
        return None


def linear_readers(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Names of the layers that read what normalisation layers give, and from which nothing else does.

    Args:
        model: Of timm's; a copy without memory is watched.
        names: Of the normalisation layers.

    Raises:
        InputError: Something else reads what one gives, or a reader could not take up a change of it.
    """
    outline = deepcopy(model).to('meta').eval()
    linear = {id(module.weight): name for name, module in outline.named_modules()
              if isinstance(module, nn.Linear | nn.Conv2d)}
    watch = _Watch(set(linear))
    for name in names:
        layer = outline.get_submodule(name)
        layer.register_forward_hook(
            lambda layer, given, result, name=name: watch.follow(name, result, _channel_numbers(layer, result)))
    try:
        with torch.no_grad(), watch:
            outline(try_images(outline))
    except RuntimeError as error:
        raise InputError('the function of the network cannot be kept, since no image could be followed through it '
                         f'({reason_of(error)}): {NOT_KEPT}') from error
    found: dict[str, list[str]] = {}
    for name in names:
        found[name] = [linear[weight] for weight in watch.readers[name]]
        if why := _why_not(model, name, found[name], [linear[weight] for weight in watch.across[name]],
                           [linear[weight] for weight in watch.readers[name] if watch.reads[weight] != {name}],
                           watch.others[name]):
            raise InputError(f"the function of the network cannot be kept, since '{name}' {why}: "
                             f'{NOT_KEPT}')
    return found


def _why_not(
        model: nn.Module,
        name: str,
        readers: Sequence[str],
        across: Sequence[str],
        shared: Sequence[str],
        others: set[str],
) -> str | None:
    """Why readers cannot take up what changes in a layer: what it is or does, or by what else it is read.

    Args:
        readers: Those that read its channels.
        across: Those that read something else of it.
        shared: Those that read other things too.
        others: Functions that read it.
    """
    act = getattr(model.get_submodule(name), 'act', None)
    if act is not None and not isinstance(act, nn.Identity):
        return f'has an activation, {type(act).__name__}'
    if others:
        return f'is read by {min(others)}'
    if across:
        return f"is read by '{across[0]}', which sums over other things than its channels"
    if not readers:
        return 'is read by nothing at all'
    if shared:
        return f"is read by '{shared[0]}', which reads other things too"
    bias = getattr(model.get_submodule(name), 'bias', None)
    has_bias = bias is not None and (bias.is_meta or bool(bias.any()))
    for reader in readers:
        if reason := Reader(model.get_submodule(reader)).why_not(has_bias):  # type: ignore[arg-type]
            return f"is read by '{reader}', which {reason}"
    return None


def _channel_numbers(layer: nn.Module, result: torch.Tensor) -> torch.Tensor:
    """The number of the channel of each element of what a normalisation layer gives, laid out in memory as that is."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    numbers = torch.arange(weight.numel(), dtype=torch.int32, device='cpu').view(weight.shape)
    if channel_axis(layer) == 1:
        numbers = numbers.view(-1, *[1] * (result.ndim - 2))
    there = torch.empty_strided(result.shape, result.stride(), dtype=torch.int32, device='cpu')
    return there.copy_(numbers.expand(result.shape))


class _Followed(NamedTuple):
    name: str  # of the layer that gave it
    tensor: torch.Tensor  # so that its id stays its own
    channels: torch.Tensor  # the number of each element's channel


class _Watch(TorchFunctionMode):
    """Follows what layers give until something reads it.

    Args:
        weights: Of the linear layers and convolutions, by `id`.

    Attributes:
        readers: By layer, the weights through which its channels are read, in their order.
        across: By layer, the weights that sum over something else of it.
        others: By layer, the names of functions that read it otherwise.
        reads: By weight, the layers that are read through it; None is something else.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.readers: dict[str, set[int]] = defaultdict(set)
        self.across: dict[str, set[int]] = defaultdict(set)
        self.others: dict[str, set[str]] = defaultdict(set)
        self.reads: dict[int, set[str | None]] = defaultdict(set)
        self._followed: dict[int, _Followed] = {}

    def follow(self, name: str, tensor: torch.Tensor, channels: torch.Tensor) -> None:
        """From now on, watch for this tensor of a layer, whose elements are of these channels."""
        self._followed[id(tensor)] = _Followed(name, tensor, channels)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (F.linear, torch.conv2d):
            read, weight = (args[place] if len(args) > place else kwargs[key]
                            for place, key in enumerate(('input', 'weight')))
            if id(weight) in self.weights:
                source = self._followed.get(id(read))
                self.reads[id(weight)].add(source and source.name)
                if source:
                    summed = source.channels if func is F.linear else source.channels.movedim(-3, -1)
                    in_order = bool((summed == torch.arange(summed.shape[-1], device='cpu')).all())
                    (self.readers if in_order else self.across)[source.name].add(id(weight))
                return result
        read = [value for value in _flat([args, kwargs]) if isinstance(value, torch.Tensor)]
        given = [self._followed[id(value)] for value in read if id(value) in self._followed]
        if given and any(isinstance(value, torch.Tensor) for value in _flat([result])):
            name = func.__name__
            moves = name in _MOVES or name == 'pad' and result.shape == given[0].tensor.shape
            if moves and len(read) == 1 and args and args[0] is given[0].tensor:
                self.follow(given[0].name, result, func(given[0].channels, *args[1:], **kwargs))
            else:
                for source in given:
                    self.others[source.name].add(resolve_name(func) or name)
        return result


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]

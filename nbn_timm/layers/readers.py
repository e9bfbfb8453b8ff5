"""Which linear layers and convolutions read what a layer gives, found by watching one image go through the network."""
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import get_model_input_config
from torch.overrides import TorchFunctionMode, resolve_name

from nbn_timm.errors import InputError

__all__ = ['Reader', 'linear_readers']

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


def linear_readers(model: nn.Module, names: Sequence[str]) -> dict[str, list[Reader]]:
    """The layers that read what normalisation layers give, and from which nothing else does.

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
        outline.get_submodule(name).register_forward_hook(
            lambda module, given, result, name=name: watch.follow(name, result))
    with torch.no_grad(), watch:
        outline(torch.empty(1, *get_model_input_config(outline)['input_size'], device='meta'))
    found: dict[str, list[Reader]] = {}
    for name in names:
        bias = getattr(model.get_submodule(name), 'bias', None)
        has_bias = bias is not None and (bias.is_meta or bool(bias.any()))
        readers = {linear[weight]: Reader(model.get_submodule(linear[weight]))  # type: ignore[arg-type]
                   for weight in watch.readers[name]}
        others = sorted(watch.others[name])
        if not readers and not others:
            others = ['nothing at all']
        others += [f"'{reader}', which reads other things too" for reader, weight in
                   ((linear[weight], weight) for weight in watch.readers[name]) if watch.reads[weight] != {name}]
        others += [f"'{reader}', which {reason}" for reader, layer in readers.items()
                   if (reason := layer.why_not(has_bias))]
        if others:
            raise InputError(f"the function of the network cannot be kept, since '{name}' is read by {others[0]}: "
                             'leave this layer out with `layers`, or train with NBN from untrained weights on')
        found[name] = list(readers.values())
    return found


class _Watch(TorchFunctionMode):
    """Follows what layers give until something reads it.

    Args:
        weights: Of the linear layers and convolutions, by `id`.

    Attributes:
        readers: By layer, the weights through which what it gives is read.
        others: By layer, the names of functions that read it otherwise.
        reads: By weight, the layers that are read through it; None is something else.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.readers: dict[str, set[int]] = defaultdict(set)
        self.others: dict[str, set[str]] = defaultdict(set)
        self.reads: dict[int, set[str | None]] = defaultdict(set)
        self._followed: dict[int, tuple[str, torch.Tensor]] = {}  # with the tensor, so that its id stays its own

    def follow(self, name: str, tensor: torch.Tensor) -> None:
        """From now on, watch for this tensor."""
        self._followed[id(tensor)] = name, tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (F.linear, torch.conv2d):
            read, weight = (args[place] if len(args) > place else kwargs[key]
                            for place, key in enumerate(('input', 'weight')))
            if id(weight) in self.weights:
                source = self._followed.get(id(read))
                self.reads[id(weight)].add(source and source[0])
                if source:
                    self.readers[source[0]].add(id(weight))
                return result
        given = [value for value in _flat([args, kwargs]) if id(value) in self._followed]
        if given and any(isinstance(value, torch.Tensor) for value in _flat([result])):
            source = self._followed[id(given[0])]
            name = func.__name__
            if name in _MOVES or name == 'pad' and result.shape == given[0].shape:
                self.follow(source[0], result)
            else:
                for value in given:
                    self.others[self._followed[id(value)][0]].add(resolve_name(func) or name)
        return result


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]

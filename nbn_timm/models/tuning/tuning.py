"""Registry of the ways to fine-tune a network, and what all of them share."""
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.key_values import check_types, key_values, refuse_unknown
from nbn_timm.layers.frozen import freeze_nbn
from nbn_timm.models.transfer import classifier_names
from nbn_timm.registry import Registry

__all__ = ['TUNINGS', 'Tuning', 'apply_tuning', 'blocks_of', 'create_tuning', 'has_adapters', 'learn_only_tuned',
           'register_tuning']

FLAG = '--tune-kwargs'


class Tuning:
    """Base of all: what is put into a network, and what of it learns beside the classifier.

    Attributes:
        name: That `--tune` chooses it by.
        traces: Parts of the names of what it puts in, by which a checkpoint shows it.
    """

    name: ClassVar[str]
    traces: ClassVar[tuple[str, ...]] = ()

    def apply(self, model: nn.Module) -> None:
        """Put new parameters into a network with its weights, in place; by default none.

        Raises:
            InputError: It is not for this network.
        """

    def learns(self, model: nn.Module) -> set[str]:
        """Names of the parameters that are to learn, of a network to which it has been applied."""
        return {name for name, _ in model.named_parameters() if any(trace in name for trace in self.traces)}


TUNINGS: Registry[Tuning] = Registry('tuning')


def register_tuning(name: str) -> Callable[[type[Tuning]], type[Tuning]]:
    """Class decorator: make a `Tuning` available under a name."""
    def register(tuning: type[Tuning]) -> type[Tuning]:
        tuning.name = name
        return TUNINGS.register(name)(tuning)
    return register


def create_tuning(name: str, given: Mapping[str, Any]) -> Tuning:
    """A way to fine-tune by its name, with its own settings.

    Raises:
        InputError: Unknown name or setting, or a value of another type.
    """
    kind = TUNINGS.find(name)
    has_settings = kind.__init__ is not object.__init__
    settings = inspect.signature(kind).parameters if has_settings else {}
    takes_more = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in settings.values())
    if not takes_more:
        refuse_unknown(f'--tune {name}', given, list(settings))
    check_types(f'--tune {name}', key_values(FLAG, given), settings)
    return kind(**given)


def apply_tuning(model: nn.Module, name: str | None, given: Mapping[str, Any]) -> nn.Module:
    """Put into a network what a way to fine-tune needs; without a name there is nothing.

    Raises:
        InputError: As `create_tuning`, or it is not for this network.
    """
    if name is not None:
        create_tuning(name, given).apply(model)
    return model


def has_adapters(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights are of a network into which parameters were put."""
    traces = [trace for tuning in TUNINGS.values() for trace in tuning.traces]
    return any(trace in key for key in weights for trace in traces)


def learn_only_tuned(model: nn.Module, name: str, given: Mapping[str, Any]) -> None:
    """Let the classifier and what is tuned learn, and nothing else; BatchNorm and NBN beside it keep their statistics.

    Raises:
        InputError: As `create_tuning`, or there is nothing to tune.
    """
    tuned = create_tuning(name, given).learns(model)
    if not tuned:
        raise InputError(f'--tune {name} finds nothing to train in {type(model).__name__}: give another way, or leave '
                         'it out')
    heads = tuple(f'{one}.' for one in classifier_names(model))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in tuned or key.startswith(heads))
    for module in list(model.modules()):
        own = list(module.parameters(recurse=False))
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or any(one.requires_grad for one in own):
            continue
        if isinstance(module, nn.BatchNorm1d):
            raise InputError(f'--tune {name} would let the statistics of BatchNorm1d move in {type(model).__name__}, '
                             'which has no frozen form here: give another network, or --freeze')
        freeze_nbn(module)


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the blocks, or without such of all but the classifier, by name.

    As in LIFT, the embedding of the patches and a norm behind the last block are no part of them.
    """
    heads = tuple(f'{one}.' for one in classifier_names(model))
    inside = 'blocks.' if isinstance(getattr(model, 'blocks', None), nn.Module) else ''
    for name, parameter in model.named_parameters():
        if name.startswith(inside) and not name.startswith(heads):
            yield name, parameter

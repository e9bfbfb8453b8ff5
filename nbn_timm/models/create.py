"""A model of timm's registry, made for a dataset or as a checkpoint records it."""
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.data.pictures import mode_of
from nbn_timm.errors import InputError, nearest
from nbn_timm.key_values import (
    KeyValue,
    call,
    cannot_take,
    check_number,
    check_types,
    key_values,
    raised_here,
    reason_of,
    refuse_owned,
)
from nbn_timm.layers import add_nbn
from nbn_timm.layers.head import ClassVectors

from .model_folder import HUB, find_weights_file, is_model_folder, read_folder_config, read_weights
from .size_limit import LARGEST_NUMBER, TooLarge, largest_number, size_limit

_OWNERS = {
    'model_name': 'give --model',
    'num_classes': 'give --num-classes',
    'pretrained': 'give --pretrained',
    'device': 'give --device',
    'checkpoint_path': 'give --initial-checkpoint',
    'features_only': 'a network without a classifier is of no use here, so leave it out',
}
_RULES = (nn.modules.conv._ConvNd, nn.Linear, ClassVectors)  # layers that start by chance
_RECORDED = "config.json's"  # in place of a flag, of what a folder records
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def create_model(
        name: str,
        num_classes: int | None = None,
        pretrained: bool = False,
        drop: float | None = None,
        drop_path: float | None = None,
        bn_momentum: float | None = None,
        nbn: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        flags: tuple[str, str] = ('--model', '--model-kwargs'),
        in_chans: int | None = None,
) -> nn.Module:
    """Create a registered model; a wrong name or argument is an error that says so in one sentence.

    Args:
        name: As for `timm.create_model`.
        num_classes: None keeps the model's own.
        pretrained: Load its pretrained weights.
        drop: Dropout rate.
        drop_path: Drop path rate.
        bn_momentum: Momentum of all BatchNorm layers.
        nbn: Put NBN into the last stage, see `add_nbn`; pretrained weights are loaded before.
        model_kwargs: Further arguments of the model.
        flags: Which give name and arguments, for messages.
        in_chans: Channels of the images, to which timm adapts pretrained weights; None keeps the model's own.

    Raises:
        InputError: Unknown model, tag or argument, or a value that the model cannot take; no pretrained weights to be
            had; no normalisation for NBN.
    """
    name = name.removeprefix('timm/')  # as on the Hub
    recorded = _check_name(name, pretrained, flags[0])
    own = key_values(flags[1], model_kwargs or {})
    refuse_owned(own, _OWNERS)
    given = [*own, *(KeyValue(key, value, f'{flag} {value:g}') for key, value, flag in (
        ('drop_rate', drop, '--drop'), ('drop_path_rate', drop_path, '--drop-path'),
        ('in_chans', in_chans, '--in-chans')) if value is not None)]
    what = f"model '{name}'"
    _check_arguments(what, flags[1], model_kwargs or {})
    _check_arguments(what, _RECORDED, recorded)

    model = _made_by_timm(name, num_classes, pretrained, given)
    check_types(what, [*key_values(_RECORDED, recorded), *own], _switches(model))
    if nbn:
        add_nbn(model)
    if bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.momentum = bn_momentum
    return model


@torch.no_grad()
def init_by_torch(model: Any, classifier_alone: bool = False) -> None:
    """Give convolutions and linear layers new weights by their own `reset_parameters`, which is torch's rule.

    Some released codes leave them so, where timm and most others have Kaiming's rule for convolutions. Normalisation
    layers keep the values that they begin with.

    Args:
        model: Of timm's kind, with untrained weights.
        classifier_alone: Leave all but the classifier.

    Raises:
        InputError: The model does not say what its classifier is.
    """
    parts: Any = [model]
    if classifier_alone:
        classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
        if not isinstance(classifier, nn.Module | tuple | list):
            raise InputError(f'--init torch_classifier: {type(model).__name__} does not say what its classifier is; '
                             'give --init torch or leave it out')
        parts = [classifier] if isinstance(classifier, nn.Module) else classifier
    for part in parts:
        for module in part.modules():
            if isinstance(module, _RULES):
                module.reset_parameters()


def _check_name(name: str, pretrained: bool, flag: str) -> dict[str, Any]:
    """Refuse an unknown name, or a folder that is damaged; returns the arguments that a folder records."""
    if ':' not in name and not timm.is_model(name):
        raise InputError(f"unknown {flag} '{name}'{nearest(name, timm.list_models())} "
                         "(timm.list_models('*part*') lists names)")
    if not is_model_folder(name):
        return {}
    config = read_folder_config(name)
    if pretrained:
        read_weights(name)  # timm would look at no checksum
    return config.get('model_args') or {}


def _check_arguments(what: str, flag: str, arguments: Mapping[str, Any]) -> None:
    """Refuse values that a model takes when it is made, and fails with or grows by without end."""
    for key, value in arguments.items():
        if key.endswith(('drop_rate', 'drop_path_rate')) and value is not None:
            # Of some models these are used, and refused, in the first step of training alone.
            check_number(what, flag, key, value, high=1)
        if largest_number(value) > LARGEST_NUMBER:
            raise cannot_take(what, flag, key, value, f'give whole numbers up to {LARGEST_NUMBER:,}')


def _made_by_timm(name: str, num_classes: int | None, pretrained: bool, given: Sequence[KeyValue]) -> nn.Module:
    """`timm.create_model`, what may go wrong there as one sentence; bugs in a model stay what they are."""
    def make(weights: bool = False, **settings: Any) -> nn.Module:
        with size_limit():
            return timm.create_model(name, pretrained=weights, num_classes=num_classes, **settings)

    try:
        if given or is_model_folder(name):
            _try_outline(make, given, f"model '{name}'")
        if pretrained:
            _fetch_weights(name)
        return call(partial(make, pretrained), given, f"model '{name}'", retry=make)
    except InputError:
        raise
    except TooLarge as error:
        raise InputError(f"model '{name}' is too large for this machine ({error}): give another one") from error
    except (RuntimeError, OSError, ValueError) as error:
        if not (pretrained or 'pretrained tag' in str(error) or is_model_folder(name)):
            raise
        reason = textwrap.shorten(str(error), 400, placeholder=' ...') or type(error).__name__
        raise InputError(f"the weights of '{name}' cannot be had ({reason}): "
                         'check the name (timm.list_pretrained() lists all with weights) and the connection, or give '
                         'a file of weights (--pretrained-path of nbn-train and nbn-probe)') from error
    except Exception as error:
        if not is_model_folder(name):
            raise
        raise InputError(_no_model(name, error)) from error


def _try_outline(make: Callable[..., nn.Module], given: Sequence[KeyValue], what: str) -> None:
    """Make a model without memory first, so that what is wrong is found before its weights take memory and time.

    Raises:
        InputError: A setting is to blame.
        TooLarge: The model is too large, and no setting is to blame.
    """
    def outline(**settings: Any) -> nn.Module:
        with torch.device('meta'):
            return make(**settings)

    try:
        call(outline, given, what)
    except Exception as error:  # of code that may raise anything
        is_told = isinstance(error, InputError) and 'meta' not in str(error.__cause__)  # else it has no outline
        if is_told or isinstance(error, TooLarge):
            raise


def _fetch_weights(name: str) -> None:
    """Bring the weights of one of timm's models into the Hub's cache; timm would wait for ever if they trickle."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is not None and cfg.hf_hub_id and not cfg.hf_hub_filename and not (cfg.file or cfg.state_dict):
        find_weights_file(f'{HUB}{cfg.hf_hub_id}')


def _switches(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a model that are true or false, where 'false' as text would be taken for true.

    timm's other annotations say less than what its models take.
    """
    return {name: parameter for name, parameter in inspect.signature(type(model)).parameters.items()
            if parameter.annotation in (bool, 'bool')}


def _no_model(name: str, error: Exception) -> str:
    reason = textwrap.shorten(str(error), 400, placeholder=' ...')
    return (f"'{name}' is no model that timm can make with these settings ({type(error).__name__}: {reason}): check "
            '--drop, --drop-path and --model-kwargs, and its config.json, which may be damaged or of another kind')


def check_input_size(
        model: nn.Module,
        name: str,
        input_size: tuple[int, int, int],
        model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Refuse images that a model cannot take, and a model that gives no logits of them, by trying one.

    Args:
        model: A timm model; most take any size, transformers with absolute positions or windows do not, and with many
            halvings a small image has no pixel left.
        name: Of the model.
        input_size: (channels, height, width) of the images.
        model_kwargs: That the user gave for it.

    Raises:
        InputError: The model is for another size or number of channels, or no classifier. What it cannot do with images
            of its own size either is no fault of the size: where there are `model_kwargs` these are blamed, else it
            stays the error that it is.
    """
    takes = get_model_input_config(model)
    channels, height, width = takes['input_size']
    mode_of(input_size[0])
    if channels != input_size[0]:
        raise InputError(f"model '{name}' takes images of {channels} channels, and these have {input_size[0]}: leave "
                         'in_chans out of --model-kwargs, and give --in-chans')
    if takes['fixed_input_size'] and (height, width) != input_size[1:]:
        wanted = input_size[1] if input_size[1] == input_size[2] else '({},{})'.format(*input_size[1:])
        ours = f'--img-size {height} or ' if height == width else ''
        raise InputError(f"model '{name}' takes images of {height}x{width} only and these are "
                         f'{input_size[1]}x{input_size[2]}: give {ours}--model-kwargs img_size={wanted}')
    try:
        logits = _try_image(model, input_size)
    except Exception as error:  # of layers that may raise anything about a size
        if raised_here(error):
            raise
        if input_size == takes['input_size'] or not _takes_size(model, takes['input_size']):
            if not model_kwargs:
                raise
            given = ' '.join(f'{key}={value}' for key, value in model_kwargs.items())
            raise InputError(f"model '{name}' cannot be used as it was made ({reason_of(error)}): correct "
                             f'--model-kwargs {given}') from error
        raise InputError(f"model '{name}' cannot take images of {input_size[1]}x{input_size[2]} ({reason_of(error)}): "
                         f'give another --img-size, such as its own {height}') from error
    if logits.ndim != 2:
        raise InputError(f"model '{name}' gives an output of {list(logits.shape)} for an image, and no logits per "
                         'class: leave what changes its pooling or head out of --model-kwargs')


@torch.no_grad()
def _try_image(model: nn.Module, input_size: tuple[int, int, int]) -> torch.Tensor:
    """What a model gives in evaluation for a grey image; its modes stay as they are."""
    training = [module for module in model.modules() if module.training]
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(0))
    try:
        return model.eval()(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
    finally:
        for module in training:
            module.training = True


def _takes_size(model: nn.Module, input_size: tuple[int, int, int]) -> bool:
    try:
        _try_image(model, input_size)
    except Exception:  # whatever it is, it did not take it
        return False
    return True

"""A model of timm's registry, made for a dataset or as a checkpoint records it."""
from typing import Any

import timm
from timm.models import get_model_input_config
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.errors import InputError, nearest
from nbn_timm.layers import add_nbn

from .model_folder import is_model_folder, read_folder_config, read_weights

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def create_model(
        name: str,
        num_classes: int | None = None,
        pretrained: bool = False,
        drop: float | None = None,
        drop_path: float | None = None,
        bn_momentum: float | None = None,
        nbn: bool = False,
        **model_kwargs: Any,
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

    Raises:
        InputError: Unknown model, tag or argument; no pretrained weights to be had; no BatchNorm for NBN.
    """
    name = name.removeprefix('timm/')  # as on the Hub
    if ':' not in name and not timm.is_model(name):
        raise InputError(f"unknown --model '{name}'{nearest(name, timm.list_models())} "
                         "(timm.list_models('*part*') lists names)")
    if is_model_folder(name):
        read_folder_config(name)
        if pretrained:
            read_weights(name)  # timm would look at no checksum
    model = _made_by_timm(name, pretrained, dict(
        num_classes=num_classes, drop_rate=drop, drop_path_rate=drop_path, **model_kwargs))
    if nbn:
        add_nbn(model)
    if bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.momentum = bn_momentum
    return model


def _made_by_timm(name: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    """`timm.create_model`, what may go wrong there as one sentence; bugs in a model stay what they are."""
    folder = is_model_folder(name)
    try:
        return timm.create_model(name, pretrained=pretrained, **settings)
    except InputError:
        raise
    except TypeError as error:
        if folder:
            raise InputError(_no_model(name, error)) from error
        if 'argument' not in str(error):
            raise
        raise InputError(f"model '{name}' does not take this setting ({error}): "
                         'check --drop, --drop-path and --model-kwargs') from error
    except (RuntimeError, OSError, ValueError) as error:
        if not (pretrained or 'pretrained tag' in str(error) or folder):
            raise
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f"the weights of '{name}' cannot be had ({reason}): "
                         'check the name (timm.list_pretrained() lists all with weights) and the connection, or leave '
                         'out --pretrained') from error
    except Exception as error:
        if not folder:
            raise
        raise InputError(_no_model(name, error)) from error


def _no_model(name: str, error: Exception) -> str:
    reason = ' '.join(str(error).split())
    return (f"'{name}' is no model that timm can make with these settings ({type(error).__name__}: {reason}): check "
            '--drop, --drop-path and --model-kwargs, and its config.json, which may be damaged or of another kind')


def check_input_size(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """Refuse images that a model cannot take.

    Args:
        model: A timm model; most take any size, transformers with absolute positions or windows do not.
        name: Of the model.
        input_size: (channels, height, width) of the images.

    Raises:
        InputError: The model is for another size, or not for RGB images.
    """
    takes = get_model_input_config(model)
    channels, height, width = takes['input_size']
    if not channels == input_size[0] == 3:
        raise InputError(f"all images are read as RGB, but model '{name}' takes {channels} channels and the input size "
                         f'says {input_size[0]}: leave in_chans out of --model-kwargs and give an input size of 3 '
                         'channels')
    if takes['fixed_input_size'] and (height, width) != input_size[1:]:
        wanted = input_size[1] if input_size[1] == input_size[2] else '({},{})'.format(*input_size[1:])
        ours = f'--img-size {height} or ' if height == width else ''
        raise InputError(f"model '{name}' takes images of {height}x{width} only and these are "
                         f'{input_size[1]}x{input_size[2]}: give {ours}--model-kwargs img_size={wanted}')

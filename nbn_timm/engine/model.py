"""A model of timm's registry, made for a dataset."""
from typing import Any

import timm
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.errors import InputError, nearest
from nbn_timm.layers import add_nbn

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
    if ':' not in name and not timm.is_model(name):
        raise InputError(f"unknown --model '{name}'{nearest(name, timm.list_models())} "
                         "(timm.list_models('*part*') lists names)")
    settings = dict(num_classes=num_classes, drop_rate=drop, drop_path_rate=drop_path, **model_kwargs)
    try:
        model = timm.create_model(name, pretrained=pretrained, **settings)
    except TypeError as error:
        if 'argument' not in str(error):
            raise
        raise InputError(f"model '{name}' does not take this setting ({error}): "
                         'check --drop, --drop-path and --model-kwargs') from error
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        if not (pretrained or 'pretrained tag' in str(error)):
            raise
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f"the weights of '{name}' cannot be had ({reason}): "
                         'check the name (timm.list_pretrained() lists all with weights) and the connection, or leave '
                         'out --pretrained') from error
    if nbn:
        add_nbn(model)
    if bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.momentum = bn_momentum
    return model

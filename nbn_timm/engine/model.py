"""A model of timm's registry, made for a dataset."""
from typing import Any

import timm
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.errors import InputError, nearest

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def create_model(
        name: str,
        num_classes: int | None = None,
        pretrained: bool = False,
        drop: float | None = None,
        drop_path: float | None = None,
        bn_momentum: float | None = None,
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
        model_kwargs: Further arguments of the model.

    Raises:
        InputError: Unknown model, tag or argument.
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
    except RuntimeError as error:
        if 'pretrained tag' not in str(error):
            raise
        raise InputError(f'{error}: timm.list_pretrained() lists the tags of all models') from error
    if bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.momentum = bn_momentum
    return model

"""Settings of the model."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbn_timm.settings import NOT_NEGATIVE, PROBABILITY, Settings, Values, not_with, setting

INITS = ('model', 'torch', 'torch_classifier')


def _given_weights(name: str, others: Values) -> str | None:
    given = next((one for one in ('pretrained', 'pretrained_path', 'initial_checkpoint') if getattr(others, one)), None)
    return given and f'has no effect with --{given.replace("_", "-")}, which gives all weights'


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which network."""

    title = 'model'

    model: str = setting('', 'any timm model, or one of nbn_timm', metavar='NAME', short='-m',
                         unset='that of the finished network, if there is one', inherited=True)
    add_nbn: bool = setting(False, 'put NBN into the last stage of a timm model: into its BatchNorm, or where it has '
                            'none into its LayerNorm, GroupNorm and RmsNorm', inherited=True)
    model_kwargs: Mapping[str, Any] = setting({}, 'for the constructor', inherited=True)


@dataclass(frozen=True)
class StartSettings(Settings):
    """From which weights training starts, and what is set of the network for training alone."""

    title = 'start of training'

    pretrained: bool = setting(False, "from the model's published weights", effect=not_with('initial_checkpoint'))
    pretrained_path: str | None = setting(
        None, 'from weights of the same architecture in a file or a folder; a classifier for other classes begins anew',
        metavar='PATH', is_file=True, effect=not_with('initial_checkpoint'))
    initial_checkpoint: str | None = setting(
        None, 'from these weights, a file or the folder of a run; it also tells model, data and input format where '
        'they are not given, and classes that both have keep their rows', metavar='PATH', is_file=True)
    init: str = setting(
        INITS[0], "initial weights: by the model's own rule, by torch's for every layer, or by torch's for the "
        'classifier alone', choices=INITS, effect=_given_weights)
    freeze: str | None = setting(
        None, "what does not learn: all up to a stage or block by its name, as layer3 or blocks.4, or 'backbone'; "
        'BatchNorm statistics included', metavar='NAME', effect=not_with('stage'))
    freeze_epochs: int = setting(0, 'epochs at the beginning in which the classifier alone learns', limits=NOT_NEGATIVE,
                                 effect=not_with('stage'))
    keep_bn_stats: bool = setting(
        False, 'BatchNorm and NBN keep the running statistics that they have and normalise by them in training too, '
        'for fine-tuning by small batches', effect=not_with('stage'))
    drop: float | None = setting(None, 'dropout rate', limits=PROBABILITY, metavar='P', unset="the model's")
    drop_path: float | None = setting(None, 'drop path rate', limits=PROBABILITY, metavar='P', unset="the model's")
    grad_checkpointing: bool = setting(
        False, 'keep fewer activations for the backward pass and compute them again there: less memory, more time',
        kind='machine')
    bn_momentum: float | None = setting(None, 'momentum of all BatchNorm layers', limits=PROBABILITY,
                                        unset="the model's", effect=not_with('keep_bn_stats'))

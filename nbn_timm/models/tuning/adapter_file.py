"""Files with what fine-tuning of a part has learned: a few MB, which go onto the plain network again."""
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from nbn_timm.errors import InputError, in_words
from nbn_timm.files import atomic_write
from nbn_timm.models.transfer import classifier_names
from nbn_timm.models.weight_files import DIGEST, check_weights, read_checkpoint, weights_digest

from .classifier import with_head
from .tuning import TUNINGS, apply_tuning, create_tuning

__all__ = ['ADAPTER', 'AdapterFile', 'load_adapter', 'read_adapter', 'save_adapter']

ADAPTER = 'nbn_timm_adapter'  # key of the metadata
_ADAPTER_DIGEST = 'nbn_timm_adapter_sha256'  # of what stands there, as `DIGEST` is of the weights
_BASE = '.base_layer'  # what peft puts into the names of the weights that it goes onto


@dataclass(frozen=True)
class AdapterFile:
    """What is known of the network that an adapter is for.

    Attributes:
        model: Name of the plain network, for `timm.create_model`.
        num_classes: Of the classifier.
        tune, tune_kwargs: Of the fine-tuning.
        head, head_kwargs: Of the classifier; None is the model's own kind.
        model_kwargs: Constructor arguments.
        backbone_sha256: Digest of all weights of the plain network that have not been trained.
        record: Of the training, for `NetworkRecord.from_dict`: settings, classes, format of the images.
    """

    model: str
    num_classes: int
    tune: str
    tune_kwargs: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    head_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    backbone_sha256: str = ''
    record: Mapping[str, Any] = field(default_factory=dict)


_TYPES: Mapping[str, tuple[type, ...]] = {  # of what is no mapping
    **dict.fromkeys(('model', 'tune', 'backbone_sha256'), (str,)), 'num_classes': (int,), 'head': (str, type(None))}


def save_adapter(model: nn.Module, path: str | Path, about: AdapterFile) -> None:
    """Write what has been trained of a network, whole or not at all.

    Args:
        model: To which the tuning of `about` has been applied.
        path: Of a safetensors file.
        about: Its `backbone_sha256` is computed here.
    """
    learned, rest = _divided(model, about)
    told = {**asdict(about), 'backbone_sha256': weights_digest(rest)}
    text = json.dumps(told, sort_keys=True)
    metadata = {'format': 'pt', DIGEST: weights_digest(learned), ADAPTER: text, _ADAPTER_DIGEST: _sha256(text)}
    tensors = {name: value.detach().cpu().clone() for name, value in learned.items()}
    atomic_write(Path(path), lambda place: safetensors.torch.save_file(tensors, place, metadata=metadata))


def read_adapter(path: str | Path) -> AdapterFile | None:
    """What a file says of its network; None if it is no file of an adapter.

    Raises:
        InputError: It is one, and what it says is malformed.
    """
    if Path(path).suffix != '.safetensors':
        return None
    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
    except Exception:  # of a file that is damaged, which is said where it is read
        return None
    if ADAPTER not in metadata:
        return None
    malformed = f"what '{path}' says of its adapter is malformed"
    if metadata.get(_ADAPTER_DIGEST) != _sha256(metadata[ADAPTER]):
        raise InputError(f'{malformed} (it does not have the digest that was written with it): get it again')
    try:
        about = AdapterFile(**json.loads(metadata[ADAPTER]))
    except (TypeError, ValueError) as error:
        raise InputError(f'{malformed} ({in_words(error)}): get it again') from error
    for each in fields(about):
        value = getattr(about, each.name)
        if not isinstance(value, _TYPES.get(each.name, Mapping)) or isinstance(value, bool):
            raise InputError(f'{malformed} ({each.name} is {value!r:.80}): get it again')
    return about


def load_adapter(model: Any, path: str | Path) -> nn.Module:
    """Put an adapter and its classifier onto the plain network, in place.

    Args:
        model: Of timm's, with the weights that the fine-tuning began with; its classifier may be any.
        path: Of a file that `save_adapter` wrote.

    Returns:
        The same model.

    Raises:
        InputError: The file is damaged or no adapter, or is for another network or other weights. The model may have
            been changed by then.
    """
    weights = read_checkpoint(path)
    about = read_adapter(path)
    if about is None:
        raise InputError(f"'{path}' is no file of an adapter: give one that a run with --tune wrote")
    check_weights(weights, path)
    if not any(value.shape[:1] == (about.num_classes,) for value in weights.values()):
        raise InputError(f"'{path}' is said to be of {about.num_classes} classes and has no classifier of so many: get "
                         'it again')
    if model.num_classes != about.num_classes:
        model.reset_classifier(about.num_classes)
    training = model.training
    with_head(model, about.head, about.head_kwargs)
    apply_tuning(model, about.tune, about.tune_kwargs)
    learned, rest = _divided(model, about)
    wrong = sorted(learned.keys() ^ weights.keys()) or sorted(
        name for name in learned if learned[name].shape != weights[name].shape)
    if wrong:
        raise InputError(f"the adapter in '{path}' is for {about.model}, and this network differs in '{wrong[0]}': "
                         'give that model')
    if weights_digest(rest) != about.backbone_sha256:
        raise InputError(f"the adapter in '{path}' was trained on other weights of {about.model} than these: give the "
                         'network with the weights that its training began with')
    model.load_state_dict({**model.state_dict(), **weights})
    return model.train(training)


def _divided(model: nn.Module, about: AdapterFile) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state of a network in two: what the tuning and the classifier have, and the rest by its plain names."""
    tuning = create_tuning(about.tune, about.tune_kwargs)
    traces, tuned = TUNINGS[about.tune].traces, tuning.learns(model)
    heads = tuple(f'{name}.' for name in classifier_names(model))
    owners = {name.rpartition('.')[0] for name in tuned}  # of BatchNorm, the statistics have moved as well
    tuned |= {name for name, _ in model.named_buffers() if name.rpartition('.')[0] in owners}
    learned, rest = {}, {}
    for name, value in model.state_dict().items():
        own = any(trace in name for trace in traces) and f'{_BASE}.' not in name
        if own or name in tuned or name.startswith(heads):
            learned[name] = value
        else:
            rest[name.replace(_BASE, '')] = value
    return learned, rest


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()

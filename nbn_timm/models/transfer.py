"""Weights for a model that is to learn something else: all but the classifier, from a file or a folder."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.layers import BottleneckLinear, add_nbn, nbn_layers
from nbn_timm.layers.try_images import try_images

from ._released import StateDict, to_model_format
from .create import create_model
from .model_folder import FOLDER, HUB, is_model_folder, read_weights
from .run_folder import source_file
from .weight_files import read_state_dict

__all__ = ['add_nbn_to_trained', 'classifier_names', 'find_weights', 'has_nbn', 'load_pretrained_file', 'start_model']


def find_weights(source: str | Path, use_ema: bool = True) -> StateDict:
    """The weights that lie in a file, the folder of a run, or a folder or repository of timm's format.

    Raises:
        InputError: There are none, or they are damaged.
    """
    name = str(source)
    if name.startswith(HUB):
        weights = read_weights(name)
        if weights is None:
            raise InputError(f"'{name}' has no weights in a file that is known: give one with model.safetensors")
        return weights
    return read_state_dict(source_file(name.removeprefix(FOLDER) if is_model_folder(name) else name), use_ema)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of the classifier of a timm model, or of its several ones; none if it has none.

    They are where the number of classes shows: what timm's cfg names, and what `get_classifier` gives.
    """
    named = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    found = {named} if isinstance(named, str) else set(named)
    get_classifier: Any = getattr(model, 'get_classifier', None)
    classifier = get_classifier() if get_classifier is not None else ()
    parts = [classifier] if isinstance(classifier, nn.Module) else list(classifier or ())
    ids = {id(part) for part in parts if not isinstance(part, nn.Identity)}
    found |= {name for name, module in model.named_modules() if id(module) in ids}
    there = dict(model.named_modules())
    return tuple(sorted(name for name in found if name in there))


def load_pretrained_file(
        model: nn.Module,
        source: str | Path,
        rows: Sequence[tuple[int, int]] | None = None,
        use_ema: bool = True,
) -> str:
    """Load weights into a model of the same architecture whose classifier may be for other classes.

    Args:
        model: Of timm's; it is changed in place.
        source: See `find_weights`.
        rows: Of the classifier, the classes that keep theirs: label here, label there. None takes all of it if it fits.
        use_ema: Take averaged weights where there are some.

    Returns:
        What became of the classifier and of the first convolution, in words; empty if all was loaded as it is.

    Raises:
        InputError: There are no weights, or they differ from the model outside of the classifier.
    """
    weights = find_weights(source, use_ema)
    if has_nbn(weights) and not nbn_layers(model):
        raise InputError(f"the weights in '{source}' are of a network with NBN, and {_name(model)} has none, so that "
                         'its outputs would be garbage: give --add-nbn if they were trained with it, or the --model '
                         'with _nbn in its name; given as --initial-checkpoint of nbn-train or --checkpoint of '
                         'nbn-probe, they bring their model along')
    try:
        weights = to_model_format(weights, model)
    except InputError as error:
        raise InputError(f"the weights in '{source}' do not fit: {error}") from error
    weights, told = adapt_stem(weights, model)
    here, of_classifier = model.state_dict(), tuple(f'{name}.' for name in classifier_names(model))
    mine, theirs = ({key for key in state if not key.startswith(of_classifier)} for state in (here, weights))
    wrong = sorted(mine ^ theirs) + sorted(key for key in mine & theirs if here[key].shape != weights[key].shape)
    if wrong:
        raise InputError(f"the weights in '{source}' do not fit {_name(model)}: they differ in {len(wrong)} entries "
                         f'(first: {wrong[0]}); give the --model and --model-kwargs that they were trained with')
    same = here.keys() == weights.keys() and all(here[key].shape == weights[key].shape for key in here)
    if same and rows is None:
        model.load_state_dict(weights)
        return told and f'all weights{told}'
    model.load_state_dict({**here, **{key: weights[key] for key in mine}})
    begin_classifier(model)
    kept = _copy_rows(model, weights, of_classifier, rows or ())
    if kept:
        return f'all but the classifier, of which {kept} classes of the same name keep their rows{told}'
    return f'all but the classifier, which begins anew{told}'


def _name(model: nn.Module) -> str:
    return getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)


def adapt_stem(weights: StateDict, model: nn.Module) -> tuple[StateDict, str]:
    """Weights whose first convolution takes RGB, for a model that takes other channels, by timm's rule.

    Of one channel that is the sum over RGB; of n channels RGB in turn, times 3 / n.

    Returns:
        The weights, and in words what was done, for the end of a sentence; empty if nothing was.
    """
    named = getattr(model, 'pretrained_cfg', {}).get('first_conv') or ()
    here, adapted = model.state_dict(), dict(weights)
    for name in (named,) if isinstance(named, str) else named:
        key = f'{name}.weight'
        old, new = weights.get(key), here.get(key)
        if old is None or new is None or old.ndim != 4 or old.shape[1] != 3 or old.shape[1] == new.shape[1]:
            continue
        adapted[key] = adapt_input_conv(new.shape[1], old)
    changed = [key for key in adapted if adapted[key] is not weights[key]]
    channels = here[changed[0]].shape[1] if changed else 0
    return adapted, _adapted(channels) if changed else ''


def _adapted(channels: int) -> str:
    return f'; the first convolution was adapted from RGB to {channels} channel{"s" * (channels > 1)} as in timm'


@torch.no_grad()
def begin_classifier(model: nn.Module) -> None:
    """Let a linear classifier on trained features begin at zero, where all classes are equally likely.

    What the models of timm begin with is for features that are to be trained as well. EfficientNets have weights so
    large that on 20 classes the loss begins at 14, not at log 20 = 3, and epochs go by until that noise is unlearned.
    """
    for name in classifier_names(model):
        part: Any = model.get_submodule(name)
        for module in (part.fc if isinstance(part, BottleneckLinear) else part).modules():
            if type(module) in (nn.Linear, nn.Conv2d):  # others normalise, and zero has no direction
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)


@torch.no_grad()
def add_nbn_to_trained(model: Any, keeps_statistics: bool = False) -> str:
    """Put NBN into the last stage of a network with weights, which in evaluation computes what it did.

    Args:
        model: Of timm's; it is changed in place.
        keeps_statistics: What follows normalises by the running statistics alone, in training too.

    Returns:
        By how much its features differ on a batch of noise, in words.

    Raises:
        InputError: It has no normalisation for NBN.
    """
    images = try_images(model, 8)
    training = model.training
    before = _features(model.eval(), images)
    after = _features(add_nbn(model, keep_function=True), images)
    model.train(training)
    difference = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
    return ('NBN was put into the network with its weights: in evaluation its features of a batch of noise differ by '
            f'{difference:.1e} of the largest'
            + ('' if keeps_statistics else '; in training it normalises by the batch, and so goes other ways'))


def _features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the classifiers are given, flat; what the network gives if it has none. A new classifier tells nothing."""
    given: list[torch.Tensor] = []
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].flatten()))
             for name in classifier_names(model)]
    output = model(images)
    for hook in hooks:
        hook.remove()
    return torch.cat(given) if given else output


def start_model(
        name: str,
        num_classes: int | None,
        file: str | None,
        rows: Sequence[tuple[int, int]] | None = None,
        *,
        pretrained: bool = False,
        nbn: bool = False,
        keeps_statistics: bool = False,
        **settings: Any,
) -> tuple[Any, list[str]]:
    """A model with the weights that it is to start from, and what a person should know of them.

    Args:
        name: As for `create_model`.
        num_classes: Of the classifier.
        file: See `load_pretrained_file`; None takes the model's own weights.
        rows: See `load_pretrained_file`.
        pretrained: The model's own weights are the published ones.
        nbn: Put NBN into the last stage; if the weights are of a network without, its function stays.
        keeps_statistics: See `add_nbn_to_trained`.
        settings: Further arguments of `create_model`.

    Raises:
        InputError: As these.
    """
    later = nbn and (pretrained if file is None else not has_nbn(find_weights(file)))
    model: Any = create_model(name, num_classes, pretrained and file is None, nbn=nbn and not later, **settings)
    told = load_pretrained_file(model, file, rows) if file is not None else ''
    if file is None and pretrained and model.num_classes != model.pretrained_cfg.get('num_classes'):
        begin_classifier(model)
    notes = [f"'{file}' gives {told}"] if told and rows != () else []  # else the caller has said so
    channels = settings.get('in_chans')
    if file is None and pretrained and channels not in (None, 3):
        notes.append(f'the pretrained weights:{_adapted(channels)[1:]}')
    return model, [*notes, *([add_nbn_to_trained(model, keeps_statistics)] if later else [])]


def has_nbn(weights: StateDict) -> bool:
    """Whether weights are of a network with NBN, of this package or as released."""
    return 'scale_factor' in weights or any(key.endswith('.scale.alpha') for key in weights)


@torch.no_grad()
def _copy_rows(
        model: nn.Module,
        weights: StateDict,
        of_classifier: tuple[str, ...],
        rows: Sequence[tuple[int, int]],
) -> int:
    """Rows of a classifier of other classes; returns how many, 0 if it is of another kind."""
    here = model.state_dict()
    mine, theirs = ({key for key in state if key.startswith(of_classifier)} for state in (here, weights))
    if not rows or mine != theirs:
        return 0
    parts = [key for key in mine if here[key].ndim]
    if any(here[key].shape[1:] != weights[key].shape[1:] for key in parts):
        return 0
    ours, other = torch.tensor(list(rows)).T
    shared = {f'{name}.{key}' for name, part in model.named_modules() if isinstance(part, BottleneckLinear)
              for key in part.state_dict() if not key.startswith('fc.')}
    for key in shared & mine:
        here[key].copy_(weights[key])
    for key in [key for key in parts if key not in shared]:
        here[key][ours] = weights[key][other].to(here[key].dtype)  # a state dict shares the model's memory
    return len(rows)

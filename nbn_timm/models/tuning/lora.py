"""LoRA and its kind, which peft puts into the layers of a network (the extra `nbn_timm[peft]`)."""
import inspect
import math
import re
import textwrap
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from nbn_timm.errors import InputError, nearest
from nbn_timm.key_values import KeyValue, call, check_number, check_types, key_values, refuse_owned
from nbn_timm.layers.try_images import try_images

from .tuning import FLAG, Tuning, register_tuning

__all__ = ['LoraTuning', 'merge_lora']

_OWNERS = {
    'task_type': 'a classifier is trained in any case, so leave it out',
    'modules_to_save': 'the classifier is trained in any case, so leave it out',
    'peft_type': 'give kind',
    'inference_mode': 'leave it out',
}
_MOST_RANKS = 100_000  # far more than a layer has
_LINEAR = r'(qkv|q|k|v)'  # names of the projections of queries, keys and values in timm's attention


@register_tuning('lora')
class LoraTuning(Tuning):
    """Low-rank updates of weights, or another method of peft.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, and peft.

    Args:
        kind: peft's name of a method that changes single layers: lora, adalora, loha, lokr, oft, boft, vera, ia3, ...
        settings: Of that method, by peft's names, as r, lora_alpha, target_modules, use_dora. By default it goes into
            the projections of queries, keys and values.
    """

    traces = ('.lora_', '.base_layer.', '.hada_', '.lokr_', '.oft_', '.boft_', '.vera_', '.ia3_')

    def __init__(self, kind: str = 'lora', **settings: Any) -> None:
        self.kind, self.settings = str(kind), settings

    def apply(self, model: nn.Module) -> None:
        """Put it into the layers; the classifier stays as it is."""
        peft = _peft()
        types = {one.value.lower(): one for one in peft.PeftType}
        known = {name: types[name] for name in types if types[name] in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING}
        if self.kind not in known:
            raise InputError(f'--tune lora cannot take {FLAG} kind={self.kind}: give one of peft that changes single '
                             f'layers, {", ".join(sorted(known))}{nearest(self.kind, sorted(known))}')
        refuse_owned(key_values(FLAG, self.settings), _OWNERS)
        config_type = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[known[self.kind]]
        _check_settings(self.settings, inspect.signature(config_type).parameters)
        targets = self.settings['target_modules'] if 'target_modules' in self.settings else _default_targets(model)
        own = [KeyValue('target_modules', targets, f'{FLAG} target_modules={targets}'),
               *(one for one in key_values(FLAG, self.settings) if one.key != 'target_modules')]
        config = call(lambda **given: config_type(**given), own, f'peft\'s {self.kind}')
        try:
            peft.inject_adapter_in_model(config, model)
        except (ValueError, TypeError, RuntimeError, re.error) as error:  # of whatever peft does with its settings
            reason = textwrap.shorten(str(error), 300, placeholder=' ...')
            given = ' '.join(f'{key}={value}' for key, value in self.settings.items())
            remedy = (f'correct {FLAG} {given}' if given else f'give {FLAG} target_modules=NAMES')
            raise InputError(f'peft cannot put {self.kind} into {type(model).__name__} '
                             f'({type(error).__name__}: {reason}): {remedy}') from error
        _refuse_bypassed(model)

    def learns(self, model: nn.Module) -> set[str]:
        """What peft has put in, without the weights that it goes onto."""
        peft = _peft()
        layers = [(name, module) for name, module in model.named_modules()
                  if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
        return {f'{name}.{own}' for name, layer in layers for own, _ in layer.named_parameters()
                if not own.startswith('base_layer.')}


def _check_settings(settings: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse what means nothing to any method of peft, which takes it without a word, by the names that it gives."""
    what = '--tune lora'
    switches = {key: one for key, one in parameters.items() if one.annotation in (bool, 'bool')}
    check_types(what, key_values(FLAG, settings), switches)
    for key, value in settings.items():
        if value is None or (key in parameters and value == parameters[key].default):  # oft has an r of 0
            continue
        numbers = value.values() if key.endswith('_pattern') and isinstance(value, Mapping) else [value]
        for number in numbers:
            if isinstance(number, float):
                check_number(what, FLAG, key, number, low=-math.inf)
            if key in ('r', 'rank_pattern'):
                check_number(what, FLAG, key, number, low=1, high=_MOST_RANKS, whole=True)
            elif key.rpartition('_')[2] == 'alpha' or key == 'alpha_pattern':
                check_number(what, FLAG, key, number, above=True)
            elif ('dropout' in key and key not in switches) or key in ('beta1', 'beta2'):
                check_number(what, FLAG, key, number, high=1, below=True)


def _refuse_bypassed(model: nn.Module) -> None:
    """Refuse a network that reads the weight of a layer without calling it, and would miss what peft puts in."""
    outline, called = deepcopy(model).to('meta').eval(), set[str]()
    layers = {name: module for name, module in outline.named_modules()
              if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        outline(try_images(outline))
    if missed := sorted(layers.keys() - called):
        raise InputError(f"{type(model).__name__} reads the weight of '{missed[0]}' without calling the layer, so "
                         f'--tune lora would do nothing there: give {FLAG} target_modules=NAMES of other layers')


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"--tune lora needs the package 'peft' ({error}): pip install 'nbn_timm[peft]'") from error
    return peft


def _default_targets(model: nn.Module) -> str:
    pattern = re.compile(rf'.*attn\.{_LINEAR}')
    if not any(isinstance(module, nn.Linear) and pattern.fullmatch(name) for name, module in model.named_modules()):
        raise InputError(f'{type(model).__name__} has no attention with the usual names: give '
                         f"{FLAG} target_modules=NAMES, a list of layers or a regular expression of peft's")
    return pattern.pattern


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Merge what peft has put into layers into their weights, in place; a network without it stays as it is.

    Raises:
        InputError: peft cannot merge one, or the weights would not be finite.
    """
    if not any('.base_layer.' in name for name, _ in model.named_parameters()):
        return model
    layers: Mapping[str, Any] = {
        name: module for name, module in model.named_modules()
        if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer)}
    for name, layer in layers.items():
        try:
            layer.merge(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise InputError(f"'{name}' cannot be merged ({error}): leave out --fuse") from error
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model

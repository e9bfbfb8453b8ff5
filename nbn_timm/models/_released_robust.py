"""Checkpoints of codes for adversarial robustness to this package's keys.

RoBal (wutong16/Adversarial_Long-Tail, commit ab2f3a7) saves a WRN-34-10 below `backbone.` and its classifier below
`classifier.`, behind `model.module.` of its wrapper. A cosine classifier there has a bias of zeros that is never
trained, and CosPlus an average of features, `moving_ed`, that has no part in its output. TRADES (yaodongyu/TRADES,
commit 6e8e11b) and MART (YisenWang/MART, commit 2d83e17) save the bare network, and TRADES' WRN a stage `sub_block1`
that nothing uses. Their ResNet-18 is that of kuangliu/pytorch-cifar, with `shortcut` and `linear`.
"""
import re
from collections.abc import Mapping
from typing import Any

__all__ = ['COSPLUS_MARK', 'robust_form', 'without_robust_names']

COSPLUS_MARK = 'fc.moving_ed'  # in a checkpoint with RoBal's classifier
_WIDE = 'backbone.block1.layer.0.conv1.weight'
_NAMES = (
    (re.compile(r'^backbone\.'), ''),
    (re.compile(r'^classifier\.(?:fc\.)?'), 'fc.'),
    (re.compile(r'^(layer\d\.\d+)\.shortcut\.'), r'\1.downsample.'),
    (re.compile(r'^linear\.(weight|bias)$'), r'fc.\1'),
)


def robust_form(state_dict: Mapping[str, Any]) -> str:
    """Whose format a state dict has, 'RoBal' or 'TRADES'; an empty string if it is none of these."""
    if any(key.endswith(_WIDE) for key in state_dict):
        return 'RoBal'
    names = {key.removeprefix('module.') for key in state_dict}
    if {'linear.weight', 'layer4.0.shortcut.0.weight', 'conv1.weight'} <= names or (
            'sub_block1.layer.0.conv1.weight' in names):
        return 'TRADES'
    return ''


def without_robust_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict under this package's keys, if it has one of these formats; else as they are."""
    form = robust_form(state_dict)
    if not form:
        return dict(state_dict)
    prefix = next((key.removesuffix(_WIDE) for key in state_dict if key.endswith(_WIDE)), 'module.')
    found = {}
    for key, value in state_dict.items():
        name = key.removeprefix(prefix)
        for pattern, ours in _NAMES:
            name = pattern.sub(ours, name)
        if not name.startswith('sub_block1.'):
            found[name] = value
    if form == 'RoBal' and not any(f'{prefix}classifier.fc.' in key for key in state_dict) and (
            'fc.bias' in found and not found['fc.bias'].any()):
        del found['fc.bias']
    return found

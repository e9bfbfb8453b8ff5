"""Checkpoints of other formats to this package's: recognised by their keys and shapes, never by a file name.

Released with NBN (yuxiangbao/NBN, commit 7365e21): torchvision's keys, raw NBN vectors, and one tensor `scale_factor`.
Its first entry is alpha for all NBN layers of a single network, its first E entries are those of E experts. Experts
have their stages in `layer3s.<expert>.<block>` and `layer4s.<expert>.<block>`, their classifiers in `linears.<expert>`.
Released with RIDE (frank-xwang/RIDE-LongTailRecognition, commit ab8be5c): the same below `backbone.`, for CIFAR with
`layer2s` and `layer3s`; cosine classifiers are stored transposed and have no bias, and after RIDE's second stage there
is the assignment module `expert_help_pred_*`. Keys may carry `module.` in both.
"""
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from timm.models import clean_state_dict, create_model, is_model

from nbn_timm.errors import InputError
from nbn_timm.layers import nbn_layers

from ._released_robust import COSPLUS_MARK, robust_form, without_robust_names
from ._tags import tag_of_classes
from .ownership import needs_package

__all__ = ['Recognized', 'checkpoint_filter_fn', 'convert_checkpoint', 'recognize', 'rename_experts', 'to_model_format',
           'without_wrapper']

StateDict = dict[str, torch.Tensor]

_BOTTLENECK_DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_BASIC_DEPTHS: dict[tuple[int, ...], int] = {(1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 34}

_FAMILIES: dict[tuple[int, ...], str] = {(64, 64): 'resnet', (128, 4): 'resnext'}  # by the first 3x3 convolution


# Names of experts' parts in released checkpoints, and ours.
_EXPERT_NAMES = (
    (re.compile(r'^layer(\d)s\.(\d+)\.(\d+)\.'), r'layer\1.\3.\2.'),
    (re.compile(r'^linears\.(\d+)\.'), r'fc.\1.'),
    (re.compile(r'^expert_help_pred_hidden_fcs\.'), 'router.hidden.'),
    (re.compile(r'^expert_help_pred_fc\.'), 'router.decide.'),
)
_RIDE_PREFIX = 'backbone.'
ROUTED_PREFIX = 'network.'  # of the network in a `RoutedExperts`


@dataclass(frozen=True)
class Recognized:
    """What the keys and shapes of a checkpoint say it is."""

    arch: str  # a name in timm's registry, unless no model fits
    num_classes: int
    form: str = ''  # 'NBN', 'RIDE', 'RoBal' or 'TRADES' if it is in their released format and needs conversion
    model_args: dict[str, Any] = field(default_factory=dict)  # of the constructor, what the name does not say
    has_router: bool = False  # RIDE's assignment module is in it
    added_head: str = ''  # kind of the classifier in the place of that of timm's own network, see `with_head`

    @property
    def has_bare_cosine(self) -> bool:
        """Whether it has cosines, of a scale that no published format tells."""
        return not self.form and 'cosine' in (self.added_head, self.model_args.get('head'))

    @property
    def tag(self) -> str:
        """The benchmark of the zoo with that number of classes, or an empty string."""
        return tag_of_classes(self.num_classes)

    @property
    def name(self) -> str:
        """`arch.tag`."""
        return f'{self.arch}.{self.tag}' if self.tag else self.arch

    @property
    def arguments(self) -> str:
        """`model_args` as they stand in a call, each with a comma before it."""
        return ''.join(f', {key}={value!r}' for key, value in self.model_args.items())

    def __str__(self) -> str:
        form = f'released {self.form} format' if self.form else 'no conversion needed'
        benchmark = f' ({self.tag})' if self.tag else ''
        router = ', with an assignment module' if self.has_router else ''
        head = f' with a {self.added_head} classifier' if self.added_head else ''
        return f'{self.arch}{self.arguments}{head}, {self.num_classes} classes{benchmark}{router}, {form}'


def recognize(state_dict: Mapping[str, torch.Tensor]) -> Recognized | None:
    """Tell which ResNet of this package, of timm or of the released codes a state dict belongs to, if any."""
    state_dict = without_wrapper(state_dict)
    renamed = rename_experts(state_dict)
    form = robust_form(state_dict) or _released_form(state_dict)
    state_dict = renamed
    experts = sum(re.fullmatch(r'fc\.\d+(\.fc)?\.weight', key) is not None for key in state_dict)
    classifier = 'fc.0' if experts else 'fc'
    head = _head(state_dict, classifier)
    last = state_dict.get(f'{classifier}.fc.weight' if head == 'bottleneck' else f'{classifier}.weight')
    if last is None or 'conv1.weight' not in state_dict:
        return None
    backbone = _backbone(state_dict)
    if backbone is None:
        return None
    nbn = 'scale_factor' in state_dict or any(key.endswith('.scale.alpha') for key in state_dict)
    if backbone == 'resnext50' and not nbn and not experts:
        backbone = 'resnext50_32x4d'
    shike = any(key.startswith('fusion.') for key in state_dict)
    in_name = nbn and head == 'rectified' and not shike  # there are no names for rectification alone
    model_args = _expert_args(state_dict, experts) if experts else {}
    if not in_name and (experts or head != 'linear'):
        model_args['head'] = head
    arch = f'{backbone}{"_ride" * bool(experts)}{"_nbn" * nbn}{"_lr" * in_name}'
    if shike:
        arch, model_args = f'{backbone}_shike{"_nbn" * nbn}', dict(num_experts=experts, head=head)
    elif backbone.endswith('_bbn'):  # there are no names for NBN in it
        arch, model_args = backbone, dict(nbn=True) if nbn else {}
        if head != 'linear':
            model_args['head'] = head
    has_router = any(key.startswith('router.') for key in state_dict)
    timms = is_model(arch) and not needs_package(arch)  # whose constructors know no heads
    added_head = model_args.pop('head', '') if timms else ''
    return Recognized(arch, last.shape[0], form, model_args, has_router, added_head)


def rename_experts(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Released names and shapes to this package's, of experts' parts above all; other entries stay as they are."""
    renamed = {}
    for key, value in without_robust_names(state_dict).items():
        name = key.removeprefix(_RIDE_PREFIX).removeprefix(ROUTED_PREFIX)
        if re.fullmatch(r'linears\.\d+\.weight', name) and f'{key.removesuffix("weight")}bias' not in state_dict:
            value = value.T
        for pattern, ours in _EXPERT_NAMES:
            name = pattern.sub(ours, name)
        renamed[name] = value
    return renamed


def convert_checkpoint(state_dict: Mapping[str, torch.Tensor], recognized: Recognized) -> StateDict:
    """A released state dict with this package's keys, for the model that `recognized` names.

    Raises:
        InputError: There is no such model, or the keys do not fit it.
    """
    if not is_model(recognized.arch):
        raise InputError(f'the checkpoint is a {recognized}, for which this package has no model: give one of an '
                         'architecture that timm.list_models() names')
    if recognized.added_head:
        raise InputError(f'the checkpoint is a {recognized.arch} with a {recognized.added_head} classifier, which timm '
                         'has no name for: leave it as it is, since nbn-validate --checkpoint and nbn-predict take it')
    model = create_model(recognized.arch, num_classes=recognized.num_classes, device='meta', **recognized.model_args)
    converted = to_model_format(state_dict, model)
    own = model.state_dict()
    wrong = converted.keys() ^ own.keys() or {key for key, value in own.items() if converted[key].shape != value.shape}
    if wrong:
        raise InputError(f'the checkpoint looks like a {recognized.arch} but differs in {_some(wrong)}: it is damaged '
                         'or of a variant that this package does not know')
    return {key: value.contiguous() for key, value in converted.items()}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module, new_head: bool = False) -> StateDict:
    """Make a state dict of this package's, timm's or the released format fit a zoo model; timm calls it while loading.

    Beyond `to_model_format` it drops a classifier of another number of classes whole, statistics of its logit
    rectification included, of which timm drops the weight and bias alone. Where timm drops the classifier it does not
    load strictly either, so all else is compared with the model here.

    Args:
        state_dict: Of a file.
        model: That will take it.
        new_head: The classifier is dropped in any case.

    Raises:
        InputError: As `to_model_format`, or something outside of the classifier is missing or superfluous.
    """
    prefix = f'{model.get_classifier(name_only=True)}.'  # type: ignore[operator]
    state_dict = to_model_format(state_dict, model)
    rest = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    wrong = rest.keys() ^ {key for key in model.state_dict() if not key.startswith(prefix)}
    if wrong:
        raise InputError(f'the weights do not fit {type(model).__name__}: they differ from it in {_some(wrong)}, so '
                         'give a file of this architecture')
    classes = {value.shape[0] for key, value in state_dict.items()
               if key.startswith(prefix) and key.endswith('weight')}
    return rest if new_head or (classes and classes != {model.num_classes}) else state_dict


def without_wrapper(state_dict: Mapping[str, Any]) -> StateDict:
    """A state dict without what a training framework puts around it, and before every key, such as `student.model.`."""
    for wrapper in ('state_dict', 'model'):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    state_dict = clean_state_dict(dict(state_dict))
    suffix = 'conv1.weight'  # the stem of all networks here; those of blocks have longer names
    prefix = min((key for key in state_dict if f'.{key}'.endswith(f'.{suffix}')), key=len, default=suffix)
    prefix = prefix.removesuffix(suffix)
    if not prefix or prefix in (_RIDE_PREFIX, ROUTED_PREFIX) or not all(key.startswith(prefix) for key in state_dict):
        return state_dict
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}


def to_model_format(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Bring a state dict of this package's, timm's or the released format to the keys of `model`.

    Raises:
        InputError: One of the two has NBN and the other has not: loaded regardless, the outputs would be garbage.
    """
    state_dict = rename_experts(without_wrapper(state_dict))
    network = getattr(model, 'network', model)  # of a `RoutedExperts`
    layers = nbn_layers(network)
    alphas = [key for key in network.state_dict() if key.endswith('.scale.alpha')]
    has_scale = any(key.endswith('.scale.alpha') for key in state_dict)
    model_name = type(network).__name__
    if layers and not has_scale and 'scale_factor' not in state_dict:
        raise InputError(f'the checkpoint has no NBN scale, but {model_name} has NBN layers: load it into the plain '
                         'architecture, or give a checkpoint of an NBN model')
    if not layers and (has_scale or 'scale_factor' in state_dict):
        raise InputError(f'the checkpoint is of an NBN model, but {model_name} has no NBN layers, so that its outputs '
                         'would be garbage: give --add-nbn (add_nbn in Python) if the checkpoint was trained with it, '
                         'or the architecture with _nbn in its name, or fold the checkpoint first')
    if 'scale_factor' in state_dict:
        scale = state_dict.pop('scale_factor')
        for key in alphas:
            expert = _expert_of(key)
            state_dict[key] = scale[expert:expert + 1].clone()
    state_dict.pop(COSPLUS_MARK, None)
    if network is model:  # an assignment module is no part of it
        return {key: value for key, value in state_dict.items() if not key.startswith('router.')}
    return {key if key.startswith('router.') else f'{ROUTED_PREFIX}{key}': value for key, value in state_dict.items()}


def _released_form(state_dict: Mapping[str, torch.Tensor]) -> str:
    if any(key.startswith(_RIDE_PREFIX) for key in state_dict):
        return 'RIDE'
    return 'NBN' if 'scale_factor' in state_dict or 'linears.0.weight' in state_dict else ''


def _expert_of(name: str) -> int:
    """The expert that a layer `<stage>.<block>.<expert>.*` belongs to; 0 for one of a single network."""
    match = re.match(r'layer\d\.\d+\.(\d+)\.', name)
    return int(match[1]) if match else 0


def _head(state_dict: Mapping[str, torch.Tensor], classifier: str) -> str:
    """Kind of a classifier."""
    if f'{classifier}.bn.running_mean' in state_dict:
        return 'rectified'
    if f'{classifier}.reduce.weight' in state_dict:
        return 'bottleneck'
    if COSPLUS_MARK in state_dict:
        return 'cosplus'
    return 'linear' if f'{classifier}.bias' in state_dict else 'cosine'


def _expert_args(state_dict: Mapping[str, torch.Tensor], experts: int) -> dict[str, Any]:
    """Constructor arguments of a RIDE network: how many experts there are, how wide, and from which stage on."""
    stages = sorted({match[1] for key in state_dict if (match := re.match(r'(layer\d)\.', key))})
    norm = 'bn3' if f'{stages[0]}.0.conv3.weight' in state_dict else 'bn2'
    last = state_dict.get(f'{stages[-1]}.0.0.{norm}.weight')
    # The widths of reduced experts are 48 channels for CIFAR, 384 (times 4 in bottlenecks) else: multiples of 3.
    args = dict(num_experts=experts, reduced=last is not None and last.shape[0] % 3 == 0)
    return args if len(stages) == 3 else {**args, 'share_layer3': 'layer3.0.conv1.weight' in state_dict}


def _backbone(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """Name of a ResNet by its depth, width and grouping."""
    if 'block1.layer.0.conv1.weight' in state_dict:
        wide = {key.split('.')[2] for key in state_dict if key.startswith('block1.layer.')}
        return f'wrn_{6 * len(wide) + 4}_{state_dict["block1.layer.0.conv1.weight"].shape[0] // 16}'

    def blocks(stage: int) -> int:
        return len({key.split('.')[1] for key in state_dict if key.startswith(f'layer{stage}.')})

    depths = tuple(blocks(stage) for stage in range(1, 5))
    experts = any(key.startswith('fc.0.') for key in state_dict)
    if 'layer4.0.1.conv1.weight' in state_dict and not experts:  # BBN's branches, which share a classifier
        return f'resnet{6 * depths[0] + 2}_bbn'
    if depths[3] == 0:  # CIFAR: three stages
        if len(set(depths[:3])) > 1 or not depths[0] or state_dict['conv1.weight'].shape[0] != 16:
            return None
        second = state_dict.get('layer2.0.conv1.weight')  # None of experts, whose keys are longer
        wide_stages = depths[0] == 2 and second is not None and second.shape[0] == 64
        return f'resnet{6 * depths[0] + 2}{"_wide" * wide_stages}'
    if 'layer1.0.conv3.weight' not in state_dict:
        depth = _BASIC_DEPTHS.get(depths)
        small = state_dict['conv1.weight'].shape[-1] == 3
        return f'resnet{depth}{"_cifar" * small}' if depth else None
    depth = _BOTTLENECK_DEPTHS.get(depths)
    family = _FAMILIES.get(tuple(state_dict['layer1.0.conv2.weight'].shape[:2]))
    return f'{family}{depth}' if depth and family else None


def _some(keys: set[str]) -> str:
    first = sorted(keys)[:3]
    return ', '.join(first) + (f' and {len(keys) - 3} more entries' if len(keys) > 3 else '')

"""A folder with `config.json` and `model.safetensors`, which timm's `local-dir:` and `hf-hub:` load."""
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import filter_pretrained_cfg, get_model_args, save_for_hf

from nbn_timm.layers import fold_nbn
from nbn_timm.models.ownership import needs_package
from nbn_timm.models.tuning import has_adapters
from nbn_timm.models.tuning.lora import merge_lora
from nbn_timm.models.weight_files import save_weights, weights_digest
from nbn_timm.seals import seal_file
from nbn_timm.trained.opening import RECORD_KEY, TrainedModel

from .artefact import Artefact, FormatUnavailable

FILES = ('model.safetensors', 'config.json')

# timm's architectures that ours fold to, and arguments that make them so. Its only ResNet-10 has another stem.
COUNTERPARTS: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet10_nbn': ('resnet18', {'layers': [1, 1, 1, 1]}),
    'resnet50_nbn': ('resnet50', {}),
    'resnet101_nbn': ('resnet101', {}),
    'resnet152_nbn': ('resnet152', {}),
    'resnext50_nbn': ('resnext50_32x4d', {}),
    'resnext101_nbn': ('resnext101_32x4d', {}),
}
_FOLDED_ARGS = ('nbn', 'gradient', 'share_alpha')  # arguments that have no meaning once NBN is folded


def write(artefact: Artefact, folder: Path) -> None:
    """Fold, load into the plain architecture, and save that with timm's own function.

    Raises:
        FormatUnavailable: No registered architecture is of the folded form.
    """
    plain: Any = plain_model(artefact.trained)
    weights, record = plain.state_dict(), artefact.record
    about: dict[str, Any] = {RECORD_KEY: replace(record, digest=weights_digest(weights)).to_dict()}
    if record.classes is not None and record.classes.named:
        about['label_names'] = list(record.classes.names)
        plain.pretrained_cfg.pop('label_names', None)  # of a folder that this one is made from
    save_for_hf(plain, str(folder), model_config=about, data_config=artefact.trained.input.input_format(),
                safe_serialization=True)
    seal_file(folder / FILES[1])
    save_weights(weights, folder / FILES[0])  # which adds a digest of them


def load(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The folder as timm loads it."""
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def plain_model(trained: TrainedModel) -> nn.Module:
    """The folded network as a model of the plain architecture.

    Raises:
        FormatUnavailable: No registered architecture is of the folded form.
    """
    weights = merge_lora(fold_nbn(trained.model)).state_dict()
    plain = fresh_model(trained)
    if plain is None or _shapes(weights) != _shapes(plain.state_dict()):
        cause = 'adapters or prompts' if has_adapters(weights) else _classifier(trained.model)
        raise FormatUnavailable(
            f"'{trained.name}' folds to no architecture that timm could build by name, because of its "
            f'{cause}, so there is no folder for timm: choose other --formats')
    plain.load_state_dict(weights)
    return plain


def fresh_model(trained: TrainedModel) -> nn.Module | None:
    """The architecture that the network folds to with new weights; None if it has a head that timm's has not."""
    architecture, arguments = plain_architecture(trained)
    if 'head' in arguments and not needs_package(architecture):
        return None
    cfg = filter_pretrained_cfg(trained.model.pretrained_cfg, remove_source=True) | {'architecture': architecture}
    return timm.create_model(architecture, pretrained_cfg=cfg, **arguments).eval()


def plain_architecture(trained: TrainedModel) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the architecture that the network folds to; timm's own wherever it has one."""
    architecture = trained.architecture
    arguments = get_model_args(trained.model) | dict(trained.model_args)
    if needs_package(architecture):
        base = architecture.removesuffix('_lr')
        architecture, extra = COUNTERPARTS.get(base, (base.removesuffix('_nbn'), {}))
        arguments = {key: value for key, value in arguments.items() if key not in _FOLDED_ARGS} | extra
        if arguments.get('head') in ('linear', 'rectified'):
            del arguments['head']
    return architecture, arguments


def _shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state_dict.items()}


def _classifier(model: Any) -> str:
    classifier = model.get_classifier()
    return type(classifier[0] if isinstance(classifier, nn.ModuleList) else classifier).__name__

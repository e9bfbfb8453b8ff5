"""The models for torch.hub: `torch.hub.load('USER/REPO', 'resnet32_nbn', pretrained=True)`, or `source='local'`.

All take `pretrained`, `num_classes`, `in_chans` and the other arguments of timm's models.
"""
from pkgutil import iter_modules as _iter_modules

from timm import list_models as _list_models
from timm.models import model_entrypoint as _model_entrypoint

from nbn_timm import models as _models

dependencies = ['torch', 'timm', 'safetensors', 'huggingface_hub', 'yaml', 'filelock']

globals().update({
    _name: _model_entrypoint(_name)
    for _module in _iter_modules(_models.__path__) for _name in _list_models(module=_module.name)})

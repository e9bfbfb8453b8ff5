"""The model zoo. Importing this package registers its models with timm; every module of this folder is imported."""
import importlib
import pkgutil

from .bbn import ResNetCifarBbn
from .resnet_cifar import ResNetCifar
from .resnet_nbn import ResNetNbn
from .ride import MultiExpert, ResNetCifarRide, ResNetRide
from .routed_experts import RoutedExperts
from .shike import ResNetCifarShike

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

__all__ = ['MultiExpert', 'ResNetCifar', 'ResNetCifarBbn', 'ResNetCifarRide', 'ResNetCifarShike', 'ResNetNbn',
           'ResNetRide', 'RoutedExperts']

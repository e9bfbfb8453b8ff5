"""The model zoo. Importing this package registers its models with timm."""
from .resnet_cifar import ResNetCifar
from .resnet_nbn import ResNetNbn
from .ride import ResNetCifarRide, ResNetRide

__all__ = ['ResNetCifar', 'ResNetCifarRide', 'ResNetNbn', 'ResNetRide']

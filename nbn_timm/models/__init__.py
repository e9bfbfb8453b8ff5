"""The model zoo. Importing this package registers its models with timm."""
from .resnet_cifar import ResNetCifar
from .resnet_nbn import ResNetNbn
from .ride import MultiExpert, ResNetCifarRide, ResNetRide
from .routed_experts import RoutedExperts

__all__ = ['MultiExpert', 'ResNetCifar', 'ResNetCifarRide', 'ResNetNbn', 'ResNetRide', 'RoutedExperts']

"""CIFAR-100-LT: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, as LDAM draws it."""
from torchvision.datasets import CIFAR100

from nbn_timm.datasets.benchmark import register_benchmark
from nbn_timm.datasets.cifar import CifarLT


@register_benchmark('cifar100_lt')
class Cifar100LT(CifarLT):
    """100 classes with 500 to 5 images at factor 100; the test split is CIFAR-100's."""

    title = 'CIFAR-100-LT'
    num_classes = 100
    largest = 500
    images = '`cifar-100-python`, which torchvision fetches'
    hub_id = 'uoft-cs/cifar100'
    cifar = CIFAR100
    zoo_default = True

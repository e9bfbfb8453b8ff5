"""CIFAR-10-LT: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, as LDAM draws it."""
from torchvision.datasets import CIFAR10

from nbn_timm.datasets.benchmark import register_benchmark
from nbn_timm.datasets.cifar import CifarLT


@register_benchmark('cifar10_lt')
class Cifar10LT(CifarLT):
    """10 classes with 5000 to 50 images at factor 100; the test split is CIFAR-10's."""

    title = 'CIFAR-10-LT'
    num_classes = 10
    largest = 5000
    images = '`cifar-10-batches-py`, which torchvision fetches'
    hub_id = 'uoft-cs/cifar10'
    cifar = CIFAR10

"""CIFAR-100-LT: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, as LDAM draws it."""
from torchvision.datasets import CIFAR100

from nbn_timm.datasets.benchmark import register_benchmark
from nbn_timm.datasets.cifar import CifarLT
from nbn_timm.datasets.cifar_draw import CifarOrder


@register_benchmark('cifar100_lt')
class Cifar100LT(CifarLT):
    """100 classes with 500 to 5 images at factor 100; the test split is CIFAR-100's."""

    title = 'CIFAR-100-LT'
    num_classes = 100
    largest = 500
    images = '`cifar-100-python`, which torchvision fetches'
    hub_id = 'uoft-cs/cifar100'
    cifar = CIFAR100
    order = CifarOrder(  # made by benchmarks/cifar_draws.py
        classes=100,
        images=500,
        labels_sha256='9f11b9f97aad759ba6df0a33e3218b01d8deaf4ed3a14aa1185d69b9ad7ebcb3',
        draws={
            ('exp', 10): 'd0262356bfc4aa110d026add22bd1796d3ae95d22b4e638b14ebfca0181025b1',
            ('exp', 50): '8382897eace08678a67a0991b1d0db69b45f9c89ce7c38bc78fa3869909c4695',
            ('exp', 100): '644b6d28caa663f356ee55c541b55da2f8d0c4461cc0b2161f99c2fbf0273456',
            ('exp', 200): '270547597b0f832beceb1edf8f3fe327a61062a21189e66eb1f815ee4f91ad3e',
            ('step', 10): '4837b5cb8746af7a7cfcf791243e2118e5acf03761c9d8b17b2335e3e6dd881d',
            ('step', 100): '3105cff262e9b3af8d8a8dc40a24b26c7786a6cd0db4f709d5b0809746c61b2b',
        })
    zoo_default = True

"""CIFAR-10-LT: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, as LDAM draws it."""
from torchvision.datasets import CIFAR10

from nbn_timm.datasets.benchmark import register_benchmark
from nbn_timm.datasets.cifar import CifarLT
from nbn_timm.datasets.cifar_draw import CifarOrder


@register_benchmark('cifar10_lt')
class Cifar10LT(CifarLT):
    """10 classes with 5000 to 50 images at factor 100; the test split is CIFAR-10's."""

    title = 'CIFAR-10-LT'
    num_classes = 10
    largest = 5000
    images = '`cifar-10-batches-py`, which torchvision fetches'
    hub_id = 'uoft-cs/cifar10'
    cifar = CIFAR10
    order = CifarOrder(  # made by benchmarks/cifar_draws.py
        classes=10,
        images=5000,
        labels_sha256='2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253',
        draws={
            ('exp', 10): '448d422a25745cdaddb0c8f0da49d43d297b6b29058379b9440627c227cfc243',
            ('exp', 50): '620184a2896675c834da5f030951948e3480f350a46537d6a4adc4451699def2',
            ('exp', 100): 'f7669c469c9ddf9afcfabc0b127018ebfa21ac9ecddbe2642455be26c359cb8d',
            ('exp', 200): '71da1ec51fc39313a87f0b3eb37f8e2325954ce7606d7a6ccad2cef25135df4f',
            ('step', 10): 'f3e9e0d400e057766d9632473db7132dacff28b4e28f59463afdfa0fa5d2e419',
            ('step', 100): '734b13780c9751dbfe817fcd5d57aee1a33511d36e031e802e5d18804eec6c94',
        })

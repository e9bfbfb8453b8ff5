"""Pretrained cfgs of the benchmarks: what of a dataset a model's transforms and classifier depend on."""
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ._pretrained import shipped_file

__all__ = ['cifar_cfgs', 'imagenet_cfgs']

Classifier = str | tuple[str, ...]

_IMAGENET_LIKE: dict[str, dict[str, Any]] = {
    'imagenet_lt': dict(num_classes=1000),
    'inat18': dict(num_classes=8142, mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192)),
    'places_lt': dict(num_classes=365),
}
_CIFAR: dict[str, dict[str, Any]] = {
    'cifar100_lt': dict(num_classes=100),
    'cifar10_lt': dict(num_classes=10),
}
_DIGITS = dict(num_classes=10, input_size=(3, 16, 16), pool_size=(4, 4), mean=(0.306,) * 3, std=(0.324,) * 3)


def imagenet_cfgs(arch: str, classifier: Classifier = 'fc', **released: str) -> dict[str, dict[str, Any]]:
    """Cfgs of one architecture for 224 pixels, a tag per dataset; `released` gives the address of weights by tag."""
    common = dict(
        input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv='conv1', classifier=classifier,
        license='apache-2.0', origin_url='https://github.com/yuxiangbao/NBN', paper_ids='arXiv:2501.03122')
    return {f'{arch}.{tag}': dict(common, **dataset, url=released.get(tag, ''))
            for tag, dataset in _IMAGENET_LIKE.items()}


def cifar_cfgs(arch: str, classifier: Classifier = 'fc', digits: bool = False) -> dict[str, dict[str, Any]]:
    """Cfgs of one architecture for 32 pixels, a tag per dataset; with `digits` also for the quick start's 16 pixels."""
    datasets = {'digits_lt': _DIGITS, **_CIFAR} if digits else _CIFAR
    # timm takes a tag with weights for the default unless a later one has the star.
    default = next(iter(_CIFAR))
    common = dict(
        input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, interpolation='bilinear',
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010),  # of CIFAR-10; the field uses them for both
        first_conv='conv1', classifier=classifier, license='apache-2.0', url='')
    return {f'{arch}.{tag}{"*" if tag == default else ""}': dict(common, **dataset, file=shipped_file(f'{arch}.{tag}'))
            for tag, dataset in datasets.items()}

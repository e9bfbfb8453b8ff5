"""Pretrained cfgs of the benchmarks: what of a dataset a model's transforms and classifier depend on."""
from typing import Any

from nbn_timm.data.settings import InputSettings

from ._pretrained import shipped_file, shipped_settings
from ._tags import tagged_benchmarks

__all__ = ['cifar_cfgs', 'imagenet_cfgs']

Classifier = str | tuple[str, ...]


def imagenet_cfgs(arch: str, classifier: Classifier = 'fc', url: str = '') -> dict[str, dict[str, Any]]:
    """Cfgs of one architecture for 224 pixels, a tag per benchmark; `url` has weights of the default tag."""
    return _cfgs('imagenet', arch, 32, url, classifier=classifier,
                 origin_url='https://github.com/yuxiangbao/NBN', paper_ids='arXiv:2501.03122')


def cifar_cfgs(arch: str, classifier: Classifier = 'fc', stride: int = 4) -> dict[str, dict[str, Any]]:
    """Cfgs of one architecture for 32 pixels, a tag per benchmark, with the weights that come with the package."""
    cfgs = _cfgs('cifar', arch, stride, '', classifier=classifier)
    return {key: dict(cfg, file=shipped_file(key.removesuffix('*'))) for key, cfg in cfgs.items()}


def _cfgs(family: str, arch: str, stride: int, url: str, **common: Any) -> dict[str, dict[str, Any]]:
    """A cfg for each benchmark of the family: its input format, or the one that shipped weights were trained with."""
    cfgs = {}
    # timm takes a tag with weights for the default unless a later one has the star.
    for tag, benchmark in sorted(tagged_benchmarks(family, arch).items(), key=lambda entry: entry[1].zoo_default):
        image = benchmark.defaults.as_trained(InputSettings.from_record(shipped_settings(f'{arch}.{tag}')))
        cfgs[f'{arch}.{tag}{"*" if benchmark.zoo_default else ""}'] = dict(
            common, **image.input_format(), num_classes=benchmark.num_classes, first_conv='conv1',
            pool_size=tuple(pixels // stride for pixels in image.input_size[1:]), license='apache-2.0',
            url=url if benchmark.zoo_default else '')
    return cfgs

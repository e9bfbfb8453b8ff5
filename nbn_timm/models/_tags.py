"""Tags of the zoo's pretrained cfgs: names of benchmarks."""
from nbn_timm.datasets import Benchmark, benchmarks

__all__ = ['tag_of_classes', 'tagged_benchmarks']

_FAMILIES = ('imagenet', 'cifar')


def tagged_benchmarks(family: str, arch: str) -> dict[str, Benchmark]:
    """The benchmarks that an architecture of a family, 'imagenet' or 'cifar', has a cfg for, by tag."""
    return {name: benchmark for name, benchmark in benchmarks().items() if benchmark.zoo in (family, arch)}


def tag_of_classes(num_classes: int) -> str:
    """The benchmark of a whole family that has so many classes, or an empty string if none or several have."""
    found = [name for name, benchmark in benchmarks().items()
             if benchmark.zoo in _FAMILIES and benchmark.num_classes == num_classes]
    return found[0] if len(found) == 1 else ''

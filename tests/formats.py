"""Published input formats, for tests that need one."""
from nbn_timm.datasets import find_dataset

CIFAR_LT, DIGITS_LT, IMAGENET_LT, INAT18 = (
    find_dataset(name).defaults for name in ('cifar100_lt', 'digits_lt', 'imagenet_lt', 'inat18'))

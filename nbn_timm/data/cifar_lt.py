"""CIFAR-10 and CIFAR-100 from torchvision, from which CIFAR-LT is drawn."""
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from nbn_timm.data.dataset import ArraySamples
from nbn_timm.errors import InputError

CIFAR_CLASSES: dict[str, type[CIFAR10]] = {'cifar10_lt': CIFAR10, 'cifar100_lt': CIFAR100}
CIFAR_FACTOR = 100.0  # the imbalance factor that is meant where a paper names none


def load_cifar(
        benchmark: str,
        data_dir: str | Path,
        train: bool,
        download: bool = False,
) -> tuple[ArraySamples, tuple[str, ...]]:
    """Load the balanced training or test set behind a CIFAR-LT benchmark.

    Args:
        benchmark: 'cifar10_lt' or 'cifar100_lt'.
        data_dir: Folder of torchvision's CIFAR, which holds `cifar-10-batches-py` or `cifar-100-python`.
        train: The 50,000 training images, else the 10,000 test images.
        download: Fetch the data if they are not there.

    Returns:
        Images in torchvision's order and the class names.

    Raises:
        InputError: The data are missing or damaged, or cannot be downloaded.
    """
    cifar = CIFAR_CLASSES[benchmark]
    try:
        dataset = cifar(str(data_dir), train=train, download=download)
    except (RuntimeError, OSError) as error:
        if download:
            raise InputError(
                f"{cifar.__name__} cannot be downloaded to '{data_dir}' ({error}): fetch {cifar.url} elsewhere and "
                f"unpack it there, so that '{cifar.base_folder}' lies in that folder") from error
        raise InputError(
            f"{cifar.__name__} is missing or damaged in '{data_dir}': give --download, or put the folder "
            f"'{cifar.base_folder}' of {cifar.url} there") from error
    return ArraySamples(dataset.data, dataset.targets), tuple(dataset.classes)

"""What CIFAR-10-LT and CIFAR-100-LT share: torchvision's data and the format in which the field reads them."""
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torchvision.datasets import CIFAR10

from nbn_timm.data.dataset import ArraySamples
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.settings import DataSettings
from nbn_timm.datasets.drawn_benchmark import DrawnBenchmark
from nbn_timm.datasets.fetching import TIMEOUT, fetch_archive, locate
from nbn_timm.datasets.named_dataset import image_root
from nbn_timm.errors import InputError
from nbn_timm.files import watched


class CifarLT(DrawnBenchmark):
    """CIFAR by LDAM's draw: with seed 0 the published images in the published order.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, whose
    CIFAR-10 statistics are the ones that everybody uses for CIFAR-100 too.

    Attributes:
        cifar: torchvision's dataset.
    """

    cifar: ClassVar[type[CIFAR10]]
    home = 'https://www.cs.toronto.edu/~kriz/cifar.html'
    terms = 'none stated; cite Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009'
    held_out = {'test': 10_000}
    zoo = 'cifar'
    defaults = DataDefaults(
        input_size=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        crop_pct=1.0,
        train_transform='cifar',
        color_jitter=None,
    )

    def load(self, settings: DataSettings, part: str) -> tuple[ArraySamples, tuple[str, ...]]:
        """The 50,000 training images or the 10,000 test images in torchvision's order."""
        cifar: Any = self.cifar
        train = part == 'train'
        data_dir = image_root(settings)
        download = settings.download and train  # which fetches both splits
        try:
            if download:
                watched(partial(cifar, str(data_dir), download=True), data_dir / cifar.filename, TIMEOUT)
            dataset = cifar(str(data_dir), train=train)
        except (RuntimeError, OSError) as error:
            if download:
                raise InputError(
                    f"{cifar.__name__} cannot be downloaded to '{data_dir}' ({error}): fetch {cifar.url} elsewhere and "
                    f"unpack it there, so that '{cifar.base_folder}' lies in that folder") from error
            raise InputError(
                f"{cifar.__name__} is missing or damaged in '{data_dir}': give --download, or put the folder "
                f"'{cifar.base_folder}' of {cifar.url} there") from error
        return ArraySamples(dataset.data, dataset.targets), tuple(dataset.classes)

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        own = super().own_settings(settings)
        return own if settings.lists else own | {'download'}

    def obtain(self, data_dir: Path, source: str | None) -> None:
        """Put torchvision's archive into the data folder and unpack it, as torchvision does."""
        if source is not None:
            fetch_archive(locate(source, '', self.cifar.filename), data_dir / self.cifar.filename, self.cifar.tgz_md5)
        self.load(DataSettings(self.name, str(data_dir), download=True), 'train')

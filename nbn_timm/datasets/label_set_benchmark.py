"""Benchmarks whose images are of several classes: published lists of images, and labels from their annotations.

The lists are those of Wu et al., "Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets",
ECCV 2020, at the last commit of their repository. `nbn-prepare` makes CSV files of them, and of the annotations that
come with the images. That the training labels are the authors' is told by a digest.
"""
import hashlib
from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from timm.data import str_to_pil_interp
from torchvision.transforms import InterpolationMode

from nbn_timm.data.defaults import SQUASH, DataDefaults
from nbn_timm.data.photometric import PhotometricCrop
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import Source
from nbn_timm.data.tables import write_table
from nbn_timm.data.train_transforms import Step, TrainTransform, register_train_transform
from nbn_timm.datasets.benchmark import Benchmark, Statistics
from nbn_timm.datasets.csv_files import NO_COLUMN, read_csv_files
from nbn_timm.datasets.fetching import fetch, locate, report_missing
from nbn_timm.errors import InputError
from nbn_timm.files import git_blob_id

LISTS_URL = 'https://raw.githubusercontent.com/wutong16/DistributionBalancedLoss/' \
            '14460d0acda6a3e77a8a6a5999b9746243cb1535'
BETWEEN = ';'  # labels of a picture in the CSV files


@register_train_transform('photometric')
class Photometric(TrainTransform):
    """Photometric distortion, a random crop of at least 0.8 of each side, resizing without the ratio, and a flip."""

    words = 'photometric distortion, random crop of 0.8 to 1 of each side, resize to{size} without the ratio'

    def crop(self, height: int, width: int, interpolation: InterpolationMode | None) -> list[Step] | None:
        name = 'bilinear' if interpolation is None else interpolation.value
        return [PhotometricCrop((height, width), int(str_to_pil_interp(name)))]


@dataclass(frozen=True)
class LabelledImage:
    """An image by its path below the data folder, and its labels."""

    path: str
    labels: tuple[int, ...]


class LabelSetBenchmark(Benchmark):
    """A benchmark of images of several classes.

    Attributes:
        names: Of the classes, in label order.
        list_folder, list_name, list_blob: Of the list of training images at its published place, and its git blob id.
        digest: SHA-256 of the training labels, see `digest_of`.
        published: Number of images.
    """

    names: ClassVar[tuple[str, ...]]
    list_folder: ClassVar[str]
    list_name: ClassVar[str]
    list_blob: ClassVar[str]
    digest: ClassVar[str]
    published: ClassVar[Statistics]
    shot_limits = (99, 20)  # the authors' code counts a class of 100 images among the many
    draw = 'the published list'
    defaults = DataDefaults(crop_pct=1.0, crop_mode=SQUASH, train_transform=Photometric.name, color_jitter=None)

    @abstractmethod
    def train_images(self, ids: Sequence[str], data_dir: Path) -> list[LabelledImage]:
        """The images of the training list, with the labels of their annotations.

        Raises:
            InputError: Annotations are missing or malformed.
        """

    @abstractmethod
    def test_images(self, data_dir: Path) -> list[LabelledImage]:
        """The test images, likewise."""

    def class_names(self) -> tuple[str, ...]:
        return self.names

    def statistics(self) -> Statistics:
        return self.published

    def label_sets(self, settings: DataSettings) -> bool:
        return True

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return frozenset({'data_dir'})

    def splits_files(self, settings: DataSettings) -> bool:
        return True

    def validates(self, settings: DataSettings) -> bool:
        return False

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        data_dir = Path(settings.data_dir or '.')
        wanted = [part for part in ('train', 'test') if part in parts or part == 'train' and count]
        for part in wanted:
            if part in parts and not (data_dir / self.file_of(part)).is_file():
                raise InputError(f"'{self.file_of(part)}' is not in '{data_dir}': run nbn-prepare {self.name} "
                                 f'--data-dir {data_dir}, or correct --data-dir')
        files = {f'{part}_csv': self.file_of(part) for part in wanted if (data_dir / self.file_of(part)).is_file()}
        defaults = DataSettings()
        return read_csv_files(settings.with_values(
            files, file_column=defaults.file_column, label_column=defaults.label_column, label_separator=BETWEEN,
            split_column=NO_COLUMN, group_column=None), parts, self.names)

    def file_of(self, part: str) -> str:
        """Name of the CSV file of a split in the data folder."""
        return f'{self.name}_{part}.csv'

    def prepare(self, settings: DataSettings, source: str | None = None) -> None:
        """Make the CSV files of both splits in the data folder, and look for their images.

        `source` holds the authors' list, as their repository does.
        """
        data_dir = Path(settings.data_dir or '.')
        found = {'train': self.train_images(self._ids(data_dir, source or LISTS_URL), data_dir),
                 'test': self.test_images(data_dir)}
        if (digest := digest_of(found['train'])) != self.digest:
            raise InputError(f"the training labels by the annotations in '{data_dir}' are not the published ones "
                             f'(digest {digest[:12]} instead of {self.digest[:12]}): obtain {self.images} from '
                             f'{self.home}')
        for part, number in (('train', self.published.train), ('test', self.published.test)):
            if len(found[part]) != number:
                raise InputError(f'there are {len(found[part]):,} {part} images with annotations, and {self.title} has '
                                 f'{number:,}: obtain {self.images} from {self.home}')
        missing = 0
        for part, images in found.items():
            write_table(data_dir / self.file_of(part), ('file', 'label'), (
                (image.path, BETWEEN.join(self.names[label] for label in image.labels)) for image in images))
            missing += report_missing(self.file_of(part), [image.path for image in images], data_dir)
        if missing:
            raise InputError(f"{self.name} is incomplete, {missing:,} images are missing in '{data_dir}': obtain "
                             f'{self.images} from {self.home}')
        print(f'{self.name} is complete: {sum(map(len, found.values())):,} images in {data_dir}')

    def _ids(self, data_dir: Path, source: str) -> list[str]:
        """The training list, which is fetched unless it is there; its git blob id must be the published one."""
        path, address = data_dir / f'{self.name}_ids.txt', f'{self.name}_ids.txt'

        def check(file: Path) -> None:
            if git_blob_id(file) != self.list_blob:
                raise InputError(f"'{address}' is not the published list of {self.title} (git blob id "
                                 f'{git_blob_id(file)[:12]} instead of {self.list_blob[:12]}): remove it, or give '
                                 'another --source')

        if path.is_file():
            address = str(path)
            check(path)
        else:
            address = locate(source, self.list_folder, self.list_name)
            fetch(address, path, check)
            print(f'{path.name}: fetched from {address}, as published')
        return path.read_text(encoding='utf-8').split()


def digest_of(images: Iterable[LabelledImage]) -> str:
    """SHA-256 of a line for each image: the name of its file without folder and ending, and its labels."""
    lines = (f'{Path(image.path).stem} {" ".join(map(str, image.labels))}\n' for image in images)
    return hashlib.sha256(''.join(lines).encode()).hexdigest()

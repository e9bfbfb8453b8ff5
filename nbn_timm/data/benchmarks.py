"""The published list benchmarks: class numbers, list files and where their images come from."""
from dataclasses import dataclass
from pathlib import Path

from nbn_timm.data.defaults import IMAGENET_LT, INAT18, DataDefaults

# The lists of Kang et al., ICLR 2020, at the last commit of their repository; later codebases carry the same bytes.
LISTS_URL = 'https://raw.githubusercontent.com/facebookresearch/classifier-balancing/' \
            'f162adef63fdf592d0b8a0f6e52bc481fc08785f/data'


@dataclass(frozen=True)
class ListFile:
    """A published list: file name and git blob id, which identifies its exact bytes."""

    name: str
    blob_id: str

    def find(self, data_dir: Path) -> Path | None:
        """The file in a data folder or its `lists` subfolder, or None."""
        return next((path for path in (data_dir / self.name, data_dir / 'lists' / self.name) if path.is_file()), None)


@dataclass(frozen=True)
class ListBenchmark:
    """A benchmark that is defined by lists of images.

    Attributes:
        num_classes: Number of classes.
        defaults: Published input format.
        folder: Folder of the lists at their published place.
        train, val, test: The lists; val is None where the benchmark has no split to select a model on.
        images: What to obtain from where, and how it must lie under the data folder.
    """

    num_classes: int
    defaults: DataDefaults
    folder: str
    train: ListFile
    val: ListFile | None
    test: ListFile
    images: str

    @property
    def lists(self) -> tuple[ListFile, ...]:
        """The lists that there are."""
        return tuple(part for part in (self.train, self.val, self.test) if part is not None)

    def list_of(self, part: str) -> ListFile | None:
        """The list of 'train', 'val' or 'test'."""
        return {'train': self.train, 'val': self.val, 'test': self.test}[part]


LIST_BENCHMARKS = {
    'imagenet_lt': ListBenchmark(
        num_classes=1000,
        defaults=IMAGENET_LT,
        folder='ImageNet_LT',
        train=ListFile('ImageNet_LT_train.txt', 'a063f095fcd475db4cf8b0658c4b73955535bbf9'),
        val=ListFile('ImageNet_LT_val.txt', '3ed3188b2f44829ce2dec1cc27040d8d40984088'),
        test=ListFile('ImageNet_LT_test.txt', '76a2fb9749d6cd29e765cc4f8c270f2504131e2f'),
        images='ILSVRC 2012 (https://image-net.org/download) as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG',
    ),
    'places_lt': ListBenchmark(
        num_classes=365,
        defaults=IMAGENET_LT,
        folder='Places_LT',
        train=ListFile('Places_LT_train.txt', '6392252f8ae867bc8a5e841cc1b29e5b8ef4b636'),
        val=ListFile('Places_LT_val.txt', 'b93a2ca58ccb7f3b671c176f395a70bf52c95533'),
        test=ListFile('Places_LT_test.txt', 'e732e58b8aa718a2c1c11933375f5710652c2b93'),
        images='Places365-Standard, small images in easy directory structure '
               '(http://places2.csail.mit.edu/download.html), as train/<class>/*.jpg and val/<class>/*.jpg',
    ),
    'inat18': ListBenchmark(
        num_classes=8142,
        defaults=INAT18,
        folder='iNaturalist18',
        train=ListFile('iNaturalist18_train.txt', '4accdb7584d2f0a5106c40a33ed6afa392189bcc'),
        val=None,
        test=ListFile('iNaturalist18_val.txt', '4c23900857fd0f5adcd4cc0dffef345039eeb05f'),
        images='iNaturalist 2018 (https://github.com/visipedia/inat_comp/tree/master/2018), archive '
               'train_val2018.tar.gz, as train_val2018/<group>/<class>/*.jpg',
    ),
}

"""Tiny-ImageNet-LT, from Stanford's Tiny-ImageNet (course CS231n) as it is downloaded."""
from pathlib import Path

from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.settings import DataSettings
from nbn_timm.datasets.benchmark import register_benchmark
from nbn_timm.datasets.drawn_benchmark import DrawnBenchmark
from nbn_timm.datasets.fetching import Archive
from nbn_timm.errors import InputError


@register_benchmark('tiny_imagenet_lt')
class TinyImageNetLT(DrawnBenchmark):
    """200 classes of ImageNet at 64 pixels, 500 to 5 training images at factor 100.

    Papers use the exponential profile, but nobody has published a split: this draw is by LDAM's rule with seed 0 on
    the images in torchvision's order (folders and files sorted by name), so that a label is the rank of its wnid. The
    test split is the archive's labelled `val`, as in the literature; its `test` has no labels. Small images are padded
    by an eighth, cropped and flipped, with ImageNet's statistics.
    """

    title = 'Tiny-ImageNet-LT'
    num_classes = 200
    home = 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'
    images = 'the archive as it is, as `tiny-imagenet-200/train/<wnid>/images/*.JPEG` and `tiny-imagenet-200/val/`'
    terms = "ImageNet's: non-commercial research and education"
    largest = 500
    held_out = {'test': 10_000}
    defaults = DataDefaults(input_size=(3, 64, 64), crop_pct=1.0, train_transform='cifar', color_jitter=None)
    archive = Archive('http://cs231n.stanford.edu', 'tiny-imagenet-200.zip', '90528d7ca1a48142e341f4ef8d21d0de',
                      folder='tiny-imagenet-200', marker='wnids.txt')

    def load(self, settings: DataSettings, part: str) -> tuple[ImageSamples, tuple[str, ...]]:
        root = self.unpacked(settings)
        wnids = sorted(_text(root / 'wnids.txt').split())
        if len(set(wnids)) != self.num_classes:
            raise InputError(f"'{root / 'wnids.txt'}' names {len(set(wnids))} classes instead of {self.num_classes}: "
                             f'unpack {self.archive.file} again')
        labels = {wnid: label for label, wnid in enumerate(wnids)}
        rows = _training_images(root, labels) if part == 'train' else _annotated_images(root, labels)
        paths, targets = zip(*rows, strict=True)
        return ImageSamples(paths, targets, root=root), _names(root, wnids)


def _training_images(root: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    rows = []
    for wnid, label in labels.items():
        folder = root / 'train' / wnid / 'images'
        files = sorted(path.name for path in folder.glob('[!.]*.JPEG'))
        if not files:
            raise InputError(f"'{folder}' has no images: unpack the archive again")
        rows += [(f'train/{wnid}/images/{file}', label) for file in files]
    return rows


def _annotated_images(root: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    """The images of `val`, which `val_annotations.txt` labels: file, wnid and box in columns."""
    path = root / 'val' / 'val_annotations.txt'
    columns = [line.split('\t') for line in _text(path).splitlines() if line.strip()]
    wrong = next((row for row in columns if len(row) < 2 or row[1] not in labels), None)
    if wrong is not None or not columns:
        raise InputError(f"'{path}' has no class of wnids.txt in its second column ({(wrong or ['empty'])[0]}): unpack "
                         'the archive again')
    return [(f'val/images/{row[0]}', labels[row[1]]) for row in columns]


def _names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    """The words of each wnid as words.txt has them, or the wnid where it has none or the same for another class."""
    lines = _text(root / 'words.txt').splitlines() if (root / 'words.txt').is_file() else []
    words = dict(line.split('\t', 1) for line in lines if '\t' in line)
    names = [words.get(wnid, wnid).strip() for wnid in wnids]
    return tuple(name if names.count(name) == 1 else wnid for name, wnid in zip(names, wnids, strict=True))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read ({getattr(error, 'strerror', None) or error}): unpack the archive "
                         'again') from error

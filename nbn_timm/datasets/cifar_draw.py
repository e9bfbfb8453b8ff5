"""Which draw a list of CIFAR's training images is: LDAM's, on which papers report, or another.

LDAM shuffles the places of each class in CIFAR's own order (Cao et al., NeurIPS 2019, `draw_by_counts`). So image files
have that draw only where something tells their places: their pixels, beside the originals, or numbers in their names.
"""
import hashlib
import importlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from nbn_timm.data.folders import find_split_folder, is_plain, read_class_folders
from nbn_timm.data.longtail import PROFILES, draw_by_counts, profile_counts
from nbn_timm.data.pictures import read_picture
from nbn_timm.errors import InputError

COMMON_FACTORS = (10, 20, 50, 100, 200)
LDAMS, OTHER = "LDAM's draw", "another draw than LDAM's"
BY_PIXELS, BY_NAMES = 'by the pixels', 'by the numbers in the file names'
IF_COUNTED = "if the numbers in the file names follow CIFAR's order in each class, which names cannot prove"

_FIRST_AND_LAST_NUMBER = (re.compile(r'^\d+'), re.compile(r'\d+$'))


@dataclass(frozen=True)
class CifarOrder:
    """What is known of CIFAR's training images without them.

    Attributes:
        classes: How many.
        images: Of each class.
        labels_sha256: Of the labels in CIFAR's order, a byte each.
        draws: SHA-256 of the places that LDAM's draws take with seed 0, by profile and factor; see `places_sha256`.
    """

    classes: int
    images: int
    labels_sha256: str
    draws: Mapping[tuple[str, int], str]

    def is_of(self, labels: np.ndarray) -> bool:
        """Whether these are CIFAR's labels in CIFAR's order."""
        return labels_sha256(labels) == self.labels_sha256

    def are_drawn(self, places: np.ndarray) -> bool:
        """Whether these are the places of one of LDAM's draws, in any order."""
        return places_sha256(places) in self.draws.values()


def labels_sha256(labels: np.ndarray) -> str:
    """SHA-256 of labels in their order, a byte each."""
    return hashlib.sha256(np.asarray(labels, dtype=np.uint8).tobytes()).hexdigest()


def places_sha256(places: np.ndarray) -> str:
    """SHA-256 of places in ascending order, as little-endian int64."""
    return hashlib.sha256(np.sort(places).astype('<i8').tobytes()).hexdigest()


@dataclass(frozen=True)
class Originals:
    """CIFAR's training images in CIFAR's order: labels, int64 [N], and a digest of the pixels of each."""

    labels: np.ndarray
    pixels: Sequence[bytes]
    source: str


@dataclass(frozen=True)
class Files:
    """Image files: paths relative to `root` and labels, int64 [N]."""

    root: Path
    paths: Sequence[str]
    labels: np.ndarray

    def pixels(self) -> Iterator[bytes]:
        """A digest of the pixels of each.

        Raises:
            InputError: A file is missing or no image.
        """
        return (pixel_digest(np.asarray(read_picture(str(self.root / path)))) for path in self.paths)


@dataclass(frozen=True)
class Verdict:
    """Whether a list is LDAM's draw, None where nothing tells, and what it is in words."""

    published: bool | None
    text: str


@dataclass(frozen=True)
class Places:
    """Where files stand: in all of CIFAR, or, if only that is known, among the images of their class, int64 [N]."""

    values: np.ndarray
    in_class: bool


def pixel_digest(image: np.ndarray) -> bytes:
    """Of an image, uint8 [H, W, 3]."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


# What is at hand -----------------------------------------------------------------------------------------------------

def find_originals(cifar: type[CIFAR10], order: CifarOrder, folders: Iterable[Path]) -> Originals | None:
    """CIFAR as it is published, torchvision's files or the Hub's Parquet files, from the first folder that has it.

    Raises:
        InputError: A Parquet file cannot be read, or is not CIFAR's training split in its order.
    """
    for folder in folders:
        if (folder / cifar.base_folder / cifar.train_list[0][0]).is_file():
            try:
                dataset = cifar(str(folder), train=True)
            except (RuntimeError, OSError) as error:
                raise InputError(f"'{folder / cifar.base_folder}' is damaged ({error}): unpack {cifar.filename} again"
                                 ) from error
            return Originals(np.asarray(dataset.targets), [pixel_digest(image) for image in dataset.data],
                             cifar.base_folder)
        found = sorted(path for place in (folder, folder / 'data', folder / 'cifar100', folder / 'plain_text')
                       for path in place.glob('train*.parquet'))
        if found:
            return _read_parquet(found, order)
    return None


def _read_parquet(files: Sequence[Path], order: CifarOrder) -> Originals:
    try:
        parquet = importlib.import_module('pyarrow.parquet')
    except ImportError as error:
        raise InputError(f"'{files[0]}' needs pyarrow, which is not installed: pip install 'nbn_timm[parquet]'"
                         ) from error
    labels: list[int] = []
    pixels: list[bytes] = []
    for file in files:
        try:
            rows = parquet.read_table(file).to_pydict()
            column = 'fine_label' if 'fine_label' in rows else 'label'
            labels += rows[column]
            for image in rows.get('img', rows.get('image', ())):
                with Image.open(io.BytesIO(image['bytes'])) as picture:
                    pixels.append(pixel_digest(np.asarray(picture.convert('RGB'))))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{file}' has no images with labels as the Hub's CIFAR has them ({error}): take it away"
                             ) from error
    if len(pixels) != len(labels) or not order.is_of(np.asarray(labels)):
        raise InputError(f"'{files[0].parent}' has Parquet files that are not CIFAR's training images in their order: "
                         'take them away')
    return Originals(np.asarray(labels), pixels, files[0].name)


def find_files(data_dir: Path, classes: int) -> Files | None:
    """Training images in class folders, of a data folder that has as many of these as CIFAR has classes."""
    folder = find_split_folder(data_dir, 'train') or data_dir
    if folder == data_dir and not is_plain(data_dir):
        return None
    if not folder.is_dir() or sum(path.is_dir() for path in folder.iterdir()) != classes:
        return None
    samples = read_class_folders(folder, training=True).samples
    if samples is None:
        return None
    paths = [Path(samples.path(index)).relative_to(data_dir).as_posix() for index in range(len(samples))]
    return Files(data_dir, paths, samples.targets)


def find_places(files: Files, order: CifarOrder) -> Places | None:
    """Places by the numbers in the names of all of CIFAR's training images; None where the names do not tell.

    Numbers from 0 or 1 over all images count only if the labels then are in CIFAR's order. Numbers that begin anew in
    each class give the places in the classes, if they follow CIFAR's order, which names cannot prove.
    """
    total = order.classes * order.images
    if len(files.paths) != total:
        return None
    by_label = np.argsort(files.labels, kind='stable')
    for numbers in _numbers(files.paths):
        for start in (0, 1):
            places = numbers - start
            if np.array_equal(np.sort(places), np.arange(total)):
                if order.is_of(files.labels[np.argsort(places)]):
                    return Places(places, in_class=False)
            elif np.array_equal(np.sort(places[by_label].reshape(order.classes, -1), axis=1).ravel(),
                                np.tile(np.arange(order.images), order.classes)):
                return Places(places, in_class=True)
    return None


def _numbers(paths: Sequence[str]) -> Iterator[np.ndarray]:
    """The numbers that all names begin with, and those that all end in."""
    stems = [Path(path).stem for path in paths]
    for pattern in _FIRST_AND_LAST_NUMBER:
        found = [pattern.search(stem) for stem in stems]
        if all(found):
            texts = [match.group() for match in found if match]
            if max(map(len, texts)) < 10:
                yield np.array(texts, dtype=np.int64)


# What a list is ------------------------------------------------------------------------------------------------------

def judge(listed: Files, order: CifarOrder, everything: Files | None = None, originals: Originals | None = None
          ) -> Verdict:
    """Say which draw a training list is.

    Args:
        listed: Its images.
        order: Of CIFAR.
        everything: All training images that are there, of which the list names some.
        originals: CIFAR itself.
    """
    counts = np.bincount(listed.labels, minlength=order.classes).tolist()
    if min(counts) == order.images:
        return Verdict(None, 'all training images, so no draw')
    if tail_of(counts, order) is None:
        return Verdict(False, f"{OTHER}: LDAM's rule gives no such numbers of images per class")
    if originals is not None:
        return _judge_pixels(listed, counts, originals)
    if any(order.are_drawn(numbers - start) for numbers in _numbers(listed.paths) for start in (0, 1)):
        return Verdict(True, f'{LDAMS}, {BY_NAMES}')
    places = None if everything is None else find_places(everything, order)
    if everything is not None and places is not None and not places.in_class:
        place_of = dict(zip(everything.paths, places.values.tolist(), strict=True))
        found = [place_of.get(path, -1) for path in listed.paths]
        wanted = draw_by_counts(everything.labels[np.argsort(places.values)], counts).tolist()
        return _compared(len(set(found) & set(wanted)), len(wanted), BY_NAMES)
    if _has_ldams_ranks(listed, counts, order):
        return Verdict(None, f'{LDAMS} {IF_COUNTED}')
    if everything is not None and _is_first_by_sha1(listed, everything):
        return Verdict(False, f'{OTHER}: of each class the first images by the SHA-1 of the file name')
    return Verdict(None, "not known to be LDAM's draw, since nothing here tells CIFAR's order")


def tail_of(counts: Sequence[int], order: CifarOrder) -> tuple[str, int] | None:
    """Profile and factor of which LDAM's rule gives these numbers of images, None if there are none."""
    factors = (*COMMON_FACTORS, *range(2, order.images + 1))
    return next(((profile, factor) for profile in PROFILES for factor in factors
                 if profile_counts(order.classes, order.images, factor, profile) == list(counts)), None)


def _judge_pixels(listed: Files, counts: Sequence[int], originals: Originals) -> Verdict:
    wanted = Counter((int(originals.labels[place]), originals.pixels[place])
                     for place in draw_by_counts(originals.labels, counts))
    found = Counter(zip(listed.labels.tolist(), listed.pixels(), strict=True))
    strange = (found - Counter(zip(originals.labels.tolist(), originals.pixels, strict=True))).total()
    if strange:
        return Verdict(False, f'{OTHER}: the pixels of {strange:,} of {found.total():,} images are of no training '
                              'image of that class in CIFAR')
    return _compared((wanted & found).total(), found.total(), BY_PIXELS)


def _compared(same: int, total: int, means: str) -> Verdict:
    if same == total:
        return Verdict(True, f'{LDAMS}, {means}')
    return Verdict(False, f'{OTHER}, {means}: {same:,} of {total:,} images are in both')


def _has_ldams_ranks(listed: Files, counts: Sequence[int], order: CifarOrder) -> bool:
    """Whether numbers within the classes are those that LDAM takes, whatever they count."""
    wanted = ldams_ranks(counts, order)
    return any(
        all(set(numbers[listed.labels == label] - start) == set(ranks) for label, ranks in wanted.items())
        for numbers in _numbers(listed.paths) for start in (0, 1))


def ldams_ranks(counts: Sequence[int], order: CifarOrder, seed: int = 0) -> dict[int, list[int]]:
    """The places among the images of its class that the draw takes, by label.

    The generator shuffles as many places for each class, so these do not depend on where the classes lie in CIFAR.
    """
    chosen = draw_by_counts(np.repeat(np.arange(order.classes), order.images), counts, seed)
    ranks: dict[int, list[int]] = defaultdict(list)
    for place in chosen.tolist():
        ranks[place // order.images].append(place % order.images)
    return ranks


def _is_first_by_sha1(listed: Files, everything: Files) -> bool:
    """Whether a list has of each class the first files by the SHA-1 of their names, and leaves out some."""
    def by_class(files: Files) -> dict[int, list[str]]:
        names: dict[int, list[str]] = defaultdict(list)
        for path, label in zip(files.paths, files.labels.tolist(), strict=True):
            names[label].append(Path(path).name)
        return names

    there, taken = by_class(everything), by_class(listed)
    first = {label: sorted(there[label], key=lambda name: hashlib.sha1(name.encode()).digest())[:len(names)]
             for label, names in taken.items()}
    return len(listed.paths) < len(everything.paths) and all(
        set(first[label]) == set(names) for label, names in taken.items())


# Making LDAM's -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rebuilt:
    """Files of LDAM's draw.

    Attributes:
        paths: In the order of the draw, None for one that is not there.
        means: By what they were found.
        proven: They are the draw, and not only if the names mean what they seem to.
    """

    paths: Sequence[str | None]
    means: str
    proven: bool


def rebuild(everything: Files, counts: Sequence[int], seed: int, order: CifarOrder, originals: Originals | None = None
            ) -> Rebuilt | None:
    """Find the files of LDAM's draw.

    Args:
        everything: The training images that are there.
        counts: Images of each class.
        seed: Of the draw.
        order: Of CIFAR.
        originals: CIFAR itself, by whose pixels the files are found.

    Returns:
        None where nothing tells which they are.
    """
    labels = everything.labels.tolist()
    if originals is not None:
        files: dict[tuple[int, bytes], list[str]] = defaultdict(list)
        for path, label, pixels in zip(everything.paths, labels, everything.pixels(), strict=True):
            files[label, pixels].append(path)
        chosen = draw_by_counts(originals.labels, counts, seed)
        keys = ((int(originals.labels[place]), originals.pixels[place]) for place in chosen)
        return Rebuilt([files[key].pop(0) if files[key] else None for key in keys], BY_PIXELS, proven=True)
    places = find_places(everything, order)
    if places is None:
        return None
    if not places.in_class:
        path_at = dict(zip(places.values.tolist(), everything.paths, strict=True))
        in_order = everything.labels[np.argsort(places.values)]
        return Rebuilt([path_at[place] for place in draw_by_counts(in_order, counts, seed).tolist()], BY_NAMES,
                       proven=True)
    path_of = dict(zip(zip(labels, places.values.tolist(), strict=True), everything.paths, strict=True))
    return Rebuilt([path_of[label, rank] for label, ranks in ldams_ranks(counts, order, seed).items()
                    for rank in ranks], IF_COUNTED, proven=False)

"""Settings of the data: what is read, in which format, by which processes, and how training augments it."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbn_timm.data.decoders import PILLOW, decoder_names
from nbn_timm.data.lists import MAX_CLASSES
from nbn_timm.data.longtail import PROFILES
from nbn_timm.data.shift import ClassShift
from nbn_timm.key_values import refuse_unknown
from nbn_timm.settings import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Limits,
    Settings,
    Tolerated,
    Values,
    all_of,
    fields_of,
    not_with,
    only_with,
    setting,
)

SIDE = Limits(1, 10_000)  # pixels; a larger image takes gigabytes


def _draws_anew(name: str, others: Values) -> str | None:
    reason = not_with('split_file')(name, others)
    if reason and 'split_file' not in others.typed and (others.initial_checkpoint or others.checkpoint):
        # Of another draw the split file would not have been taken over, see `NetworkRecord.inherited_by_training`.
        return Tolerated('has no effect, since the run that is gone on from brings the split file of this very draw')
    return reason


@dataclass(frozen=True)
class DataSettings(Settings):
    """What to read.

    Attributes:
        dataset: A name of `nbn_timm.datasets`, or a timm dataset such as 'torch/cifar100' or 'hfds/<name>'.
        data_dir: Folder of the images, and of torchvision's data sets.
        train_list, val_list, test_list: List files of `path label` lines, with paths relative to `data_dir`; looked
            for as given, in `data_dir` and in `data_dir/lists`. They replace the lists of a benchmark, or its draw
            by images in files.
        train_csv, val_csv, test_csv: CSV files with a header; looked for as given and in `data_dir`.
        file_column, label_column: Names of their columns.
        label_separator: What stands between the labels of a picture that can have several; None takes the cell for one.
        split_column: Column of the training CSV that says which split a row belongs to; 'none' if no column does, None
            for the one whose cells say nothing else.
        group_column: Column of the training CSV by whose cells `val_fraction` keeps pictures together.
        val_fraction: Share of the training pictures that becomes the validation split.
        val_seed: Of that draw.
        val_groups: CSV file of pictures that stay together in that draw.
        split_file: What such a draw has written, and what is read in its place.
        num_classes: Number of classes; None takes the benchmark's, or what the training split shows.
        imbalance_factor: Make the training split long-tailed, largest over smallest class; None takes the benchmark's
            factor, and draws nothing where there is none.
        imbalance_profile: See `profile_counts`.
        imbalance_seed: Of the draw; 0 is LDAM's.
        test_distribution: See `ClassShift.parse`.
        class_counts: File of training images per class instead of what the training split shows.
        class_names: File of what the classes are called, see `ClassNames.read`.
        download: Let torchvision and timm fetch what is missing.
        train_split, val_split, test_split: Names of the splits of timm's dataset types; without `val_split` there
            is none to select a model on.
        batch_size: Hint for timm's streamed datasets (tfds, hfids).
        seed: Shuffling seed of timm's streamed datasets.
    """

    title = 'data'

    dataset: str = setting(
        '', 'what is read',
        metavar='NAME', unset='that of the finished network, if there is one', inherited=True)
    data_dir: str | None = setting(None, 'root of the images', metavar='DIR', kind='place', inherited=True)
    train_list: str | None = setting(None, "'path label' per line, relative to --data-dir", metavar='FILE',
                                     is_file=True, inherited=True, unset="the benchmark's")
    val_list: str | None = setting(None, 'likewise, to choose checkpoints by', metavar='FILE', is_file=True,
                                   inherited=True, unset="the benchmark's")
    test_list: str | None = setting(None, 'likewise, to report on', metavar='FILE', is_file=True, inherited=True,
                                    unset="the benchmark's")
    train_csv: str | None = setting(None, 'CSV file with a header, a picture per row, paths relative to --data-dir',
                                    metavar='FILE', is_file=True, inherited=True)
    val_csv: str | None = setting(None, 'likewise, to choose checkpoints by', metavar='FILE', is_file=True,
                                  inherited=True)
    test_csv: str | None = setting(None, 'likewise, to report on', metavar='FILE', is_file=True, inherited=True)
    file_column: str = setting('file', 'column of the picture files', metavar='NAME', inherited=True)
    label_column: str = setting('label', 'column of the labels, names or numbers', metavar='NAME', inherited=True)
    label_separator: str | None = setting(
        None, 'what stands between labels in that column, such as ";", where a picture can be of several classes or of '
        'none', metavar='TEXT', inherited=True, unset='a picture has one label')
    split_column: str | None = setting(None, 'column of --train-csv that says train, val or test; none: no column does',
                                       metavar='NAME', inherited=True, unset='the one whose cells are such words')
    group_column: str | None = setting(
        None, 'column of --train-csv, such as the patient; --val-fraction keeps what is equal there together',
        metavar='NAME', inherited=True, effect=only_with('val_fraction'))
    val_fraction: float | None = setting(
        None, 'without a validation split: take this share of the training pictures for one, of every class that has '
        'two or more', limits=Limits(0, 0.9, above=True), metavar='F', inherited=True, effect=_draws_anew)
    val_seed: int = setting(0, 'of that draw, so that runs of other seeds share it', limits=NOT_NEGATIVE,
                            inherited=True, effect=only_with('val_fraction'))
    val_groups: str | None = setting(
        None, 'CSV file with the columns file and group: that draw keeps a group together', metavar='FILE',
        is_file=True, inherited=True, effect=only_with('val_fraction'))
    split_file: str | None = setting(
        None, 'CSV file with the columns file and split (train or val) that divides the training pictures; '
        '--val-fraction writes one into the run folder', metavar='FILE', is_file=True, inherited=True)
    train_split: str = setting('train', "of timm's dataset types", metavar='NAME', inherited=True)
    val_split: str | None = setting(None, "of timm's dataset types", metavar='NAME', inherited=True)
    test_split: str = setting('validation', "of timm's dataset types", metavar='NAME', inherited=True)
    num_classes: int | None = setting(None, 'number of classes', limits=Limits(1, MAX_CLASSES), inherited=True,
                                      unset='as the dataset has')
    imbalance_factor: float | None = setting(
        None, 'make training long-tailed: largest / smallest class', limits=AT_LEAST_1, inherited=True,
        unset='as the dataset is, or its benchmark prescribes')
    imbalance_profile: str = setting(PROFILES[0], 'of that draw', choices=PROFILES, inherited=True)
    imbalance_seed: int = setting(0, 'of that draw', limits=NOT_NEGATIVE, inherited=True)
    test_distribution: str | None = setting(
        None, 'test on a long-tailed part of the test split, as SADE does: forward_RATIO (as in training) or '
        'backward_RATIO, such as backward_50', metavar='NAME', inherited=True, unset='all of it')
    class_counts: str | None = setting(
        None, 'training images per class, where they cannot be counted or to override', metavar='FILE', is_file=True,
        unset='counted')
    class_names: str | None = setting(
        None, 'what classes are called, where folders or labels are codes: a file of a code, a tab and a name per '
        'line, or of a name per line in label order; none: the codes stay', metavar='FILE', kind='place',
        inherited=True, unset='as in words.txt of class folders, if there is one')
    download: bool = setting(False, 'fetch what torchvision or timm can fetch', kind='machine',
                             also=('--dataset-download',))
    batch_size: int = 1
    seed: int = 0

    def shift(self) -> ClassShift | None:
        """The distribution of the test, None for all of its images.

        Raises:
            InputError: It is none.
        """
        return ClassShift.parse(self.test_distribution) if self.test_distribution else None

    @property
    def lists(self) -> dict[str, str]:
        """The list files that are set, by split."""
        given = {'train': self.train_list, 'val': self.val_list, 'test': self.test_list}
        return {part: path for part, path in given.items() if path}

    @property
    def csvs(self) -> dict[str, str]:
        """The CSV files that are set, by split."""
        given = {'train': self.train_csv, 'val': self.val_csv, 'test': self.test_csv}
        return {part: path for part, path in given.items() if path}


# How pictures in files are divided where there is no validation split.
OF_THE_SPLIT = frozenset({'val_fraction', 'val_seed', 'val_groups', 'split_file'})

# Which images a draw keeps.
OF_THE_DRAW = frozenset({'imbalance_factor', 'imbalance_profile', 'imbalance_seed'})


@dataclass(frozen=True)
class InputSettings(Settings):
    """The format of images as the network sees them; None is the benchmark's, the network's or the weights' own."""

    title = 'input format'
    about = "Default: as published for the benchmark, else that of the finished network or the model's own."

    img_size: int | None = setting(None, 'pixels of a side', limits=SIDE, inherited=True, unset='see above',
                                   effect=not_with('input_size'))
    input_size: tuple[int, ...] | None = setting(None, 'channels height width', limits=SIDE, nargs=3,
                                                 metavar='N', inherited=True, unset='see above')
    in_chans: int | None = setting(
        None, 'channels of the images: 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA, more from TIFF or NumPy files; a '
        'pretrained first convolution is adapted as in timm',
        limits=AT_LEAST_1, inherited=True, unset='see above', effect=not_with('input_size'))
    crop_pct: float | None = setting(None, 'share of the resized image that the centre crop keeps',
                                     limits=Limits(0.1, 2), inherited=True, unset='see above')
    crop_mode: str | None = setting(
        None, 'in evaluation: the middle of an image, all of it without its ratio, or all of it within borders',
        choices=('center', 'squash', 'border'), inherited=True, unset='see above')
    interpolation: str | None = setting(None, 'resampling in evaluation', metavar='NAME', inherited=True,
                                        unset='see above')
    mean: tuple[float, ...] | None = setting(None, 'of pixels in [0, 1]', limits=PROBABILITY, nargs=0, metavar='F',
                                             inherited=True, unset='see above')
    std: tuple[float, ...] | None = setting(None, 'of pixels in [0, 1]', limits=Limits(1e-6), nargs=0, metavar='F',
                                            inherited=True, unset='see above')

    @property
    def channels(self) -> int | None:
        """Of the images, where they are given."""
        return self.input_size[0] if self.input_size else self.in_chans

    def as_model_kwargs(self) -> dict[str, int]:
        """What the constructor of a model must be told of them."""
        return {'in_chans': self.channels} if self.channels not in (None, 3) else {}  # type: ignore[dict-item]


@dataclass(frozen=True)
class LoaderSettings(Settings):
    """How images are loaded; none of it changes what is computed, beyond which random draws an augmentation makes."""

    title = 'loading'

    workers: int = setting(4, 'loading processes per process', limits=Limits(0, 1024), short='-j', kind='machine')
    pin_mem: bool = setting(False, 'page-locked memory, for faster copies to a GPU', kind='machine')


@dataclass(frozen=True)
class MemorySettings(Settings):
    """Where the images of training are kept."""

    title = 'memory'
    of_training = True

    in_memory: bool | None = setting(
        None, 'read small images once and augment them in batches, which leaves a small network nothing to wait for',
        kind='machine', unset='where that changes nothing else')


@dataclass(frozen=True)
class DecodingSettings(Settings):
    """How the files of training images are read."""

    title = 'decoding'
    of_training = True

    decoder: str = setting(
        PILLOW, 'what cuts random crops out of JPEG files: turbojpeg decodes no more than the crop',
        choices=decoder_names, effect=not_with('no_aug'))


def _jittered(name: str, others: Values) -> str | None:
    if others.aa and not others.force_color_jitter:
        return 'has no effect with --aa, which leaves colour jitter out, but with --force-color-jitter'
    return None


def _some_jitter(name: str, others: Values) -> str | None:
    return 'has no effect with --color-jitter 0' if others.color_jitter == 0 else None


_of_plain = all_of(not_with('no_aug'), not_with('simclr'))

_OF_ALL_VIEWS = ('other_views', 'reprob', 'remode', 'recount')  # random erasing happens on the device


@dataclass(frozen=True)
class AugmentSettings(Settings):
    """Training augmentation by timm's flags; None is the benchmark's published value."""

    title = 'augmentation'
    of_training = True

    no_aug: bool = setting(False, 'resize and centre crop only')
    scale: tuple[float, ...] | None = setting(
        None, 'area of the random resized crop', limits=POSITIVE, nargs=2, metavar=('MIN', 'MAX'), unset='0.08 1',
        effect=not_with('no_aug'))
    ratio: tuple[float, ...] | None = setting(
        None, 'aspect ratio of the random resized crop', limits=POSITIVE, nargs=2, metavar=('MIN', 'MAX'),
        unset='3/4 4/3', effect=not_with('no_aug'))
    hflip: float | None = setting(None, 'probability of a horizontal flip', limits=PROBABILITY, metavar='P',
                                  unset="the benchmark's", effect=not_with('no_aug'))
    simclr: bool = setting(False, "SimCLR's random resized crop, of small images too, jitter of colour and hue, and "
                           'grey', effect=not_with('no_aug'))
    blur: float = setting(0.0, 'probability of a blur after these', limits=PROBABILITY, metavar='P',
                          effect=all_of(not_with('no_aug'), only_with('simclr')))
    vflip: float = setting(0.0, 'probability of a vertical flip', limits=PROBABILITY, metavar='P',
                           effect=_of_plain)
    rotation: float = setting(0.0, 'rotate by up to so many degrees; corners turn black', limits=Limits(0, 180),
                              metavar='DEG', effect=_of_plain)
    color_jitter: float | None = setting(
        None, 'strength of brightness, contrast and saturation jitter', limits=NOT_NEGATIVE, unset="the benchmark's",
        effect=all_of(_of_plain, _jittered))
    color_jitter_prob: float | None = setting(None, 'that an image is jittered', limits=PROBABILITY, metavar='P',
                                              unset='1', effect=all_of(_of_plain, _jittered, _some_jitter))
    grayscale_prob: float = setting(0.0, 'that an image turns grey', limits=PROBABILITY, metavar='P',
                                    effect=_of_plain)
    gaussian_blur_prob: float = setting(0.0, 'that an image is blurred', limits=PROBABILITY, metavar='P',
                                        effect=_of_plain)
    force_color_jitter: bool = setting(False, 'jitter beside --aa too',
                                       effect=all_of(_of_plain, only_with('aa'), _some_jitter))
    aa: str | None = setting(None, "AutoAugment's policy 'cifar10', or one of timm's, as rand-m9-mstd0.5",
                             metavar='POLICY', effect=_of_plain)
    train_interpolation: str | None = setting(None, "resampling in training: timm's name or 'random'", metavar='NAME',
                                              unset='as in evaluation', effect=not_with('no_aug'))
    reprob: float = setting(0.0, 'probability of random erasing', limits=PROBABILITY, metavar='P',
                            effect=not_with('no_aug'))
    remode: str = setting('pixel', 'what random erasing fills in', choices=('const', 'rand', 'pixel'),
                          effect=all_of(not_with('no_aug'), only_with('reprob')))
    recount: int = setting(1, 'rectangles of random erasing', limits=Limits(1, 1000),
                           effect=all_of(not_with('no_aug'), only_with('reprob')))
    curriculum: bool = setting(
        False, 'CUDA: change pictures by up to ten operations of growing strength, as many as the network can take in '
        'their class', effect=_of_plain)
    cutout: int = setting(0, 'blacken a square of N pixels, cut off at the border', limits=Limits(0, SIDE.high),
                          effect=_of_plain)

    other_views: Mapping[str, Any] = setting(
        {}, 'augmentation of all but the first view of an image, where it differs from the first, as rotation=0 '
        'aa=cifar10; for losses of several views')

    def __post_init__(self) -> None:
        super().__post_init__()
        self.of_other_views()

    def of_other_views(self) -> 'AugmentSettings':
        """The augmentation of all views but the first.

        Raises:
            InputError: It has a setting that there is not, or a wrong value.
        """
        known = [one.name for one in fields_of(AugmentSettings) if one.name not in _OF_ALL_VIEWS]
        refuse_unknown('--other-views', self.other_views, known)
        return self.with_values(self.other_views, of='--other-views', other_views={}) if self.other_views else self

    @property
    def area(self) -> tuple[float, float] | None:
        """`scale` as two numbers."""
        return pair(self.scale)

    @property
    def aspect(self) -> tuple[float, float] | None:
        """`ratio` as two numbers."""
        return pair(self.ratio)


def pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    """Two numbers."""
    return None if values is None else (values[0], values[1])

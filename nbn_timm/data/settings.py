"""Settings of the data and of its augmentation."""
from dataclasses import dataclass


@dataclass(frozen=True)
class DataSettings:
    """What to read.

    Attributes:
        dataset: A name of `nbn_timm.datasets`, or a timm dataset such as 'torch/cifar100' or 'hfds/<name>'.
        data_dir: Folder of the images, and of torchvision's data sets.
        train_list, val_list, test_list: List files of `path label` lines, with paths relative to `data_dir`; looked
            for as given, in `data_dir` and in `data_dir/lists`. They replace the lists of a benchmark, or its draw
            by images in files.
        num_classes: Number of classes; None takes the benchmark's, or what the training split shows.
        imbalance_factor: Make the training split long-tailed, largest over smallest class; None takes the benchmark's
            factor, and draws nothing where there is none.
        imbalance_profile: 'exp' or 'step'.
        imbalance_seed: Of the draw; 0 is LDAM's.
        class_counts_file: Training images per class instead of what the training split shows.
        download: Let torchvision and timm fetch what is missing.
        train_split, val_split, test_split: Names of the splits of timm's dataset types; without `val_split` there
            is none to select a model on.
        batch_size: Hint for streamed datasets (tfds, wds, hfids).
        seed: Shuffling seed of streamed datasets.
    """

    dataset: str
    data_dir: str | None = None
    train_list: str | None = None
    val_list: str | None = None
    test_list: str | None = None
    num_classes: int | None = None
    imbalance_factor: float | None = None
    imbalance_profile: str = 'exp'
    imbalance_seed: int = 0
    class_counts_file: str | None = None
    download: bool = False
    train_split: str = 'train'
    val_split: str | None = None
    test_split: str = 'validation'
    batch_size: int = 1
    seed: int = 42

    @property
    def lists(self) -> dict[str, str]:
        """The list files that are set, by split."""
        given = {'train': self.train_list, 'val': self.val_list, 'test': self.test_list}
        return {part: path for part, path in given.items() if path}


@dataclass(frozen=True)
class AugmentSettings:
    """Training augmentation by timm's flags; None is the benchmark's published value."""

    no_aug: bool = False  # resize and centre crop only
    scale: tuple[float, float] | None = None  # area range of the random resized crop; timm's 0.08 to 1
    ratio: tuple[float, float] | None = None  # aspect range of the random resized crop; timm's 3/4 to 4/3
    hflip: float | None = None  # probability
    vflip: float = 0.0  # probability
    rotation: float = 0.0  # greatest angle in degrees, either way; the corners turn black
    color_jitter: float | None = None  # strength; 0 for none
    color_jitter_prob: float | None = None  # None jitters every image
    force_color_jitter: bool = False  # beside an auto-augment policy as well
    aa: str | None = None  # 'cifar10' or timm's auto-augment policy, e.g. 'rand-m9-mstd0.5'; switches jitter off
    interpolation: str | None = None  # timm's name or 'random'
    reprob: float = 0.0  # random erasing: probability
    remode: str = 'pixel'  # random erasing: 'const', 'rand' or 'pixel'
    recount: int = 1  # random erasing: rectangles per image
    cutout: int = 0  # side of a black square in pixels; 0 for none

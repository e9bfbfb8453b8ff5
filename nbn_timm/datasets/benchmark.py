"""What the field compares its methods on: one file of this folder, one class and one decorator each."""
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import timm

from nbn_timm.data.settings import DataSettings
from nbn_timm.data.shift import RATIOS
from nbn_timm.datasets.named_dataset import DATASETS, NamedDataset, register_dataset

BenchmarkT = TypeVar('BenchmarkT', bound='Benchmark')


@dataclass(frozen=True)
class Statistics:
    """Images of a benchmark: of its splits, of its largest and smallest class, and how its classes divide."""

    train: int
    val: int | None
    test: int
    largest: int
    smallest: int
    shots: tuple[int, int, int]  # many-, medium- and few-shot classes


class Benchmark(NamedDataset):
    """A published dataset, with all that this package knows of it.

    Attributes:
        title: Its name for people.
        num_classes: How many classes it has.
        home: Address of the page of the images.
        images: What to obtain from there, and how it lies under the data folder.
        terms: On which terms the images may be used, in a few words.
        hub_id: The Hub's name of the dataset that the images are from, if it is there.
        draw: How the long tail came about, where it is not drawn here.
        zoo: The models that have a pretrained cfg for it: 'imagenet' (all for 224 pixels), 'cifar' (all for 32), or
            one architecture; empty for none.
        zoo_default: It is those models' default cfg.
        shift_ratios: Of the shifted tests that the literature reports, see `nbn_timm.data.shift`.
    """

    title: ClassVar[str]
    num_classes: ClassVar[int]  # type: ignore[misc]
    home: ClassVar[str] = ''
    images: ClassVar[str] = ''
    terms: ClassVar[str] = ''
    hub_id: ClassVar[str | None] = None
    draw: ClassVar[str] = ''
    zoo: ClassVar[str] = ''
    zoo_default: ClassVar[bool] = False
    shift_ratios: ClassVar[tuple[float, ...]] = RATIOS

    @abstractmethod
    def prepare(self, settings: DataSettings, source: str | None = None) -> None:
        """Put what can be fetched into the data folder, check it, and say what is missing; `nbn-prepare` calls it.

        Args:
            settings: The data folder, and the draw if there is one.
            source: Address or folder that has the files in place of their published place.

        Raises:
            InputError: Something cannot be fetched, is not as published, or is missing.
        """

    def class_names(self) -> tuple[str, ...] | None:
        """Names in label order where they are known without the data."""
        return None

    def statistics(self) -> Statistics | None:
        """Number of images, where it is known without the data."""
        return None

    def remark(self, train_list: str | None) -> str:
        """What must be said beside an accuracy after training on the images of that list, if anything."""
        return ''

    def describe_draw(self, imbalance_factor: float | None, profile: str, seed: int) -> str:
        """How the long tail came about, in words for people."""
        factor = self.factor if imbalance_factor is None else imbalance_factor
        return self.draw if factor is None else rule_of_ldam(profile, seed)


def register_benchmark(name: str) -> Callable[[type[BenchmarkT]], type[BenchmarkT]]:
    """Class decorator: make a `Benchmark` known by `name`, to all commands."""
    return register_dataset(name)


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    return {name: known(name) for name, known in DATASETS.items() if issubclass(known, Benchmark)}


def find_benchmark(name: str | None) -> Benchmark | None:
    """The benchmark of that name; None for own images and for names that are not known."""
    known = DATASETS.get(name or '')
    return known(str(name)) if known is not None and issubclass(known, Benchmark) else None


def benchmark_of(model: str | None) -> str | None:
    """Name of the benchmark that a zoo model is configured for, None for other models."""
    cfg = timm.get_pretrained_cfg(model) if model and timm.is_model(model) else None
    tagged = f'{model}.{cfg.tag}' if cfg and cfg.tag else f'{model}'  # an alias ends in its tag
    return next((name for name in benchmarks() if tagged.endswith((f'.{name}', f'_{name}'))), None)


def rule_of_ldam(profile: str, seed: int) -> str:
    """The draw of this package in words for people."""
    return f'by the rule of LDAM (Cao et al., NeurIPS 2019): {profile} profile, seed {seed}'


def describe_draw(settings: DataSettings) -> str:
    """How the long tail of a training came about, empty where that is not known."""
    if settings.train_list:
        return f'list file `{settings.train_list}`'
    if settings.train_csv:
        return f'CSV file `{settings.train_csv}`'
    benchmark = find_benchmark(settings.dataset)
    if benchmark is not None:
        return benchmark.describe_draw(settings.imbalance_factor, settings.imbalance_profile, settings.imbalance_seed)
    drawn = settings.imbalance_factor is not None
    return rule_of_ldam(settings.imbalance_profile, settings.imbalance_seed) if drawn else ''

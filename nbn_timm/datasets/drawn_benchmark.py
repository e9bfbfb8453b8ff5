"""Benchmarks that are drawn from a balanced dataset by the rule of LDAM."""
import hashlib
import json
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import numpy as np

from nbn_timm.data.classes import ClassCounts
from nbn_timm.data.dataset import ImageSamples, LabelledImages
from nbn_timm.data.longtail import draw_long_tail, profile_counts
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import PARTS, Source
from nbn_timm.datasets.benchmark import Benchmark, Statistics
from nbn_timm.datasets.fetching import Archive, report_missing
from nbn_timm.datasets.list_files import read_lists
from nbn_timm.datasets.named_dataset import LISTS, image_root
from nbn_timm.errors import InputError
from nbn_timm.files import write_text_atomic


class DrawnBenchmark(Benchmark):
    """A benchmark whose training split is drawn, see `draw_long_tail`; lists of one's own take the place of the draw.

    Attributes:
        factor: The imbalance factor that is meant where a paper names none.
        largest: Training images of the largest class.
        held_out: Images of the splits that stay whole, 'test' and perhaps 'val'.
        archive: What `load` reads, if that is an archive as it was downloaded.
    """

    factor: ClassVar[float] = 100.0
    largest: ClassVar[int]
    held_out: ClassVar[dict[str, int]]
    archive: ClassVar[Archive | None] = None

    @abstractmethod
    def load(self, settings: DataSettings, part: str) -> tuple[LabelledImages, tuple[str, ...]]:
        """All images of a split, before the draw, and the class names in label order.

        Raises:
            InputError: They are missing or damaged.
        """

    def obtain(self, data_dir: Path, source: str | None) -> None:
        """Fetch what `load` reads.

        Raises:
            InputError: It cannot be had, or is not as published.
        """
        if self.archive is not None:
            print(f'{self.name}: {self.archive.obtain(data_dir, source)} is there')

    def unpacked(self, settings: DataSettings) -> Path:
        """The folder of the unpacked archive.

        Raises:
            InputError: It is not in the data folder.
        """
        assert self.archive is not None
        data_dir = image_root(settings)
        found = self.archive.find(data_dir)
        if found is None:
            raise InputError(
                f"'{data_dir}' has no folder '{self.archive.folder}' with '{self.archive.marker}' in it: run "
                f'nbn-prepare {self.name} --data-dir {data_dir}, or unpack {self.archive.file} there')
        return found

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        if settings.lists:
            source = read_lists(settings, parts, count)
            source.notes.append(self.note_on_lists(settings))
            return source
        source = Source()
        for part in PARTS:
            wanted = part in parts or (part == 'train' and count)
            if not wanted or part not in ('train', *self.held_out):
                continue
            try:
                source.datasets[part], source.names = self.load(settings, part)
            except InputError:
                if part in parts:
                    raise
        return source

    def note_on_lists(self, settings: DataSettings) -> str:
        """What must be said of lists that take the place of the draw."""
        return f"the images of {self.name} come from list files, not from LDAM's draw: say so beside any number"

    def what_is_drawn(self, targets: np.ndarray, indices: np.ndarray) -> str:
        """Whether a draw from these labels is a published one, in words, or nothing."""
        return ''

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return LISTS | {'data_dir'}

    def splits_files(self, settings: DataSettings) -> bool:
        return bool(settings.lists)

    def validates(self, settings: DataSettings) -> bool:
        return bool(settings.val_list) if settings.lists else 'val' in self.held_out

    def drawn_factor(self, settings: DataSettings) -> float | None:
        return settings.imbalance_factor if settings.lists else super().drawn_factor(settings)

    def statistics(self) -> Statistics:
        counts = profile_counts(self.num_classes, self.largest, self.factor)
        split = ClassCounts.from_dict({'counts': counts}).shot_split(*self.shot_limits)
        return Statistics(sum(counts), self.held_out.get('val'), self.held_out['test'], max(counts), min(counts),
                          (len(split.many), len(split.medium), len(split.few)))

    def remark(self, train_list: str | None) -> str:
        return ("The long-tailed draw comes from that list and is not the one of LDAM's code that papers commonly use, "
                'so the accuracies are not comparable with theirs to the last points.') if train_list else ''

    def prepare(self, settings: DataSettings, source: str | None = None) -> None:
        """Fetch the images and write `<benchmark>_<profile>_<factor>.json`, the draw's report.

        The report holds the images per class, the drawn indices' number and their SHA-256 (as little-endian int64, in
        order), by which two installations can compare their draws.
        """
        data_dir = Path(settings.data_dir or '.')
        self.obtain(data_dir, source)
        data, names = self.load(settings, 'train')
        self._check_files(settings, data)
        factor = self.factor if settings.imbalance_factor is None else settings.imbalance_factor
        profile, seed = settings.imbalance_profile, settings.imbalance_seed
        indices = draw_long_tail(data.targets, len(names), factor, profile, seed)
        counts = ClassCounts.from_targets(
            data.targets[indices], names, f'{self.name}, {profile} profile, factor {factor:g}')
        report = counts.to_dict() | {
            'imbalance_factor': factor,
            'imbalance_profile': profile,
            'imbalance_seed': seed,
            'size': len(indices),
            'indices_sha256': hashlib.sha256(np.asarray(indices, dtype='<i8').tobytes()).hexdigest(),
        }
        told = self.what_is_drawn(data.targets, indices)
        if told:
            report['draw'] = told
        path = data_dir / f'{self.name}_{profile}_{factor:g}.json'
        write_text_atomic(path, json.dumps(report, indent=1) + '\n')
        split = ', '.join(f'{len(classes)} {shot}' for shot, classes in counts.shot_split(*self.shot_limits).items())
        images = counts.train_images
        print(f'{self.name}: {len(indices):,} training images, {max(images)} to {min(images)} per class ({split}); '
              f'{told}{"; " if told else ""}report in {path}')

    def _check_files(self, settings: DataSettings, train: LabelledImages) -> None:
        """Look for all images of all splits, where they are files."""
        missing = 0
        for part in ('train', *self.held_out):
            data = train if part == 'train' else self.load(settings, part)[0]
            if isinstance(data, ImageSamples):
                paths = (data.path(index) for index in range(len(data)))
                root = Path(data.root)
                missing += report_missing(part, (str(Path(path).relative_to(root)) for path in paths), root)
        if missing:
            raise InputError(f"{self.name} is incomplete, {missing:,} images are missing in '{settings.data_dir}': "
                             f'obtain {self.images} from {self.home} again')

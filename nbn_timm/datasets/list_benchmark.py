"""Benchmarks that published lists define."""
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from nbn_timm.data.lists import read_image_list
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.shift import ClassShift
from nbn_timm.data.splits import Source
from nbn_timm.datasets.benchmark import Benchmark, Statistics
from nbn_timm.datasets.fetching import fetch, locate, report_missing
from nbn_timm.datasets.list_files import ListFile, read_lists
from nbn_timm.datasets.named_dataset import LISTS
from nbn_timm.errors import InputError
from nbn_timm.files import git_blob_id

# The lists of Kang et al., ICLR 2020, at the last commit of their repository; later codebases carry the same bytes.
SADE_LISTS = Path(__file__).with_name('sade_lists.npz')  # made by benchmarks/sade_lists.py
LISTS_URL = 'https://raw.githubusercontent.com/facebookresearch/classifier-balancing/' \
            'f162adef63fdf592d0b8a0f6e52bc481fc08785f/data'


class ListBenchmark(Benchmark):
    """A benchmark that is defined by lists of images.

    Attributes:
        lists: By split; a benchmark may have no 'val' to select a model on.
        folder: Folder of the lists at their published place.
        published: Number of images, as the lists have them.
    """

    lists: ClassVar[Mapping[str, ListFile]]
    folder: ClassVar[str] = ''
    published: ClassVar[Statistics | None] = None
    draw = 'the published lists'

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        return read_lists(settings, parts, count, self.lists)

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return LISTS | {'data_dir'}

    def splits_files(self, settings: DataSettings) -> bool:
        return True

    def published_test(self, settings: DataSettings, shift: ClassShift) -> np.ndarray | None:
        """The images of SADE's list of that name, where there is one and the test list is the published one.

        Raises:
            InputError: The test list is another.
        """
        if settings.test_list:
            return None
        with np.load(SADE_LISTS) as lists:
            if f'{self.name}/{shift}' not in lists:
                return None
            chosen = np.unpackbits(lists[f'{self.name}/{shift}'])
        part = self.lists['test']
        path = part.find(Path(settings.data_dir or '.'))
        if path is not None:
            _check_blob_id(path, part, f"'{path}'", "SADE's tests are parts of that one, so remove the file and run "
                           f'nbn-prepare {self.name}')
        return np.flatnonzero(chosen)

    def validates(self, settings: DataSettings) -> bool:
        return bool(settings.val_list) or 'val' in self.lists

    def statistics(self) -> Statistics | None:
        return self.published

    def prepare(self, settings: DataSettings, source: str | None = None) -> None:
        """Put the published lists into the data folder and look for their images.

        `source` holds `<folder>/<list>`; on disk it may hold the lists directly.
        """
        data_dir = Path(settings.data_dir or '.')
        lists = [self._obtain(part, data_dir, source or LISTS_URL) for part in self.lists.values()]
        missing = total = 0
        for path in lists:
            rows = read_image_list(path, self.num_classes)
            missing += report_missing(path.name, rows.paths, data_dir)
            total += len(rows.paths)
        if missing:
            raise InputError(
                f"{self.name} is incomplete, {missing:,} of {total:,} images are missing in '{data_dir}': obtain "
                f'{self.images} from {self.home}')
        print(f'{self.name} is complete: {total:,} images in {data_dir}')

    def _obtain(self, part: ListFile, data_dir: Path, source: str) -> Path:
        """Find a published list in the data folder or fetch it there; its git blob id must be the published one."""
        present = part.find(data_dir)
        if present is not None:
            _check_blob_id(present, part, f"'{present}'", 'remove it to fetch the published one')
            print(f'{part.name}: there already, as published')
            return present
        address = locate(source, self.folder, part.name)
        fetch(address, data_dir / part.name,
              lambda temporary: _check_blob_id(temporary, part, f"'{address}'", 'give another --source'))
        print(f'{part.name}: fetched from {address}, as published')
        return data_dir / part.name


def _check_blob_id(path: Path, part: ListFile, place: str, remedy: str) -> None:
    found = git_blob_id(path)
    if found != part.blob_id:
        raise InputError(
            f'{place} is not the published {part.name} (git blob id {found[:12]} instead of {part.blob_id[:12]}): '
            f'{remedy}')

"""What CIFAR-10-LT and CIFAR-100-LT share: torchvision's data and the format in which the field reads them."""
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torchvision.datasets import CIFAR10

from nbn_timm.data.dataset import ArraySamples
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.lists import read_image_list
from nbn_timm.data.longtail import profile_counts
from nbn_timm.data.settings import DataSettings
from nbn_timm.datasets.cifar_draw import (
    LDAMS,
    CifarOrder,
    Files,
    Originals,
    find_files,
    find_originals,
    judge,
    rebuild,
)
from nbn_timm.datasets.drawn_benchmark import DrawnBenchmark
from nbn_timm.datasets.fetching import TIMEOUT, fetch_archive, locate
from nbn_timm.datasets.list_files import given_list
from nbn_timm.datasets.named_dataset import image_root
from nbn_timm.errors import InputError
from nbn_timm.files import file_sha256, watched, write_text_atomic


class CifarLT(DrawnBenchmark):
    """CIFAR by LDAM's draw: with seed 0 the published images in the published order.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, whose
    CIFAR-10 statistics are the ones that everybody uses for CIFAR-100 too.

    Attributes:
        cifar: torchvision's dataset.
        order: What is known of its training images without them.
    """

    cifar: ClassVar[type[CIFAR10]]
    order: ClassVar[CifarOrder]
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

    def what_is_drawn(self, targets: np.ndarray, indices: np.ndarray) -> str:
        if self.order.are_drawn(indices):
            return "LDAM's published draw, by its SHA-256"
        return "LDAM's rule on CIFAR's own order" if self.order.is_of(targets) else ''

    def note_on_lists(self, settings: DataSettings) -> str:
        found = self._made_list(settings)
        return super().note_on_lists(settings) if found is None else (
            f'the training images of {self.name} come from a list file that nbn-prepare made: {found}')

    def remark(self, train_list: str | None) -> str:
        made = re.fullmatch(rf'{self.name}_(exp|step)_[0-9.]+_train\.txt', Path(train_list or '').name)
        return '' if made else super().remark(train_list)

    def prepare(self, settings: DataSettings, source: str | None = None) -> None:
        """Fetch CIFAR and write the report of the draw; of image files say which draw their lists are.

        A data folder with the training images in class folders is a copy. Nothing is fetched for it unless `source` is
        given: the archive, or a folder that has CIFAR as torchvision or the Hub has it. Each training list there is
        judged, and LDAM's draw is written as one where names or pixels tell which files these are; see `cifar_draw`.
        """
        data_dir = Path(settings.data_dir or '.')
        files = find_files(data_dir, self.order.classes) if data_dir.is_dir() else None
        if files is None:
            super().prepare(settings, source)
            return
        places = [data_dir, *([Path(source)] if source and Path(source).is_dir() else [])]
        originals = find_originals(self.cifar, self.order, places)
        if (source and originals is None) or (data_dir / self.cifar.base_folder).is_dir():
            super().prepare(settings, source)
            originals = find_originals(self.cifar, self.order, places)
        for path in sorted(path for folder in (data_dir, data_dir / 'lists') for path in folder.glob('*train*.txt')):
            rows = read_image_list(path, self.num_classes)
            verdict = judge(Files(data_dir, rows.paths, rows.targets), self.order, files, originals)
            print(f'{path.relative_to(data_dir)}: {len(rows.paths):,} images, {verdict.text}', flush=True)
        self._write_draw(settings, files, originals)

    def _write_draw(self, settings: DataSettings, files: Files, originals: Originals | None) -> None:
        """Write LDAM's draw from image files as a list with a record, or say why that cannot be."""
        factor = self.factor if settings.imbalance_factor is None else settings.imbalance_factor
        profile, seed = settings.imbalance_profile, settings.imbalance_seed
        counts = profile_counts(self.order.classes, self.order.images, factor, profile)
        found = rebuild(files, counts, seed, self.order, originals)
        if found is None:
            print(f"{self.name}: {LDAMS} cannot be made from the {len(files.paths):,} image files in '{files.root}', "
                  f"as nothing there tells CIFAR's order: give a folder with '{self.cifar.base_folder}' or the Hub's "
                  'Parquet files as --source')
            return
        paths = [path for path in found.paths if path is not None]
        if len(paths) < len(found.paths):
            print(f"{self.name}: {len(found.paths) - len(paths):,} of {len(found.paths):,} images of {LDAMS} are not "
                  f"among the {len(files.paths):,} image files in '{files.root}', so it cannot be made from them")
            return
        name = f'{self.name}_{profile}_{factor:g}' + (f'_seed{seed}' if seed else '') + (
            '_train.txt' if found.proven else '_train_unproven.txt')
        labels = np.repeat(np.arange(self.order.classes), counts)
        text = ''.join(f'{path} {label}\n' for path, label in zip(paths, labels, strict=True))
        target = files.root / name
        write_text_atomic(target, text)
        told = f'{LDAMS}{", " if found.proven else " "}{found.means}' + (f', with seed {seed}' if seed else '')
        record = {'list': name, 'list_sha256': file_sha256(target), 'size': len(paths), 'imbalance_profile': profile,
                  'imbalance_factor': factor, 'imbalance_seed': seed, 'draw': told, 'proven': found.proven}
        write_text_atomic(target.with_suffix('.json'), json.dumps(record, indent=1) + '\n')
        print(f'{self.name}: wrote {target}, {len(paths):,} images, {told}')

    def _made_list(self, settings: DataSettings) -> str | None:
        """What the record beside the training list says of it, if there is one and it is of this list."""
        if not settings.train_list:
            return None
        path = given_list(settings, image_root(settings), 'train')
        try:
            record = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
            return str(record['draw']) if record['list_sha256'] == file_sha256(path) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def obtain(self, data_dir: Path, source: str | None) -> None:
        """Put torchvision's archive into the data folder and unpack it, as torchvision does."""
        if source is not None:
            fetch_archive(locate(source, '', self.cifar.filename), data_dir / self.cifar.filename, self.cifar.tgz_md5)
        self.load(DataSettings(self.name, str(data_dir), download=True), 'train')

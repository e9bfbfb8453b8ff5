"""List files of one's own: `path label` lines."""
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.lists import ImageList, read_image_list
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import PARTS, Source
from nbn_timm.datasets.named_dataset import LISTS, NamedDataset, image_root, register_dataset
from nbn_timm.errors import InputError
from nbn_timm.files import refuse_no_file


@dataclass(frozen=True)
class ListFile:
    """A published list: file name and git blob id, which identifies its exact bytes."""

    name: str
    blob_id: str

    def find(self, data_dir: Path) -> Path | None:
        """The file in a data folder or its `lists` subfolder, or None."""
        return next((path for path in (data_dir / self.name, data_dir / 'lists' / self.name) if path.is_file()), None)


@register_dataset('list')
class ListFiles(NamedDataset):
    """Images that list files name."""

    hint = 'your own list files'

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        return read_lists(settings, parts, count)

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return LISTS | {'data_dir'}

    def splits_files(self, settings: DataSettings) -> bool:
        return True

    def validates(self, settings: DataSettings) -> bool:
        return bool(settings.val_list)


def read_lists(
        settings: DataSettings,
        parts: Collection[str],
        count: bool,
        published: Mapping[str, ListFile] | None = None,
) -> Source:
    """Read the lists that are given, and for the other splits the published ones.

    Args:
        settings, parts, count: See `NamedDataset.read`.
        published: The lists that belong to the dataset, by split.

    Raises:
        InputError: A list is missing or malformed.
    """
    data_dir = image_root(settings)
    num_classes = settings.num_classes
    lists: dict[str, ImageList] = {}
    notes: list[str] = []
    for part in PARTS:  # the training list first, because it may settle the class number
        wanted = part in parts or (part == 'train' and count)
        path = _find_list(settings, data_dir, part, published or {}, required=part in parts) if wanted else None
        if path is None:
            continue
        lists[part] = read_image_list(path, num_classes)
        notes += lists[part].notes
        if part == 'train' and num_classes is None:
            num_classes = int(lists['train'].targets.max()) + 1
    datasets = {part: ImageSamples(rows.paths, rows.targets, root=data_dir) for part, rows in lists.items()}
    _refuse_other_labels(lists)
    if 'train' in lists:
        return Source(dict(datasets), _names_from_folders(lists['train'], num_classes) if num_classes else None, notes)
    return Source(dict(datasets), None, notes, next(iter(lists.values())).class_folders() if lists else {})


def _refuse_other_labels(lists: Mapping[str, ImageList]) -> None:
    """Raise InputError if two lists give the class of a folder other labels."""
    seen: dict[str, tuple[int, str]] = {}  # label by folder, and the list that gave it first
    for part, rows in lists.items() if len(lists) > 1 else ():
        for folder, label in rows.class_folders().items():
            before, where = seen.setdefault(folder, (label, part))
            if before != label:
                raise InputError(f"the class '{folder}' has label {label} in the {part} list and {before} in the "
                                 f'{where} list: number the classes alike in all lists')


def given_list(settings: DataSettings, data_dir: Path, part: str) -> Path:
    """The list file that is given for a split.

    Raises:
        InputError: It is not there.
    """
    given = settings.lists[part]
    candidates = (Path(given), data_dir / given, data_dir / 'lists' / given)
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        refuse_no_file(*candidates)
        raise InputError(f"the list file '{given}' is neither there nor in '{data_dir}' or its folder 'lists': "
                         f'correct --{part}-list')
    return found


def _find_list(
        settings: DataSettings,
        data_dir: Path,
        part: str,
        published: Mapping[str, ListFile],
        required: bool,
) -> Path | None:
    """The list file of a split, or None where the dataset has none (or its training list is not needed)."""
    if settings.lists.get(part):
        return given_list(settings, data_dir, part)
    if part in published:
        found = published[part].find(data_dir)
        if found is None and required:
            raise InputError(
                f"'{published[part].name}' is neither in '{data_dir}' nor in its folder 'lists': "
                f'run nbn-prepare {settings.dataset} --data-dir {data_dir}, or give --{part}-list')
        return found
    if required and part == 'train':
        raise InputError(f'the dataset {settings.dataset} needs a training list: give --train-list')
    return None


def _names_from_folders(rows: ImageList, num_classes: int) -> tuple[str, ...] | None:
    """Class names, of a class without images its number; None if the folders do not tell the classes apart."""
    names = rows.folder_names()
    return None if names is None else tuple(names.get(label, str(label)) for label in range(num_classes))

"""Class folders of one's own: `<split>/<class>/<image>`."""
from collections.abc import Collection
from pathlib import Path

from nbn_timm.data.class_names import ClassNames, names_beside
from nbn_timm.data.folders import SPLIT_FOLDERS, find_split_folder, is_plain, read_class_folders
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import PARTS, Source
from nbn_timm.datasets.named_dataset import NamedDataset, image_root, register_dataset
from nbn_timm.errors import InputError


@register_dataset('folder')
class ClassFolders(NamedDataset):
    """Images in one folder per class, in one folder per split; without splits all of them train."""

    hint = 'class folders'

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        data_dir = image_root(settings)
        source = Source()
        plain = is_plain(data_dir)
        if plain:
            source.notes.append(f"'{data_dir}' has class folders and no folders of splits: all of it is the training "
                                'split')
        for part in PARTS:  # the training split first, because its folders name the classes
            folder = find_split_folder(data_dir, part) if part in parts or part == 'train' else None
            if plain and part == 'train':
                folder = data_dir
            if folder is not None:
                read = read_class_folders(folder, source.names, training=part == 'train' and part in parts)
                source.names = read.names
                source.notes += read.notes
                if read.samples is not None:
                    source.datasets[part] = read.samples
            elif part == 'train' and part in parts:
                raise InputError(f"'{data_dir}' has no folder 'train': put the images as train/<class>/<image>")
        if not set(source.datasets) & set(parts):
            wanted = [name for part in parts for name in SPLIT_FOLDERS[part]]
            raise InputError(
                f"'{data_dir}' has no folder {' or '.join(wanted)}: put the images as {wanted[0]}/<class>/<image>")
        if 'train' not in source.datasets:
            source.notes.append(f"'{data_dir}' has no training split, so the classes are the folders that are there")
        return source

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        return frozenset({'data_dir'})

    def names_beside(self, settings: DataSettings) -> ClassNames | None:
        return names_beside(settings.data_dir) if settings.data_dir else None

    def splits_files(self, settings: DataSettings) -> bool:
        return True

    def validates(self, settings: DataSettings) -> bool | None:
        if settings.data_dir and find_split_folder(Path(settings.data_dir), 'val') is None:
            return False
        return None  # a folder may turn out to have no labels

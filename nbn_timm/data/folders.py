"""Class folders: `<split>/<class>/<image>`."""
from pathlib import Path

import numpy as np
from timm.data import create_reader

from nbn_timm.data.dataset import ImageSamples
from nbn_timm.errors import InputError

SPLIT_FOLDERS = {'train': ('train',), 'val': ('val', 'validation'), 'test': ('test',)}


def find_split_folder(data_dir: Path, split: str) -> Path | None:
    """Folder of a split ('train', 'val' or 'test'), or None."""
    return next((data_dir / name for name in SPLIT_FOLDERS[split] if (data_dir / name).is_dir()), None)


def read_class_folders(folder: Path, names: tuple[str, ...] | None = None) -> tuple[ImageSamples, tuple[str, ...]]:
    """Read a split with timm's folder reader: leaf folders are classes, labelled in natural order of their names.

    Args:
        folder: Folder of the split.
        names: Classes of the training split, whose labels this split must share; None takes the folders found.

    Raises:
        InputError: There are no images, or a class that the training split does not have.
    """
    try:
        reader = create_reader('', root=str(folder))
    except RuntimeError as error:
        raise InputError(
            f"folder '{folder}' has no images in class folders: put them as {folder.name}/<class>/<image>") from error
    found = tuple(reader.class_to_idx)
    names = names or found
    strange = sorted(set(found) - set(names))
    if strange:
        raise InputError(
            f"class folder '{strange[0]}' of '{folder}' is not among the {len(names)} classes of the training split: "
            'rename or remove it')
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[name] for name in found])
    paths, targets = zip(*reader.samples, strict=True)
    return ImageSamples(paths, labels[list(targets)]), names

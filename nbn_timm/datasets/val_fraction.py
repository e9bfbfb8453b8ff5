"""`--val-fraction`: a validation split where a dataset in files has none, drawn from its training pictures."""
from dataclasses import replace
from pathlib import Path

from nbn_timm.data.classes import label_names
from nbn_timm.data.dataset import ImageSamples
from nbn_timm.data.label_sets import images_per_class, labels_of
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.val_split import draw_validation, kept_together, picture_keys, read_groups, write_split
from nbn_timm.datasets.named_dataset import data_root, find_dataset, known_number
from nbn_timm.errors import InputError


def draw_split_file(settings: DataSettings, fraction: float, path: Path) -> None:
    """Draw a share of the training pictures as the validation split, and write the split to a file.

    Pictures of the same bytes and of the same group stay together; see `draw_validation` for the rest.

    Raises:
        InputError: There is a validation split already, the pictures are in no files, or training can spare none.
    """
    dataset = find_dataset(settings.dataset)
    settings = replace(settings, num_classes=known_number(dataset, settings), split_file=None)
    source = dataset.read(settings, {'train', *([] if dataset.validates(settings) is False else ['val'])}, True)
    train = source.datasets['train']
    if 'val' in source.datasets:
        raise InputError(f'the dataset {settings.dataset} has a validation split here, so --val-fraction has none to '
                         'make: leave it out')
    if not isinstance(train, ImageSamples):
        raise InputError(f'--val-fraction divides pictures in files, and the dataset {settings.dataset} has none here: '
                         'leave it out')
    keys = picture_keys(train, settings.data_dir)
    groups = read_groups(settings.val_groups, data_root(train, settings)) if settings.val_groups else {}
    if groups and groups.keys().isdisjoint(keys):  # a file without any says that nothing belongs together
        raise InputError(f"--val-groups '{settings.val_groups}' names no training picture (the first one is "
                         f"'{keys[0]}'): write paths relative to --data-dir into its column file")
    units = kept_together(train, keys, source.groups, groups)
    validates = draw_validation(keys, train.targets, fraction, settings.val_seed, units)
    if not validates.any():
        raise InputError('--val-fraction finds no picture that training can spare, since each class has one picture or '
                         'one group: leave it out')
    names = source.names or label_names(len(images_per_class(train.targets)))
    told = source.groups or ([groups.get(key, '') for key in keys] if groups else None)
    separator = settings.label_separator or ';'
    labels = [separator.join(names[label] for label in labels_of(target)) for target in train.targets]
    write_split(path, keys, labels, validates, told)

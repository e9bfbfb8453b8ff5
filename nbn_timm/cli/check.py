"""Know the data first: what is in a collection of pictures, and what of it would stop or spoil a training.

    nbn-check pictures/                                        # class folders, with or without train, val and test
    nbn-check --dataset csv --train-csv labels.csv --data-dir pictures --html check.html
    nbn-check --dataset csv --train-csv labels.csv --data-dir pictures --label-separator ';'    # pictures of several
    nbn-check fields.csv --in-chans 6                          # TIFF and NumPy files of six channels
"""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbn_timm.bars import with_bar_or_lines
from nbn_timm.config import build_parser, read_given
from nbn_timm.data.grouping import Groups
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.tables import write_table
from nbn_timm.datasets import dataset_choices, reason_unused
from nbn_timm.errors import InputError, run_cli
from nbn_timm.files import prints_beside, write_text_atomic
from nbn_timm.inspection.collection import collect
from nbn_timm.inspection.facts import look_at_all
from nbn_timm.inspection.findings import Inspection, as_data, inspect
from nbn_timm.inspection.page import write_inspection_page
from nbn_timm.inspection.text import as_text
from nbn_timm.settings import AT_LEAST_1, Limits, SettingGroups, Settings, Values, setting

DESCRIPTION = ('Look at every picture of a collection once: pictures per class, damaged files, repeats, odd ones. Exit '
               'code 0: nothing stops a training; 1: something does, or what was given is wrong; 2: a wrong flag.')
_OF_TRAINING = {'val_fraction', 'val_seed', 'val_groups', 'group_column', 'class_counts'}


@dataclass(frozen=True)
class CheckingSettings(Settings):
    """How it is looked, and where it is told."""

    title = 'checking'

    workers: int | None = setting(None, 'processes that look at pictures; 0: this one alone', limits=Limits(0, 1024),
                                  short='-j', kind='machine', unset='one per core, four at most')
    in_chans: int | None = setting(
        None, 'channels that pictures are read with, as nbn-train --in-chans; more than four from TIFF or NumPy files',
        limits=AT_LEAST_1, unset='3')
    json: str | None = setting(None, 'write all that was found as JSON', metavar='FILE', kind='place')
    html: str | None = setting(None, 'write a page with pictures', metavar='FILE', kind='place')
    groups_file: str | None = setting(
        None, 'write pictures that are the same or nearly so as a CSV file, which nbn-train --val-groups takes',
        metavar='FILE', kind='place')


@dataclass(frozen=True)
class CheckSettings(SettingGroups):
    """All settings of a check."""

    checking: CheckingSettings = CheckingSettings()
    data: DataSettings = DataSettings()

    explained = {'dataset': lambda: f': {dataset_choices()}'}

    def idle(self, name: str, values: Values) -> str | None:
        """What the data set leaves unused, and what is of training alone."""
        if name in _OF_TRAINING:
            return 'is for training'
        return reason_unused(name, self.data)


def create_parser() -> argparse.ArgumentParser:
    """The flags of data settings are those of nbn-train."""
    parser = build_parser(CheckSettings, 'nbn-check', DESCRIPTION)
    parser.usage = 'nbn-check [DIR_OR_LIST] [--flag value ...]; --help lists the flags'
    parser.add_argument('place', nargs='?', metavar='DIR_OR_LIST',
                        help='folder with train, val and test or with class folders, a CSV file, or a list file')
    return parser


def main(argv: Sequence[str] | None = None) -> bool:
    """Check as the command line says, and tell; true if nothing stops a training.

    Raises:
        InputError: Something given is wrong.
    """
    given = read_given(CheckSettings, create_parser(), argv)
    place = given.positional.get('place')
    settings = given.settings(_named_by(place) if place else None)
    with prints_beside(settings.checking.json, settings.checking.html, settings.checking.groups_file):
        given.check_effects(settings, print)
        return check(settings)


def check(settings: CheckSettings) -> bool:
    """Look at all pictures, and tell; true if nothing stops a training.

    Raises:
        InputError: Something given is wrong.
    """
    data = settings.data
    if not data.dataset:
        raise InputError('there is nothing to look at: give a folder of pictures, or --dataset and what it needs')
    collection = collect(data)
    if settings.checking.in_chans is not None:
        collection.read_as(settings.checking.in_chans)
    workers = settings.checking.workers
    looks = look_at_all(list(collection.splits.values()), min(4, os.cpu_count() or 1) if workers is None else workers)
    result = inspect(collection, with_bar_or_lines(looks, len(collection), 'pictures'))
    print(as_text(result), flush=True)
    _write(settings.checking, result)
    return not result.stops


def _named_by(place: str) -> dict[str, str]:
    """Data settings that a folder, CSV file or list stands for."""
    if not os.path.exists(place):
        raise InputError(f"there is no file or folder '{place}': check the path")
    if os.path.isdir(place):
        return {'dataset': 'folder', 'data_dir': place}
    kind = 'csv' if place.lower().endswith('.csv') else 'list'
    return {'dataset': kind, f'train_{kind}': place, 'data_dir': str(Path(place).parent)}


def _write(asked: CheckingSettings, result: Inspection) -> None:
    if asked.json:
        write_text_atomic(asked.json, json.dumps(as_data(result), indent=1) + '\n')
    if asked.html:
        write_inspection_page(asked.html, result)
    if asked.groups_file:
        write_groups(asked.groups_file, result)
    for file in filter(None, (asked.json, asked.html, asked.groups_file)):
        print(f'written: {file}', flush=True)


def write_groups(path: str, result: Inspection) -> None:
    """Write pictures that are the same or nearly so as CSV with the columns file and group."""
    groups = Groups(len(result.facts))
    for group in (*result.same, *result.near):
        for index in group[1:]:
            groups.join(group[0], index)
    rows = [[result.collection.name(index), number] for number, group in enumerate(groups.members()) for index in group]
    write_table(path, ['file', 'group'], rows)


def console() -> int:
    """Console command `nbn-check`."""
    sound = True

    def run(argv: list[str] | None) -> None:
        nonlocal sound
        sound = main(argv)

    return run_cli(run, 'nbn-check') or int(not sound)


if __name__ == '__main__':
    sys.exit(console())

"""nbn-report: what a run has come to, as one HTML page; of several runs a comparison.

    nbn-report output/quickstart
    nbn-report output/cross-entropy output/balanced-softmax --output comparison.html
"""
import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nbn_timm.config import build_parser, read_given
from nbn_timm.data import Classes
from nbn_timm.data.dataset import pictures_digest
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import Known
from nbn_timm.data.val_split import SPLIT_FILE
from nbn_timm.datasets import create_splits
from nbn_timm.errors import InputError, quoted, run_cli
from nbn_timm.evaluation.temperature import CALIBRATION
from nbn_timm.files import prints_beside, refuse_no_file
from nbn_timm.models.run_folder import ADJUSTED, BEST, LAST, RESULTS, source_file
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.report import (
    FinishedRun,
    NormSizes,
    find_checkpoint,
    is_run,
    norm_sizes,
    of_its_weights,
    read_run,
    write_comparison,
    write_report,
)
from nbn_timm.settings import SettingGroups, Settings, only_with, setting
from nbn_timm.trained.opening import checkpoint_record, open_trained
from nbn_timm.training.distributed import World, init_world
from nbn_timm.training.report import REPORT
from nbn_timm.training.settings import TrainSettings
from nbn_timm.validation import ValidateSettings, validate, validation_settings

COMPARISON = 'comparison.html'


@dataclass(frozen=True)
class ReportSettings(Settings):
    """What the page is made of."""

    title = 'report'

    output: str | None = setting(None, 'write the page to this file', short='-o', metavar='FILE', kind='place',
                                 unset=f'{REPORT} in the folder of the run, {COMPARISON} here for several')
    names: tuple[str, ...] | None = setting(None, 'of the runs, in their order', nargs=0, metavar='NAME',
                                            unset='their folders')
    evaluate: bool = setting(False, 'run the networks on their test split again, as for runs of earlier versions, '
                             'which kept no predictions')
    data_dir: str | None = setting(None, 'folder of the pictures', metavar='DIR', unset='as recorded')
    device: str | None = setting(None, 'of --evaluate', metavar='DEVICE', effect=only_with('evaluate'),
                                 unset='a GPU if there is one')


@dataclass(frozen=True)
class ReportCommand(SettingGroups):
    """All settings of a report."""

    report: ReportSettings = ReportSettings()


def create_parser() -> argparse.ArgumentParser:
    """The flags and the runs."""
    parser = build_parser(ReportCommand, 'nbn-report', 'Write one HTML page of a run: curves, classes, confusion, '
                          'pictures, calibration, settings; or a comparison of several runs with the first.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, or a checkpoint')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or a run cannot be read.
    """
    given = read_given(ReportCommand, create_parser(), argv)
    settings = given.settings().report
    with prints_beside(settings.output):
        given.check_effects(given.settings(), print)
        report(settings, [Path(run) for run in given.positional['runs']])


def report(settings: ReportSettings, places: Sequence[Path]) -> None:
    """Write the page of some runs.

    Raises:
        InputError: Something given is wrong, or a run cannot be read.
    """
    world = init_world(settings.device if settings.evaluate else 'cpu')
    if world.distributed:
        raise InputError('nbn-report is one process: leave out torchrun')
    names = names_of(places, settings.names)
    with TemporaryDirectory() as work:
        runs = [read(place, name, settings, world, Path(work, str(number)))
                for number, (place, name) in enumerate(zip(places, names, strict=True))]
    told = [note if len(runs) == 1 else f'{run.name}: {note}' for run in runs for note in run.notes]
    notes: list[str] = []
    dataset = open_pictures(runs[0], settings.data_dir, notes)
    opened = [open_norms(run, place, notes) for run, place in zip(runs, places, strict=True)]
    if len(runs) == 1:
        path = Path(settings.output or runs[0].folder / REPORT)
        write_report(path, runs[0], _groups_of(runs[0]), dataset, opened[0][0], opened[0][1], tuple(notes),
                     None if dataset is None else settings.data_dir)
        notes = [*told, *notes]
    else:
        path = Path(settings.output or COMPARISON)
        norms = {run.name: sizes for run, (sizes, _) in zip(runs, opened, strict=True) if sizes is not None}
        notes = list(write_comparison(path, runs, dataset, norms, (*told, *notes)))
    for note in notes:
        print(note)
    size = f' ({path.stat().st_size / 1e6:.1f} MB)' if path.is_file() else ''
    print(f"wrote '{path}'{size}")


def names_of(places: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """One name for each run.

    Raises:
        InputError: There are too few or too many, or two are the same.
    """
    found = list(names or [folder_of(place).resolve().name for place in places])
    if len(found) != len(places) or len(set(found)) != len(found):
        raise InputError(f'the {len(places)} runs need one name each: give {len(places)} different --names')
    return found


def folder_of(place: Path) -> Path:
    """Of a run, by itself or by a checkpoint in it."""
    return place.parent if place.is_file() else place


def _groups_of(run: FinishedRun) -> type[SettingGroups]:
    """Settings of the command that made a run: the one that has them all, else of a training."""
    known = (TrainSettings, ProbeSettings)
    return next((groups for groups in known if run.settings.keys() <= groups.declared().keys()),
                TrainSettings)


def _check_file(place: Path, evaluate: bool) -> None:
    """Refuse a file that is no checkpoint, or is not the one that the results in its folder are of.

    Raises:
        InputError: It is such a file.
    """
    folder = quoted(str(place.parent))
    try:
        read_checkpoint(place)
    except InputError as error:
        if not is_run(place.parent) or place.name in (BEST, LAST, ADJUSTED):
            raise
        raise InputError(f'{quoted(str(place))} is no checkpoint: give the folder {folder} of the run, or a checkpoint '
                         'in it') from error
    if evaluate or not any((place.parent / name).is_file() for name in RESULTS):
        return
    evaluated = source_file(place.parent, finished=True)
    if not evaluated.samefile(place):
        raise InputError(f'the results in {folder} are of {evaluated.name}, and this is {place.name}: give the folder, '
                         'or add --evaluate')


def read(place: Path, name: str, settings: ReportSettings, world: World, work: Path) -> FinishedRun:
    """Read a run, and evaluate its network again if that is asked for."""
    refuse_no_file(place, or_folder=True)
    if place.is_file():
        _check_file(place, settings.evaluate)
    if place.is_file() and not is_run(place.parent):  # a checkpoint alone
        run = FinishedRun(name, place.parent, checkpoint_record(str(place)).arguments, (), 'test', {}, (), None)
    else:
        run = read_run(folder_of(place), name=name)
    if not settings.evaluate:
        return of_its_weights(run)
    checkpoint = place if place.is_file() else find_checkpoint(run)
    if checkpoint is None:
        raise InputError(f"there is no checkpoint in '{run.folder}' to evaluate: give the file, or leave out --evaluate"
                         )
    record = checkpoint_record(str(checkpoint))
    classes, fitted = record.classes, record.calibration
    of_sets = classes is not None and classes.label_sets
    values = {
        'checkpoint': str(checkpoint), 'split': run.split, 'results_file': str(work / f'{run.split}.json'),
        'per_class_file': str(work / f'{run.split}_per_class.csv'), 'workers': 0,
        'save_predictions': str(work / f'{run.split}_predictions.npz'), 'use_ema': bool(run.results.get('use_ema')),
        **({} if of_sets else {'temperature': 1.0}),  # as the numbers of a run are
        **({'data_dir': settings.data_dir} if settings.data_dir else {}),
        **({'device': settings.device} if settings.device else {})}
    print(f"evaluating '{checkpoint}' on {world.device.type}", flush=True)
    with redirect_stdout(StringIO()):
        validate(validation_settings(ValidateSettings.of(values), values), world)
    found = read_run(run.folder, work, name)
    kept = {key: run.results[key] for key in ('checkpoint', 'weights') if key in run.results}
    kept |= {} if fitted is None else {CALIBRATION: fitted.to_dict()}
    return replace(found, settings=run.settings, results={**found.results, **kept})


def open_pictures(run: FinishedRun, data_dir: str | None, notes: list[str]) -> Any:
    """The split that was evaluated, for thumbnails; None, with a note, where it cannot be had."""
    if run.targets is None or not run.settings.get('dataset'):
        return None
    data = DataSettings.from_record({**run.settings, **({'data_dir': data_dir} if data_dir else {})})
    known = Known(Classes(None, tuple(run.names), 'the run', run.of_sets), 'the run', binding=True)
    try:
        own_split = run.folder / SPLIT_FILE  # where the folder lies now
        drawn = run.split == 'val' and own_split.is_file()
        data = replace(data, train_list=data.train_list if drawn else None, class_counts=None,
                       num_classes=len(run.classes), download=False, split_file=str(own_split) if drawn else None)
        splits = create_splits(data, (run.split,), known, label_sets=True)
        pictures = splits.test if run.split == 'test' else splits.val
        if run.digest is not None and pictures_digest(pictures) != run.digest:
            raise InputError('those that are found are not those that were evaluated: give the --data-dir of these')
    except InputError as error:
        notes.append(f'The pictures are not at hand: {error}')
        return None
    return pictures


def open_norms(run: FinishedRun, place: Path, notes: list[str]) -> tuple[NormSizes | None, int]:
    """Sizes of the normalisation layers, where there are some, and the processes that trained together."""
    checkpoint = place if place.is_file() else find_checkpoint(run)
    if checkpoint is None:
        return None, 1
    try:
        trained = open_trained(str(checkpoint), use_ema=bool(run.results.get('use_ema')))
    except InputError as error:
        notes.append(f'The network of {run.name} could not be opened: {error}')
        return None, 1
    try:
        return norm_sizes(trained.model), trained.record.processes
    except InputError:  # a network without BatchNorm
        return None, trained.record.processes


def console() -> int:
    """Entry point of `nbn-report`."""
    return run_cli(main, 'nbn-report')


if __name__ == '__main__':
    sys.exit(console())

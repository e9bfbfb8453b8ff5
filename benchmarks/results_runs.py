"""Finished runs and their methods, as results_page.py and results_plots.py read them from the logs."""
import csv
import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nbn_timm.errors import InputError
from nbn_timm.evaluation.predictions import Predictions
from nbn_timm.files import file_sha256
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.settings import TrainSettings

NEEDED = ('args.yaml', 'log.jsonl', 'test.json', 'test_per_class.csv')
# Of train_list.py: {"hardware": "in words", "torch": version, "command": ...}; of a run that went from one machine to
# another {"command": ..., "parts": [{"hardware": ..., "epochs": 182, "precision": "bfloat16", ...}, ...]}.
HARDWARE = 'hardware.json'
SHOTS = ('many', 'medium', 'few')
DATA = 'data.json'  # digests of the lists, see results_rows.py
PREDICTIONS = 'predictions.npz'  # of the last checkpoint, in float32 on the CPU
ROUNDING = 0.6  # points between a run's own evaluation, as in bfloat16, and the one in float32; SHIKE's had 0.4


@dataclass(frozen=True)
class ClassRow:
    """One class of a run's test_per_class.csv."""

    name: str
    train_images: int
    shot: str
    test_images: int
    correct: int

    @property
    def accuracy(self) -> float:
        return 100 * self.correct / self.test_images


@dataclass(frozen=True)
class Part:
    """Epochs of a run that one machine trained.

    Attributes:
        hardware: In words, as train_list.py writes them.
        epochs: How many.
        precision: Of the arithmetic, such as bfloat16.
        versions: Of torch, timm and this package, as far as recorded.
        hours: In training steps.
    """

    hardware: str
    epochs: int
    precision: str
    versions: Mapping[str, str]
    hours: float

    @property
    def gpu(self) -> bool:
        return 'NVIDIA' in self.hardware

    @property
    def machine_hours(self) -> float:
        """Hours of a GPU, which runs side by side share, or of a CPU core."""
        side_by_side = re.search(r'(\d+) runs at a time', self.hardware)
        cores = re.search(r'(\d+) of \d+ cores', self.hardware)
        if self.gpu:
            return self.hours / int(side_by_side[1] if side_by_side else 1)
        return self.hours * int(cores[1] if cores else 1)

    def in_words(self, whole: bool) -> str:
        """Hardware, precision and version of torch; of a part that is not the whole run its epochs too."""
        torch, epochs = self.versions.get('torch'), '' if whole else f'{self.epochs} epochs'
        return ', '.join(text for text in (self.hardware, epochs, self.precision, torch and f'torch {torch}') if text)


@dataclass(frozen=True)
class Run:
    """What the logs of a finished run say."""

    name: str
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]  # one entry per epoch
    classes: Sequence[ClassRow]
    done_with: Mapping[str, Any]  # see `HARDWARE`; empty if that was not recorded
    predictions: Predictions | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # digests of the lists
    predictions_sha256: str | None = None
    first_stage: 'Run | None' = None  # that a second stage began with

    @property
    def parts(self) -> list[Part]:
        """What each machine trained, in their order."""
        images = sum(row.train_images for row in self.classes)
        hours = [images / entry['train_images_per_second'] / 3600 for entry in self.log]
        found, begin = [], 0
        for part in self.done_with.get('parts') or [self.done_with]:
            end = begin + part.get('epochs', len(self.log))
            found.append(Part(
                part.get('hardware', 'not recorded'), end - begin, part.get('precision') or self.precision,
                {key: part[key] for key in ('torch', 'timm', 'commit') if key in part}, sum(hours[begin:end])))
            begin = end
        return found

    @property
    def precision(self) -> str:
        """Of the arithmetic, by the settings."""
        whole = self.settings.get('model_dtype') or 'float32'
        return self.settings.get('amp_dtype', whole) if self.settings.get('amp') else whole

    @property
    def hardware(self) -> str:
        """In words, with the precision and the version of torch."""
        parts = self.parts
        return '; then '.join(part.in_words(len(parts) == 1) for part in parts)

    @property
    def method(self) -> str:
        return re.sub(r'-s\d+$', '', self.name)

    @property
    def seed(self) -> int:
        return self.settings['seed']

    @property
    def train_seconds(self) -> float:
        """Seconds in training steps: without evaluation, and without the pauses of a resumed run."""
        return 3600 * sum(part.hours for part in self.parts)

    @property
    def draw(self) -> str:
        """Which draw the training images are, in words."""
        return self.data.get('train', {}).get('draw', 'not recorded')

    def accuracy(self, shot: str | None = None) -> float:
        """Test accuracy in percent over the images of all classes, or of the many-, medium- or few-shot ones."""
        rows = [row for row in self.classes if shot in (None, row.shot)]
        return 100 * sum(row.correct for row in rows) / sum(row.test_images for row in rows)

    def what_it_computes(self) -> dict[str, Any]:
        """The settings that runs of one method share; a first stage's run may have a seed of its own too.

        Seeds of one method may come from a processor in float32 and from a GPU under autocast, which the page tells.
        """
        free = {'seed', 'amp', 'amp_dtype'}
        recipe = {name for name, one in TrainSettings.declared().items() if one.declaration.kind == 'recipe'} - free
        return {key: re.sub(r'-s\d+(?=/)', '', value) if isinstance(value, str) else value
                for key, value in self.settings.items() if key in recipe}


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seeds only."""

    name: str
    label: str
    runs: Sequence[Run]

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.runs[0].settings

    def accuracies(self, shot: str | None = None) -> list[float]:
        """Test accuracy of each run."""
        return [run.accuracy(shot) for run in self.runs]

    def class_accuracies(self) -> list[float]:
        """Test accuracy of each class, mean over the runs."""
        return [statistics.mean(row.accuracy for row in rows)
                for rows in zip(*(run.classes for run in self.runs), strict=True)]

    def curve(self, key: str) -> list[float]:
        """A number of the log after each epoch, mean over the runs."""
        return [statistics.mean(entry[key] for entry in entries)
                for entries in zip(*(run.log for run in self.runs), strict=True)]


def read_run(folder: Path) -> Run:
    """Read the logs of a run.

    Raises:
        InputError: A file is missing or damaged, the run is not finished, or what it evaluated is not its last epoch.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise InputError(f"'{folder}' is no finished run of train.py (no {missing[0]}): give another folder")
    try:
        settings = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
        log = [json.loads(line) for line in (folder / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
        test = json.loads((folder / 'test.json').read_text(encoding='utf-8'))
        with open(folder / 'test_per_class.csv', newline='', encoding='utf-8') as file:
            classes = [ClassRow(row['name'], int(row['train_images']), row['shot'], int(row['test_images']),
                                int(row['correct'])) for row in csv.DictReader(file)]
        done_with = json.loads((folder / HARDWARE).read_text(encoding='utf-8')) if (folder / HARDWARE).is_file() else {}
        run = Run(settings.get('experiment') or folder.name, settings, log, classes, dict(done_with))
        if 'parts' in done_with and sum(part.epochs for part in run.parts) != len(log):
            raise ValueError(f'the parts of {HARDWARE} do not add up to {len(log)} epochs')
        epochs = [entry['epoch'] for entry in log]
        stated = [test[name] for name in ('top1', *SHOTS)]
        found = [round(run.accuracy(shot), 6) for shot in (None, *SHOTS)]
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, yaml.YAMLError) as error:
        raise InputError(f"the logs in '{folder}' cannot be read ({type(error).__name__}: {error}): repeat the run"
                         ) from error
    if epochs != list(range(settings['epochs'])):
        raise InputError(f"'{folder}' has logged {len(epochs)} epochs of {settings['epochs']}: let the run finish")
    if EvaluatedWeights.of_results(test).chosen_by:
        raise InputError(f"'{folder}' reports {test['checkpoint']}: the page shows last epochs only, so give a run "
                         'without a validation split')
    if stated != found:
        raise InputError(f"test.json and test_per_class.csv in '{folder}' differ ({stated} and {found}): they are of "
                         'two runs')
    return with_predictions(run, folder)


def with_predictions(run: Run, folder: Path) -> Run:
    """The run with what an auditor has of it, if anything; its accuracies are then those of the predictions.

    Raises:
        InputError: The predictions are of another network.
    """
    data = folder / DATA
    run = replace(run, data=json.loads(data.read_text(encoding='utf-8')) if data.is_file() else {})
    file = folder / PREDICTIONS
    if not file.is_file():
        return run
    kept = Predictions.read(file)
    hits = np.bincount(kept.labels[kept.correct], minlength=len(run.classes)).tolist()
    audited = replace(run, predictions=kept, predictions_sha256=file_sha256(file), classes=[
        replace(row, correct=correct) for row, correct in zip(run.classes, hits, strict=True)])
    if abs(audited.accuracy() - run.accuracy()) > ROUNDING:
        raise InputError(f"'{file}' says {audited.accuracy():.2f}% and the run {run.accuracy():.2f}%: they are of two "
                         'networks, so collect the run again')
    return audited


def read_methods(folder: Path, labels: Mapping[str, str]) -> list[Method]:
    """All runs below a folder by method, in the order of `labels` and then of their names.

    Raises:
        InputError: There are none, runs of one method differ in a setting, or two have the same seed.
    """
    runs = [read_run(path.parent) for path in sorted(folder.glob('*/args.yaml'))]
    if not runs:
        raise InputError(f"there are no runs in '{folder}': put some there with `results_page.py collect RUN ...`")
    by_name = {run.name: run for run in runs}
    runs = [replace(run, first_stage=_first_stage(run, by_name)) for run in runs]
    classes = [[(row.name, row.train_images, row.shot) for row in run.classes] for run in runs]
    for run, of_run in zip(runs, classes, strict=True):
        if of_run != classes[0]:
            raise InputError(f"runs '{runs[0].name}' and '{run.name}' were trained on other numbers of images per "
                             'class: keep results of different training sets in different folders')
    methods = []
    order = {name: position for position, name in enumerate(labels)}
    for name in sorted({run.method for run in runs}, key=lambda name: (order.get(name, len(order)), name)):
        own = sorted((run for run in runs if run.method == name), key=lambda run: run.seed)
        check_same(own)
        methods.append(Method(name, labels.get(name, name.replace('_', ' ')), own))
    return methods


def _first_stage(run: Run, by_name: Mapping[str, Run]) -> Run | None:
    """The run that a second stage began with, whose cost is part of its own; None of others.

    Raises:
        InputError: It is not there.
    """
    if not run.settings.get('stage'):
        return None
    name = Path(run.settings.get('initial_checkpoint') or '').parent.name
    if name not in by_name:
        raise InputError(f"'{run.name}' is the second stage of '{name}', which is not there: collect that run too")
    return by_name[name]


def check_same(runs: Sequence[Run]) -> None:
    """Refuse to average runs that differ in more than their seed, or not even in that."""
    first = runs[0].what_it_computes()
    for before, run in itertools.pairwise(runs):
        other = run.what_it_computes()
        changed = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if changed:
            key = changed[0]
            raise InputError(f"runs '{runs[0].name}' and '{run.name}' differ in {key} ({first.get(key)} and "
                             f'{other.get(key)}): give them different method names')
        if run.seed == before.seed:
            raise InputError(f"runs '{before.name}' and '{run.name}' have the same seed {run.seed}: keep one")

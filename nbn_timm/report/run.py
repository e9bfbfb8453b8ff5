"""What the files of a run tell: of this package, of earlier versions of it, or of timm's training script."""
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from nbn_timm.data.classes import label_names
from nbn_timm.errors import InputError, quoted
from nbn_timm.evaluation import label_sets
from nbn_timm.evaluation.label_sets import LabelSetPredictions
from nbn_timm.evaluation.predictions import Predictions
from nbn_timm.evaluation.result import FURTHER_METRICS, METRICS
from nbn_timm.evaluation.temperature import CALIBRATION, FittedTemperature
from nbn_timm.evaluation.thresholds import THRESHOLDS, Thresholds
from nbn_timm.models.run_folder import source_file
from nbn_timm.models.weight_files import DIGEST, read_state_dict, weights_digest
from nbn_timm.seals import is_as_written, is_text_as_written

SHOTS = ('many', 'medium', 'few')
_FILES = ('args.yaml', 'summary.csv', 'test.json', 'val.json')
_MOST_VALUES = 100_000  # of args.yaml

T = TypeVar('T')


@dataclass(frozen=True)
class Measure:
    """What a run is judged by.

    Attributes:
        words: What it is.
        columns: Its names in results, by 'all' and the shots; with 'eval_' before them in the summary.
    """

    words: str
    columns: Mapping[str, str]


ACCURACY = Measure('accuracy', {'all': 'top1', **{shot: shot for shot in SHOTS}})
PRECISION = Measure('mean average precision', {'all': 'map', **{shot: f'map_{shot}' for shot in SHOTS}})


@dataclass(frozen=True)
class ClassRow:
    """A class, as an evaluation met it.

    Attributes:
        name: Of the class.
        train_images: None where they are not known.
        shot: 'many', 'medium' or 'few'; None likewise.
        test_images: Of the evaluated split.
        correct: Of these, how many were told right.
        predicted: Pictures that were told to be of it; None where that was not kept.
        average_precision: In percent, where a picture can be of several classes and one is of this.
    """

    name: str
    train_images: int | None
    shot: str | None
    test_images: int
    correct: int
    predicted: int | None
    average_precision: float | None = None

    @property
    def recall(self) -> float | None:
        """In percent."""
        return 100 * self.correct / self.test_images if self.test_images else None

    @property
    def precision(self) -> float | None:
        """In percent."""
        return 100 * self.correct / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """In percent."""
        if self.predicted is None or not self.predicted + self.test_images:
            return None
        return 200 * self.correct / (self.predicted + self.test_images)


def shot_limits(splits: Mapping[str, Any]) -> dict[str, str]:
    """Training images of many-, medium- and few-shot classes, for people; of the limits in a run's results."""
    many, few = splits['many_above'], splits['few_below']
    return {'many': f'>{many}', 'medium': f'{few}–{many}', 'few': f'<{few}'}


@dataclass(frozen=True)
class FinishedRun:
    """A run by its files; what there is not is empty or None.

    Attributes:
        name: Of its folder.
        folder: Where it lies.
        settings: Of args.yaml.
        epochs: Rows of summary.csv, numbers by column.
        split: That was evaluated at the end, 'test' or 'val'.
        results: Of test.json or val.json.
        classes: In label order.
        predictions: Of the pictures of the split, where these are of one class.
        label_sets: Likewise, where they can be of several.
        thresholds: From which probability on a class is told, there.
        notes: What is missing and why, a sentence each.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    epochs: Sequence[Mapping[str, float]]
    split: str
    results: Mapping[str, Any]
    classes: Sequence[ClassRow]
    predictions: Predictions | None
    notes: tuple[str, ...] = ()
    label_sets: LabelSetPredictions | None = None
    thresholds: Thresholds = Thresholds.fixed()

    @property
    def of_sets(self) -> bool:
        """Whether its pictures can be of several classes."""
        return bool(self.results.get('label_sets')) or any('eval_map' in row for row in self.epochs)

    @property
    def measure(self) -> Measure:
        """What it is judged by."""
        return PRECISION if self.of_sets else ACCURACY

    @property
    def kept(self) -> Predictions | LabelSetPredictions | None:
        """The predictions, of either kind; None if none were kept."""
        return self.label_sets if self.of_sets else self.predictions

    @property
    def targets(self) -> np.ndarray | None:
        """Labels [N] or label sets [N, C] of the pictures whose predictions were kept; None if none were."""
        return None if self.kept is None else self.kept.targets

    @property
    def digest(self) -> str | None:
        """Of these pictures; None where it was not kept."""
        return None if self.kept is None else self.kept.digest

    @cached_property
    def told_sets(self) -> np.ndarray:
        """Classes that are told of each picture that can be of several, uint8 [N, C]."""
        assert self.label_sets is not None
        return self.thresholds.answers(self.label_sets.logits)

    @property
    def calibration(self) -> FittedTemperature | None:
        """The temperature that was fitted when the run was evaluated; its results are without it."""
        return FittedTemperature.from_dict(self.results.get(CALIBRATION))

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return [row.name for row in self.classes]

    @cached_property
    def shot_of_class(self) -> np.ndarray | None:
        """Index in `SHOTS` of each class, [C]; None where the training images are not known."""
        shots = [row.shot for row in self.classes]
        return None if None in shots or not shots else np.array([SHOTS.index(str(shot)) for shot in shots])

    def curve(self, column: str) -> tuple[list[float], list[float]]:
        """Epochs, from 1, and values of a column of the summary, where it has some."""
        rows = [row for row in self.epochs if column in row]
        return [row['epoch'] + 1 for row in rows], [row[column] for row in rows]


def read_run(folder: Path, evaluated: Path | None = None, name: str | None = None) -> FinishedRun:
    """Read the files of a run.

    Args:
        folder: Of the run.
        evaluated: Where its evaluation lies if it is not in the folder.
        name: What to call it instead of the folder's name.

    Raises:
        InputError: It is no folder of a run, or a file is damaged.
    """
    if evaluated is None and not is_run(folder):
        raise InputError(f"'{folder}' is no folder of a run (it has none of {', '.join(_FILES)}): give the folder that "
                         'train.py has written')
    place = evaluated or folder
    split = 'test' if (place / 'test.json').is_file() or not (place / 'val.json').is_file() else 'val'
    results: dict[str, Any] = _read(place / f'{split}.json', _results, {})
    counted = _rows_of_results(results) if results else []
    classes: list[ClassRow] = _read(place / f'{split}_per_class.csv', _class_rows, counted)
    if counted and [_numbers(row) for row in counted] != [_numbers(row) for row in classes]:
        raise InputError(f"{split}.json and {split}_per_class.csv in '{place}' are of different evaluations, or one is "
                         'damaged: evaluate again')
    whole = {f'{split}.json': is_as_written(results),
             'args.yaml': _read(folder / 'args.yaml', is_text_as_written, True)}
    notes = [f'{file} is not as it was written: it was edited, or is damaged.'
             for file, as_written in whole.items() if not as_written]
    run = FinishedRun(
        name or folder.resolve().name, folder, _read(folder / 'args.yaml', _settings, {}),
        _read(folder / 'summary.csv', _summary, []), split, results, classes, None)
    _check_log(run)
    if run.of_sets:
        thresholds = Thresholds.from_dict(results.get(THRESHOLDS), len(classes)) or Thresholds.fixed()
        sets, missing = _label_sets(place, split, results, classes, thresholds)
        return replace(run, label_sets=sets, thresholds=thresholds, notes=(*notes, *missing))
    predictions, missing = _predictions(place, split, results, classes)
    if predictions is not None:
        told = np.bincount(predictions.predicted, minlength=len(classes)).tolist()
        classes = [row if row.predicted is not None else replace(row, predicted=number)
                   for row, number in zip(classes, told, strict=True)]
    return replace(run, classes=classes, predictions=predictions, notes=(*notes, *missing))


def is_run(folder: Path) -> bool:
    """Whether a folder has a file that only runs leave."""
    return any((folder / file).is_file() for file in _FILES)


def find_checkpoint(run: FinishedRun) -> Path | None:
    """The file of the weights that were evaluated, if it is there."""
    try:
        return source_file(run.folder, finished=True)
    except InputError:
        return None


def of_its_weights(run: FinishedRun) -> FinishedRun:
    """The run without its results, and a note, where the file that they are of has other weights by now.

    What there is nothing to compare with stays: a file that is gone or damaged, or results of an earlier version, which
    are told with a note.
    """
    weights, file = run.results.get('weights'), f'{run.split}.json'
    path = run.folder / Path(str(weights.get('file'))).name if isinstance(weights, Mapping) else None
    if path is None or not path.is_file():
        return run
    recorded = run.results.get(DIGEST)
    if recorded is None:
        return replace(run, notes=(*run.notes, f'{file} is of an earlier version, which did not record by a digest of '
                                   f'which weights it is, so {path.name} may have others by now.'))
    try:
        digest = weights_digest(read_state_dict(path, bool(run.results.get('use_ema'))))
    except InputError:  # the network cannot be opened, which is told elsewhere
        return run
    if digest == recorded:
        return run
    return replace(run, results={}, classes=(), predictions=None, label_sets=None, notes=(
        *run.notes, f'The results in {file} are of other weights than {path.name} has now, so they are not told: '
        'nbn-report --evaluate evaluates these. The curves are of the training before.'))


def _read(path: Path, parse: Callable[[str], T], otherwise: T) -> T:
    if not path.is_file():
        return otherwise
    try:
        return parse(path.read_text(encoding='utf-8', errors='surrogateescape'))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error, yaml.YAMLError) as error:
        reason = f'no {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())
        raise InputError(f"'{path}' cannot be read ({reason}): replace it by an intact copy") from error


def _settings(text: str) -> dict[str, Any]:
    """Of args.yaml; timm's has aliases, which may amount to more than a file could hold."""
    settings = dict(yaml.safe_load(text))
    left = _MOST_VALUES

    def count(value: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f'it has more than {_MOST_VALUES:,} values')
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            count(part)

    count(settings)
    if not all(isinstance(name, str) for name in settings):
        raise ValueError('a name of a setting is none')
    return settings


def _results(text: str) -> dict[str, Any]:
    """Of test.json, in which every number is one and those of the classes add up."""
    results = dict(json.loads(text))
    of_sets = bool(results.get('label_sets'))
    if not all(_is_count(results[name]) for name in ('num_samples', 'num_classes')):
        raise ValueError('num_samples or num_classes is no number')
    for name in label_sets.METRICS if of_sets else (*METRICS, *FURTHER_METRICS):
        if results.get(name) is not None and not _is_finite(results[name]):
            raise ValueError(f'{name} is no number')
    splits = results.get('splits')
    if splits and not all(_is_count(number) for number in (
            splits['many_above'], splits['few_below'],
            *(splits[shot]['classes' if of_sets else 'images'] for shot in SHOTS))):
        raise ValueError('splits are no numbers')
    classes = results.get('per_class')
    if classes is not None:
        columns = [classes[name] for name in ('correct', 'total', 'predicted') if name in classes]
        if not all(_is_count(number) for column in columns for number in column) or (
                {len(column) for column in columns} != {results['num_classes']}):
            raise ValueError('the numbers of the classes are none')
        if of_sets:
            _check_set_numbers(results, classes)
            return results
        correct, total = sum(classes['correct']), sum(classes['total'])
        if total != results['num_samples'] or not abs(results['top1'] * total - 100 * correct) <= 0.001 * total:
            raise ValueError('the numbers of the classes do not add up')
    return results


def _check_set_numbers(results: Mapping[str, Any], classes: Mapping[str, Any]) -> None:
    """Refuse numbers of the classes that pictures of several classes cannot have."""
    precisions = classes['average_precision']
    if len(precisions) != results['num_classes'] or not all(
            value is None or _is_finite(value) and 0 <= value <= 1 for value in precisions):
        raise ValueError('an average precision is none')
    numbers = zip(classes['correct'], classes['total'], classes['predicted'], strict=True)
    if any(correct > min(total, predicted) or max(total, predicted) > results['num_samples']
           for correct, total, predicted in numbers):
        raise ValueError('the numbers of the classes do not add up')


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2 ** 53


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _summary(text: str) -> list[dict[str, float]]:
    """Rows of numbers; what is empty is left out, and so is a last line that a kill cut short."""
    table = csv.DictReader(text.splitlines())
    if 'epoch' not in (table.fieldnames or ()):
        raise ValueError('it has no column epoch')
    read = list(table)
    if read and not text.endswith('\n'):
        read.pop()
    rows = [{name: float(value) for name, value in row.items() if value not in (None, '')} for row in read]
    if not all(_is_finite(row['epoch']) for row in rows):
        raise ValueError('an epoch is no number')
    return rows


def _check_log(run: FinishedRun) -> None:
    """Compare the summary with the log, which has the same numbers of each epoch.

    A kill between the two leaves an epoch more in the summary.

    Raises:
        InputError: They differ.
    """
    logged_rows: list[dict[str, Any]] = _read(run.folder / 'log.jsonl', _log_rows, [])
    log = {row['epoch']: row for row in logged_rows}
    summary = {row['epoch']: row for row in run.epochs}
    columns = {name for row in run.epochs for name in row}
    for epoch, logged in log.items() if (run.folder / 'summary.csv').is_file() else ():
        told = summary.get(epoch)
        if told is None or any(not _same(told.get(name), logged.get(name)) for name in columns):
            raise InputError(f"summary.csv and log.jsonl in '{run.folder}' do not agree on epoch "
                             f'{epoch + 1:g}, so one is damaged or of another run: replace it by an intact copy, or '
                             'remove log.jsonl')


def _same(one: Any, other: Any) -> bool:
    """Whether two numbers are one, as NaN is not by itself."""
    return one == other or (one != one and other != other)


def _log_rows(text: str) -> list[dict[str, Any]]:
    """Rows of the log; what cannot be read of it has nothing to compare with."""
    rows = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and _is_finite(row.get('epoch')):
                rows.append(row)
    return rows


def _class_rows(text: str) -> list[ClassRow]:
    def number(text: str | None) -> int | None:
        return int(text) if text else None

    rows = [ClassRow(row['name'] or row['class'], number(row['train_images']), row['shot'] or None,
                     int(row['test_images']), int(row['correct']), number(row.get('predicted')),
                     float(row['average_precision']) if row.get('average_precision') else None)
            for row in csv.DictReader(text.splitlines())]
    for row in rows:
        counts = (row.train_images, row.test_images, row.correct, row.predicted)
        if row.shot not in (None, *SHOTS) or not all(one is None or _is_count(one) for one in counts) or (
                row.correct > row.test_images or not 0 <= (row.average_precision or 0) <= 100):
            raise ValueError(f'its row of {quoted(str(row.name))} has impossible values')
    return rows


def _numbers(row: ClassRow) -> tuple[int, int]:
    return row.correct, row.test_images


def _rows_of_results(results: Mapping[str, Any]) -> list[ClassRow]:
    counted = results.get('per_class') or {}
    correct, total = counted.get('correct') or [], counted.get('total') or []
    predicted = counted.get('predicted') or [None] * len(total)
    precisions = counted.get('average_precision') or [None] * len(total)
    return [ClassRow(name, None, None, of_class, right, told, None if precision is None else 100 * precision)
            for name, of_class, right, told, precision in
            zip(label_names(len(total)), total, correct, predicted, precisions, strict=True)]


def _predictions(
        place: Path,
        split: str,
        results: Mapping[str, Any],
        classes: Sequence[ClassRow],
) -> tuple[Predictions | None, list[str]]:
    files = [path for name in (f'{split}_predictions.npz', 'predictions.npz') if (path := place / name).is_file()]
    if not files:
        return None, []
    found = Predictions.read(files[0])
    if len(classes) <= max(found.labels.max(), found.top.max()):
        raise InputError(f"the predictions in '{place}' are of more classes than its results: evaluate again")
    if len(found) != results.get('num_samples'):
        return None, [f'{files[0].name} is of {len(found):,} pictures and {split}.json of another number, so it is '
                      'left out: evaluate again']
    counted = [np.bincount(labels, minlength=len(classes)).tolist()
               for labels in (found.labels[found.correct], found.labels)]
    if list(zip(*counted, strict=True)) != [_numbers(row) for row in classes]:
        return None, [f'{files[0].name} has other hits than {split}.json, so it is left out: evaluate again']
    return found, []


def _label_sets(
        place: Path,
        split: str,
        results: Mapping[str, Any],
        classes: Sequence[ClassRow],
        thresholds: Thresholds,
) -> tuple[LabelSetPredictions | None, list[str]]:
    """What was kept of the pictures, if it is of the evaluation that the results are of."""
    file = place / f'{split}_predictions.npz'
    if not file.is_file():
        return None, []
    found = LabelSetPredictions.read(file)
    expected = [(row.correct, row.test_images, row.predicted) for row in classes]
    if found.sets.shape[1] == len(classes) and len(found) == results.get('num_samples'):
        told = thresholds.answers(found.logits)
        counts = (part.sum(axis=0, dtype=np.int64).tolist() for part in (told & found.sets, found.sets, told))
        if list(zip(*counts, strict=True)) == expected:
            return found, []
    return None, [f'{file.name} is not of the evaluation in {split}.json, so it is left out: evaluate again']

"""What the files of a run tell: of this package, of earlier versions of it, or of timm's training script."""
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from nbn_timm.data.classes import label_names
from nbn_timm.errors import InputError
from nbn_timm.evaluation.predictions import Predictions

SHOTS = ('many', 'medium', 'few')
_FILES = ('args.yaml', 'summary.csv', 'test.json', 'val.json')
_WEIGHTS = ('model_best.pth.tar', 'last.pth.tar')

T = TypeVar('T')


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
    """

    name: str
    train_images: int | None
    shot: str | None
    test_images: int
    correct: int
    predicted: int | None

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
        predictions: Of the pictures of the split.
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
        InputError: It is no folder of a run, is of pictures of several classes, or a file is damaged.
    """
    if evaluated is None and not is_run(folder):
        raise InputError(f"'{folder}' is no folder of a run (it has none of {', '.join(_FILES)}): give the folder that "
                         'train.py has written')
    place = evaluated or folder
    split = 'test' if (place / 'test.json').is_file() or not (place / 'val.json').is_file() else 'val'
    results: dict[str, Any] = _read(place / f'{split}.json', lambda text: dict(json.loads(text)), {})
    if results.get('label_sets'):
        raise InputError(f"the run in '{place}' is of pictures of several classes, for which there is no page: look at "
                         f'{split}.json and {split}_per_class.csv')
    classes: list[ClassRow] = _read(place / f'{split}_per_class.csv', _class_rows, [])
    predictions, notes = _predictions(place, split, results)
    if not classes and results:
        classes = _rows_of_results(results)
    if predictions is not None and len(classes) <= max(predictions.labels.max(), predictions.top.max()):
        raise InputError(f"the predictions in '{place}' are of more classes than its results: evaluate again")
    if predictions is not None:
        told = np.bincount(predictions.predicted, minlength=len(classes)).tolist()
        classes = [row if row.predicted is not None else replace(row, predicted=number)
                   for row, number in zip(classes, told, strict=True)]
    return FinishedRun(
        name or folder.resolve().name, folder,
        _read(folder / 'args.yaml', lambda text: dict(yaml.safe_load(text)), {}),
        _read(folder / 'summary.csv', _summary, []), split, results, classes, predictions, tuple(notes))


def is_run(folder: Path) -> bool:
    """Whether a folder has a file that only runs leave."""
    return any((folder / file).is_file() for file in _FILES)


def find_checkpoint(run: FinishedRun) -> Path | None:
    """The file of the weights that were evaluated, if it is there."""
    weights = run.results.get('weights')
    named = [str(weights['file'])] if isinstance(weights, dict) and weights.get('file') else []
    return next((path for file in (*named, *_WEIGHTS) if (path := run.folder / file).is_file()), None)


def _read(path: Path, parse: Callable[[str], T], otherwise: T) -> T:
    if not path.is_file():
        return otherwise
    try:
        return parse(path.read_text(encoding='utf-8', errors='surrogateescape'))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"'{path}' cannot be read ({' '.join(str(error).split())}): replace it by an intact copy"
                         ) from error


def _summary(text: str) -> list[dict[str, float]]:
    """Rows of numbers; what is empty is left out, and so is a last line that a kill cut short."""
    rows = []
    for row in csv.DictReader(text.splitlines()):
        if None in row or not row.get('epoch'):
            continue
        rows.append({name: float(value) for name, value in row.items() if value not in (None, '')})
    return rows


def _class_rows(text: str) -> list[ClassRow]:
    def number(text: str | None) -> int | None:
        return int(text) if text else None

    return [ClassRow(row['name'] or row['class'], number(row['train_images']), row['shot'] or None,
                     int(row['test_images']), int(row['correct']), number(row.get('predicted')))
            for row in csv.DictReader(text.splitlines())]


def _rows_of_results(results: Mapping[str, Any]) -> list[ClassRow]:
    counted = results.get('per_class') or {}
    correct, total = counted.get('correct') or [], counted.get('total') or []
    predicted = counted.get('predicted') or [None] * len(total)
    return [ClassRow(name, None, None, *numbers) for name, *numbers in
            zip(label_names(len(total)), total, correct, predicted, strict=True)]


def _predictions(place: Path, split: str, results: Mapping[str, Any]) -> tuple[Predictions | None, list[str]]:
    files = [path for name in (f'{split}_predictions.npz', 'predictions.npz') if (path := place / name).is_file()]
    if not files:
        return None, []
    found = Predictions.read(files[0])
    if len(found) != results.get('num_samples'):
        return None, [f'{files[0].name} is of {len(found):,} pictures and {split}.json of another number, so it is '
                      'left out: evaluate again']
    return found, []

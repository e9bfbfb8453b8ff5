"""Evaluation of pictures of several classes: average precision, F1, and the thresholds of the answer."""
import csv
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, Classes, ShotSplit
from nbn_timm.errors import InputError, in_words
from nbn_timm.evaluation.evaluator import ExactSum, refuse_faults, shot_split_of
from nbn_timm.evaluation.predictions import digest_array, read_digest, write_arrays, write_columns
from nbn_timm.evaluation.result import Result
from nbn_timm.evaluation.thresholds import Thresholds
from nbn_timm.files import atomic_write

METRICS = ('loss', 'map', 'map_many', 'map_medium', 'map_few', 'micro_f1', 'macro_f1')


def average_precision(scores: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Average precision of each class, float64 [C] from 0 to 1; NaN for a class that no image is of.

    The mean over the images of a class of the share that are of it among those with no smaller score, as
    `sklearn.metrics.average_precision_score`: without interpolation, and images with the same score count together.

    Args:
        scores: Of the classes, [N, C].
        sets: Label sets, [N, C].
    """
    return drawn_average_precision(scores, sets, np.ones((1, len(sets)), dtype=np.int64))[0]


def drawn_average_precision(scores: np.ndarray, sets: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Average precision as above, with images counted as often as they are drawn.

    Args:
        scores: Of the classes, [N, C].
        sets: Label sets, [N, C].
        draws: How often each image is drawn, int [R, N].

    Returns:
        float64 [R, C]; NaN where no drawn image is of the class.
    """
    found = np.full((len(draws), scores.shape[1]), np.nan)
    for label in np.flatnonzero(sets.any(axis=0)):
        order = np.argsort(-scores[:, label], kind='stable')
        ranked, counted = scores[order, label], draws[:, order]
        members = np.flatnonzero(sets[order, label])
        last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of those with the same score
        ends = np.unique(last[np.searchsorted(last, members)])  # where the recall rises
        seen = np.cumsum(counted, axis=1, dtype=np.int64)[:, ends]
        hits = np.cumsum(counted[:, members], axis=1, dtype=np.int64)[:, np.searchsorted(members, ends, 'right') - 1]
        total = hits[:, -1]
        sums = (np.diff(hits, axis=1, prepend=0) * (hits / np.maximum(seen, 1))).sum(axis=1)
        found[:, label] = np.where(total > 0, sums / np.maximum(total, 1), np.nan)
    return found


@dataclass(frozen=True)
class LabelSetPredictions:
    """What a network says of each of N labelled pictures, in the order of the split.

    Attributes:
        sets: Label sets, uint8 [N, C].
        logits: float32 [N, C].
        digest: Of the pictures, see `Predictions`.
    """

    sets: np.ndarray
    logits: np.ndarray
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def targets(self) -> np.ndarray:
        """What the data set says, the label sets."""
        return self.sets

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Sigmoids of the logits, float64 [N, C]."""
        return torch.from_numpy(self.logits.astype(np.float64)).sigmoid().numpy()

    @property
    def losses(self) -> np.ndarray:
        """Binary cross-entropy of each picture, the mean over the classes, float64 [N]."""
        logits = self.logits.astype(np.float64)
        return (np.logaddexp(0, logits) - logits * self.sets).mean(axis=1)

    @classmethod
    def read(cls, path: str | Path) -> 'LabelSetPredictions':
        """Read what `write` wrote.

        Raises:
            InputError: It is no such file.
        """
        try:
            with np.load(path) as arrays:
                sets, logits, digest = arrays['label_sets'], arrays['logits'], read_digest(arrays)
            if sets.ndim != 2 or sets.shape != logits.shape or not len(sets):
                raise ValueError('label sets and logits are not of the same pictures and classes')
            if not ((sets == 0) | (sets == 1)).all() or not np.isfinite(logits).all():
                raise ValueError('a label or a logit is none')
            return cls(sets.astype(np.uint8), logits.astype(np.float32), digest)
        except Exception as error:  # damaged archives make zipfile, zlib and numpy raise nearly anything
            raise InputError(f"the predictions '{path}' cannot be read ({in_words(error)}): evaluate again with "
                             'nbn-validate --logits-file') from error

    def write(self, path: str | Path) -> None:
        """Write a compressed NumPy file, whole or not at all."""
        write_arrays(path, label_sets=self.sets, logits=self.logits, **digest_array(self.digest))

    def write_table(self, path: str | Path, names: Sequence[str], pictures: Sequence[str], answers: np.ndarray) -> None:
        """Write one row per picture, whole or not at all: path, labels, answer, and the probability of each class.

        Args:
            path: Ends in one of `predictions.FORMATS`; .npz takes what `write` writes.
            names: Of the classes.
            pictures: Their files, [N].
            answers: Sets that are told of them, [N, C].
        """
        if Path(path).suffix.lower() == '.npz':
            self.write(path)
            return
        of_class = np.array(names, dtype=object)

        def told(sets: np.ndarray) -> list[str]:
            return ['; '.join(of_class[row.astype(bool)]) for row in sets]

        probabilities = torch.from_numpy(self.logits).sigmoid().numpy()
        write_columns(path, {'path': list(pictures), 'labels': told(self.sets), 'answer': told(answers),
                             **{f'probability of {name}': probabilities[:, label] for label, name in enumerate(names)}})


@dataclass(frozen=True)
class LabelSetResult(Result):
    """Result of one pass over pictures of several classes.

    Percentages; that of classes without a picture is None, printed as n/a. The mean average precision is over the
    classes that a picture of the split is of.

    Attributes:
        loss: Mean binary cross-entropy per image and class.
        images: That were evaluated.
        average_precision: Of each class, 0 to 1; None where no image is of it.
        per_class_correct, per_class_total, per_class_predicted: Images that are of a class and were told to be; that
            are; that were told to be.
        shot_split: None where the training counts are not known.
        thresholds: In words: from which probability on a class is told.
    """

    loss: float
    images: int
    average_precision: tuple[float | None, ...]
    per_class_correct: tuple[int, ...]
    per_class_total: tuple[int, ...]
    per_class_predicted: tuple[int, ...]
    shot_split: ShotSplit | None
    thresholds: str = ''

    @property
    def num_samples(self) -> int:
        """Evaluated images."""
        return self.images

    def mean_average_precision(self, labels: Iterable[int] | None = None) -> float | None:
        """Of some classes, or of all."""
        chosen = range(len(self.average_precision)) if labels is None else labels
        known = [value for label in chosen if (value := self.average_precision[label]) is not None]
        return 100 * sum(known) / len(known) if known else None

    def f1(self, label: int) -> float | None:
        """Harmonic mean of precision and recall of a class; None if no image is of it or was told to be."""
        images = self.per_class_predicted[label] + self.per_class_total[label]
        return 200 * self.per_class_correct[label] / images if images else None

    @property
    def micro_f1(self) -> float | None:
        """F1 of all classes of all images together."""
        images = sum(self.per_class_predicted) + sum(self.per_class_total)
        return 200 * sum(self.per_class_correct) / images if images else None

    @property
    def macro_f1(self) -> float | None:
        """Mean of the F1 over the classes that an image is of or was told to be of."""
        values = [value for label in range(len(self.per_class_total)) if (value := self.f1(label)) is not None]
        return sum(values) / len(values) if values else None

    def metrics(self) -> dict[str, float | None]:
        """All numbers by name, rounded to 6 decimals."""
        shots = dict(self.shot_split.items()) if self.shot_split is not None else {}
        values = {
            'loss': self.loss, 'map': self.mean_average_precision(),
            **{f'map_{shot}': self.mean_average_precision(shots[shot]) if shot in shots else None
               for shot in ('many', 'medium', 'few')},
            'micro_f1': self.micro_f1, 'macro_f1': self.macro_f1}
        return {name: None if value is None else round(value, 6) for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able: `metrics()`, the sizes of the splits and what was measured of each class."""
        split = self.shot_split
        return {
            **self.metrics(),
            'num_samples': self.images,
            'num_classes': len(self.per_class_total),
            'label_sets': True,
            'splits': None if split is None else {
                'many_above': split.many_above, 'few_below': split.few_below,
                **{name: {'classes': len(labels)} for name, labels in split.items()}},
            'per_class': {
                'average_precision': [None if value is None else round(value, 8) for value in self.average_precision],
                'correct': list(self.per_class_correct), 'total': list(self.per_class_total),
                'predicted': list(self.per_class_predicted)},
        }

    def table(self) -> str:
        """The result as a text table, one row per split with its number of classes."""
        metrics, split = self.metrics(), self.shot_split
        rows: list[tuple[str, str, int | None]] = [('All', 'map', len(self.per_class_total))]
        limits = {} if split is None else {
            'many': f' (>{split.many_above})', 'medium': f' ({split.few_below}-{split.many_above})',
            'few': f' (<{split.few_below})'}
        shots = dict(split.items()) if split is not None else {}
        rows += [(shot.capitalize() + limits.get(shot, ''), f'map_{shot}', len(shots[shot]) if shots else None)
                 for shot in ('many', 'medium', 'few')]
        lines = [f'{"":<20}{"mAP":>10}{"classes":>9}{"images":>9}']
        for row, (label, name, classes) in enumerate(rows):
            sizes = ''.join(f'{"" if size is None else size:>9}' for size in (classes, None if row else self.images))
            lines.append(f'{label:<20}{_shown(metrics[name]):>10}{sizes}'.rstrip())
        return '\n'.join([*lines, f'{"Loss":<20}{self.loss:>10.4f}'])

    def further_table(self) -> str:
        """A second, small table: of the sets that are told."""
        metrics = self.metrics()
        return '\n'.join([f'{"Micro F1":<20}{_shown(metrics["micro_f1"]):>10}',
                          f'{"Macro F1":<20}{_shown(metrics["macro_f1"]):>10}  {self.thresholds}'.rstrip()])

    def write_per_class_csv(self, path: str | Path, class_counts: Classes | None) -> None:
        """Write one row per class, whole or not at all; what is not known is empty."""
        shot_of = {label: name for name, labels in (self.shot_split.items() if self.shot_split else ())
                   for label in labels}

        def write(temporary: Path) -> None:
            with open(temporary, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
                writer = csv.writer(file)
                writer.writerow(['class', 'name', 'train_images', 'shot', 'test_images', 'average_precision', 'correct',
                                 'predicted', 'precision', 'recall', 'f1'])
                for label, total in enumerate(self.per_class_total):
                    correct, predicted = self.per_class_correct[label], self.per_class_predicted[label]
                    precision, value = self.average_precision[label], self.f1(label)
                    rates = [None if precision is None else 100 * precision, correct, predicted,
                             100 * correct / predicted if predicted else None, 100 * correct / total if total else None,
                             value]
                    writer.writerow([
                        label, class_counts.names[label] if class_counts else '',
                        class_counts.counts[label] if class_counts and class_counts.counts else '',
                        shot_of.get(label, ''), total,
                        *('' if rate is None else round(rate, 6) for rate in rates)])

        atomic_write(path, write)


def _shown(value: float | None) -> str:
    return 'n/a' if value is None else f'{value:.2f}'


class LabelSetEvaluator:
    """Keep the logits of all pictures, of which average precision is made, and count what is told of them.

    Counts are integers, the loss is an exact sum and average precision goes by the order of the logits alone, so
    splitting the images over processes or batches does not change the result.

    Args:
        num_classes: C, the length of the model's output.
        class_counts: Training images per class, for the many/medium/few splits; None reports none.
        device: Where the model's output is.
        max_samples: Ignore predictions beyond this many examples (padding of a distributed sampler).
        many: A class with more training images than this is many-shot.
        few: A class with fewer training images than this is few-shot.
        thresholds: From which probability on a class is told.

    Raises:
        InputError: `class_counts` is of another number of classes.
    """

    def __init__(
            self,
            num_classes: int,
            class_counts: Classes | None = None,
            device: torch.device | str | None = None,
            max_samples: int | None = None,
            many: int = MANY_ABOVE,
            few: int = FEW_BELOW,
            thresholds: Thresholds | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.shot_split = shot_split_of(class_counts, num_classes, many, few)
        self.device = device
        self.max_samples = max_samples
        self.thresholds = thresholds or Thresholds.fixed()
        self.reset()

    def reset(self) -> None:
        """Forget everything seen so far."""
        self.num_samples = 0
        self.kept_logits: list[torch.Tensor] = []
        self.kept_sets: list[torch.Tensor] = []
        self.losses = ExactSum(self.device)

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around calls of the model; nothing is looked at."""
        return nullcontext()

    def predict(self, model: nn.Module, images: torch.Tensor) -> Any:
        """What `update` takes, from a model in eval mode."""
        return model(images)

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits [B, C] of any floating type, label sets [B, C]; more logits than sets are padding.

        Raises:
            InputError: The output is not [B, C], or the targets are no label sets of these classes.
        """
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[1] != self.num_classes:
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise InputError(f'the model returned {shape} where logits [batch, {self.num_classes}] were expected: '
                             'check --model and --num-classes')
        if target.ndim != 2 or target.shape[1] != self.num_classes:
            raise InputError(f'the targets are {list(target.shape)} where label sets [batch, {self.num_classes}] were '
                             'expected: give data whose images can be of several classes, with these classes')
        if self.max_samples is not None:
            target = target[:max(0, self.max_samples - self.num_samples)]
        output = output[:len(target)].float()
        self.num_samples += len(output)
        self.losses.add(F.binary_cross_entropy_with_logits(output, target.float(), reduction='none').flatten())
        self.kept_logits.append(output.cpu())
        self.kept_sets.append(target.to(torch.uint8).cpu())

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, C] and label sets [N, C] of this process's images, on the CPU."""
        empty = torch.zeros(0, self.num_classes)
        return torch.cat([empty, *self.kept_logits]), torch.cat([empty.to(torch.uint8), *self.kept_sets])

    def predictions(self) -> LabelSetPredictions:
        """What was said of this process's images."""
        logits, sets = self.logits()
        return LabelSetPredictions(sets.numpy(), logits.numpy())

    def compute(self, distributed: bool = False) -> LabelSetResult:
        """Return the result over everything seen, of all processes if `distributed`.

        Raises:
            InputError: No image was seen, or a logit was not finite.
        """
        logits, sets = (part.numpy() for part in self.logits())
        losses = self.losses.parts.clone()
        if distributed:
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, (logits, sets))
            logits, sets = (np.concatenate(parts) for parts in zip(*found, strict=True))
            dist.all_reduce(losses)
        refuse_faults(int((~np.isfinite(logits).all(axis=1)).sum()), 0, len(logits), self.num_classes)
        told = self.thresholds.answers(logits)
        precisions = [None if np.isnan(value) else float(value) for value in average_precision(logits, sets)]
        counts = (part.sum(axis=0, dtype=np.int64).tolist() for part in (told & sets, sets, told))
        correct, total, predicted = map(tuple, counts)
        return LabelSetResult(
            ExactSum.mean(losses.tolist(), logits.size), len(logits), tuple(precisions), correct, total, predicted,
            self.shot_split, self.thresholds.in_words())

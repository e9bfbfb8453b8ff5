"""What an evaluation found: numbers, a table for people, and files."""
import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbn_timm.data.classes import ClassCounts, ShotSplit
from nbn_timm.evaluation.calibration import Calibration
from nbn_timm.files import atomic_write, write_text_atomic
from nbn_timm.seals import sealed

METRICS = ('top1', 'top5', 'mean_class', 'many', 'medium', 'few', 'loss')  # headline numbers
FURTHER_METRICS = ('macro_f1', 'harmonic_mean', 'worst_class', 'nll', 'brier', 'ece', 'ece_many', 'ece_medium',
                   'ece_few')
LOWER_IS_BETTER = frozenset({'loss', 'nll', 'brier', 'ece', 'ece_many', 'ece_medium', 'ece_few'})


class Result(ABC):
    """What every evaluation gives, whatever its targets are."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Evaluated images."""

    @abstractmethod
    def metrics(self) -> dict[str, float | None]:
        """All numbers by name."""

    def headline(self) -> dict[str, float | None]:
        """Those of `metrics()` that one line has room for."""
        return self.metrics()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""

    @abstractmethod
    def table(self) -> str:
        """The result as a text table."""

    @abstractmethod
    def further_table(self) -> str:
        """A second, small table."""

    @abstractmethod
    def write_per_class_csv(self, path: str | Path, class_counts: ClassCounts | None) -> None:
        """Write one row per class, whole or not at all."""

    def write_json(self, path: str | Path, **about: Any) -> None:
        """Write the entries of `about`, which say what was evaluated, and `to_dict()`; whole or not at all."""
        write_text_atomic(path, json.dumps(sealed({**about, **self.to_dict()}), indent=2) + '\n')


@dataclass(frozen=True)
class EvalResult(Result):
    """Result of one pass over an evaluation set.

    The per-class counts are what was measured; every top-1 accuracy is derived from them. Accuracies are percentages;
    the accuracy of a split without an image is None, printed as n/a. Inside a split the mean is taken over images,
    which on a balanced test set is the mean over its classes as well.
    """

    loss: float  # mean cross-entropy per image
    top5: float  # 100 if there are at most 5 classes
    per_class_correct: tuple[int, ...]  # top-1 hits, index = label
    per_class_total: tuple[int, ...]  # evaluated images, index = label
    shot_split: ShotSplit | None  # None: the training counts are not known
    per_class_predicted: tuple[int, ...] | None = field(default=None, kw_only=True)  # images that were told to be of it
    brier: float | None = field(default=None, kw_only=True)  # 0 to 2, mean over images
    calibration: Mapping[str, Calibration] = field(default_factory=dict, kw_only=True)  # by shot; 'all' without shots

    @property
    def num_samples(self) -> int:
        """Evaluated images, without the padding of a distributed sampler."""
        return sum(self.per_class_total)

    @property
    def top1(self) -> float:
        """Accuracy over all images."""
        return 100 * sum(self.per_class_correct) / self.num_samples

    @property
    def mean_class(self) -> float:
        """Mean of the per-class recalls, over the classes that the evaluation set contains."""
        recalls = self._recalls()
        return sum(recalls) / len(recalls)

    @property
    def many(self) -> float | None:
        """Accuracy over the images of the many-shot classes."""
        return None if self.shot_split is None else self._accuracy(self.shot_split.many)

    @property
    def medium(self) -> float | None:
        """Accuracy over the images of the medium-shot classes."""
        return None if self.shot_split is None else self._accuracy(self.shot_split.medium)

    @property
    def few(self) -> float | None:
        """Accuracy over the images of the few-shot classes."""
        return None if self.shot_split is None else self._accuracy(self.shot_split.few)

    @property
    def harmonic_mean(self) -> float:
        """Harmonic mean of the per-class recalls; 0 if one of them is."""
        recalls = self._recalls()
        return len(recalls) / sum(1 / recall for recall in recalls) if all(recalls) else 0.0

    @property
    def worst_class(self) -> float:
        """The lowest recall of a class."""
        return min(self._recalls())

    def precision(self, label: int) -> float | None:
        """Percentage of the images that were told to be of a class and are; None if there is none."""
        predicted = None if self.per_class_predicted is None else self.per_class_predicted[label]
        return 100 * self.per_class_correct[label] / predicted if predicted else None

    def f1(self, label: int) -> float | None:
        """Harmonic mean of precision and recall of a class; None if no image is of it or was told to be."""
        if self.per_class_predicted is None:
            return None
        images = self.per_class_predicted[label] + self.per_class_total[label]
        return 200 * self.per_class_correct[label] / images if images else None

    @property
    def macro_f1(self) -> float | None:
        """Mean of the F1 over the classes that the evaluation set contains or that were predicted."""
        values = [value for label in range(len(self.per_class_total)) if (value := self.f1(label)) is not None]
        return sum(values) / len(values) if values else None

    def calibration_error(self, shot: str | None = None) -> float | None:
        """Expected calibration error in percentage points, over all images or those of the classes of a shot."""
        if shot is not None:
            return self.calibration[shot].error if shot in self.calibration else None
        return Calibration.together(self.calibration.values()).error if self.calibration else None

    def metrics(self) -> dict[str, float | None]:
        """All numbers by name, rounded to 6 decimals: below that the order of summation would show."""
        values = {
            'loss': self.loss, 'top1': self.top1, 'top5': self.top5, 'mean_class': self.mean_class,
            'many': self.many, 'medium': self.medium, 'few': self.few,
            'macro_f1': self.macro_f1, 'harmonic_mean': self.harmonic_mean, 'worst_class': self.worst_class,
            'nll': self.loss, 'brier': self.brier, 'ece': self.calibration_error(),
            **{f'ece_{shot}': self.calibration_error(shot) for shot in ('many', 'medium', 'few')},
        }
        return {name: None if value is None else round(value, 6) for name, value in values.items()}

    def headline(self) -> dict[str, float | None]:
        """Those of `metrics()` that one line has room for."""
        return {name: value for name, value in self.metrics().items() if name not in FURTHER_METRICS}

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able: `metrics()`, the sizes of the splits and the per-class counts."""
        split = self.shot_split
        return {
            **self.metrics(),
            'num_samples': self.num_samples,
            'num_classes': len(self.per_class_total),
            'splits': None if split is None else {
                'many_above': split.many_above,
                'few_below': split.few_below,
                **{name: {'classes': len(labels), 'images': self._images(labels)} for name, labels in split.items()},
            },
            'per_class': {
                'correct': list(self.per_class_correct), 'total': list(self.per_class_total),
                **({} if self.per_class_predicted is None else {'predicted': list(self.per_class_predicted)})},
        }

    def table(self) -> str:
        """The result as a text table, one row per split with its number of classes and evaluated images."""
        rows: list[tuple[str, float | None, int | None, int | None]] = [
            ('All', self.top1, len(self.per_class_total), self.num_samples)]
        for label, accuracy, classes in self._shot_rows():
            rows.append((label, accuracy, *((None, None) if classes is None else
                                            (len(classes), self._images(classes)))))
        rows.append(('Mean class', self.mean_class, sum(total > 0 for total in self.per_class_total), None))
        rows.append(('Top-5', self.top5, None, None))
        lines = [f'{"":<20}{"accuracy":>10}{"classes":>9}{"images":>9}']
        for label, accuracy, num_classes, images in rows:
            shown = 'n/a' if accuracy is None else f'{accuracy:.2f}'
            sizes = ''.join(f'{"" if size is None else size:>9}' for size in (num_classes, images))
            lines.append(f'{label:<20}{shown:>10}{sizes}'.rstrip())
        return '\n'.join([*lines, f'{"Loss":<20}{self.loss:>10.4f}'])

    def further_table(self) -> str:
        """A second, small table: what accuracy does not say."""
        metrics = self.metrics()

        def shown(name: str, decimals: int = 2) -> str:
            value = metrics[name]
            return 'n/a' if value is None else f'{value:.{decimals}f}'

        ece = ''.join(f'{shown(name):>9}' for name in ('ece_many', 'ece_medium', 'ece_few'))
        return '\n'.join([
            f'{"":<20}{"all":>10}{"many":>9}{"medium":>9}{"few":>9}',
            f'{"Calibration error":<20}{shown("ece"):>10}{ece}',
            f'{"Macro F1":<20}{shown("macro_f1"):>10}',
            f'{"Harmonic mean":<20}{shown("harmonic_mean"):>10}',
            f'{"Worst class":<20}{shown("worst_class"):>10}',
            f'{"NLL":<20}{shown("nll", 4):>10}',
            f'{"Brier":<20}{shown("brier", 4):>10}'])

    def write_per_class_csv(self, path: str | Path, class_counts: ClassCounts | None) -> None:
        """Write one row per class, whole or not at all; what is not known (accuracy without test images) is empty."""
        splits = self.shot_split.items() if self.shot_split is not None else ()
        shot_of = {label: name for name, labels in splits for label in labels}

        def write(temporary: Path) -> None:
            with open(temporary, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
                writer = csv.writer(file)
                writer.writerow(['class', 'name', 'train_images', 'shot', 'test_images', 'correct', 'accuracy',
                                 'predicted', 'precision', 'f1'])
                for label, (correct, total) in enumerate(
                        zip(self.per_class_correct, self.per_class_total, strict=True)):
                    name = class_counts.names[label] if class_counts else ''
                    count = class_counts.counts[label] if class_counts and class_counts.counts else ''
                    accuracy = round(100 * correct / total, 6) if total else ''
                    predicted = '' if self.per_class_predicted is None else self.per_class_predicted[label]
                    rates = ('' if rate is None else round(rate, 6) for rate in (self.precision(label), self.f1(label)))
                    writer.writerow([label, name, count, shot_of.get(label, ''), total, correct, accuracy, predicted,
                                     *rates])

        atomic_write(path, write)

    def _recalls(self) -> list[float]:
        """Of the classes that the evaluation set contains."""
        return [100 * correct / total
                for correct, total in zip(self.per_class_correct, self.per_class_total, strict=True) if total]

    def _images(self, labels: Iterable[int]) -> int:
        return sum(self.per_class_total[label] for label in labels)

    def _accuracy(self, labels: Iterable[int]) -> float | None:
        labels = list(labels)
        total = self._images(labels)
        return 100 * sum(self.per_class_correct[label] for label in labels) / total if total else None

    def _shot_rows(self) -> list[tuple[str, float | None, tuple[int, ...] | None]]:
        split = self.shot_split
        if split is None:
            return [('Many', None, None), ('Medium', None, None), ('Few', None, None)]
        return [
            (f'Many (>{split.many_above})', self.many, split.many),
            (f'Medium ({split.few_below}-{split.many_above})', self.medium, split.medium),
            (f'Few (<{split.few_below})', self.few, split.few),
        ]


def no_metrics() -> dict[str, float | None]:
    """The names of `EvalResult.metrics`, without values, for an epoch that was not evaluated."""
    return dict.fromkeys(EvalResult(0.0, 0.0, (1,), (1,), None).metrics())

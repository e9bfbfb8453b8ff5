"""What a network says of each labelled picture: small enough to keep, and enough for a report.

The logits of 50,000 pictures of 1,000 classes take 200 MB; the five likeliest classes and their probabilities take two.
"""
import csv
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import nn

from nbn_timm.data.lists import MAX_CLASSES
from nbn_timm.errors import InputError, in_words, quoted
from nbn_timm.evaluation.calibration import Calibration
from nbn_timm.files import atomic_write
from nbn_timm.layers import ExpertHead

TOP = 5  # classes that are kept of a picture
FORMATS = ('.csv', '.parquet', '.npz')

_ARRAYS = {'labels', 'top5', 'probabilities', 'confidence', 'label_log_probability', 'feature_length', 'digest'}


@dataclass(frozen=True)
class Predictions:
    """What a network says of each of N labelled pictures, in the order of the split.

    Attributes:
        labels: [N], int64.
        top: [N, K], int64: the K = 5 likeliest classes (all if there are fewer), the likeliest first.
        probabilities: Theirs, [N, K], float32; of files of earlier versions [N, 1].
        label_log_probability: Natural logarithm of the probability of the label, [N], float32.
        feature_length: Length of the vector that the classifier is given, [N], float32; None where there is no single
            one, as with several experts.
        digest: Of the pictures, by which two evaluations of the same ones know each other, see
            `nbn_timm.data.dataset.pictures_digest`; None where it is not known.
    """

    labels: np.ndarray
    top: np.ndarray
    probabilities: np.ndarray
    label_log_probability: np.ndarray
    feature_length: np.ndarray | None = None
    digest: str | None = None

    @classmethod
    def of_logits(cls, logits: torch.Tensor, labels: torch.Tensor, feature_length: torch.Tensor | None = None
                  ) -> 'Predictions':
        """Those of logits [N, C] and labels [N]; classes with the same logit are ranked by label."""
        logits = logits.float()
        top = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        return cls(
            labels.cpu().numpy(), top.cpu().numpy(), logits.softmax(dim=1).gather(1, top).cpu().numpy(),
            logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0].cpu().numpy(),
            None if feature_length is None else feature_length.float().cpu().numpy())

    @classmethod
    def concatenate(cls, parts: Sequence['Predictions']) -> 'Predictions':
        """Those of all the pictures of some."""
        lengths = [part.feature_length for part in parts if part.feature_length is not None]
        columns: Any = {name: np.concatenate([getattr(part, name) for part in parts])
                        for name in ('labels', 'top', 'probabilities', 'label_log_probability')}
        return cls(**columns, feature_length=np.concatenate(lengths) if len(lengths) == len(parts) else None)

    @classmethod
    def in_order(cls, of_processes: Sequence['Predictions'], in_turn: bool = True) -> 'Predictions':
        """Those of all processes, by rank, in the order of the split; see `order_of_split`."""
        order = order_of_split([len(part) for part in of_processes], in_turn)
        return cls.concatenate(of_processes)[order]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: np.ndarray) -> 'Predictions':
        lengths = None if self.feature_length is None else self.feature_length[chosen]
        return Predictions(self.labels[chosen], self.top[chosen], self.probabilities[chosen],
                           self.label_log_probability[chosen], lengths)

    @property
    def targets(self) -> np.ndarray:
        """What the data set says, the labels."""
        return self.labels

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class, [N]."""
        return self.top[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        """Its probability, [N]."""
        return self.probabilities[:, 0]

    @property
    def correct(self) -> np.ndarray:
        """Whether it is the label, [N]."""
        return self.top[:, 0] == self.labels

    def calibration(self, chosen: np.ndarray | None = None) -> Calibration:
        """Of all pictures, or of those where `chosen` [N] is true."""
        where: Any = slice(None) if chosen is None else chosen
        return Calibration.of(self.confidence[where], self.correct[where])

    def write(self, path: str | Path) -> None:
        """Write a compressed NumPy file, whole or not at all."""
        kind = np.uint16 if max(self.labels.max(), self.top.max()) < 2 ** 16 else np.int32
        arrays = {'labels': self.labels.astype(kind), 'top5': self.top.astype(kind),
                  'probabilities': self.probabilities, 'label_log_probability': self.label_log_probability}
        if self.feature_length is not None:
            arrays['feature_length'] = self.feature_length
        write_arrays(path, **arrays, **digest_array(self.digest))

    @classmethod
    def read(cls, path: str | Path) -> 'Predictions':
        """Read what `write` wrote, or an earlier version, which kept the confidence alone.

        Raises:
            InputError: It is no such file.
        """
        try:
            with np.load(path) as arrays:
                if unknown := sorted(set(arrays) - _ARRAYS):
                    raise ValueError(f'it has {quoted(unknown[0])}, which is none of its arrays')
                probabilities = (arrays['probabilities'] if 'probabilities' in arrays else
                                 arrays['confidence'][:, None])
                found = cls(arrays['labels'].astype(np.int64), arrays['top5'].astype(np.int64),
                            probabilities.astype(np.float32), arrays['label_log_probability'].astype(np.float32),
                            arrays['feature_length'] if 'feature_length' in arrays else None, read_digest(arrays))
                if fault := _of_labels(arrays['labels'], arrays['top5']) or found._fault():
                    raise ValueError(fault)
        except Exception as error:  # damaged archives make zipfile, zlib and numpy raise nearly anything
            reason = in_words(error)
            raise InputError(f"the predictions '{path}' cannot be read ({reason}): evaluate again with nbn-validate "
                             '--save-predictions') from error
        return found

    def _fault(self) -> str | None:
        """What no evaluation gives, None if there is nothing of the kind."""
        arrays = (array for array in vars(self).values() if isinstance(array, np.ndarray))
        if len({len(array) for array in arrays}) != 1 or not len(self):
            return 'its arrays have different lengths'
        if self.labels.ndim != 1 or self.top.ndim != 2 or self.label_log_probability.ndim != 1 or (
                self.probabilities.ndim != 2 or self.probabilities.shape[1] not in (1, self.top.shape[1])):
            return 'its arrays have other dimensions'
        if self.feature_length is not None and (self.feature_length.ndim != 1 or not (self.feature_length >= 0).all()):
            return 'the length of a vector is none'
        # NaN is in no range.
        whole = ((self.probabilities >= 0) & (self.probabilities <= 1.001)).all() and (
            self.label_log_probability <= 0.001).all()
        return None if whole else 'a probability is none'


def _of_labels(*labels: np.ndarray) -> str | None:
    """What labels in a file cannot be."""
    wrong = any(array.dtype.kind not in 'iu' or (array.size and not 0 <= array.min() <= array.max() < MAX_CLASSES)
                for array in labels)
    return 'a label is none' if wrong else None


def order_of_split(numbers: Sequence[int], in_turn: bool = True) -> np.ndarray:
    """Where the pictures of a split are among those of all processes, one after the other.

    Args:
        numbers: Of pictures, by process.
        in_turn: Process r of P has the pictures r, r + P, r + 2 P, ...; else, as of a stream, the r-th part.
    """
    if not in_turn:
        return np.arange(sum(numbers))
    place = np.concatenate([np.arange(number) * len(numbers) + rank for rank, number in enumerate(numbers)])
    return place.argsort(kind='stable')


def digest_array(digest: str | None) -> dict[str, np.ndarray]:
    """A digest in hexadecimal as an array of a file, if there is one."""
    return {} if digest is None else {'digest': np.frombuffer(bytes.fromhex(digest), np.uint8)}


def read_digest(arrays: Mapping[str, np.ndarray]) -> str | None:
    """What `digest_array` put into a file; None of those of earlier versions.

    Raises:
        ValueError: It is no digest.
    """
    if 'digest' not in arrays:
        return None
    if arrays['digest'].dtype != np.uint8 or arrays['digest'].shape != (32,):
        raise ValueError('the digest of its pictures is none')
    return arrays['digest'].tobytes().hex()


def write_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    """Write a compressed NumPy file, whole or not at all."""
    def write(temporary: Path) -> None:
        with open(temporary, 'wb') as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    atomic_write(path, write)


class FeatureLengths:
    """Lengths of the vectors that the classifier of a model is given, batch by batch.

    Attributes:
        last: Of the last batch, [B]; None where the model has no single classifier of vectors.
    """

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look on while the body runs the model."""
        get_classifier: Any = getattr(unwrap_model(model), 'get_classifier', None)
        classifier = get_classifier() if get_classifier is not None else None
        if not isinstance(classifier, nn.Module) or isinstance(classifier, ExpertHead | nn.Identity | nn.ModuleList):
            yield
            return
        hook = classifier.register_forward_pre_hook(self._see)
        try:
            yield
        finally:
            hook.remove()
            self.last = None

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        features = inputs[0] if inputs else None
        vectors = isinstance(features, torch.Tensor) and (features.ndim == 2 or features.shape[2:] == (1, 1))
        self.last = features.float().flatten(1).norm(dim=1) if vectors else None  # type: ignore[union-attr]


# Tables for people and their programs -------------------------------------------------------------------------------

def check_format(path: str | None) -> None:
    """Refuse a file that `write_predictions` could not write, before any work is done.

    Raises:
        InputError: Its name ends in none of `FORMATS`, or the library that it needs is missing.
    """
    if path is None:
        return
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"--save-predictions '{path}' ends in none of {', '.join(FORMATS)}: give a name that does")
    if suffix == '.parquet':
        _parquet()


def write_predictions(
        path: str | Path,
        predictions: Predictions,
        names: Sequence[str],
        pictures: Sequence[str],
) -> None:
    """Write one row per picture, in the order of the split, whole or not at all.

    Columns: path, label, top1 to top5, probability1 to probability5, label_probability. A name that ends in .npz takes
    what `Predictions.write` writes.

    Args:
        path: Ends in one of `FORMATS`.
        predictions: Of N pictures.
        names: Of the classes.
        pictures: Of the pictures, [N]: their files.

    Raises:
        InputError: The file system refused, or a library is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix == '.npz':
        predictions.write(path)
        return
    of_class = np.array(names, dtype=object)
    count = predictions.probabilities.shape[1]
    columns: dict[str, Any] = {'path': list(pictures), 'label': of_class[predictions.labels].tolist()}
    columns |= {f'top{rank + 1}': of_class[predictions.top[:, rank]].tolist() for rank in range(count)}
    columns |= {f'probability{rank + 1}': predictions.probabilities[:, rank] for rank in range(count)}
    columns['label_probability'] = np.exp(predictions.label_log_probability)
    write_columns(path, columns)


def write_columns(path: str | Path, columns: dict[str, Any]) -> None:
    """Write a table, whole or not at all: lists of text and arrays of numbers by column, all of one length.

    Args:
        path: Ends in .parquet, or in anything else for CSV.
        columns: By name.

    Raises:
        InputError: The file system refused, or a library is missing.
    """
    suffix = Path(path).suffix.lower()
    atomic_write(path, lambda file: (_write_parquet if suffix == '.parquet' else _write_csv)(file, columns))


def _write_csv(path: Path, columns: dict[str, Any]) -> None:
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column if isinstance(column, list) else column.tolist() for column in columns.values()),
                             strict=True))


def _write_parquet(path: Path, columns: dict[str, Any]) -> None:
    arrow, parquet = _parquet()
    parquet.write_table(arrow.table({
        name: [text.encode('utf-8', 'backslashreplace').decode() for text in column] if isinstance(column, list)
        else column for name, column in columns.items()}), path)


def _parquet() -> tuple[Any, Any]:
    try:
        return importlib.import_module('pyarrow'), importlib.import_module('pyarrow.parquet')
    except ImportError as error:
        raise InputError("a .parquet file needs pyarrow, which is not installed: pip install 'nbn_timm[parquet]', or "
                         'give a name that ends in .csv') from error

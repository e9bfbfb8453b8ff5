"""Heads side by side on images that they were not trained on."""
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nbn_timm.data import Classes
from nbn_timm.data.splits import SHOT_LIMITS
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult, LongTailEvaluator
from nbn_timm.probe.features import Features
from nbn_timm.probe.heads import TAUS, Head, TrainedHead, adjusted, fit_head, head_logits
from nbn_timm.probe.methods import HeadMethod, head_method
from nbn_timm.probe.settings import HeadSettings

_COLUMNS = (('top1', 'all'), ('many', 'many'), ('medium', 'medium'), ('few', 'few'), ('mean_class', 'mean class'))


@dataclass(frozen=True)
class ComparedHead:
    """A head and what it reached on the validation.

    Attributes:
        name: See `head_method`.
        result: On the validation images, or on all folds together.
        tau: Strength of its adjustment, chosen there; None without one.
        seconds: That its training took, with all folds.
        head: Trained on all training images and folded.
        method: How it was trained.
    """

    name: str
    result: EvalResult
    tau: float | None
    seconds: float
    head: Head
    method: HeadMethod

    @property
    def described(self) -> str:
        """Its name and what was chosen of it."""
        return self.name if self.tau is None else f'{self.name} (tau {self.tau:g})'


@dataclass(frozen=True)
class Comparison:
    """Heads that were judged alike.

    Attributes:
        heads: In the order in which they were asked for.
        left_out: Those that could not be had, each with the reason.
        metric: By which `best` is.
    """

    heads: tuple[ComparedHead, ...]
    left_out: dict[str, str]
    metric: str

    @property
    def best(self) -> ComparedHead:
        """The best by the metric; of equal ones the first."""
        values = {one.name: one.result.metrics()[self.metric] for one in self.heads}
        if None in values.values():
            raise InputError(f"there is no image to measure '{self.metric}' on: choose by another --eval-metric")
        sign = 1 if self.metric == 'loss' else -1
        return min(self.heads, key=lambda one: sign * (values[one.name] or 0.0))

    def find(self, name: str) -> ComparedHead:
        """The head of that name.

        Raises:
            InputError: It is not among them.
        """
        found = next((one for one in self.heads if one.name == name), None)
        if found is None:
            reason = self.left_out.get(name)
            raise InputError(f"there is no head '{name}' to keep ({reason})" if reason else
                             f"--keep '{name}' is none of the heads ({', '.join(one.name for one in self.heads)}): "
                             'give one of them, or add it to --heads')
        return found

    def table(self) -> str:
        """For people: accuracies in per cent, one row per head."""
        width = max(len(one.described) for one in self.heads) + 2
        lines = [f'{"":<{width}}' + ''.join(f'{title:>12}' for _, title in _COLUMNS) + f'{"seconds":>10}']
        for one in self.heads:
            metrics = one.result.metrics()
            shown = ('n/a' if (value := metrics[name]) is None else f'{value:.2f}' for name, _ in _COLUMNS)
            lines.append(f'{one.described:<{width}}' + ''.join(f'{value:>12}' for value in shown)
                         + f'{one.seconds:>10.1f}')
        return '\n'.join(lines)


def compare_heads(
        names: Sequence[str],
        train: Features,
        val: Features | None,
        classes: Classes,
        settings: HeadSettings | None = None,
        *,
        metric: str = 'mean_class',
        shot_limits: tuple[int, int] = SHOT_LIMITS,
        seed: int = 42,
        tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Train heads and judge them on validation images, or without these by cross-validation of the training images.

    An adjustment's strength is the one of `TAUS` that is best there, which makes it look a little better than it is.

    Args:
        names: See `head_method`.
        train: Features of the training images.
        val: Of validation images; None splits the training images into `settings.folds`.
        classes: With the training images per class.
        settings: Of the training.
        metric: Of `EvalResult.metrics`, by which to choose.
        shot_limits: Of many and few, see `ClassCounts.shot_split`.
        seed: Of the trainings and of the folds.
        tell: Takes a line about a head that is left out.

    Returns:
        The heads, each trained on all training images.

    Raises:
        InputError: A name is unknown, or no head can be had.
    """
    settings = settings or HeadSettings()
    methods = {name: head_method(name) for name in names}
    parts = parts_of(train, val, settings.folds, seed)
    trained: dict[object, tuple[list[TrainedHead], float]] = {}
    found: list[ComparedHead] = []
    left_out: dict[str, str] = {}
    for name, method in methods.items():
        try:
            if method.training not in trained:
                begun = time.perf_counter()
                of_parts = [fit_head(part, classes, method, settings, seed) for part, _ in parts]
                on_all = of_parts[0] if val is not None else fit_head(train, classes, method, settings, seed)
                trained[method.training] = [*of_parts, on_all], time.perf_counter() - begun
            heads, seconds = trained[method.training]
            tau, result = _judged(method, heads, [held for _, held in parts], classes, metric, shot_limits)
            found.append(ComparedHead(name, result, tau, seconds, adjusted(heads[-1], method, classes, tau), method))
        except InputError as error:
            left_out[name] = str(error)
            if tell is not None:
                tell(f"The head '{name}' is left out: {error}.")
    if not found:
        raise InputError(f'no head can be had: {next(iter(left_out.values()), "give some with --heads")}')
    return Comparison(tuple(found), left_out, metric)


def parts_of(train: Features, val: Features | None, folds: int, seed: int = 42) -> list[tuple[Features, Features]]:
    """What heads are trained on and what they are judged on: the validation, or without it each fold in turn."""
    if val is not None:
        return [(train, val)]
    return [(train.select(torch.from_numpy(rest)), train.select(torch.from_numpy(held)))
            for rest, held in fold_indices(train.labels.cpu().numpy(), folds, seed)]


def _judged(
        method: HeadMethod,
        heads: Sequence[TrainedHead],
        held: Sequence[Features | None],
        classes: Classes,
        metric: str,
        shot_limits: tuple[int, int],
) -> tuple[float | None, EvalResult]:
    """The best strength of the method's adjustment, None if it has none, and the result with it."""
    results: dict[float | None, EvalResult] = {}
    for tau in (TAUS if method.adjust else (None,)):
        evaluator = LongTailEvaluator(classes.num_classes, classes, heads[0].mean.device, None, *shot_limits)
        for head, part in zip(heads, held, strict=False):  # the last head is the one of all images
            assert part is not None
            evaluator.update(head_logits(adjusted(head, method, classes, tau), part.plain), part.labels)
        results[tau] = evaluator.compute()
    sign = 1 if metric == 'loss' else -1
    best = min(results, key=lambda tau: sign * (results[tau].metrics()[metric] or 0.0))
    return best, results[best]


def fold_indices(labels: np.ndarray, folds: int, seed: int = 42) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of a training set of which each is held out once: indices of the rest and of the part.

    Each class is dealt out evenly, so that the rest has all classes. The image of a class that has one is never held
    out.

    Args:
        labels: int64 [N].
        folds: Their number.
        seed: Of who is dealt to whom.

    Raises:
        InputError: No class has two images.
    """
    rng = np.random.default_rng(seed)
    fold, begin = np.full(len(labels), -1), 0
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        if len(own) > 1:
            fold[own] = (begin + np.arange(len(own))) % folds
            begin += len(own)
    if begin == 0:
        raise InputError('no class has two training images, so none can be held out to choose a head by: give '
                         'validation images, or one head with --heads')
    for number in range(folds):
        if (fold == number).any():
            yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)

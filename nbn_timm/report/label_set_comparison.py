"""What one run has over another where a picture can be of several classes."""
from typing import Any

import numpy as np

from nbn_timm.evaluation.label_sets import drawn_average_precision
from nbn_timm.report.bootstrap import draws_of, percentile_interval
from nbn_timm.report.difference import Difference, Row, class_changes, interval_table
from nbn_timm.report.label_sets import names
from nbn_timm.report.pictures import PICTURES, Gallery, Shown
from nbn_timm.report.run import SHOTS, FinishedRun

RESAMPLES = 1000  # each ranks the pictures of all classes


def difference(first: FinishedRun, run: FinishedRun, dataset: Any) -> Difference:
    """What `run` has over `first`, on the same pictures."""
    assert run.label_sets is not None and first.label_sets is not None
    sets, gallery = run.label_sets.sets, Gallery(dataset, run.label_sets.sets)
    before, after = (np.array([np.nan if row.average_precision is None else row.average_precision
                               for row in one.classes]) for one in (first, run))
    right_before, right_after = ((one.told_sets == sets).all(axis=1) for one in (first, run))

    def pictures(chosen: np.ndarray, gain: np.ndarray) -> list[Shown]:
        indices = np.flatnonzero(chosen)
        indices = indices[np.argsort(-gain[indices], kind='stable')][:PICTURES]
        return [Shown(gallery.uri(index), gallery.name(index), [
            f'is: {names(run, sets[index])}', f'{first.name}: {names(run, first.told_sets[index])}',
            f'{run.name}: {names(run, run.told_sets[index])}']) for index in indices.tolist()]

    gain = first.label_sets.losses - run.label_sets.losses
    gained, lost, figure = class_changes(first, run, before, after, 'average precision')
    return Difference(
        run.name, interval_table(intervals(first, run)), RESAMPLES, 'test pictures', 'average precision',
        gained, lost, figure, 'tells all labels of these right', pictures(right_after & ~right_before, gain),
        pictures(right_before & ~right_after, -gain))


def intervals(first: FinishedRun, run: FinishedRun, resamples: int = RESAMPLES) -> list[Row]:
    """Mean average precision over all classes and by shot, and F1 at the thresholds, of `run` less `first`.

    Pictures are drawn, and each draw is judged as an evaluation is: over the classes that a drawn picture is of.
    """
    assert run.label_sets is not None
    groups = {'mAP': np.arange(len(run.classes))}
    if (shots := run.shot_of_class) is not None:
        groups |= {f'mAP {shot}': np.flatnonzero(shots == number) for number, shot in enumerate(SHOTS)}
    groups = {name: labels for name, labels in groups.items() if run.label_sets.sets[:, labels].any()}
    number = len(run.label_sets)
    whole = _judged(first, run, np.ones((1, number), dtype=np.int64), groups)
    drawn = [_judged(first, run, draws, groups) for draws in draws_of(number, resamples)]
    return [(name, number, 'pictures', percentile_interval(
        float(whole[name][0]), np.concatenate([block[name] for block in drawn]))) for name in whole]


def _judged(
        first: FinishedRun,
        run: FinishedRun,
        draws: np.ndarray,
        groups: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Differences [R] in points, for pictures that are drawn so often, int [R, N]."""
    (precision_before, f1_before), (precision_after, f1_after) = (_of_classes(one, draws) for one in (first, run))
    change = precision_after - precision_before
    found = {name: _mean(change[:, labels]) for name, labels in groups.items()}
    micro = [_f1(*(part.sum(axis=1) for part in counts)) for counts in (f1_after, f1_before)]
    macro = [_mean(_f1(*counts)) for counts in (f1_after, f1_before)]
    return {**found, 'Micro F1': micro[0] - micro[1], 'Macro F1': macro[0] - macro[1]}


def _of_classes(run: FinishedRun, draws: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Average precision [R, C] in percent; hits, and pictures that are of a class and that are told to be, [R, C]."""
    assert run.label_sets is not None
    sets, told = run.label_sets.sets.astype(np.float64), run.told_sets.astype(np.float64)
    counted = draws.astype(np.float64)
    return (100 * drawn_average_precision(run.label_sets.logits, run.label_sets.sets, draws),
            (counted @ (sets * told), counted @ (sets + told)))


def _f1(correct: np.ndarray, images: np.ndarray) -> np.ndarray:
    """In percent; NaN of a class that no picture is of or is told to be."""
    return np.where(images > 0, 200 * correct / np.maximum(images, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Of each row, over what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    return np.where(known.any(axis=1), np.nansum(values, axis=1) / np.maximum(known.sum(axis=1), 1), np.nan)

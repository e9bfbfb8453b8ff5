"""The page that compares several runs, each with the first."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from nbn_timm.pages import Number, Table, can_draw, how_to_draw, write_page
from nbn_timm.report import figures
from nbn_timm.report.bootstrap import LEVEL, RESAMPLES, Interval, paired_interval
from nbn_timm.report.norms import NormSizes
from nbn_timm.report.pictures import Gallery, Shown, percent
from nbn_timm.report.recipe import differing_settings
from nbn_timm.report.run import SHOTS, FinishedRun
from nbn_timm.report.single import CARDS, DECIMALS, PICTURES, feature_lengths

_CLASSES = 10  # that gain or lose most


@dataclass(frozen=True)
class Difference:
    """What one run has over the first.

    Attributes:
        name: Of the run.
        intervals: What is measured, in words, and the interval of the mean difference.
        gained, lost: Names of the classes that gained or lost most, a table each.
        figure: Change of recall by training images.
        better, worse: Pictures that only this run, or only the first, tells right.
    """

    name: str
    intervals: Table
    gained: Table | None
    lost: Table | None
    figure: figures.Svg
    better: list[Shown]
    worse: list[Shown]


def write_comparison(
        path: str | Path,
        runs: Sequence[FinishedRun],
        dataset: Any = None,
        norms: Mapping[str, NormSizes] | None = None,
        notes: tuple[str, ...] = (),
) -> None:
    """Write the page that compares runs with the first of them.

    Args:
        path: Of the page.
        runs: Two or more, of different names.
        dataset: The evaluated split of the first, for thumbnails.
        norms: Of the networks, by the names of the runs.
        notes: What is missing and why, a sentence each.

    Raises:
        InputError: The file system refused.
    """
    first = runs[0]
    differences, told = [], list(notes)
    for run in runs[1:]:
        reason = not_comparable(first, run)
        if reason is None:
            differences.append(difference(first, run, dataset))
        else:
            told.append(f'{run.name} cannot be compared picture by picture with {first.name}, since {reason}.')
    if not can_draw():
        told.append(how_to_draw())
    by_name = {run.name: run for run in runs}
    accuracy = {name: run.curve('eval_top1') for name, run in by_name.items()}
    loss = {name: run.curve('train_loss') for name, run in by_name.items()}
    colors = dict(zip(by_name, cycle(figures.SERIES)))  # as in the bars, of a run without epochs too
    settings = differing_settings({name: run.settings for name, run in by_name.items()})
    write_page(
        path, 'comparison.html', runs=runs, first=first, notes=told, numbers=number_table(runs),
        shot_bars=figures.shot_bars({name: run.results for name, run in by_name.items()}),
        curves=[(figures.curves(accuracy, 'accuracy by epoch', 'accuracy in %', colors), 'Accuracy after each epoch.'),
                (figures.curves(loss, 'training loss by epoch', 'training loss', colors), 'Training loss.')],
        norms=figures.norm_figures(norms or {}, feature_lengths(by_name)), differences=differences,
        settings=Table(['setting', *by_name], [[name, *values] for name, values in settings]),
        level=f'{100 * LEVEL:g} %', resamples=RESAMPLES)


def not_comparable(first: FinishedRun, run: FinishedRun) -> str | None:
    """Why two runs cannot be paired; None if they can."""
    for one in (first, run):
        if one.predictions is None:
            return f'{one.name} has no predictions (nbn-report --evaluate runs its network again)'
    assert first.predictions is not None and run.predictions is not None
    if not np.array_equal(first.predictions.labels, run.predictions.labels) or first.names != run.names:
        return 'they were evaluated on other pictures or classes'
    return None


def number_table(runs: Sequence[FinishedRun]) -> Table:
    """All numbers, a column for each run."""
    rows = []
    for key, label, unit in CARDS:
        values = [run.results.get(key) for run in runs]
        if any(value is not None for value in values):
            numbers = (None if value is None else Number(value, DECIMALS.get(key, 2)) for value in values)
            rows.append([f'{label} ({unit})', *numbers])
    return Table(['', *(run.name for run in runs)], rows)


def difference(first: FinishedRun, run: FinishedRun, dataset: Any) -> Difference:
    """What `run` has over `first`, on the same pictures."""
    before, after = first.predictions, run.predictions
    assert before is not None and after is not None
    change = recalls(run) - recalls(first)
    order = np.argsort(np.nan_to_num(change), kind='stable')
    gallery = Gallery(dataset, after)

    def classes(labels: np.ndarray) -> Table | None:
        rows = [[run.classes[label].name, run.classes[label].train_images, float(recalls(first)[label]),
                 float(recalls(run)[label]), float(change[label])] for label in labels.tolist()]
        return Table(['class', 'training images', first.name, run.name, 'points'], rows) if rows else None

    def pictures(chosen: np.ndarray, surest: np.ndarray) -> list[Shown]:
        indices = np.flatnonzero(chosen)
        indices = indices[np.argsort(-surest[indices], kind='stable')][:PICTURES]
        return [Shown(gallery.uri(index), gallery.name(index), [
            f'is: {run.classes[after.labels[index]].name}',
            f'{first.name}: {first.classes[before.predicted[index]].name}, {percent(float(before.confidence[index]))}',
            f'{run.name}: {run.classes[after.predicted[index]].name}, {percent(float(after.confidence[index]))}'])
            for index in indices.tolist()]

    return Difference(
        run.name, interval_table(intervals(first, run)),
        classes(order[::-1][:_CLASSES][change[order[::-1][:_CLASSES]] > 0]),
        classes(order[:_CLASSES][change[order[:_CLASSES]] < 0]), figures.gain_by_images(run.classes, change),
        pictures(after.correct & ~before.correct, before.confidence),
        pictures(before.correct & ~after.correct, after.confidence))


def recalls(run: FinishedRun) -> np.ndarray:
    """Of each class by the predictions, in percent, [C]; NaN without a picture."""
    assert run.predictions is not None
    number = len(run.classes)
    total = np.bincount(run.predictions.labels, minlength=number)
    correct = np.bincount(run.predictions.labels[run.predictions.correct], minlength=number)
    return np.where(total > 0, 100 * correct / np.maximum(total, 1), np.nan)


def intervals(first: FinishedRun, run: FinishedRun) -> list[tuple[str, int, str, Interval]]:
    """What is measured, over how many of what, and the interval of `run` less `first`."""
    before, after = first.predictions, run.predictions
    assert before is not None and after is not None
    points = 100.0 * (after.correct.astype(int) - before.correct.astype(int))
    found = [('Top-1', len(points), 'pictures', paired_interval(points))]
    change = recalls(run) - recalls(first)
    change = change[~np.isnan(change)]
    found.append(('Mean class', len(change), 'classes', paired_interval(change)))
    if run.shot_of_class is not None:
        of_picture = run.shot_of_class[after.labels]
        for number, shot in enumerate(SHOTS):
            if (of_shot := points[of_picture == number]).size:
                found.append((shot.capitalize(), len(of_shot), 'pictures', paired_interval(of_shot)))
    loss = before.label_log_probability - after.label_log_probability
    found.append(('NLL (less is better)', len(loss), 'pictures', paired_interval(loss)))
    return found


def interval_table(rows: Sequence[tuple[str, int, str, Interval]]) -> Table:
    """For people; whether zero lies outside is said in words."""
    words = {0: 'not told apart', 1: 'more', -1: 'less'}
    return Table(['', 'over', 'difference', 'from', 'to', ''], [
        [name, f'{number:,} {what}', *(Number(value, 4 if name.startswith('NLL') else 2, signed=True) for value in
                                       (found.mean, found.low, found.high)), words[found.verdict]]
        for name, number, what, found in rows])

"""The page that compares several runs, each with the first."""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from nbn_timm.errors import InputError
from nbn_timm.pages import Number, Table, can_draw, how_to_draw, write_page
from nbn_timm.report import figures, label_set_comparison
from nbn_timm.report.bootstrap import LEVEL, RESAMPLES, paired_interval
from nbn_timm.report.difference import Difference, Row, class_changes, interval_table
from nbn_timm.report.norms import NormSizes
from nbn_timm.report.pictures import PICTURES, Gallery, Shown, percent
from nbn_timm.report.recipe import differing_settings
from nbn_timm.report.run import SHOTS, FinishedRun
from nbn_timm.report.single import DECIMALS, about_probabilities, feature_lengths, known_cards


def write_comparison(
        path: str | Path,
        runs: Sequence[FinishedRun],
        dataset: Any = None,
        norms: Mapping[str, NormSizes] | None = None,
        notes: tuple[str, ...] = (),
) -> list[str]:
    """Write the page that compares runs with the first of them.

    Args:
        path: Of the page.
        runs: Two or more, of different names.
        dataset: The evaluated split of the first, for thumbnails.
        norms: Of the networks, by the names of the runs.
        notes: What is missing and why, a sentence each.

    Returns:
        The notes, and what else could not be compared.

    Raises:
        InputError: The file system refused, or the pictures of some runs are of one class and those of others not.
    """
    first = runs[0]
    other = next((run for run in runs if run.of_sets != first.of_sets), None)
    if other is not None:
        several, one = (other, first) if other.of_sets else (first, other)
        raise InputError(f'the pictures of {several.name} can be of several classes and those of {one.name} are of '
                         'one: compare runs of one kind')
    differences, told = [], list(notes)
    for run in runs[1:]:
        reason = not_comparable(first, run)
        if reason is None:
            compare = label_set_comparison.difference if run.of_sets else difference
            found = compare(first, run, dataset)
            differences.append(replace(found, doubt=not_known_to_be_same(first, run)))
        else:
            told.append(f'{run.name} cannot be compared picture by picture with {first.name}, since {reason}.')
    if not can_draw():
        told.append(how_to_draw())
    by_name = {run.name: run for run in runs}
    measure = first.measure
    judged = {name: run.curve(f'eval_{measure.columns["all"]}') for name, run in by_name.items()}
    loss = {name: run.curve('train_loss') for name, run in by_name.items()}
    colors = dict(zip(by_name, cycle(figures.SERIES)))  # as in the bars, of a run without epochs too
    settings = differing_settings(runs)
    write_page(
        path, 'comparison.html', runs=runs, first=first, notes=told, numbers=number_table(runs),
        probabilities=about_probabilities(runs), measure=measure.words,
        shot_bars=figures.shot_bars({name: run.results for name, run in by_name.items()}, measure),
        curves=[(figures.curves(judged, f'{measure.words} by epoch', f'{measure.words} in %', colors),
                 f'{figures.sentence_case(measure.words)} after each epoch.'),
                (figures.curves(loss, 'training loss by epoch', 'training loss', colors), 'Training loss.')],
        norms=figures.norm_figures(norms or {}, feature_lengths(by_name)), differences=differences,
        settings=Table(['setting', *by_name], [[name, *values] for name, values in settings]),
        level=f'{100 * LEVEL:g} %')
    return told


def not_comparable(first: FinishedRun, run: FinishedRun) -> str | None:
    """Why two runs cannot be paired; None if they can."""
    for one in (first, run):
        if one.targets is None:
            return f'{one.name} has no predictions (nbn-report --evaluate runs its network again)'
    assert first.targets is not None and run.targets is not None
    if first.names != run.names or not np.array_equal(first.targets, run.targets):
        return 'they were evaluated on other pictures or classes'
    if None not in (first.digest, run.digest) and first.digest != run.digest:
        return 'they were evaluated on other pictures'
    return None


def not_known_to_be_same(first: FinishedRun, run: FinishedRun) -> str | None:
    """That two runs can be paired only if their pictures are the same, which nothing tells; None where it is known."""
    unknown = [one.name for one in (first, run) if one.digest is None]
    if not unknown:
        return None
    return (f'Whether {run.name} was evaluated on the same pictures as {first.name} is not known: the number, the '
            f'labels and their order are the same, and {" and ".join(unknown)} kept no digest of the pictures '
            '(streams and datasets of timm have none; for folders and lists --evaluate makes one). If they are others, '
            'the differences below mean nothing.')


def number_table(runs: Sequence[FinishedRun]) -> Table:
    """All numbers, a column for each run."""
    rows = []
    for key, label, unit in known_cards(runs[0]):
        values = [run.results.get(key) for run in runs]
        if any(value is not None for value in values):
            numbers = (None if value is None else Number(value, DECIMALS.get(key, 2)) for value in values)
            rows.append([f'{label} ({unit})', *numbers])
    return Table(['', *(run.name for run in runs)], rows)


def difference(first: FinishedRun, run: FinishedRun, dataset: Any) -> Difference:
    """What `run` has over `first`, on the same pictures."""
    before, after = first.predictions, run.predictions
    assert before is not None and after is not None
    gallery = Gallery(dataset, after.labels)
    gained, lost, figure = class_changes(first, run, recalls(first), recalls(run), 'recall')

    def pictures(chosen: np.ndarray, surest: np.ndarray) -> list[Shown]:
        indices = np.flatnonzero(chosen)
        indices = indices[np.argsort(-surest[indices], kind='stable')][:PICTURES]
        return [Shown(gallery.uri(index), gallery.name(index), [
            f'is: {run.classes[after.labels[index]].name}',
            f'{first.name}: {first.classes[before.predicted[index]].name}, {percent(float(before.confidence[index]))}',
            f'{run.name}: {run.classes[after.predicted[index]].name}, {percent(float(after.confidence[index]))}'])
            for index in indices.tolist()]

    return Difference(
        run.name, interval_table(intervals(first, run)), RESAMPLES, 'test pictures, or of classes,',
        'recall', gained, lost, figure,
        'tells these right', pictures(after.correct & ~before.correct, before.confidence),
        pictures(before.correct & ~after.correct, after.confidence))


def recalls(run: FinishedRun) -> np.ndarray:
    """Of each class by the predictions, in percent, [C]; NaN without a picture."""
    assert run.predictions is not None
    number = len(run.classes)
    total = np.bincount(run.predictions.labels, minlength=number)
    correct = np.bincount(run.predictions.labels[run.predictions.correct], minlength=number)
    return np.where(total > 0, 100 * correct / np.maximum(total, 1), np.nan)


def intervals(first: FinishedRun, run: FinishedRun) -> list[Row]:
    """What is measured, over how many of what, and the interval of `run` less `first`."""
    before, after = first.predictions, run.predictions
    assert before is not None and after is not None
    points = 100.0 * (after.correct.astype(int) - before.correct.astype(int))
    found: list[Row] = [('Top-1', len(points), 'pictures', paired_interval(points))]
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

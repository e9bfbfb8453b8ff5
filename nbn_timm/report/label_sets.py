"""What the page of a run shows of its evaluation where a picture can be of several classes."""
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbn_timm.pages import Number, Table
from nbn_timm.report import figures
from nbn_timm.report.pictures import PICTURES, PICTURES_OF_PAIR, Gallery, Shown, percent
from nbn_timm.report.run import SHOTS, FinishedRun, shot_limits

CARDS = (
    ('map', 'mAP', 'mean over the classes, %'), ('map_many', 'Many', 'mAP, %'), ('map_medium', 'Medium', 'mAP, %'),
    ('map_few', 'Few', 'mAP, %'), ('micro_f1', 'Micro F1', 'of all labels, %'),
    ('macro_f1', 'Macro F1', 'mean over the classes, %'), ('loss', 'Loss', 'per picture and class'),
)
NO_CLASS = 'no class'
_CLASSES = 12  # with the most mistakes
_TALL = 15  # rows from which a table scrolls by itself


def evaluation(run: FinishedRun, gallery: Gallery | None) -> dict[str, Any]:
    """Tables, figures and pictures for the template."""
    classes, shown = class_table(run), pictures(run, gallery)
    false_alarms, misses = (mistake_table(run, gallery, told) for told in (True, False))
    return dict(
        shots=shot_table(run), classes=classes, told_from=run.thresholds.in_words(),
        rates=figures.rates_by_images(run.classes, 'average_precision', 'f1'), labels_each=number_figure(run),
        false_alarms=false_alarms, misses=misses, **shown,
        sections=[('classes', 'Classes', classes), ('mistakes', 'Mistakes', false_alarms or misses),
                  ('pictures', 'Pictures', shown['surprising'] or shown['missed'])])


def shot_table(run: FinishedRun) -> Table | None:
    """Classes, labels, average precision and F1 of many, medium and few."""
    splits = run.results.get('splits')
    if not splits or run.shot_of_class is None:
        return None
    limits, rows = shot_limits(splits), []
    for shot in SHOTS:
        of_shot = [row for row in run.classes if row.shot == shot]
        known = [row.f1 for row in of_shot if row.f1 is not None]
        rows.append([shot, limits[shot], len(of_shot), sum(row.train_images or 0 for row in of_shot),
                     sum(row.test_images for row in of_shot), run.results.get(f'map_{shot}'),
                     sum(known) / len(known) if known else None])
    return Table(['shots', 'images per class', 'classes', 'training labels', f'{run.split} labels', 'mAP %',
                  'mean F1 %'], rows)


def class_table(run: FinishedRun) -> Table | None:
    """Average precision of each class, its threshold, and what comes of that; the most frequent in training first."""
    values = run.thresholds.values
    order = sorted(range(len(run.classes)), key=lambda label: -(run.classes[label].train_images or 0))
    rows = [[row.name, row.train_images, row.shot, row.test_images, row.average_precision,
             Number(values[label if len(values) > 1 else 0], 3), row.predicted, row.precision, row.recall, row.f1]
            for label in order for row in [run.classes[label]]]
    columns = ['class', 'training images', 'shots', f'{run.split} images', 'AP %', 'threshold', 'told', 'precision %',
               'recall %', 'F1 %']
    return Table(columns, rows, tall=len(rows) > _TALL) if rows else None


def number_figure(run: FinishedRun) -> figures.Svg:
    """How many labels pictures have, and how many are told."""
    if run.label_sets is None:
        return None
    return figures.labels_each({'labels it has': run.label_sets.sets.sum(axis=1, dtype=np.int64),
                                'labels told': run.told_sets.sum(axis=1, dtype=np.int64)})


def beyond(run: FinishedRun) -> np.ndarray:
    """How far the probability of each class lies above its threshold, [N, C]; a class is told from 0 on."""
    assert run.label_sets is not None
    return run.label_sets.probabilities - np.array(run.thresholds.values)


def mistake_table(run: FinishedRun, gallery: Gallery | None, told: bool) -> Table | None:
    """The classes that are most often told of pictures that are not of them, or are missed, with such pictures."""
    if run.label_sets is None or gallery is None:
        return None
    wrong = _mistakes(run, told)
    counts, excess = wrong.sum(axis=0), beyond(run) * (1 if told else -1)
    rows = []
    for label in np.argsort(-counts, kind='stable')[:_CLASSES][:int((counts > 0).sum())].tolist():
        those, row = np.flatnonzero(wrong[:, label]), run.classes[label]
        furthest = those[np.argsort(-excess[those, label], kind='stable')][:PICTURES_OF_PAIR]
        whole = row.predicted if told else row.test_images
        rows.append([row.name, int(counts[label]), 100 * float(counts[label]) / (whole or 1),
                     gallery.row(furthest.tolist()), row.train_images])
    share = '% of told' if told else '% of its pictures'
    return Table(['class', 'times', share, 'such pictures', 'training images'], rows, decimals=1) if rows else None


def pictures(run: FinishedRun, gallery: Gallery | None) -> dict[str, list[Shown]]:
    """Wrong classes told most surely, labels missed by most, and of the others the pictures of the greatest loss."""
    if run.label_sets is None or gallery is None:
        return {'surprising': [], 'missed': [], 'worst': []}
    excess = beyond(run)
    found: dict[str, list[Shown]] = {}
    shown: list[int] = []
    for name, told in (('surprising', True), ('missed', False)):
        amounts = np.where(_mistakes(run, told), excess * (1 if told else -1), -np.inf)
        label, most = amounts.argmax(axis=1), amounts.max(axis=1)
        order = np.argsort(-most, kind='stable')[:PICTURES]
        order = order[most[order] > -np.inf]
        found[name] = [_mistaken(run, gallery, index, int(label[index]), told) for index in order.tolist()]
        shown += order.tolist()
    losses = run.label_sets.losses
    order = np.argsort(-losses, kind='stable')
    order = order[(run.told_sets != run.label_sets.sets).any(axis=1)[order] & ~np.isin(order, shown)]
    found['worst'] = [Shown(gallery.uri(index), _alt(run, gallery, index), [
        f'told: {names(run, run.told_sets[index])}', f'is: {names(run, run.label_sets.sets[index])}',
        f'loss {losses[index]:.3f}', gallery.name(index)]) for index in order[:PICTURES].tolist()]
    return found


def names(run: FinishedRun, members: np.ndarray) -> str:
    """The classes of a set, [C], in words."""
    return '; '.join(run.classes[label].name for label in np.flatnonzero(members).tolist()) or NO_CLASS


def _mistakes(run: FinishedRun, told: bool) -> np.ndarray:
    """Where a class is told of a picture that is not of it, or missed, bool [N, C]."""
    assert run.label_sets is not None
    is_told, sets = run.told_sets.astype(bool), run.label_sets.sets.astype(bool)
    return is_told & ~sets if told else sets & ~is_told


def _mistaken(run: FinishedRun, gallery: Gallery, index: int, label: int, told: bool) -> Shown:
    """A picture with a class that is told wrongly, or missed."""
    assert run.label_sets is not None
    values: Sequence[float] = run.thresholds.values
    share, threshold = float(run.label_sets.probabilities[index, label]), values[label if len(values) > 1 else 0]
    other = f'is: {names(run, run.label_sets.sets[index])}' if told else f'told: {names(run, run.told_sets[index])}'
    return Shown(gallery.uri(index), _alt(run, gallery, index), [
        f'{"told" if told else "missed"}: {run.classes[label].name}, {percent(share)}',
        f'told from {percent(threshold)} on', other, gallery.name(index)])


def _alt(run: FinishedRun, gallery: Gallery, index: int) -> str:
    assert run.label_sets is not None
    return f'{gallery.name(index)}, a picture of {names(run, run.label_sets.sets[index])}'

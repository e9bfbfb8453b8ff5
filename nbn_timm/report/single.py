"""The page of one run."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbn_timm.evaluation.calibration import Calibration
from nbn_timm.evaluation.temperature import FittedTemperature
from nbn_timm.pages import Card, Number, Table, can_draw, how_to_draw, write_page
from nbn_timm.pages.figures import MATRIX_LIMIT
from nbn_timm.report import figures, label_sets
from nbn_timm.report.norms import NormSizes
from nbn_timm.report.pictures import PICTURES, PICTURES_OF_PAIR, Gallery, told
from nbn_timm.report.recipe import changed_settings, other_settings, repeating_command
from nbn_timm.report.run import SHOTS, FinishedRun, shot_limits
from nbn_timm.settings import SettingGroups

PAIRS = 12  # the most confused ones
CARDS = (
    ('top1', 'Top-1', 'of all pictures, %'), ('mean_class', 'Mean class', 'mean of the recalls, %'),
    ('many', 'Many', 'accuracy, %'), ('medium', 'Medium', 'accuracy, %'), ('few', 'Few', 'accuracy, %'),
    ('top5', 'Top-5', '%'), ('macro_f1', 'Macro F1', 'mean over the classes, %'),
    ('harmonic_mean', 'Harmonic mean', 'of the recalls, %'), ('worst_class', 'Worst class', 'its recall, %'),
    ('ece', 'Calibration error', '15 bins, points'), ('nll', 'NLL', 'per picture'), ('brier', 'Brier', '0 to 2'),
)
DECIMALS = {'nll': 4, 'brier': 4, 'loss': 4}
_TALL = 15  # rows from which a table scrolls by itself


def write_report(
        path: str | Path,
        run: FinishedRun,
        groups: type[SettingGroups],
        dataset: Any = None,
        norms: NormSizes | None = None,
        processes: int = 1,
        notes: tuple[str, ...] = (),
        data_dir: str | None = None,
) -> None:
    """Write the page of a run.

    Args:
        path: Of the page.
        run: What its files tell.
        groups: Settings of the command that made it.
        dataset: The evaluated split, for thumbnails.
        norms: Of the evaluated network.
        processes: That trained together.
        notes: What is missing and why, a sentence each.
        data_dir: Where the pictures are now, for the command that repeats the run; None for where they were.

    Raises:
        InputError: The file system refused.
    """
    gallery = None if run.targets is None else Gallery(dataset, run.targets)
    moved = {'data_dir': data_dir} if data_dir and run.settings.get('data_dir') else {}
    evaluation = label_sets.evaluation(run, gallery) if run.of_sets else evaluation_of_one_class(run, gallery)
    write_page(
        path, 'label_sets.html' if run.of_sets else 'run.html', run=run, cards=cards(run), **evaluation,
        notes=(*run.notes, *notes, *missing(run, gallery)), curves=figures.training_curves(run),
        probabilities=about_probabilities([run]),
        shot_bars=figures.shot_bars({run.name: run.results}, run.measure),
        norms=figures.norm_figures({} if norms is None else {run.name: norms}, feature_lengths({run.name: run})),
        layers=norms, changed=Table(['setting', 'value', 'default'], changed_settings(run.settings, groups)),
        others=Table(['setting', 'value'], other_settings(run.settings, groups)),
        command=repeating_command({**run.settings, **moved}, groups, run.name, processes))


def evaluation_of_one_class(run: FinishedRun, gallery: Gallery | None) -> dict[str, Any]:
    """What the page of a run shows of its evaluation, where a picture is of one class."""
    classes, pairs, reliability = class_table(run), pair_table(run, gallery), reliability_figure(run)
    worst = worst_pictures(run, gallery)
    return dict(
        shots=shot_table(run), classes=classes, recall=figures.rates_by_images(run.classes), pairs=pairs,
        shifts=shot_confusion(run), matrix=confusion_figure(run), reliability=reliability, **worst,
        sections=[('classes', 'Classes', classes), ('confusion', 'Confusion', pairs),
                  ('pictures', 'Pictures', worst['surprising']), ('calibration', 'Calibration', reliability)])


def missing(run: FinishedRun, gallery: Gallery | None) -> list[str]:
    """What the page lacks, a sentence each."""
    found = []
    if not can_draw():
        found.append(how_to_draw())
    if not run.results and not (run.folder / f'{run.split}.json').is_file():
        found.append('There is no test.json: the run is not finished, or another program has made it. nbn-report '
                     '--evaluate evaluates its network.')
    if run.results and run.targets is None:
        found.append('There is nothing of single pictures, since an earlier version kept no predictions: '
                     'nbn-report --evaluate runs the network again.')
    if gallery is not None and gallery.reason is not None:
        found.append(f'There are no thumbnails, since {gallery.reason}.')
    return found


def known_cards(run: FinishedRun) -> Sequence[tuple[str, str, str]]:
    """The headline numbers of runs of its kind: name in the results, title, unit."""
    return label_sets.CARDS if run.of_sets else CARDS


def cards(run: FinishedRun) -> list[Card]:
    """The headline numbers that there are."""
    return [Card(label, Number(run.results[key], DECIMALS.get(key, 2)), note) for key, label, note in known_cards(run)
            if isinstance(run.results.get(key), int | float)]


def about_probabilities(runs: Sequence[FinishedRun]) -> str | None:
    """That a page tells probabilities at temperature 1, and which ones nbn-predict tells; None of label sets."""
    if any(run.of_sets or 'ece' not in run.results for run in runs):
        return None
    several = len(runs) > 1
    here = 'those of the networks as they are' if several else 'those of the network as it is'
    fitted = [f'{f"of {run.name} " if several else ""}{_divided(run.calibration)}' for run in runs if run.calibration]
    return f'Probabilities, calibration error, NLL and Brier score on this page are {here}: temperature 1.' + (
        f' nbn-predict divides the logits {"; ".join(fitted)}.' if fitted else '')


def _divided(fitted: FittedTemperature) -> str:
    split = 'validation' if fitted.split == 'val' else fitted.split
    return (f'by {fitted.temperature:.3f}, fitted on {fitted.images:,} images of the {split} split, and so is '
            f'{"less sure" if fitted.temperature > 1 else "surer"} than told here')


def shot_table(run: FinishedRun) -> Table | None:
    """Classes, training and evaluated pictures, accuracy and calibration of many, medium and few."""
    splits = run.results.get('splits')
    if not splits or run.shot_of_class is None:
        return None
    limits, rows = shot_limits(splits), []
    for shot in SHOTS:
        of_shot = [row for row in run.classes if row.shot == shot]
        rows.append([shot, limits[shot], len(of_shot),
                     sum(row.train_images or 0 for row in of_shot), splits[shot]['images'], run.results.get(shot),
                     run.results.get(f'ece_{shot}')])
    return Table(['shots', 'images per class', 'classes', 'training images', f'{run.split} images', 'accuracy %',
                  'calibration error'], rows)


def class_table(run: FinishedRun) -> Table | None:
    """Precision, recall and F1 of each class with its counts, the most frequent in training first."""
    order = sorted(range(len(run.classes)), key=lambda label: -(run.classes[label].train_images or 0))
    rows = [[row.name, row.train_images, row.shot, row.test_images, row.precision, row.recall, row.f1]
            for row in (run.classes[label] for label in order)]
    return Table(['class', 'training images', 'shots', f'{run.split} images', 'precision %', 'recall %', 'F1 %'], rows,
                 tall=len(rows) > _TALL) if rows else None


def confusion_counts(run: FinishedRun) -> np.ndarray:
    """Pictures by label and by what they were told to be, [C, C]."""
    assert run.predictions is not None
    number = len(run.classes)
    pairs = run.predictions.labels * number + run.predictions.predicted
    return np.bincount(pairs, minlength=number * number).reshape(number, number)


def confusion_figure(run: FinishedRun) -> figures.Svg:
    """The matrix, of few enough classes."""
    if run.predictions is None or len(run.classes) > MATRIX_LIMIT:
        return None
    return figures.confusion_matrix(confusion_counts(run), run.names)


def pair_table(run: FinishedRun, gallery: Gallery | None) -> Table | None:
    """The pairs of classes that are most often confused, with pictures."""
    predictions = run.predictions
    if predictions is None or gallery is None:
        return None
    wrong = np.flatnonzero(~predictions.correct)
    pairs, counts = np.unique(np.stack([predictions.labels[wrong], predictions.predicted[wrong]]), axis=1,
                              return_counts=True)
    rows = []
    for place in np.argsort(-counts, kind='stable')[:PAIRS]:
        label, guess = (run.classes[number] for number in pairs[:, place])
        of_pair = (predictions.labels == pairs[0, place]) & (predictions.predicted == pairs[1, place])
        those = np.flatnonzero(of_pair)
        surest = those[np.argsort(-predictions.confidence[those], kind='stable')][:PICTURES_OF_PAIR]
        rows.append([label.name, guess.name, int(counts[place]), gallery.row(surest.tolist()),
                     100 * float(counts[place]) / label.test_images, label.train_images, guess.train_images])
    return Table(['is', 'told to be', 'times', 'such pictures', '% of the class', 'training images', 'of the other'],
                 rows) if rows else None


def shot_confusion(run: FinishedRun) -> Table | None:
    """Where the pictures of many, medium and few go: right, and to wrong classes of many, medium and few."""
    predictions, shots = run.predictions, run.shot_of_class
    if predictions is None or shots is None:
        return None
    rows: list[list[Any]] = []
    for number, shot in enumerate(SHOTS):
        of_shot = shots[predictions.labels] == number
        total, wrong = int(of_shot.sum()), of_shot & ~predictions.correct
        if total:
            rows.append([shot, 100 * float((of_shot & predictions.correct).sum()) / total,
                         *(100 * float((wrong & (shots[predictions.predicted] == other)).sum()) / total
                           for other in range(len(SHOTS)))])
    return Table(['pictures of', 'right %', *(f'wrong, told {shot} %' for shot in SHOTS)], rows)


def reliability_figure(run: FinishedRun) -> figures.Svg:
    """Accuracy by confidence."""
    if run.predictions is None:
        return None
    by_shot: Mapping[str, Calibration] = {}
    if run.shot_of_class is not None:
        of_picture = run.shot_of_class[run.predictions.labels]
        by_shot = {shot: run.predictions.calibration(of_picture == number) for number, shot in enumerate(SHOTS)
                   if (of_picture == number).any()}
    return figures.reliability(run.predictions.calibration(), by_shot)


def worst_pictures(run: FinishedRun, gallery: Gallery | None) -> dict[str, list[Any]]:
    """The wrong pictures of which the network was most sure, and of the others those whose label it believed least."""
    predictions = run.predictions
    if predictions is None or gallery is None:
        return {'surprising': [], 'worst': []}
    wrong = np.flatnonzero(~predictions.correct)
    surprising = wrong[np.argsort(-predictions.confidence[wrong], kind='stable')][:PICTURES]
    order = wrong[np.argsort(predictions.label_log_probability[wrong], kind='stable')]
    worst = order[~np.isin(order, surprising)][:PICTURES]
    return {name: [told(run, gallery, index) for index in chosen.tolist()]
            for name, chosen in (('surprising', surprising), ('worst', worst))}


def feature_lengths(runs: Mapping[str, FinishedRun]) -> dict[str, dict[str, float]]:
    """Mean feature length by shot, of the runs that kept it."""
    found = {}
    for name, run in runs.items():
        predictions, shots = run.predictions, run.shot_of_class
        if predictions is None or predictions.feature_length is None or shots is None:
            continue
        of_picture = shots[predictions.labels]
        found[name] = {shot: float(predictions.feature_length[of_picture == number].mean())
                       for number, shot in enumerate(SHOTS) if (of_picture == number).any()}
    return found

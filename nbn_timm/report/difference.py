"""What one run has over another, as the page of a comparison shows it."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nbn_timm.pages import Number, Table
from nbn_timm.report.bootstrap import Interval
from nbn_timm.report.figures import Svg, gain_by_images
from nbn_timm.report.pictures import Shown
from nbn_timm.report.run import FinishedRun

CLASSES = 10  # that gain or lose most
Row = tuple[str, int, str, Interval]  # what is measured, over how many of what, and the interval


@dataclass(frozen=True)
class Difference:
    """What one run has over the first.

    Attributes:
        name: Of the run.
        intervals: What is measured, in words, and the interval of the mean difference.
        resamples: Draws of an interval.
        drawn: What is drawn for them, in words.
        measure: Of a class, in words.
        gained, lost: Names of the classes that gained or lost most, a table each.
        figure: Change of the measure by training images.
        right: What `better` has of its pictures, in words.
        better, worse: Pictures that only this run, or only the first, tells right.
        doubt: That the pictures may not be the same, a sentence.
    """

    name: str
    intervals: Table
    resamples: int
    drawn: str
    measure: str
    gained: Table | None
    lost: Table | None
    figure: Svg
    right: str
    better: list[Shown]
    worse: list[Shown]
    doubt: str | None = None


def class_changes(
        first: FinishedRun,
        run: FinishedRun,
        before: np.ndarray,
        after: np.ndarray,
        measure: str,
) -> tuple[Table | None, Table | None, Svg]:
    """The classes that gain and lose most, and the change of all by training images; a measure [C] of each, or NaN."""
    change = after - before
    order = np.argsort(np.nan_to_num(change), kind='stable')

    def table(labels: np.ndarray) -> Table | None:
        rows = [[run.classes[label].name, run.classes[label].train_images, float(before[label]), float(after[label]),
                 float(change[label])] for label in labels.tolist()]
        return Table(['class', 'training images', first.name, run.name, 'points'], rows) if rows else None

    most, least = order[::-1][:CLASSES], order[:CLASSES]
    return (table(most[change[most] > 0]), table(least[change[least] < 0]),
            gain_by_images(run.classes, change, measure))


def interval_table(rows: Sequence[Row]) -> Table:
    """For people; whether zero lies outside is said in words."""
    words = {0: 'not told apart', 1: 'more', -1: 'less'}
    return Table(['', 'over', 'difference', 'from', 'to', ''], [
        [name, f'{number:,} {what}', *(Number(value, 4 if name.startswith('NLL') else 2, signed=True) for value in
                                       (found.mean, found.low, found.high)), words[found.verdict]]
        for name, number, what, found in rows])

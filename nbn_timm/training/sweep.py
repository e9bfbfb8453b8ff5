"""A sweep: the trainings of all combinations of some settings, and which of them is the best by validation."""
import csv
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbn_timm.errors import InputError, nearest
from nbn_timm.files import open_regular, read_json_object, write_text_atomic
from nbn_timm.seals import tell_changes
from nbn_timm.settings import flag
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.settings import TrainSettings

SWEEP_FILE, TABLE_FILE, OUTPUT = 'sweep.json', 'sweep.csv', 'train.txt'
LOWER_IS_BETTER = ('loss',)
MOST = 1000  # trainings of a sweep
_LONGEST_NAME = 180  # bytes; what is longer is cut, with a digest in its place


@dataclass(frozen=True)
class Trial:
    """A training of a sweep.

    Attributes:
        settings: What is swept, with the values of this combination, as they were written.
        seed: Of the training.
        flags: Of nbn-train, for the swept settings and the seed.
    """

    settings: tuple[tuple[str, str], ...]
    seed: int
    flags: tuple[str, ...]

    @property
    def label(self) -> str:
        """The combination, for people."""
        return ' '.join(f'{name}={value}' for name, value in self.settings) or 'as it is'

    @property
    def folder(self) -> str:
        """Name of the run."""
        parts = [f'{name}-{value}' for name, value in self.settings]
        name, end = re.sub(r'[^\w.+-]+', '_', '-'.join(parts)), f's{self.seed}'
        if len(name.encode()) > _LONGEST_NAME:
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            name = f'{name.encode()[:_LONGEST_NAME].decode(errors="ignore")}-{digest}'
        return f'{name}-{end}' if name else end


def trials(axes: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[Trial]:
    """All combinations, the seeds of one side by side.

    Args:
        axes: Values of each swept setting, as one would type them behind its flag.
        seeds: Of the trainings.

    Raises:
        InputError: There is no such setting, or nothing to compare.
    """
    known = TrainSettings.declared()
    for name in axes:
        if name not in known:
            raise InputError(f"there is no setting '{name}' to sweep over{nearest(name, known)}")
        if name in ('seed', 'output', 'experiment', 'resume', 'config'):
            raise InputError(f"'{name}' is not swept: give --seeds, --output, or --config behind the --")

    def words(name: str, value: str) -> list[str]:
        if known[name].type is not bool:
            return [flag(name), *value.split()] if known[name].many or known[name].type is dict else [
                f'{flag(name)}={value}']
        if value.lower() not in ('true', 'false'):
            raise InputError(f"'{name}' is on or off, and '{value}' is neither: give true or false")
        return [flag(name if value.lower() == 'true' else f'no_{name}')]

    number = math.prod(map(len, axes.values())) * len(seeds)
    if number > MOST:
        raise InputError(f'these values and seeds make {number:,} trainings, and a sweep has {MOST:,} at most: '
                         'give fewer')
    combinations = [tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [Trial(chosen, seed, (*(word for name, value in chosen for word in words(name, value)), f'--seed={seed}'))
            for chosen in combinations for seed in seeds]


@dataclass(frozen=True)
class TrialResult:
    """What a training came to.

    Attributes:
        metric: Name of what chose its best epoch.
        validation: Its value on the validation split.
        test: Accuracy on the test split, in percent; None without one.
    """

    metric: str
    validation: float
    test: float | None


def read_result(folder: Path) -> TrialResult | None:
    """The result of a run; None if it has not ended.

    Raises:
        InputError: It ended without a validation split, by which alone settings are chosen.
    """
    path = next((folder / name for name in ('test.json', 'val.json') if (folder / name).is_file()), None)
    if path is None:
        return None
    again = f"remove the folder '{folder}', and the same command trains it again"
    found = read_json_object(path, f"the results '{path}'", again)
    tell_changes(found, f"the results file '{path}'")
    if not isinstance(found.get('weights'), dict):
        raise InputError(f"the results '{path}' do not say of which weights they are: {again}")
    weights = EvaluatedWeights.of_results(found)
    metric = weights.metric
    if metric is None:
        raise InputError(f"'{folder}' had no validation split to compare settings by, and the test split is not for "
                         'choosing: give a --val-list, a folder val, or --val-split')
    try:
        with open_regular(folder / 'log.jsonl') as file:
            rows = [json.loads(line) for line in file]
        value = float({row['epoch']: row[f'eval_{metric}'] for row in rows}[int(weights.epoch or 0) - 1])
        return TrialResult(metric, value, float(found['top1']) if path.name == 'test.json' else None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the validation {metric} of the best epoch cannot be read from '{folder}' "
                         f'({" ".join(repr(error).split())}): {again}') from error


@dataclass(frozen=True)
class Row:
    """A combination of settings, over its seeds."""

    trial: Trial
    metric: str
    values: tuple[float, ...]
    tests: tuple[float | None, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def table(found: Sequence[tuple[Trial, TrialResult]]) -> list[Row]:
    """The combinations, the best by validation first."""
    rows = []
    for chosen in dict.fromkeys(trial.settings for trial, _ in found):
        of_seeds = [(trial, result) for trial, result in found if trial.settings == chosen]
        rows.append(Row(of_seeds[0][0], of_seeds[0][1].metric, tuple(result.validation for _, result in of_seeds),
                        tuple(result.test for _, result in of_seeds)))
    sign = 1 if rows and rows[0].metric in LOWER_IS_BETTER else -1
    return sorted(rows, key=lambda row: sign * row.mean if math.isfinite(row.mean) else math.inf)


def text_table(rows: Sequence[Row]) -> str:
    """For people: mean and standard deviation of the validation metric, and of the best alone the test accuracy."""
    width = max(len(row.trial.label) for row in rows)
    lines = [f'{"":<{width}}  validation {rows[0].metric}']
    for row in rows:
        spread = '' if row.deviation is None else f' ± {row.deviation:.2f}'
        lines.append(f'{row.trial.label:<{width}}  {row.mean:.2f}{spread}  ({len(row.values)} '
                     f'seed{"s" * (len(row.values) > 1)})')
    best = rows[0]
    tests = [value for value in best.tests if value is not None]
    lines += ['', f'Best by validation: {best.trial.label}'
              + (f', test top1 {statistics.fmean(tests):.2f}' if tests else '')]
    return '\n'.join(lines)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """One row per combination, with the validation metric of each seed; whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    names = [name for name, _ in rows[0].trial.settings]
    writer.writerow([*names, 'metric', 'mean', 'sd', 'seeds', 'values'])
    for row in rows:
        writer.writerow([*(value for _, value in row.trial.settings), row.metric, round(row.mean, 6),
                         '' if row.deviation is None else round(row.deviation, 6), len(row.values),
                         ' '.join(map(str, row.values))])
    write_text_atomic(path, text.getvalue())


def claim_folder(folder: Path, flags: Sequence[str]) -> None:
    """Note what is common to all trainings, and refuse a folder of other ones.

    Raises:
        InputError: It holds a sweep of other flags.
    """
    path, now = folder / SWEEP_FILE, {'train': list(flags)}
    if path.is_file():
        before = read_json_object(path, f"the flags '{path}' of a sweep", 'give another --output')
        if before != now:
            train = before.get('train')
            told = f' ({textwrap.shorten(" ".join(map(str, train)), 400)})' if isinstance(train, list) else ''
            raise InputError(f"'{folder}' holds a sweep of other trainings{told}: give another --output")
    else:
        write_text_atomic(path, json.dumps(now) + '\n')

"""Where the numbers of a run go: summary.csv, log.jsonl, and TensorBoard or W&B when asked."""
import csv
import importlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nbn_timm.errors import InputError, drop_stdout
from nbn_timm.files import write_bytes_atomic

Metrics = Mapping[str, float | None]

_COLUMN = re.compile(r'(train|eval)_\w+|epoch|lr', re.ASCII)  # of the summary

_logger = logging.getLogger(__name__)


class _Shown(logging.StreamHandler):
    """Shows messages as long as it can; a run whose output nobody can take any more trains on, and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Where the stream refuses, go on without it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        drop_stdout()
        print(f'the standard output cannot be written ({error.strerror}), so nothing more is shown; the run goes on '
              'and its files tell of it', file=sys.stderr, flush=True)


def setup_logging(is_primary: bool) -> None:
    """Show messages on stdout, plainly; processes other than the first show warnings only."""
    handler = _Shown(sys.stdout)
    handler.setFormatter(logging.Formatter('%(message)s'))
    logging.basicConfig(level=logging.INFO if is_primary else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)


class RunLog:
    """One row per epoch in `summary.csv`, one object in `log.jsonl`; a resumed run takes out what it will do again.

    Args:
        folder: Of the run.
        start_epoch: First epoch that will be written.
        tensorboard: Write events to the folder as well.
        wandb_project: Send to this project of Weights & Biases as well.
        settings: Of the run, for Weights & Biases.

    Raises:
        InputError: TensorBoard or W&B was asked for and is not installed, a log is damaged, or the folder cannot be
            written.
    """

    def __init__(
            self,
            folder: Path,
            start_epoch: int = 0,
            tensorboard: bool = False,
            wandb_project: str | None = None,
            settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.summary = folder / 'summary.csv'
        self.lines = folder / 'log.jsonl'
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.told = False  # of columns that stay empty
        if tensorboard:
            module = _import('torch.utils.tensorboard', 'tensorboard', '--log-tensorboard')
            self.tensorboard = module.SummaryWriter(str(folder), purge_step=start_epoch)
        if wandb_project:
            self.wandb = _import('wandb', 'wandb', '--log-wandb')
            self.wandb.init(project=wandb_project, name=folder.name, id=folder.name, resume='allow',
                            config=dict(settings or {}))
        for path in (self.summary, self.lines):
            if path.exists() and not path.is_file():
                raise InputError(f"the log '{path}' is no file: remove it, or give another --experiment")
        with _writing(folder):
            _trim(self.summary, start_epoch, _epochs_of_summary)
            _trim(self.lines, start_epoch, _epochs_of_lines)

    def write(
            self,
            epoch: int,
            train: Metrics,
            evaluation: Metrics | None,
            lr: float,
            seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Log an epoch (0-based); columns are named train_*, eval_* and lr, a metric that is None stays empty.

        Seconds of the epoch's parts go to log.jsonl alone, whose lines need not have the same entries.
        """
        row = {**{f'train_{key}': value for key, value in train.items()},
               **{f'eval_{key}': value for key, value in (evaluation or {}).items()}, 'lr': lr}
        now = datetime.now(timezone.utc).isoformat(timespec='seconds')
        with _writing(self.summary.parent):
            self._summarize({'epoch': epoch, **row})
            with open(self.lines, 'a', encoding='utf-8') as file:
                parts = {} if seconds is None else {
                    'seconds': {name: round(value, 4) for name, value in seconds.items()}}
                file.write(json.dumps({'epoch': epoch, 'time': now, **row, **parts}) + '\n')
        numbers = {key: value for key, value in row.items() if value is not None}
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key.replace('_', '/', 1), value, epoch)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({'epoch': epoch, **numbers})

    def _summarize(self, row: Mapping[str, Any]) -> None:
        """Append a row in the columns that the summary has, which a version with others may have begun."""
        text = io.StringIO(newline='')
        writer = csv.writer(text)
        with open(self.summary, 'a+', encoding='utf-8', newline='') as file:
            file.seek(0)
            columns = file.readline().strip().split(',')
            if columns == ['']:
                columns = list(row)
                writer.writerow(columns)
            elif not self.told and (empty := [column for column in columns if column not in row]):
                self.told = True
                _logger.warning("The columns %s of '%s' stay empty, since this run has no such values.",
                                ', '.join(empty), self.summary)
            writer.writerow([row.get(column) for column in columns])
            file.write(text.getvalue())

    def close(self) -> None:
        """Finish TensorBoard and W&B."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _trim(path: Path, start_epoch: int, epochs_of: Callable[[list[str]], Iterator[float]]) -> None:
    """Take the rows of `start_epoch` and later out of a log, and a last line that a kill cut short.

    Raises:
        InputError: A line of an epoch that stays is damaged; it is named.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = [line for line in content.split(b'\n')[:-1] if line.strip()] if start_epoch else []
    kept: list[bytes] = []
    good = 0
    try:
        for epoch in epochs_of([line.decode('utf-8', errors='backslashreplace') for line in lines]):
            if epoch < start_epoch:
                kept.append(lines[good])
            good += 1
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise InputError(f"line {good + 1} of the log '{path}' is damaged: correct or remove that line (a first "
                         'line of column names is needed), or the whole log') from error
    new = b''.join(line + b'\n' for line in kept)
    if new != content:
        write_bytes_atomic(path, new)


def _epochs_of_summary(lines: list[str]) -> Iterator[float]:
    """The epoch of each line; that of the column names is before all others."""
    columns = lines[0].strip().split(',') if lines else []
    for number, line in enumerate(lines):
        cells = line.strip().split(',')
        if not number and (cells[0] != 'epoch' or not all(map(_COLUMN.fullmatch, cells))):
            raise ValueError('no column names')
        if len(cells) != len(columns):
            raise ValueError('not as many cells as columns')
        yield [float(cell) for cell in cells if cell][0] if number else -1


def _epochs_of_lines(lines: list[str]) -> Iterator[float]:
    for line in lines:
        yield float(json.loads(line)['epoch'])


def _import(module: str, package: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f'{flag} needs {package}, which is not installed: pip install {package}') from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write the logs in '{folder}' ({error.strerror or error}; the last checkpoint is "
                         'intact): free some space and go on with --resume auto') from error

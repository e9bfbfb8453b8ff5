"""Train the recipes of a list, several runs side by side on one machine.

    python benchmarks/train_list.py benchmarks/full_recipes.txt --data-dir /data/cifar100_lt --output output/full \\
        --jobs 16 --minutes 60 -- --device cuda --cuda-graphs

A line of the list is the name of a run and its arguments of train.py; `{runs}` in it stands for the folder of all runs,
so that a second stage can begin with the run of a line above. What stands behind `--` goes to every `train.py`.

The same command goes on after any interruption: a run that has its result is left alone, and one that was interrupted
resumes. After `--minutes` all runs are interrupted. A run that begins with another one is taken for a second stage, and
goes without `--cuda-graphs`, which these do not take. Each run leaves `hardware.json`: the command, the machine, the
versions and the commit. `benchmarks/results_page.py` makes the table of the runs.
"""
import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from nbn_timm.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
RUNS = '{runs}'
RESULT = 'test.json'


@dataclass(frozen=True)
class Entry:
    """A line of a list."""

    name: str
    flags: Sequence[str]

    def first_stage(self) -> str | None:
        """Name of the run that this one begins with."""
        return next((flag.split('/')[1] for flag in self.flags if flag.startswith(f'{RUNS}/')), None)


def read_list(path: Path) -> list[Entry]:
    """The entries of a list, in its order."""
    lines = [shlex.split(line, comments=True) for line in path.read_text(encoding='utf-8').splitlines()]
    return [Entry(name, flags) for name, *flags in filter(None, lines)]


class Runner:
    """Trains entries, each in a process of its own, until the time is up.

    Args:
        output: Folder of all runs.
        data_dir: Folder of the data, which hardware.json does not show.
        train_flags: Flags for every run.
        about: What hardware.json says of every run.
        threads: CPU threads of a run.
        seconds: Until all is interrupted; None waits for the end.
    """

    def __init__(
            self,
            output: Path,
            data_dir: str,
            train_flags: Sequence[str],
            about: dict[str, str],
            threads: int = 1,
            seconds: float | None = None,
    ) -> None:
        self.output = output
        self.data_dir = data_dir
        self.train_flags = train_flags
        self.about = about
        self.threads = threads
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.ended: dict[str, threading.Event] = {}

    def train(self, entries: Sequence[Entry], jobs: int) -> list[str]:
        """Train all; returns the names of the runs that have no result."""
        self.ended = {entry.name: threading.Event() for entry in entries}
        with ThreadPoolExecutor(jobs) as pool:
            done = list(pool.map(self._train_after_first_stage, entries))
        return [entry.name for entry, ok in zip(entries, done, strict=True) if not ok]

    def _left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def _train_after_first_stage(self, entry: Entry) -> bool:
        before = entry.first_stage()
        if before in self.ended:
            self.ended[before].wait(self._left())
        try:
            return self._train(entry)
        finally:
            self.ended[entry.name].set()

    def _train(self, entry: Entry) -> bool:
        folder = self.output / entry.name
        if (folder / RESULT).exists():
            print(f'{entry.name}: there already', flush=True)
            return True
        if self._left() == 0:
            return False
        common = [flag for flag in self.train_flags if not (flag == '--cuda-graphs' and entry.first_stage())]
        flags = [*(flag.replace(RUNS, str(self.output)) for flag in entry.flags), *common]
        shown = shlex.join(['python', 'train.py', *entry.flags, *common])
        about = folder / 'hardware.json'
        if about.exists() and json.loads(about.read_text())['command'] != shown:
            print(f'{entry.name}: was begun by another command, see {about}; give another --output', flush=True)
            return False
        write_text_atomic(about, json.dumps({'command': shown, **self.about}, indent=2) + '\n')
        start = time.monotonic()
        ok = self._run([
            sys.executable, str(ROOT / 'train.py'), *flags, '--data-dir', self.data_dir, '--output', str(self.output),
            '--experiment', entry.name, '--resume', 'auto'], folder)
        minutes = (time.monotonic() - start) / 60
        print(f'{entry.name}: {"done" if ok else "not done"} after {minutes:.1f} minutes', flush=True)
        return ok

    def _run(self, command: Sequence[str], folder: Path) -> bool:
        with open(folder / 'train.txt', 'a') as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                       env={**os.environ, 'OMP_NUM_THREADS': str(self.threads)})
            try:
                return process.wait(self._left()) == 0
            except subprocess.TimeoutExpired:
                process.kill()  # its checkpoints are written whole or not at all
                process.wait()
                return False


def about_this_machine(device: str, jobs: int, threads: int) -> dict[str, str]:
    """Hardware, versions, commit and date, for the record of a run."""
    return {'hardware': _hardware(device, jobs, threads), 'torch': torch.__version__.partition('+')[0],
            'timm': timm.__version__, 'commit': _commit(), 'date': time.strftime('%Y-%m-%d')}


def _hardware(device: str, jobs: int, threads: int) -> str:
    if device.startswith('cuda'):
        return f'{torch.cuda.get_device_name()}, {jobs} runs at a time'
    cpu = next((line.partition(':')[2].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')),
               platform.processor())
    return f'{cpu}, {threads} of {os.cpu_count()} cores, {jobs} runs at a time'


def _commit() -> str:
    """Of the checkout, with '+' if it was changed; NBN_COMMIT where the folder is no checkout."""
    def git(*command: str) -> str:
        return subprocess.run(['git', '-C', str(ROOT), *command], capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git('rev-parse', '--short=10', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get('NBN_COMMIT', 'not known')


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def main() -> None:
    args = _parse()
    entries = [entry for entry in read_list(args.list) if not args.only or entry.name in args.only]
    if missing := set(args.only) - {entry.name for entry in entries}:
        sys.exit(f'{args.list} has no {sorted(missing)[0]}')
    device = args.train_flags[args.train_flags.index('--device') + 1] if '--device' in args.train_flags else 'cpu'
    runner = Runner(args.output, args.data_dir, args.train_flags, about_this_machine(device, args.jobs, args.threads),
                    args.threads, args.minutes and 60 * args.minutes)
    if left := runner.train(entries, args.jobs):
        sys.exit(f'not done, see above and train.txt in their folders: {", ".join(left)}')


def parse_before_train_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with `train_flags`, what stands behind `--`."""
    argv = sys.argv[1:]
    border = argv.index('--') if '--' in argv else len(argv)
    args = parser.parse_args(argv[:border])
    args.train_flags = argv[border + 1:]
    return args


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('list', type=Path, help='file of names and arguments of train.py')
    parser.add_argument('--data-dir', required=True, help='folder of the images and their lists')
    parser.add_argument('--output', type=Path, default=Path('output/full'), help='folder of all runs')
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help='these entries alone')
    parser.add_argument('--jobs', type=int, default=1, help='runs side by side')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of a run')
    parser.add_argument('--minutes', type=float, help='interrupt all runs after this time')
    return parse_before_train_flags(parser)


if __name__ == '__main__':
    main()

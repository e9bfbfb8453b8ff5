"""nbn-sweep: nbn-train for all combinations of some settings, and which is the best by validation.

    nbn-sweep --set lr=0.1,0.05 --set loss=cross_entropy,balanced_softmax --seeds 42 43 -- --config quickstart
"""
import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbn_timm.bars import with_bar
from nbn_timm.cli.train import parse_train
from nbn_timm.config import parse_flags, read_mapping
from nbn_timm.datasets import has_validation
from nbn_timm.errors import InputError, quoted, run_cli
from nbn_timm.files import make_folder
from nbn_timm.models.run_folder import has_controls
from nbn_timm.training.sweep import (
    OUTPUT,
    TABLE_FILE,
    Trial,
    claim_folder,
    read_result,
    table,
    text_table,
    trials,
    write_table,
)


@dataclass(frozen=True)
class Sweep:
    """What a sweep was told.

    Attributes:
        trials: Its trainings.
        flags: Of nbn-train, the same for all.
        output: Folder of all runs.
    """

    trials: tuple[Trial, ...]
    flags: tuple[str, ...]
    output: Path

    def command(self, trial: Trial) -> list[str]:
        """The flags of nbn-train for one of them."""
        return [*self.flags, *trial.flags, '--output', str(self.output), '--experiment', trial.folder]


def create_parser() -> argparse.ArgumentParser:
    """The flags before the `--`."""
    parser = argparse.ArgumentParser(
        prog='nbn-sweep', allow_abbrev=False,
        usage='nbn-sweep [--set NAME=VALUE,VALUE ...] [--seeds N ...] [--output DIR] [FILE] -- flags of nbn-train',
        description='Train all combinations of some settings one after another, each with several seeds, and tell '
        'which is the best by the validation split. The same command goes on after any interruption.')
    parser.add_argument('file', nargs='?', type=Path, metavar='FILE',
                        help='a YAML file of the same: set (a mapping of settings to lists), seeds, train (the flags)')
    parser.add_argument('--set', action='append', default=[], metavar='NAME=VALUE,VALUE',
                        help='a setting of nbn-train and its values; several --set are combined')
    parser.add_argument('--seeds', nargs='+', type=int, default=[], metavar='N',
                        help='of each combination (default: 42)')
    parser.add_argument('--output', type=_folder, default=Path('output/sweep'), metavar='DIR',
                        help='folder of all runs (default: output/sweep)')
    return parser


def _folder(text: str) -> Path:
    if not text.strip() or has_controls(text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no name of a folder: give one, as '.' for this one")
    return Path(text)


def parse_args(argv: Sequence[str] | None = None) -> Sweep:
    """Read the command line, and check the flags of every training.

    Raises:
        InputError: Something given is wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    border = argv.index('--') if '--' in argv else len(argv)
    args = parse_flags(create_parser(), argv[:border])
    axes: dict[str, list[str]] = {}
    seeds, flags = args.seeds, list(argv[border + 1:])
    if args.file is not None:
        axes, of_file, before = _read_file(args.file)
        seeds, flags = seeds or of_file, [*before, *flags]
    for text in args.set:
        name, equals, values = text.partition('=')
        if not equals or not values:
            raise InputError(f"--set '{text}' names no values: give it as --set lr=0.1,0.05")
        axes[name.replace('-', '_')] = values.split(',')
    found = Sweep(tuple(trials(axes, list(dict.fromkeys(seeds)) or [42])), tuple(flags), args.output)
    if len({trial.folder for trial in found.trials}) < len(found.trials):
        raise InputError('two of the values have the same name as a folder: write them otherwise')
    for trial in found.trials:
        settings = parse_train(found.command(trial))
        if has_validation(settings.data) is False:
            raise InputError(f"--dataset {settings.data.dataset} has no validation split here, and the test split is "
                             'not for choosing settings: give --val-fraction 0.2, a --val-list, or --val-split')
    return found


def _read_file(path: Path) -> tuple[dict[str, list[str]], list[int], list[str]]:
    data = read_mapping(path)
    unknown = data.keys() - {'set', 'seeds', 'train'}
    swept, seeds = data.get('set') or {}, data.get('seeds') or []
    if unknown or not isinstance(swept, dict) or not all(isinstance(values, list) for values in swept.values()):
        raise InputError(f"'{path}' is no sweep: give set (a mapping of settings to lists of values), seeds (a list) "
                         'and train (the flags of nbn-train)')
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise InputError(f"the seeds in '{path}' are no list of whole numbers: correct them")

    def text(value: object) -> str:
        return ' '.join(map(text, value)) if isinstance(value, list) else str(value)
    axes = {str(name).replace('-', '_'): [text(value) for value in values] for name, values in swept.items()}
    try:
        return axes, seeds, shlex.split(text(data.get('train') or ''))
    except ValueError as error:
        raise InputError(f"the flags of train in '{path}' are no command line ({error}): correct the quotes") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or a training has failed; the others have been run all the same.
    """
    sweep = parse_args(argv)
    make_folder(sweep.output)
    claim_folder(sweep.output, sweep.flags)
    failed = [trial for trial in with_bar(sweep.trials, 'sweep') if not _ended(sweep, trial)]
    found = [(trial, result) for trial in sweep.trials
             if trial not in failed and (result := read_result(sweep.output / trial.folder)) is not None]
    if found:
        rows = table(found)
        write_table(sweep.output / TABLE_FILE, rows)
        again = shlex.join(['nbn-train', *sweep.flags, *rows[0].trial.flags])
        print(f'\n{text_table(rows)}\n  {again}\n\nin {sweep.output}: {TABLE_FILE}, and a folder for each run')
    if failed:
        raise InputError(f"{len(failed)} of {len(sweep.trials)} trainings have failed, see "
                         f"'{sweep.output / failed[0].folder / OUTPUT}': the same command tries them again")


def _ended(sweep: Sweep, trial: Trial) -> bool:
    """Train, unless that has been done; whether there is a result."""
    folder = sweep.output / trial.folder
    result, note = read_result(folder), 'there already'
    if result is None:
        make_folder(folder)
        begun = time.monotonic()
        if not run_training([*sweep.command(trial), '--resume', 'auto'], folder / OUTPUT):
            print(f'{trial.folder}: failed', flush=True)
            return False
        result, note = read_result(folder), f'{time.monotonic() - begun:.0f} s'
    if result is None:
        return False
    print(f'{trial.folder}: validation {result.metric} {result.validation:.2f} ({note})', flush=True)
    return True


def run_training(flags: Sequence[str], log: Path) -> bool:
    """Run nbn-train in a process of its own, its output in a file; whether it ended well."""
    with open(log, 'a', encoding='utf-8') as file:
        command = [sys.executable, '-m', 'nbn_timm.cli.train', *flags]
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode == 0


def console() -> int:
    """Entry point of `nbn-sweep`."""
    return run_cli(main, 'nbn-sweep')


if __name__ == '__main__':
    sys.exit(console())

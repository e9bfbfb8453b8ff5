"""Train the first epochs of a recorded run again and compare the losses with its log, bit for bit.

    python benchmarks/retrain.py results/cifar100_lt/modern-s42 --epochs 2 --data-dir /data/cifar100_lt
    python benchmarks/retrain.py results/cifar100_lt/modern-s42 --epochs 1 --data-dir /data/cifar100_lt -- \\
        --device cpu --no-cuda-graphs --no-amp

The run is trained with its recorded settings and the flags of its command, which say how it began where it went from
one machine to another. Its schedule is its own: training is stopped after those epochs. What stands behind `--` goes to
train.py and has the last word. The same losses can only be expected on the same kind of machine and the versions of the
run's hardware.json; elsewhere the differences are shown. Exits with 1 if there is any.
"""
import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def losses(log: Path) -> list[float]:
    """Training loss of every epoch that a log.jsonl holds so far."""
    lines = log.read_text(encoding='utf-8').split('\n')[:-1] if log.is_file() else []
    return [json.loads(line)['train_loss'] for line in lines]


def flags_of(run: Path) -> list[str]:
    """The arguments of the run's command, without its config, whose settings are in args.yaml."""
    path = run / 'hardware.json'
    command = json.loads(path.read_text(encoding='utf-8')).get('command', '') if path.is_file() else ''
    words = shlex.split(command)
    flags = words[next((place for place, word in enumerate(words, 1) if word.endswith('train.py')), len(words)):]
    if '--config' in flags:
        place = flags.index('--config')
        del flags[place:place + 2]
    return flags


def train_again(run: Path, data_dir: str, epochs: int, flags: Sequence[str]) -> list[float]:
    """Losses of the first epochs of a run, trained here."""
    with tempfile.TemporaryDirectory() as output:
        process = subprocess.Popen([
            sys.executable, str(ROOT / 'train.py'), '--config', str(run / 'args.yaml'), *flags_of(run),
            '--data-dir', data_dir, '--output', output, '--experiment', 'again', *flags])
        try:
            while process.poll() is None and len(losses(Path(output, 'again', 'log.jsonl'))) < epochs:
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
        return losses(Path(output, 'again', 'log.jsonl'))[:epochs]


def main() -> None:
    argv = sys.argv[1:]
    border = argv.index('--') if '--' in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of a recorded run')
    parser.add_argument('--data-dir', required=True, help='folder of the images and their lists')
    parser.add_argument('--epochs', type=int, default=2, help='how many to train (default: 2)')
    args = parser.parse_args(argv[:border])
    logged = losses(args.run / 'log.jsonl')[:args.epochs]
    found = train_again(args.run, args.data_dir, args.epochs, argv[border + 1:])
    if len(found) < len(logged):
        sys.exit('training ended early: see above')
    for epoch, (before, now) in enumerate(zip(logged, found, strict=True), start=1):
        apart = '' if before == now else f', off by {now - before:.3g}'
        print(f'epoch {epoch}: logged {before!r}, here {now!r}{apart}')
    sys.exit(int(logged != found))


if __name__ == '__main__':
    main()

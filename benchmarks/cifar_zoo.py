"""Train the CIFAR-100-LT zoo: every method of docs/zoo.md, several runs side by side on one machine.

    python benchmarks/cifar_zoo.py --data-dir /data/cifar100_png --output output/zoo --jobs 2 \\
        --epochs 12 -- --sched cosine --warmup-epochs 1
    python benchmarks/cifar_zoo.py --data-dir /data/cifar100_png --output output/zoo_full --jobs 4 --device cuda

Without `--epochs` the recipes run their 200. What stands behind `--` goes to every `train.py` as it is. A run that has
its result is left alone and one that was interrupted goes on, so the same command continues after any interruption.
`benchmarks/results_page.py` makes the table of the runs.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from nbn_timm.files import write_text_atomic

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'


@dataclass(frozen=True)
class Method:
    """A row of the table: a recipe, and how it departs from it."""

    config: str
    flags: tuple[str, ...] = ()
    one_seed: bool = False


METHODS = {
    'ce': Method('resnet32'),
    'nbn': Method('resnet32_nbn'),
    'nbn_lr': Method('resnet32_nbn_lr'),
    'bs': Method('resnet32_balanced_softmax'),
    'nbn_bs': Method('resnet32_nbn_balanced_softmax'),
    'ride': Method('resnet32_ride_balanced_softmax', one_seed=True),
    'ride_nbn_lr': Method('resnet32_ride_nbn_lr', one_seed=True),
    'nbn_released_gradient': Method('resnet32_nbn', ('--model-kwargs', 'gradient=released')),
    'nbn_alpha_per_layer': Method('resnet32_nbn', ('--model-kwargs', 'share_alpha=False')),
}


def main() -> None:
    args = _parse()
    runs = [(name, seed) for index, seed in enumerate(args.seeds) for name in args.methods
            if not (index and METHODS[name].one_seed)]
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(lambda run: _train(args, *run), runs))
    failed = [f'{name}-s{seed}' for (name, seed), ok in zip(runs, outcomes, strict=True) if not ok]
    if failed:
        sys.exit(f'not done, see above and train.txt in their folders: {", ".join(failed)}')


def _train(args: argparse.Namespace, name: str, seed: int) -> bool:
    run = f'{name}-s{seed}'
    folder = Path(args.output, run)
    method = METHODS[name]
    flags = ['--config', f'cifar100_lt/{method.config}', '--data-dir', args.data_dir,
             '--train-list', args.train_list, '--test-list', args.test_list, '--seed', str(seed),
             *method.flags, '--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--workers', '0',
             '--device', args.device,
             *(['--epochs', str(args.epochs)] if args.epochs else []), *args.train_flags]
    command = [sys.executable, str(TRAIN), *flags, '--output', args.output, '--experiment', run, '--resume', 'auto']
    shown = ' '.join(['python train.py', *('/data/cifar100_png' if flag == args.data_dir else flag for flag in flags)])
    about = folder / 'hardware.json'
    if about.exists() and json.loads(about.read_text())['command'] != shown:
        print(f'{run}: was begun by another command, see {about}; give another --output', flush=True)
        return False
    if (folder / 'test.json').exists():
        print(f'{run}: there already', flush=True)
        return True
    write_text_atomic(about, json.dumps({
        'command': shown, 'hardware': _hardware(args), 'torch': torch.__version__.partition('+')[0],
        'date': time.strftime('%Y-%m-%d')}, indent=2) + '\n')
    start = time.time()
    with open(folder / 'train.txt', 'a') as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT,
                              env={**os.environ, 'OMP_NUM_THREADS': str(args.threads)}).returncode
    minutes = (time.time() - start) / 60
    print(f'{run}: {"done" if code == 0 else "failed"} after {minutes:.1f} minutes', flush=True)
    return code == 0


def _hardware(args: argparse.Namespace) -> str:
    if args.device.startswith('cuda'):
        return f'{torch.cuda.get_device_name()}, {args.jobs} runs at a time'
    cpu = next((line.partition(':')[2].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')),
               platform.processor())
    return f'{cpu}, {args.threads} of {os.cpu_count()} cores, {args.jobs} runs at a time'


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def _parse() -> argparse.Namespace:
    argv = sys.argv[1:]
    border = argv.index('--') if '--' in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='folder of the images and their lists')
    parser.add_argument('--train-list', default='CIFAR100_LT_if100_train.txt')
    parser.add_argument('--test-list', default='CIFAR100_LT_test.txt')
    parser.add_argument('--output', default='output/zoo')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='NAME')
    parser.add_argument('--seeds', nargs='+', type=int, default=[42, 43, 44])
    parser.add_argument('--epochs', type=int, help="default: the recipe's")
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--jobs', type=int, default=1, help='runs side by side')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of a run')
    args = parser.parse_args(argv[:border])
    args.train_flags = argv[border + 1:]
    return args


if __name__ == '__main__':
    main()

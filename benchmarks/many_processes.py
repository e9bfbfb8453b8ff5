"""What a run of many processes costs each of them beside the pictures: one rank's share of iNat21, measured here.

A training set with as many classes and pictures as iNat21 (10,000 and 2.7 million, of a long tail) is there as labels
alone. For each number of processes P the script becomes rank P / 2 of them and takes

- start-up: CPU seconds from an index of shards on disk to labels, class counts and groups of samples, and memory;
- every sampler: CPU seconds to draw an epoch and keep this rank's part;
- a stream: CPU seconds to plan this rank's part of an epoch over 2,700 shards for 8 workers;
- evaluation: CPU seconds to count this rank's share of the 100,000 test pictures, from random logits, and to sum up
  what P processes found, with the bytes that each of them sends. The sum is taken in this process, over the 2 log2 P
  steps that a tree takes; the network is not measured.

No other process is started and no picture is read. Times are this machine's, one thread.

    python benchmarks/many_processes.py --json many_processes.json
    python benchmarks/many_processes.py --images 20000 --classes 100 --processes 1 4
"""
import argparse
import json
import math
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nbn_timm.data import ClassCounts
from nbn_timm.data.shard_stream import ShardStream, TrainReading
from nbn_timm.data.shards import ShardIndex
from nbn_timm.evaluation import LongTailEvaluator
from nbn_timm.files import write_text_atomic
from nbn_timm.samplers import SAMPLERS, create_sampler
from nbn_timm.samplers.groups import ClassGroups

IMAGES, CLASSES, TEST_IMAGES = 2_700_000, 10_000, 100_000
PER_SHARD, WORKERS, BATCH, EPOCHS = 1000, 8, 128, 90

T = TypeVar('T')


def clock(step: Callable[[], T]) -> tuple[T, float]:
    """What a step gives, and its CPU seconds."""
    begun = time.process_time()
    result = step()
    return result, time.process_time() - begun


def peak(step: Callable[[], T]) -> tuple[T, float, float]:
    """What a step gives, the megabytes that it leaves allocated, and those that it has at most."""
    tracemalloc.start()
    result = step()
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, kept / 1e6, most / 1e6


def labels_of(images: int, classes: int) -> np.ndarray:
    """Labels of a long tail in random order; each class has one picture at least."""
    weights = 500.0 ** -np.linspace(0, 1, classes)
    counts = 1 + np.floor(weights / weights.sum() * (images - classes)).astype(np.int64)
    counts[0] += images - counts.sum()
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes), counts))


def index_of(targets: np.ndarray) -> ShardIndex:
    """An index of shards with these labels."""
    images = np.bincount(np.arange(len(targets)) // PER_SHARD)
    return ShardIndex(tuple(f'train-{shard:05}.tar' for shard in range(len(images))), (None,) * len(images), images,
                      targets)


def start(path: Path) -> tuple[ShardIndex, ClassCounts, ClassGroups]:
    """What every process does before its first epoch."""
    index = ShardIndex.read(path)
    return index, ClassCounts.from_targets(index.targets, None, 'shards'), ClassGroups.from_targets(index.targets)


def of_process(rank: int, processes: int, path: Path) -> dict[str, Any]:
    """What it costs to be one of so many processes."""
    _, kept, most = peak(lambda: start(path))
    (index, counts, groups), seconds = clock(lambda: start(path))
    found: dict[str, Any] = {'processes': processes, 'start_s': seconds, 'start_kept_mb': kept, 'start_peak_mb': most,
                             'samplers': {}}
    for name in sorted(SAMPLERS):
        sampler = create_sampler(name, index.targets, counts, 0, rank, processes, EPOCHS)
        sampler.__dict__['groups'] = groups  # every run makes them once; they are in the time of the start
        taken, seconds = clock(lambda sampler=sampler: list(sampler))  # type: ignore[misc]
        _, kept, most = peak(lambda sampler=sampler: iter(sampler))  # type: ignore[misc]
        found['samplers'][name] = {'epoch_s': seconds, 'images': len(taken), 'kept_mb': kept, 'peak_mb': most}
    sampler = create_sampler('class_balanced', index.targets, counts, 0, rank, processes, EPOCHS)
    sampler.__dict__['groups'] = groups
    reading = TrainReading(ShardStream('', index), sampler, BATCH, False, WORKERS)
    _, found['stream_epoch_s'] = clock(lambda: reading.set_epoch(1))
    found['stream_pieces'] = sum(map(len, reading.pieces or ()))
    found |= evaluation(processes, counts)
    return found


def evaluation(processes: int, counts: ClassCounts) -> dict[str, float]:
    """Counting this process's share of the test pictures, and summing up what all processes have counted."""
    evaluator = LongTailEvaluator(counts.num_classes, counts)
    images = max(1, TEST_IMAGES // processes)
    number = min(images, 512)  # more take the same time each
    output = torch.randn(number, counts.num_classes)
    target = torch.randint(counts.num_classes, (number,))
    _, seconds = clock(lambda: [evaluator.update(output[i:i + BATCH], target[i:i + BATCH])
                                for i in range(0, number, BATCH)])
    sums = torch.cat([evaluator.class_correct, evaluator.class_total, evaluator.class_predicted,
                      evaluator.losses.parts, evaluator.confidences.flatten()])
    other = sums.clone()
    steps = 2 * math.ceil(math.log2(processes)) if processes > 1 else 0
    _, reduction = clock(lambda: [sums.add_(other) for _ in range(steps)])
    _, report = clock(evaluator.compute)
    return {'evaluation_s': seconds * images / number, 'reduction_s': reduction, 'reduction_bytes': 8 * len(sums),
            'report_s': report}


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=IMAGES, metavar='N')
    parser.add_argument('--classes', type=int, default=CLASSES, metavar='C')
    parser.add_argument('--processes', type=int, nargs='+', default=[1, 8, 64], metavar='P')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    if args.images < args.classes or min(args.processes) < 1 or args.classes < 2:
        parser.error('give at least two classes, an image of each, and one process')
    torch.set_num_threads(1)
    about = {'images': args.images, 'classes': args.classes, 'device': platform.machine(), 'numpy': np.__version__,
             'torch': torch.__version__}
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'train.index.json')
        _, made = clock(lambda: index_of(labels_of(args.images, args.classes)).write(path))
        print(f'index of {path.stat().st_size / 1e6:.1f} MB, made in {made:.2f} s')
        rows = []
        for processes in args.processes:
            row = of_process(processes // 2, processes, path)
            rows.append(row)
            print(f'\n{processes} processes, rank {processes // 2}: start {row["start_s"]:.2f} s, keeps '
                  f'{row["start_kept_mb"]:.0f} MB, at most {row["start_peak_mb"]:.0f} MB; stream epoch '
                  f'{row["stream_epoch_s"]:.2f} s, {row["stream_pieces"]} pieces of shards')
            print(f'evaluation {row["evaluation_s"]:.2f} s for its share, reduction {1000 * row["reduction_s"]:.2f} ms '
                  f'of {row["reduction_bytes"] / 1000:.0f} kB, report {row["report_s"]:.3f} s')
            print(f'{"sampler":<24}{"epoch s":>9}{"images":>10}{"kept MB":>9}{"peak MB":>9}')
            for name, of_sampler in row['samplers'].items():
                print(f'{name:<24}{of_sampler["epoch_s"]:>9.3f}{of_sampler["images"]:>10}{of_sampler["kept_mb"]:>9.1f}'
                      f'{of_sampler["peak_mb"]:>9.1f}', flush=True)
    if args.json:
        write_text_atomic(args.json, json.dumps({**about, 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()

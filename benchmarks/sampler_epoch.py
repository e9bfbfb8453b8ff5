"""What drawing an epoch costs: every sampler on a training set of the size of iNaturalist 2018.

An epoch is what a data loader iterates over, all dataset indices of one process as a list. Each sampler takes turns
with instance-balanced sampling, and class-aware sampling with a plain-Python generator of the same definition, so that
a busy machine slows both alike; the ratio of their median times is the figure to quote, the times themselves are this
machine's. Images are grouped by class once in a run, which only the time of the first epoch includes.

    python benchmarks/sampler_epoch.py --repeats 20 --json sampler_epoch.json
    python benchmarks/sampler_epoch.py --counts inat18_train_class_counts.json
"""
import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch

from nbn_timm.data import ClassCounts
from nbn_timm.files import write_text_atomic
from nbn_timm.samplers import SAMPLERS, create_sampler

EPOCHS = 90
NUM_CLASSES, NUM_IMAGES = 8142, 437_513  # of iNaturalist 2018


@dataclass(frozen=True)
class Timing:
    """Median times of an epoch and of what it is compared with, in milliseconds."""

    sampler: str
    against: str
    images: int  # of an epoch
    first_ms: float  # the first epoch, with what is computed once
    epoch_ms: float
    against_ms: float
    ratio: float  # epoch_ms / against_ms
    pair_ratios: tuple[float, float, float]  # quartiles of the ratios of neighbouring runs: how far to trust `ratio`


def synthetic_counts() -> np.ndarray:
    """Images per class of a long tail from 1000 to 2 with as many classes and images as iNaturalist 2018."""
    place = np.linspace(0, 1, NUM_CLASSES)
    counts = np.floor(1000 * 500 ** -place ** 0.5163).astype(np.int64)
    counts[:NUM_IMAGES - counts.sum()] += 1
    return counts


def plain_class_aware(images: list[list[int]], k: int, seed: int) -> Iterator[int]:
    """Class-aware sampling as one writes it down: a shuffled cycle of classes, a shuffled cycle of images in each."""
    rng = random.Random(seed)

    def cycle(members: list[int]) -> Iterator[int]:
        while True:
            rng.shuffle(members)
            yield from members

    cycles = [cycle(members) for members in images]
    for label in cycle(list(range(len(images)))):
        yield from islice(cycles[label], k)


def clock(step: Callable[[], list[int]]) -> float:
    """Milliseconds of one call of `step`."""
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def compare(name: str, against: str, targets: np.ndarray, repeats: int) -> Timing:
    """Time a sampler and what it is compared with in turns."""
    sampler = create_sampler(name, targets, epochs=EPOCHS)

    def epoch() -> list[int]:
        sampler.set_epoch(sampler.epoch + 1)
        return list(sampler)

    if against == 'plain Python':
        images = [members.tolist() for members in np.split(sampler.groups.images, sampler.groups.first[1:])]

        def other() -> list[int]:
            return list(islice(plain_class_aware(images, sampler.k, sampler.epoch), len(targets)))
    else:
        other_sampler = create_sampler(against, targets, epochs=EPOCHS)

        def other() -> list[int]:
            return list(other_sampler)

    first = clock(epoch)
    times: list[list[float]] = [[], []]
    for run in range(repeats):
        for variant in (0, 1) if run % 2 else (1, 0):  # neither always follows the other
            times[variant].append(clock((epoch, other)[variant]))
    ours, theirs = map(statistics.median, times)
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
    return Timing(name, against, sampler.epoch_length, first, ours, theirs, ours / theirs, (low, middle, high))


def main() -> None:
    """Parse, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samplers', nargs='+', choices=sorted(SAMPLERS), default=sorted(SAMPLERS))
    parser.add_argument('--counts', metavar='FILE', help='training images per class (default: a synthetic long tail)')
    parser.add_argument('--repeats', type=int, default=20, metavar='N', help='measurements')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error('--repeats must be at least 2')
    counts = np.array(ClassCounts.from_file(args.counts).counts) if args.counts else synthetic_counts()
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    about = {
        'counts': args.counts or 'synthetic',
        'classes': len(counts),
        'images': len(targets),
        'device': platform.machine(),
        'numpy': np.__version__,
        'torch': torch.__version__,
        'repeats': args.repeats,
    }
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    print(f'{"sampler":<24}{"against":<20}{"images":>9}{"first ms":>10}{"epoch ms":>10}{"against ms":>12}{"ratio":>8}'
          '  quartiles over pairs')
    timings = []
    pairs = [(name, 'instance_balanced') for name in args.samplers]
    if 'class_aware' in args.samplers:
        pairs.append(('class_aware', 'plain Python'))
    for name, against in pairs:
        timing = compare(name, against, targets, args.repeats)
        timings.append(timing)
        print(f'{name:<24}{against:<20}{timing.images:>9}{timing.first_ms:>10.1f}{timing.epoch_ms:>10.1f}'
              f'{timing.against_ms:>12.1f}{timing.ratio:>8.3f}  '
              f'{"  ".join(f"{ratio:.3f}" for ratio in timing.pair_ratios)}', flush=True)
    if args.json:
        write_text_atomic(args.json, json.dumps({**about, 'timings': list(map(asdict, timings))}, indent=2) + '\n')


if __name__ == '__main__':
    main()

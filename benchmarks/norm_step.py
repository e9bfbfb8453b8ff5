"""What NBN costs: a training step and an evaluation forward of NBN against plain BatchNorm.

Both variants of a case live in one process and take turns, so that a busy machine slows both alike; the ratio of their
median times is the figure to quote, the times themselves are this machine's. On a CPU they are those of the process,
all threads together.

    python benchmarks/norm_step.py --threads 2 --repeats 20 --json norm_step.json
    python benchmarks/norm_step.py --device cuda --amp-dtype bfloat16 --channels-last
"""
import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from nbn_timm import NormalizedBatchNorm2d  # importing the package registers its models
from nbn_timm.files import write_text_atomic

NUM_CLASSES = 1000
MIN_SECONDS = 0.05  # one measurement repeats a shorter step until it has lasted about this long


@dataclass(frozen=True)
class Case:
    """Two modules with the same input, without NBN and with it."""

    shape: tuple[int, int, int, int]
    plain: Callable[[], nn.Module]
    nbn: Callable[[], nn.Module]


@dataclass(frozen=True)
class Settings:
    """How the steps are run."""

    device: torch.device
    amp_dtype: torch.dtype | None
    channels_last: bool
    warmup: int
    repeats: int


@dataclass(frozen=True)
class Timing:
    """Median times of a case's two variants, in milliseconds."""

    case: str
    mode: str  # 'train': forward, backward, SGD step; 'eval': forward
    batch: int
    plain_ms: float
    nbn_ms: float
    ratio: float  # nbn_ms / plain_ms
    pair_ratios: tuple[float, float, float]  # quartiles of the ratios of neighbouring runs: how far to trust `ratio`


def model_pair(plain: str, nbn: str) -> dict[str, Callable[[], nn.Module]]:
    """Constructors of two registered models."""
    return dict(plain=lambda: timm.create_model(plain, num_classes=NUM_CLASSES),
                nbn=lambda: timm.create_model(nbn, num_classes=NUM_CLASSES))


CASES = {
    'layer_64x1': Case((2, 64, 1, 1), lambda: nn.BatchNorm2d(64), lambda: NormalizedBatchNorm2d(64)),  # the call alone
    'layer_64x8': Case((128, 64, 8, 8), lambda: nn.BatchNorm2d(64), lambda: NormalizedBatchNorm2d(64)),
    'layer_2048x7': Case((32, 2048, 7, 7), lambda: nn.BatchNorm2d(2048), lambda: NormalizedBatchNorm2d(2048)),
    'resnet32': Case((128, 3, 32, 32), **model_pair('resnet32', 'resnet32_nbn')),
    'resnet50': Case((16, 3, 224, 224), **model_pair('resnet50', 'resnet50_nbn')),
}


def make_step(model: nn.Module, images: torch.Tensor, mode: str, settings: Settings) -> Callable[[], None]:
    """A closure that runs one step of `model`; a layer's loss is the sum of squares, a model's cross-entropy."""
    device = settings.device
    model = model.to(device).train(mode == 'train')
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    target = torch.arange(len(images), device=device) % NUM_CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    autocast = torch.autocast(device.type, dtype=settings.amp_dtype, enabled=settings.amp_dtype is not None)

    def train() -> None:
        with autocast:
            output = model(images)
            loss = F.cross_entropy(output, target) if output.ndim == 2 else output.float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def evaluate() -> None:
        with autocast:
            model(images)

    return train if mode == 'train' else evaluate


def time_case(name: str, case: Case, mode: str, settings: Settings) -> Timing:
    """Time both variants of a case in turns."""
    torch.manual_seed(0)
    images = torch.randn(case.shape, device=settings.device)
    if settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if case.shape[1] != 3 and mode == 'train':
        images.requires_grad_()  # inside a network a norm layer passes the gradient on
    steps = [make_step(create(), images, mode, settings) for create in (case.plain, case.nbn)]
    for step in steps:
        clock(step, settings.device, settings.warmup)
    calls = max(1, round(MIN_SECONDS / clock(steps[0], settings.device, 1)))
    times: list[list[float]] = [[], []]
    for run in range(settings.repeats):
        for variant in (0, 1) if run % 2 else (1, 0):  # neither always follows the other
            times[variant].append(1000 * clock(steps[variant], settings.device, calls))
    plain, nbn = map(statistics.median, times)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(name, mode, case.shape[0], plain, nbn, nbn / plain, (low, middle, high))


def clock(step: Callable[[], None], device: torch.device, calls: int) -> float:
    """Seconds per call of `step`: of the process on a CPU, including everything that it queued on a GPU."""
    on_gpu = device.type == 'cuda'
    seconds = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize(device)
    start = seconds()
    for _ in range(calls):
        step()
    if on_gpu:
        torch.cuda.synchronize(device)
    return (seconds() - start) / calls


def main() -> None:
    """Parse, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, metavar='N', help='CPU threads')
    parser.add_argument('--amp-dtype', choices=['bfloat16', 'float16'])
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--warmup', type=int, default=3, metavar='N', help='untimed steps')
    parser.add_argument('--repeats', type=int, default=20, metavar='N', help='measurements')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    if args.repeats < 2 or args.warmup < 1:
        parser.error('--repeats must be at least 2 and --warmup at least 1')
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
    settings = Settings(device, amp_dtype, args.channels_last, args.warmup, args.repeats)
    about = {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'precision': args.amp_dtype or 'float32',
        'channels_last': args.channels_last,
        'repeats': args.repeats,
    }
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    print(f'{"case":<14}{"mode":<7}{"batch":>5}{"BatchNorm ms":>14}{"NBN ms":>10}{"ratio":>8}  quartiles over pairs')
    timings = []
    for name in args.cases:
        for mode in ('train', 'eval'):
            timing = time_case(name, CASES[name], mode, settings)
            timings.append(timing)
            print(f'{name:<14}{mode:<7}{timing.batch:>5}{timing.plain_ms:>14.3f}{timing.nbn_ms:>10.3f}'
                  f'{timing.ratio:>8.3f}  {"  ".join(f"{ratio:.3f}" for ratio in timing.pair_ratios)}', flush=True)
    if args.json:
        write_text_atomic(args.json, json.dumps({**about, 'timings': list(map(asdict, timings))}, indent=2) + '\n')


if __name__ == '__main__':
    main()

"""Where a training step of several experts takes longer than their arithmetic, operation by operation.

Every operation of torch, forward and backward, is timed by the processor time of this thread, so other work on the
machine counts little. The networks take turns; of each operation the shortest of the rounds is kept, by its place in
the step. The step without any clock is timed too: what is left is Python, autograd and starting operations.

    python benchmarks/expert_profile.py --channels-last

`beyond` is what a kind of operation takes more than the arithmetic allows, in shares of the single network's step.
"""
import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from cost import multiply_adds
from expert_step import CASES, build, make_step
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = (  # by the first that an operation's name begins with
    ('convolution_backward', 'convolution, backward'),
    ('convolution', 'convolution, forward'),
    ('native_batch_norm_backward', 'BatchNorm, backward'),
    ('native_batch_norm', 'BatchNorm, forward'),
    ('relu', 'ReLU, forward'),
    ('threshold_backward', 'ReLU, backward'),
    ('add', 'adding maps and gradients'),
    ('cat', 'copying, joining and padding'),
    ('copy', 'copying, joining and padding'),
    ('clone', 'copying, joining and padding'),
    ('constant_pad', 'copying, joining and padding'),
    ('slice', 'copying, joining and padding'),
    ('new_zeros', 'copying, joining and padding'),
)
OTHER = 'all else: pooling, classifier, loss, optimizer'


class OperationClock(TorchDispatchMode):
    """Notes kind and milliseconds of each operation, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.noted.append((_kind(func, args), 1000 * (time.thread_time() - start)))
        return result


def _kind(func: Any, args: Any) -> str:
    name = func.overloadpacket.__name__
    if name == 'add_' and args[0].ndim < 4:  # the optimizer's; torch adds gradients of maps by `add`
        return OTHER
    kind = next((kind for start, kind in KINDS if name.startswith(start)), OTHER)
    if not kind.startswith('convolution'):
        return kind
    weight = args[2 if name == 'convolution_backward' else 1]
    return f'{kind}, {weight.shape[1]} to {weight.shape[0]} channels'


def profile(steps: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, Counter[str]], dict[str, float]]:
    """Milliseconds by kind of operation, and of a whole step without clock, of each network."""
    noted: dict[str, list[list[tuple[str, float]]]] = {name: [] for name in steps}
    whole: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            whole[name].append(1000 * (time.process_time() - start))
            with OperationClock() as clock:
                step()
            noted[name].append(clock.noted)
    sums: dict[str, Counter[str]] = {}
    for name, found in noted.items():
        sums[name] = Counter()
        for place in zip(*found, strict=True):
            sums[name][place[0][0]] += min(milliseconds for _, milliseconds in place)  # type: ignore[assignment]
    return sums, {name: min(times) for name, times in whole.items()}


def main() -> None:
    """Parse, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', choices=CASES, default='resnet32')
    parser.add_argument('--formulation', default='ours', help='of expert_step.py')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--rounds', type=int, default=8, metavar='N')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    single, several, model_args, size, batch = CASES[args.case]
    models = build(single, several, model_args, list(dict.fromkeys(('single', 'ours', args.formulation))))
    shape = (3, size, size)
    arithmetic = multiply_adds(models['ours'], shape) / multiply_adds(models['single'], shape)
    images = torch.randn(batch, 3, size, size)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    steps = {name: make_step(models[name], images, None, args.channels_last) for name in ('single', args.formulation)}
    for step in steps.values():
        step()
    sums, whole = profile(steps, args.rounds)
    (base, base_step), (ours, our_step) = ((sums[name], whole[name]) for name in steps)
    base['Python, autograd, starting operations'] = base_step - base.total()
    ours['Python, autograd, starting operations'] = our_step - ours.total()
    print(f'{args.case}, batch {batch}, one thread, {"channels_last" if args.channels_last else "contiguous"}, '
          f'{args.rounds} rounds, torch {torch.__version__}; arithmetic {arithmetic:.2f}')
    print(f'| operation | single (ms) | {args.formulation} (ms) | ratio | beyond |\n|---|---|---|---|---|')
    rows = [(kind, base[kind], ours[kind]) for kind in sorted({**base, **ours}, key=_order)]
    for kind, one, several_ms in [*_with_sums(rows), ('the whole step', base_step, our_step)]:
        ratio = f'{several_ms / one:.2f}' if one else ''
        beyond = (several_ms - arithmetic * one) / base_step
        print(f'| {kind} | {one:.0f} | {several_ms:.0f} | {ratio} | {beyond:+.3f} |')


def _order(kind: str) -> tuple[int, str]:
    known = [known for _, known in KINDS]
    return next((index for index, name in enumerate(known) if kind.startswith(name)), len(known)), kind


def _with_sums(rows: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The rows, with a sum behind the convolutions of either pass."""
    result: list[tuple[str, float, float]] = []
    for index, row in enumerate(rows):
        result.append(row)
        start = row[0].rpartition(', ')[0] if 'channels' in row[0] else None
        if start and not (index + 1 < len(rows) and rows[index + 1][0].startswith(start)):
            parts = [other for other in rows if other[0].startswith(start)]
            result.append((f'**{start}, all**', *(statistics.fsum(column) for column in zip(
                *(part[1:] for part in parts), strict=True))))
    return result


if __name__ == '__main__':
    main()

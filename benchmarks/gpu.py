"""What a GPU is asked in one visit: a few minutes of comparisons, then full recipes until the time is up.

    python benchmarks/gpu.py --output output/gpu --minutes 10 --data-dir /data/cifar100_lt -- \\
        --train-list lists/CIFAR100_LT_if100_train.txt --test-list lists/CIFAR100_LT_test.txt

One part after the other, each with a JSON file of its own in `--output`: a part whose file is there is left alone, so
that the same command goes on after any interruption. A part that fails leaves `PART.failed.json`, and the next one
begins; the command then ends with an error. What stands behind `--` goes to every `train.py`.

    steps       a training step of ResNeXt-50: timm's plain network, NBN, both compiled, and the published code's
                pattern (float32, contiguous, g and b normalised by separate operations)
    experts     a training step of RIDE against the single network, beside the ratio of their multiply-adds
    evaluation  images per second: plain, NBN, NBN folded
    cifar       three epochs of `train.py` with everything on the device, as images per second; needs --data-dir
    recipes     the runs of a list by train_list.py in the time that is left; needs --data-dir

Variants of a part live in one process and take turns; ratios of median times are the figures to quote. `--small` takes
networks and images that a CPU is done with in seconds, to see that all works on the day:

    python benchmarks/gpu.py --device cpu --small --output /tmp/gpu --minutes 2
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cost import multiply_adds
from expert_step import clock
from torch import nn
from train_list import about_this_machine, parse_before_train_flags

import nbn_timm  # registers the models
from nbn_timm import NormalizedBatchNorm2d
from nbn_timm.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
EPSILON = 1e-6  # of the published code


@dataclass(frozen=True)
class Visit:
    """What all parts share.

    Attributes:
        device: Where everything runs.
        small: Take sizes for a CPU.
        output: Folder of the JSON files.
        data_dir: Of CIFAR-100-LT; None leaves out what needs it.
        recipes: List of the runs for `train_list.py`.
        jobs: Runs side by side.
        seconds_left: How long there is.
        repeats: Measurements of each variant.
        train_flags: For every `train.py`.
    """

    device: torch.device
    small: bool
    output: Path
    data_dir: str | None
    recipes: Path
    jobs: int
    seconds_left: Callable[[], float]
    repeats: int
    train_flags: Sequence[str] = ()

    @property
    def names(self) -> tuple[str, str, int, int]:
        """Plain network, NBN network, image size, batch."""
        return ('resnet20', 'resnet20_nbn', 32, 8) if self.small else ('resnext50_32x4d', 'resnext50_nbn', 224, 128)

    @property
    def experts(self) -> tuple[str, str, dict[str, Any], int, int]:
        """Single network, network of experts, its arguments, image size, batch."""
        if self.small:
            return 'resnet32', 'resnet32_ride', {'reduced': True}, 32, 8
        return 'resnet50', 'resnet50_ride', {'reduced': False}, 224, 64


class PublishedNorm(NormalizedBatchNorm2d):
    """The published code's way: g and b divided by their length plus 1e-6 and multiplied by alpha in operations of
    their own (models/ResNext_NBN.py of yuxiangbao/NBN, commit 7365e21).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        alpha = self.scale.alpha
        weight = self.weight / (torch.norm(self.weight) + EPSILON) * alpha
        bias = self.bias / (torch.norm(self.bias) + EPSILON) * alpha
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, self.training,
                            0.1 if self.momentum is None else self.momentum, self.eps)


def published(model: nn.Module) -> nn.Module:
    """The network with NBN computed as in the published code, in place."""
    for module in model.modules():
        if type(module) is NormalizedBatchNorm2d:
            module.__class__ = PublishedNorm
    return model


def training_step(
        model: nn.Module,
        images: torch.Tensor,
        fast: bool = True,
        compile: bool = False,
) -> Callable[[], None]:
    """A closure that runs forward, backward and an SGD step.

    Args:
        model: Gives logits [B, C] or, of experts, [B, E, C], whose cross-entropies are added.
        images: On the device.
        fast: In bfloat16 on a GPU, and channels_last.
        compile: By `torch.compile`.
    """
    device = images.device
    model = model.to(device).train()
    if fast:
        model, images = model.to(memory_format=torch.channels_last), images.contiguous(  # type: ignore[call-overload]
            memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    network: Any = torch.compile(model) if compile else model
    target = torch.arange(len(images), device=device) % 10
    amp = fast and device.type == 'cuda'

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            logits = network(images)
            experts = logits if logits.ndim == 3 else logits[:, None]
            loss = F.cross_entropy(experts.float().flatten(0, 1), target.repeat_interleave(experts.shape[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluation_step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """A closure that runs the network in evaluation, in bfloat16 on a GPU, and channels_last."""
    device = images.device
    model = model.to(device).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda'):
            model(images)

    return step


def in_turns(steps: Mapping[str, Callable[[], None]], visit: Visit) -> dict[str, float]:
    """Median milliseconds of each step, after three untimed ones.

    Raises:
        TimeoutError: The time was up before the first round.
    """
    for step in steps.values():
        for _ in range(3):
            if not visit.seconds_left():
                raise TimeoutError('the time was up before the first round')
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(visit.repeats):
        if turn and not visit.seconds_left():
            break
        for name in list(steps)[::1 if turn % 2 else -1]:  # none always follows the same one
            times[name].append(clock(steps[name], visit.device))
    return {name: statistics.median(values) for name, values in times.items()}


def against(times: Mapping[str, float], base: str) -> dict[str, Any]:
    """Times in milliseconds, and each as a ratio to one of them."""
    return {'ms': dict(times), 'base': base, 'ratio': {name: value / times[base] for name, value in times.items()}}


def measure_steps(visit: Visit) -> dict[str, Any]:
    """A training step, see the head of the file."""
    plain, nbn, size, batch = visit.names
    images = torch.randn(batch, 3, size, size, device=visit.device)
    steps = {
        plain: training_step(timm.create_model(plain), images),
        nbn: training_step(timm.create_model(nbn), images),
        'published pattern': training_step(published(timm.create_model(nbn, gradient='released')), images, fast=False),
    }
    if not visit.small:  # compiling takes a minute each
        steps |= {f'{name}, compiled': training_step(timm.create_model(name), images, compile=True)
                  for name in (plain, nbn)}
    found = against(in_turns(steps, visit), plain)
    ours = min(found['ms'][name] for name in found['ms'] if name.startswith(nbn))
    return {**found, 'ours against published': ours / found['ms']['published pattern']}


def measure_experts(visit: Visit) -> dict[str, Any]:
    """A training step of experts against the single network."""
    single, several, arguments, size, batch = visit.experts
    images = torch.randn(batch, 3, size, size, device=visit.device)
    networks = {single: timm.create_model(single), several: timm.create_model(several, **arguments)}
    networks[several].set_expert_logits()
    costs = {name: multiply_adds(network, (3, size, size)) for name, network in networks.items()}
    times = in_turns({name: training_step(network, images) for name, network in networks.items()}, visit)
    return {**against(times, single), 'arithmetic': costs[several] / costs[single]}


def measure_evaluation(visit: Visit) -> dict[str, Any]:
    """Images per second in evaluation."""
    plain, nbn, size, batch = visit.names
    images = torch.randn(batch, 3, size, size, device=visit.device)
    network = timm.create_model(nbn).eval()
    steps = {plain: evaluation_step(timm.create_model(plain), images), nbn: evaluation_step(network, images),
             f'{nbn}, folded': evaluation_step(nbn_timm.fold_nbn(network), images)}
    found = against(in_turns(steps, visit), plain)
    return {**found, 'images per second': {name: 1000 * batch / value for name, value in found['ms'].items()}}


def measure_cifar(visit: Visit) -> dict[str, Any] | None:
    """Training of ResNet-32 by the command line, with images, augmentation and graphs on the device."""
    if visit.data_dir is None:
        return None
    fast = ['--no-amp']
    if visit.device.type == 'cuda':
        fast = ['--cuda-graphs', '--channels-last', '--amp', '--amp-dtype', 'bfloat16']
    folder, wanted = visit.output / 'cifar-run', 1 if visit.small else 3
    if len(epochs_of(folder)) < wanted:
        subprocess.run([
            sys.executable, str(ROOT / 'train.py'), '--config', 'cifar100_lt/resnet32_modern', '--data-dir',
            visit.data_dir, '--device', visit.device.type, '--output', str(visit.output), '--experiment', folder.name,
            '--epochs', str(wanted), '--resume', 'auto', *fast, *visit.train_flags], check=True,
            timeout=visit.seconds_left())
    epochs = epochs_of(folder)
    rate = max(epoch['train_images_per_second'] for epoch in epochs)
    return {'images per second': rate, 'seconds of 200 epochs': 200 * 10_847 / rate, 'epochs': len(epochs)}


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged so far, epoch by epoch."""
    log = folder / 'log.jsonl'
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def train_recipes(visit: Visit) -> dict[str, Any] | None:
    """Full recipes side by side, in the time that is left."""
    if visit.data_dir is None:
        return None
    on_gpu = ['--cuda-graphs'] if visit.device.type == 'cuda' else ['--no-amp']
    runs = visit.output / 'runs'
    done = subprocess.run([
        sys.executable, str(ROOT / 'benchmarks' / 'train_list.py'), str(visit.recipes), '--data-dir', visit.data_dir,
        '--output', str(runs), '--jobs', str(visit.jobs), '--minutes', f'{visit.seconds_left() / 60:.2f}', '--',
        '--device', visit.device.type, *on_gpu, *visit.train_flags])
    finished = sorted(path.parent.name for path in runs.glob('*/test.json'))
    print(f'{len(finished)} runs are finished: {", ".join(finished) or "none"}', flush=True)
    if done.returncode and visit.seconds_left():
        raise RuntimeError(f'runs have failed: see above, and train.txt in their folders in {runs}')
    return {'finished': finished} if done.returncode == 0 else None  # what is not done goes on in the next visit


PARTS: dict[str, Callable[[Visit], dict[str, Any] | None]] = {
    'steps': measure_steps, 'experts': measure_experts, 'evaluation': measure_evaluation, 'cifar': measure_cifar,
    'recipes': train_recipes}


def main() -> None:
    """Parse, then one part after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    parser.add_argument('--minutes', type=float, default=10.0)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART')
    parser.add_argument('--data-dir', metavar='DIR', help='folder of CIFAR-100-LT')
    parser.add_argument('--recipes', type=Path, default=ROOT / 'benchmarks' / 'full_recipes.txt', metavar='FILE')
    parser.add_argument('--jobs', type=int, default=16, metavar='N', help='runs side by side')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--repeats', type=int, default=10, metavar='N')
    args = parse_before_train_flags(parser)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        sys.exit('there is no GPU here: give --device cpu --small to try the script')
    end = time.monotonic() + 60 * args.minutes
    visit = Visit(torch.device(args.device), args.small, args.output, args.data_dir, args.recipes, args.jobs,
                  lambda: max(0.0, end - time.monotonic()), args.repeats, args.train_flags)
    args.output.mkdir(parents=True, exist_ok=True)
    about = about_this_machine(args.device, 1, torch.get_num_threads()) | {
        'command': f'python benchmarks/gpu.py {" ".join(sys.argv[1:])}', 'small': args.small}
    if failed := [name for name in args.parts if not run_part(name, visit, about)]:
        sys.exit(f'failed, see PART.failed.json in {args.output}: {", ".join(failed)}')


def run_part(name: str, visit: Visit, about: Mapping[str, Any]) -> bool:
    """Run a part unless it is done or the time is up, and write what it found; returns False where it failed."""
    file, failure = (visit.output / f'{name}{ending}.json' for ending in ('', '.failed'))
    if file.exists():
        print(f'{name}: there already, {file}', flush=True)
        return True
    if not visit.seconds_left():
        print(f'{name}: no time is left', flush=True)
        return True
    begun = time.monotonic()
    try:
        found = PARTS[name](visit)
    except (TimeoutError, subprocess.TimeoutExpired):
        print(f'{name}: not done, the time was up', flush=True)
        return True
    except Exception as error:  # the next parts are to have their turn
        write_text_atomic(failure, json.dumps({**about, 'error': repr(error), 'where': traceback.format_exc()},
                                              indent=2) + '\n')
        print(f'{name}: failed, {error!r}', flush=True)
        return False
    failure.unlink(missing_ok=True)
    if found is None:
        print(f'{name}: not done' + ('' if visit.data_dir else ', since there is no --data-dir'), flush=True)
        return True
    seconds = round(time.monotonic() - begun, 1)
    write_text_atomic(file, json.dumps({**about, 'seconds': seconds, **found}, indent=2) + '\n')
    print(f'{name}: {json.dumps(found)} ({seconds} s)', flush=True)
    return True


if __name__ == '__main__':
    main()

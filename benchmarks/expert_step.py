"""What experts cost: a training step of several experts against the single network, in four formulations.

    single     the single network of full width (its multiply-adds are the unit of the arithmetic)
    ours       this package's: stage by stage, a loop over the experts, concatenated between stages
    released   as the released codes do: one expert after the other from the shared maps to its logits
    grouped    the experts' convolutions as one grouped convolution
    batched    the experts' weights stacked, and `torch.vmap` over them; in float32 only, autocast fails under vmap

All live in one process and take turns, so that a busy machine slows them alike; ratios of median times are the figures
to quote. On a CPU the time is that of the process, all threads together, and on a GPU what a clock on the wall shows.
`grouped` and `batched` compute the same arithmetic with weights of their own.

    python benchmarks/expert_step.py --threads 1 --cases resnet32 --channels-last
    python benchmarks/expert_step.py --device cuda --amp-dtype bfloat16 --channels-last --batch 256
"""
import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from cost import multiply_adds
from torch.func import functional_call, stack_module_state

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.files import write_text_atomic
from nbn_timm.models.resnet_cifar import PadShortcut

CASES: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    # name: single network, network of experts, its arguments, image size, batch
    'resnet32': ('resnet32', 'resnet32_ride', dict(reduced=True), 32, 128),
    'resnet32_full_width': ('resnet32', 'resnet32_ride', dict(reduced=False), 32, 128),
    'resnet50': ('resnet50', 'resnet50_ride', dict(reduced=False), 224, 8),
}


class Released(nn.Module):
    """A network of experts, run expert by expert."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.network.forward_shared(x)
        logits = [self.network.forward_expert(shared, expert)[1] for expert in range(self.network.num_experts)]
        return torch.stack(logits, dim=1)


class GroupedPad(nn.Module):
    """`PadShortcut` of each expert on concatenated maps."""

    def __init__(self, shortcut: PadShortcut, experts: int, shared_input: bool) -> None:
        super().__init__()
        self.shortcut, self.experts, self.shared_input = shortcut, experts, shared_input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared_input:
            return self.shortcut(x).repeat(1, self.experts, 1, 1)
        parts = x.unflatten(1, (self.experts, -1)).flatten(0, 1)
        return self.shortcut(parts).unflatten(0, (-1, self.experts)).flatten(1, 2)


def widen(module: nn.Module, experts: int, shared_input: bool = False) -> nn.Module:
    """One expert's block as that of all experts, on concatenated maps."""
    if isinstance(module, nn.Conv2d):
        groups = module.groups if shared_input else module.groups * experts
        inputs = module.in_channels if shared_input else module.in_channels * experts
        return nn.Conv2d(inputs, module.out_channels * experts, module.kernel_size, module.stride, module.padding,
                         groups=groups, bias=False)
    if isinstance(module, nn.BatchNorm2d):
        return nn.BatchNorm2d(module.num_features * experts)
    if isinstance(module, PadShortcut):
        return GroupedPad(module, experts, shared_input)
    for name, child in list(module.named_children()):
        reads_input = name in ('conv1', 'downsample') or (name == '0' and shared_input)
        setattr(module, name, widen(child, experts, shared_input and reads_input))
    return module


class Grouped(nn.Module):
    """The experts' stages as grouped convolutions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = deepcopy(network)
        experts = network.num_experts
        for name in network.expert_stages:
            blocks = [block[0] for block in getattr(network, name)]
            shared = name == network.expert_stages[0]
            setattr(self.network, name, nn.Sequential(*[
                widen(deepcopy(block), experts, shared and index == 0) for index, block in enumerate(blocks)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


class Batched(nn.Module):
    """The experts' weights stacked: `torch.vmap` over the branches, whose BatchNorm keeps no running statistics."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        branches = [nn.Sequential(
            *[nn.Sequential(*[deepcopy(block[expert]) for block in getattr(network, name)])
              for name in network.expert_stages], network.global_pool, deepcopy(network.fc[expert]))
            for expert in range(network.num_experts)]
        for branch in branches:
            for module in branch.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.track_running_stats = False
                    module.running_mean = module.running_var = module.num_batches_tracked = None
        parameters, _ = stack_module_state(branches)
        self.names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())
        self.branch = [branches[0].to('meta')]  # in a list: no module of this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.network.forward_shared(x)

        def run(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            return functional_call(self.branch[0], parameters, (shared,))

        return torch.vmap(run)(dict(zip(self.names, self.stacked, strict=True))).transpose(0, 1)


def build(single: str, several: str, model_args: dict[str, Any], formulations: list[str]) -> dict[str, nn.Module]:
    """The networks to time, by name."""
    network = timm.create_model(several, **model_args)
    network.set_expert_logits()
    makers: dict[str, Callable[[], nn.Module]] = {
        'single': lambda: timm.create_model(single, num_classes=network.num_classes),
        'ours': lambda: network,
        'released': lambda: Released(deepcopy(network)),
        'grouped': lambda: Grouped(network),
        'batched': lambda: Batched(deepcopy(network)),
    }
    return {name: makers[name]() for name in formulations}


def make_step(model: nn.Module, images: torch.Tensor, amp_dtype: torch.dtype | None, channels_last: bool):
    """A closure that runs forward, backward and an SGD step; the loss is the sum of the experts' cross-entropies."""
    model = model.to(images.device).train()
    if channels_last and not isinstance(model, Batched):  # stacked weights have five dimensions
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.arange(len(images), device=images.device) % 10

    def step() -> None:
        with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
            experts = logits if logits.ndim == 3 else logits[:, None]
            loss = F.cross_entropy(experts.float().flatten(0, 1), target.repeat_interleave(experts.shape[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clock(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of one step: of the process on a CPU, including everything that it queued on a GPU."""
    if device.type != 'cuda':
        start = time.process_time()
        step()
        return 1000 * (time.process_time() - start)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Parse, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--formulations', nargs='+', default=['single', 'ours', 'released', 'grouped', 'batched'])
    parser.add_argument('--experts', type=int, default=3, metavar='N')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, metavar='N')
    parser.add_argument('--batch', type=int, metavar='N')
    parser.add_argument('--amp-dtype', choices=['bfloat16', 'float16'])
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--repeats', type=int, default=10, metavar='N')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error('--repeats must be at least 2, as quartiles need two')
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    about = {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
        'threads': torch.get_num_threads(), 'torch': torch.__version__, 'precision': args.amp_dtype or 'float32',
        'channels_last': args.channels_last, 'experts': args.experts, 'repeats': args.repeats}
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    print('| case | formulation | multiply-adds | ratio | step (ms) | ratio | quartiles over rounds |')
    print('|---|---|---|---|---|---|---|')
    found = []
    for case in args.cases:
        single, several, model_args, size, batch = CASES[case]
        torch.manual_seed(0)
        wanted = [name for name in args.formulations if not (args.amp_dtype and name == 'batched')]
        models = build(single, several, {**model_args, 'num_experts': args.experts}, wanted)
        costs = {name: multiply_adds(model, (3, size, size)) for name, model in models.items()
                 if name in ('single', 'ours')}
        images = torch.randn(args.batch or batch, 3, size, size, device=device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
        steps = {name: make_step(model, images, amp_dtype, args.channels_last) for name, model in models.items()}
        for step in steps.values():
            for _ in range(2):
                step()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(args.repeats):
            for name in list(steps)[::1 if turn % 2 else -1]:
                times[name].append(clock(steps[name], device))
        for name, values in times.items():
            ratios = [one / base for one, base in zip(values, times['single'], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            ratio = statistics.median(values) / statistics.median(times['single'])
            cost = costs.get(name, costs['ours'])
            print(f'| {case} | {name} | {cost / 1e6:.1f} M | {cost / costs["single"]:.2f} | '
                  f'{statistics.median(values):.0f} | {ratio:.2f} | {low:.2f} to {high:.2f} |', flush=True)
            found.append(dict(case=case, formulation=name, multiply_adds=cost, ms=statistics.median(values),
                              ratio=ratio, quartiles=[low, high]))
    if args.json:
        write_text_atomic(args.json, json.dumps({**about, 'steps': found}, indent=2) + '\n')


if __name__ == '__main__':
    main()

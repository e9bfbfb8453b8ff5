"""What routing saves: images per second of a routed network in evaluation, against the share of experts it uses.

    all experts    the network without a router
    routed         the same network with a router, whose threshold is moved so that a given share of the images goes on

All live in one process and take turns, so that a busy machine slows them alike; on a CPU the time is that of the
process. `arithmetic` is the share of the multiply-adds, decisions included, `time` that of the time: where the two
agree, images that stop early cost nothing afterwards. Weights are random, since only the number of experts counts.

    python benchmarks/routed_speed.py --threads 1 --channels-last

With --profile it prints instead, of each case, what its operations take by torch.profiler, as shares of the time of the
network without a router: the shortest of the rounds of each operation.
"""
import argparse
import json
import platform
import statistics
from copy import deepcopy

import timm
import torch
from cost import multiply_adds
from expert_step import clock
from torch.profiler import ProfilerActivity, profile

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.files import write_text_atomic
from nbn_timm.models import RoutedExperts


@torch.no_grad()
def set_share(model: RoutedExperts, images: torch.Tensor, share: float) -> None:
    """Move the router's threshold so that this share of the images goes on after the first expert."""
    model.router.decide.bias.zero_()
    decisions = model.train()(images)[0][:, 0].sort(descending=True).values
    model.eval()
    passed = round(share * len(images))
    bounds = torch.cat([decisions[:1] + 1, decisions, decisions[-1:] - 1])
    model.router.decide.bias.fill_(-bounds[passed:passed + 2].mean())


@torch.no_grad()
def settle(network: torch.nn.Module, images: torch.Tensor) -> None:
    """Running statistics of random weights, without which features vanish or explode."""
    network.train()
    for _ in range(3):
        network(images)
    network.eval()


def show_profile(models: dict[str, torch.nn.Module], images: torch.Tensor, rounds: int) -> None:
    """The longest operations of each case, and choosing and joining images, as shares of the first case."""
    spent: dict[str, dict[str, float]] = {name: {} for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            with profile(activities=[ProfilerActivity.CPU]) as found, torch.inference_mode():
                model(images)
            for row in found.key_averages():
                spent[name][row.key] = min(row.self_cpu_time_total, spent[name].get(row.key, float('inf')))
    first = next(iter(spent.values()))
    whole = sum(first.values())
    longest = sorted(first, key=lambda key: -first[key])[:4]
    print(f'| operation | {" | ".join(models)} |\n|---|{"---|" * len(models)}')
    for key in (*longest, 'aten::index', 'aten::index_put_', 'aten::cat'):
        print(f'| {key} | {" | ".join(f"{of.get(key, 0) / whole:.3f}" for of in spent.values())} |')
    print(f'| all | {" | ".join(f"{sum(of.values()) / whole:.3f}" for of in spent.values())} |')


def main() -> None:
    """Parse, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet32_ride')
    parser.add_argument('--size', type=int, default=32, metavar='PIXELS')
    parser.add_argument('--batch', type=int, default=128, metavar='N')
    parser.add_argument('--experts', type=int, default=3, metavar='N')
    parser.add_argument('--shares', nargs='+', type=float, default=[0, 0.25, 0.5, 0.75, 1], metavar='S',
                        help='of the images that go on after the first expert')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, metavar='N')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--repeats', type=int, default=15, metavar='N')
    parser.add_argument('--json', metavar='FILE')
    parser.add_argument('--profile', action='store_true', help='where the time goes')
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error('--repeats must be at least 2, as quartiles need two')
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size) * torch.linspace(0.2, 2, args.batch)[:, None, None, None]
    images = images.to(device, memory_format=memory_format)
    network = timm.create_model(args.model, num_experts=args.experts).to(device, memory_format=memory_format)
    settle(network, images)
    models: dict[str, torch.nn.Module] = {'all experts': network}
    used = {'all experts': torch.full((args.batch,), args.experts)}
    costs = {'all experts': float(multiply_adds(network, (3, args.size, args.size)))}
    for share in args.shares:
        name = f'{share:.0%} go on'
        model = RoutedExperts(deepcopy(network), top_k=min(30, network.num_classes)).to(device)
        set_share(model, images, share)
        with torch.inference_mode():
            used[name] = model.route(images)[1].cpu()
        amounts = torch.tensor(model.multiply_adds((3, args.size, args.size)), dtype=torch.float64)
        models[name], costs[name] = model, amounts[used[name] - 1].mean().item()

    if args.profile:
        show_profile(models, images, args.repeats)
        return
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(-1, args.repeats):  # the first round warms up
            for name in list(models)[::1 if turn % 2 else -1]:
                spent = clock(lambda name=name: models[name](images), device)  # type: ignore[misc]
                if turn >= 0:
                    times[name].append(spent)

    about = {'model': args.model, 'device': args.device, 'machine': platform.machine(),
             'threads': torch.get_num_threads(), 'torch': torch.__version__, 'batch': args.batch,
             'channels_last': args.channels_last, 'experts': args.experts, 'repeats': args.repeats}
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    print('| | experts used | share | arithmetic | time | quartiles over rounds | images/s |')
    print('|---|---|---|---|---|---|---|')
    whole = multiply_adds(network, (3, args.size, args.size))
    found = []
    for name, values in times.items():
        given = used[name].double().mean().item()
        arithmetic = costs[name] / whole
        ratios = [one / base for one, base in zip(values, times['all experts'], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        speed = 1000 * args.batch / statistics.median(values)
        print(f'| {name} | {given:.2f} | {given / args.experts:.2f} | {arithmetic:.2f} | {ratio:.2f} | '
              f'{low:.2f} to {high:.2f} | {speed:.0f} |')
        found.append(dict(case=name, experts=given, arithmetic=arithmetic, ratio=ratio, quartiles=[low, high],
                          images_per_second=speed))
    if args.json:
        write_text_atomic(args.json, json.dumps({**about, 'cases': found}, indent=2) + '\n')


if __name__ == '__main__':
    main()

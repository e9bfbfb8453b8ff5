"""What folding is worth: inference of the network as trained, folded, as timm's own, and with merged experts.

    original   as trained, with NBN
    folded     NBN folded into BatchNorm, what `nbn-export` writes for timm
    timm       timm's own model of that architecture with new weights; of the CIFAR networks, the plain one of this
               package, since timm has none
    merged     of several experts: folded, and their heads merged in one

All live in one process and take turns, so that a busy machine slows them alike; the ratios of times within a round are
the figures to quote, with their quartiles. A ratio of `folded` to `timm` of 1 says that nothing of NBN is left.

    python benchmarks/deploy_speed.py --threads 1
    python benchmarks/deploy_speed.py --threads 2 --cases resnet50 --batch 8
"""
import argparse
import json
import platform
from collections.abc import Callable

import timm
import torch
import torch.nn as nn

from nbn_timm import fold_nbn
from nbn_timm.deploy import deployed, interleaved
from nbn_timm.files import write_text_atomic

CASES: dict[str, tuple[str, str | None, int]] = {  # name: our network, the plain one, image size
    'resnet50': ('resnet50_nbn_lr', 'resnet50', 224),
    'resnet32': ('resnet32_nbn_lr', 'resnet32', 32),
    'resnet32_ride': ('resnet32_ride_nbn_lr', None, 32),
    'resnet50_ride': ('resnet50_ride_nbn_lr', None, 224),
}


def build(ours: str, plain: str | None) -> dict[str, nn.Module]:
    """The networks to time, by name."""
    original = timm.create_model(ours).eval()
    models: dict[str, nn.Module] = {'original': original, 'folded': fold_nbn(original)}
    if plain is None:
        models['merged'] = deployed(original)
    else:
        models['timm'] = timm.create_model(plain, num_classes=original.num_classes).eval()
    return models


def main() -> None:
    """Parse, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--threads', type=int, metavar='N')
    parser.add_argument('--batch', type=int, default=1, metavar='N')
    parser.add_argument('--repeats', type=int, default=50, metavar='N')
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    about = {'machine': platform.machine(), 'threads': torch.get_num_threads(), 'torch': torch.__version__,
             'timm': timm.__version__, 'batch': args.batch, 'repeats': args.repeats}
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    print('| case | form | ms | of the original | quartiles | of the plain one | quartiles |')
    print('|---|---|---|---|---|---|---|')
    found = []
    for case in args.cases:
        ours, plain, size = CASES[case]
        torch.manual_seed(0)
        images = torch.randn(args.batch, 3, size, size)

        def call(model: nn.Module, images: torch.Tensor = images) -> Callable[[], torch.Tensor]:
            return lambda: model(images)

        with torch.inference_mode():
            timings = interleaved({name: call(model) for name, model in build(ours, plain).items()}, args.repeats)
        for name, timing in timings.items():
            low, middle, high = timing.ratio(timings['original'])
            row = f'| {case} | {name} | {timing.median:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |'
            entry = dict(case=case, form=name, ms=timing.median, of_the_original=[low, middle, high])
            if 'timm' in timings:
                low, middle, high = timing.ratio(timings['timm'])
                row += f' {middle:.3f} | {low:.3f} to {high:.3f} |'
                entry['of_the_plain_one'] = [low, middle, high]
            else:
                row += ' | |'
            print(row, flush=True)
            found.append(entry)
    if args.json:
        write_text_atomic(args.json, json.dumps({**about, 'forms': found}, indent=2) + '\n')


if __name__ == '__main__':
    main()

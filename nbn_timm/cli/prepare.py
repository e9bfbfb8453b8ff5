"""Fetch what is published of a benchmark, check it, and say which images are missing.

    nbn-prepare imagenet_lt --data-dir /data/imagenet
    nbn-prepare cifar100_lt --data-dir /data/cifar100_png   # of image files: which draw their lists are
"""
import argparse
import sys
from dataclasses import fields

from nbn_timm.config import add_flag
from nbn_timm.data.settings import OF_THE_DRAW, DataSettings
from nbn_timm.datasets import benchmarks
from nbn_timm.errors import InputError, run_cli
from nbn_timm.settings import fields_of


def main(argv: list[str] | None = None) -> None:
    """Prepare a benchmark, as the command line says.

    Raises:
        InputError: Something cannot be fetched or is not as published, images are missing, or a flag has no effect.
    """
    args = vars(create_parser().parse_args(argv))
    benchmark = benchmarks()[args['dataset']]
    drawn = benchmark.factor is not None
    if not drawn and args.keys() & OF_THE_DRAW:
        raise InputError(f'{benchmark.name} is not drawn here, so that --imbalance-... have no effect on what is '
                         'prepared: leave them out')
    known = {field.name for field in fields(DataSettings)}
    benchmark.prepare(DataSettings(**{name: value for name, value in args.items() if name in known}), args['source'])


def console() -> int:
    """Console command `nbn-prepare`."""
    return run_cli(main, 'nbn-prepare')


def create_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog='nbn-prepare', description=(__doc__ or '').splitlines()[0])
    known = benchmarks()
    parser.add_argument('dataset', choices=known, metavar='benchmark', help=', '.join(known))
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='image root; receives what is fetched')
    parser.add_argument('--source', metavar='URL|DIR', help='other place of the published lists or of the archive '
                        '(default: where they are published); for CIFAR as image files a folder with CIFAR itself, by '
                        'which they are known')
    drawn = [f'{name}: {benchmark.factor:g}' for name, benchmark in known.items() if benchmark.factor is not None]
    group = parser.add_argument_group(f"the draw, where there is one (factor: {', '.join(drawn)})")
    for declared in fields_of(DataSettings):
        if declared.name in OF_THE_DRAW:
            add_flag(group, declared)
    return parser


if __name__ == '__main__':
    sys.exit(console())

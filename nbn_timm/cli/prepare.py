"""Fetch what is published of a benchmark, check it, and say which images are missing.

    nbn-prepare imagenet_lt --data-dir /data/imagenet
"""
import argparse
import sys
from dataclasses import fields

from nbn_timm.config import COUNT, between
from nbn_timm.data import DataSettings
from nbn_timm.data.longtail import PROFILES
from nbn_timm.datasets import benchmarks
from nbn_timm.errors import InputError, run_cli


def main(argv: list[str] | None = None) -> None:
    """Prepare a benchmark, as the command line says.

    Raises:
        InputError: Something cannot be fetched or is not as published, images are missing, or a flag has no effect.
    """
    args = vars(_parser().parse_args(argv))
    benchmark = benchmarks()[args['dataset']]
    drawn = benchmark.factor is not None
    if not drawn and any(name.startswith('imbalance_') for name in args):
        raise InputError(f'{benchmark.name} is not drawn here, so that --imbalance-... have no effect on what is '
                         'prepared: leave them out')
    known = {field.name for field in fields(DataSettings)}
    benchmark.prepare(DataSettings(**{name: value for name, value in args.items() if name in known}), args['source'])


def console() -> int:
    """Console command `nbn-prepare`."""
    return run_cli(main, 'nbn-prepare')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='nbn-prepare', description=(__doc__ or '').splitlines()[0])
    known = benchmarks()
    parser.add_argument('dataset', choices=known, metavar='benchmark', help=', '.join(known))
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='image root; receives what is fetched')
    parser.add_argument('--source', metavar='URL|DIR', help='other place of the published lists or of the archive')
    drawn = [f'{name}: {benchmark.factor:g}' for name, benchmark in known.items() if benchmark.factor is not None]
    group = parser.add_argument_group('the draw, where there is one')
    group.add_argument('--imbalance-factor', type=between(1), default=argparse.SUPPRESS, metavar='X',
                       help=f"default: the benchmark's ({', '.join(drawn)})")
    group.add_argument('--imbalance-profile', choices=PROFILES, default=argparse.SUPPRESS,
                       help=f'default: {DataSettings.imbalance_profile}')
    group.add_argument('--imbalance-seed', type=COUNT, default=argparse.SUPPRESS, metavar='N',
                       help=f'default: {DataSettings.imbalance_seed}')
    return parser


if __name__ == '__main__':
    sys.exit(console())

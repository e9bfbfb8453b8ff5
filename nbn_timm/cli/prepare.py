"""Fetch a benchmark's published lists, check them, and say which images are missing.

    nbn-prepare imagenet_lt --data-dir /data/imagenet
"""
import argparse
import hashlib
import json
import os
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torchvision.datasets.utils import check_integrity

from nbn_timm.data.benchmarks import LIST_BENCHMARKS, LISTS_URL, ListBenchmark, ListFile
from nbn_timm.data.cifar_lt import CIFAR_CLASSES, CIFAR_FACTOR, load_cifar
from nbn_timm.data.classes import ClassCounts
from nbn_timm.data.lists import read_image_list
from nbn_timm.data.longtail import PROFILES, draw_long_tail
from nbn_timm.errors import InputError, run_cli
from nbn_timm.files import atomic_write, git_blob_id, write_text_atomic

TIMEOUT = 60  # seconds without a byte before a download is given up
SHOWN = 3  # missing images named per folder


def main(argv: list[str] | None = None) -> None:
    """Prepare a benchmark, as the command line says.

    Raises:
        InputError: A list cannot be fetched or is not the published one, or images are missing.
    """
    args = _parser().parse_args(argv)
    data_dir = Path(args.data_dir)
    if args.benchmark in CIFAR_CLASSES:
        prepare_cifar(
            args.benchmark, data_dir, args.source, args.imbalance_factor, args.imbalance_profile, args.imbalance_seed)
    else:
        prepare_lists(args.benchmark, data_dir, args.source or LISTS_URL)


def prepare_lists(name: str, data_dir: Path, source: str = LISTS_URL) -> None:
    """Put a list benchmark's published lists into a data folder and look for their images.

    Args:
        name: Key of `LIST_BENCHMARKS`.
        data_dir: Image root, which also receives the lists.
        source: Address or folder that holds `<benchmark folder>/<list>`; a folder may hold the lists directly.

    Raises:
        InputError: A list cannot be fetched or is not the published one, or images are missing.
    """
    benchmark = LIST_BENCHMARKS[name]
    lists = [obtain_list(part, benchmark, data_dir, source) for part in benchmark.lists]
    missing = total = 0
    for path in lists:
        rows = read_image_list(path, benchmark.num_classes)
        absent = report_missing(path.name, rows.paths, data_dir)
        missing += absent
        total += len(rows.paths)
    if missing:
        raise InputError(
            f"{name} is incomplete, {missing:,} of {total:,} images are missing in '{data_dir}': obtain "
            f'{benchmark.images}')
    print(f'{name} is complete: {total:,} images in {data_dir}')


def obtain_list(part: ListFile, benchmark: ListBenchmark, data_dir: Path, source: str) -> Path:
    """Find a published list in the data folder or fetch it there; its git blob id must be the published one.

    Raises:
        InputError: The list cannot be fetched, or has other bytes than the published one.
    """
    present = part.find(data_dir)
    if present is not None:
        _check_blob_id(present, part, f"'{present}'", 'remove it to fetch the published one')
        print(f'{part.name}: there already, as published')
        return present
    address = _locate(source, benchmark.folder, part.name)

    def fetch(temporary: Path) -> None:
        _copy(address, temporary)
        _check_blob_id(temporary, part, f"'{address}'", 'give another --source')

    atomic_write(data_dir / part.name, fetch)
    print(f'{part.name}: fetched from {address}, as published')
    return data_dir / part.name


def report_missing(list_name: str, paths: Iterable[str], data_dir: Path) -> int:
    """Print how many images of a list do not exist, by top folder, and return their number."""
    present: dict[str, int] = {}
    missing: dict[str, list[str]] = {}
    for path in paths:
        top = Path(path).parts[0]
        if os.path.isfile(data_dir / path):
            present[top] = present.get(top, 0) + 1
        else:
            missing.setdefault(top, []).append(path)
    for top in sorted(present.keys() | missing.keys()):
        absent = missing.get(top, [])
        total = present.get(top, 0) + len(absent)
        examples = ', '.join(absent[:SHOWN]) + (', ...' if len(absent) > SHOWN else '')
        print(f'{list_name}: {top}/: ' + (
            f'{len(absent):,} of {total:,} images missing: {examples}' if absent else f'all {total:,} images there'))
    return sum(map(len, missing.values()))


def prepare_cifar(
        name: str,
        data_dir: Path,
        source: str | None = None,
        factor: float = CIFAR_FACTOR,
        profile: str = 'exp',
        seed: int = 0,
) -> None:
    """Fetch CIFAR through torchvision and write `<benchmark>_<profile>_<factor>.json`, the draw's report.

    The report holds the images per class, the drawn indices' number and their SHA-256 (as little-endian int64, in
    order), by which two installations can compare their draws.

    Args:
        name: 'cifar10_lt' or 'cifar100_lt'.
        data_dir: Folder for torchvision's data and the report.
        source: Address or folder of torchvision's archive; None is its own place.
        factor: Imbalance factor.
        profile: 'exp' or 'step'.
        seed: Of the draw.

    Raises:
        InputError: The data cannot be fetched, or the draw's settings are wrong.
    """
    if source is not None:
        _fetch_cifar_archive(name, data_dir, source)
    data, names = load_cifar(name, data_dir, train=True, download=True)
    indices = draw_long_tail(data.targets, len(names), factor, profile, seed)
    counts = ClassCounts.from_targets(data.targets[indices], names, f'{name}, {profile} profile, factor {factor:g}')
    report = counts.to_dict() | {
        'imbalance_factor': factor,
        'imbalance_profile': profile,
        'imbalance_seed': seed,
        'size': len(indices),
        'indices_sha256': hashlib.sha256(np.asarray(indices, dtype='<i8').tobytes()).hexdigest(),
    }
    path = data_dir / f'{name}_{profile}_{factor:g}.json'
    write_text_atomic(path, json.dumps(report, indent=1) + '\n')
    split = ', '.join(f'{len(classes)} {shot}' for shot, classes in counts.shot_split().items())
    print(f'{name}: {len(indices):,} training images, {max(counts.train_images)} to {min(counts.train_images)} per '
          f'class ({split}); report in {path}')


def console() -> int:
    """Console command `nbn-prepare`."""
    return run_cli(main, 'nbn-prepare')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='nbn-prepare', description=(__doc__ or '').splitlines()[0])
    parser.add_argument('benchmark', choices=[*LIST_BENCHMARKS, *CIFAR_CLASSES])
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='image root; receives the lists')
    parser.add_argument('--source', metavar='URL|DIR', help='other place of the lists (or of the CIFAR archive)')
    group = parser.add_argument_group('the draw of CIFAR-LT')
    group.add_argument('--imbalance-factor', type=float, default=CIFAR_FACTOR, metavar='X')
    group.add_argument('--imbalance-profile', choices=PROFILES, default='exp')
    group.add_argument('--imbalance-seed', type=int, default=0, metavar='N')
    return parser


def _check_blob_id(path: Path, part: ListFile, place: str, remedy: str) -> None:
    found = git_blob_id(path)
    if found != part.blob_id:
        raise InputError(
            f'{place} is not the published {part.name} (git blob id {found[:12]} instead of {part.blob_id[:12]}): '
            f'{remedy}')


def _locate(source: str, folder: str, name: str) -> str:
    """Address of a file in `source`, a folder on the network or on disk."""
    if '://' in source:
        return f'{source.rstrip("/")}/{folder}/{name}' if folder else f'{source.rstrip("/")}/{name}'
    candidates = [path for path in (Path(source) / folder / name, Path(source) / name) if path.is_file()]
    if not candidates:
        raise InputError(f"'{name}' is not in '{source}': give the folder or address that holds it as --source")
    return str(candidates[0])


def _copy(address: str, target: Path) -> None:
    try:
        with (urllib.request.urlopen(address, timeout=TIMEOUT) if '://' in address else open(address, 'rb')) as source:
            content = source.read()
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{address}' cannot be fetched ({getattr(error, 'reason', None) or error}): check the connection, or "
            'fetch the file elsewhere and give its folder as --source') from error
    target.write_bytes(content)


def _fetch_cifar_archive(name: str, data_dir: Path, source: str) -> None:
    cifar = CIFAR_CLASSES[name]
    archive = data_dir / cifar.filename
    if check_integrity(archive, cifar.tgz_md5):
        return
    address = _locate(source, '', cifar.filename)

    def fetch(temporary: Path) -> None:
        _copy(address, temporary)
        if not check_integrity(temporary, cifar.tgz_md5):
            raise InputError(f"'{address}' is not the published {cifar.filename} (MD5 differs): give another --source")

    atomic_write(archive, fetch)


if __name__ == '__main__':
    sys.exit(console())

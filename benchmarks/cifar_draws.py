"""What `nbn-prepare` knows of CIFAR's order: digests of the labels and of LDAM's draws, for the datasets' files.

    python benchmarks/cifar_draws.py /data                       # a folder with CIFAR as torchvision has it
    python benchmarks/cifar_draws.py CIFAR-100_human.pt          # or a file of its labels in that order
    python benchmarks/cifar_draws.py /data --ldam LDAM-DRW       # and compare with the code of the paper

`CIFAR-100_human.pt` and `CIFAR-10_human.pt` of UCSC-REAL/cifar-10-100n have the labels as `clean_label`. With `--ldam`
each draw is also made by the authors' class, from a checkout of kaidic/LDAM-DRW, and compared place by place.
"""
import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision

from nbn_timm.data.longtail import draw_long_tail
from nbn_timm.datasets.cifar_draw import labels_sha256, places_sha256

DRAWS = (('exp', 10), ('exp', 50), ('exp', 100), ('exp', 200), ('step', 10), ('step', 100))


def read_labels(place: Path) -> list[np.ndarray]:
    """Labels of what is there, CIFAR-10's or CIFAR-100's or both."""
    if place.is_file():
        return [np.asarray(torch.load(place, weights_only=False)['clean_label'])]  # numpy arrays, in pickle
    return [np.asarray(cifar(str(place), train=True).targets)
            for cifar in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100)
            if (place / cifar.base_folder).is_dir()]


def by_ldam(checkout: Path, labels: np.ndarray, profile: str, factor: int) -> np.ndarray:
    """The places that the authors' class takes, on images that are their places."""
    class Stub:
        def __init__(self, *_: object) -> None:
            self.data, self.targets = np.arange(len(labels))[:, None], labels.tolist()

    with mock.patch.object(torchvision.datasets, 'CIFAR10', Stub), mock.patch.object(sys, 'path', [str(checkout)]):
        sys.modules.pop('imbalance_cifar', None)
        module = importlib.import_module('imbalance_cifar')
        drawn = getattr(module, f'IMBALANCECIFAR{labels.max() + 1}')('', profile, 1 / factor)
    return drawn.data[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('place', type=Path)
    parser.add_argument('--ldam', type=Path, help='checkout of the code of the paper')
    args = parser.parse_args()
    for labels in read_labels(args.place):
        print(f"labels '{labels_sha256(labels)}'")
        for profile, factor in DRAWS:
            places = draw_long_tail(labels, labels.max() + 1, factor, profile)
            same = '' if args.ldam is None else ', as by LDAM\'s code' if np.array_equal(
                places, by_ldam(args.ldam, labels, profile, factor)) else ", NOT as by LDAM's code"
            print(f"('{profile}', {factor}): '{places_sha256(places)}'  # {len(places):,} images{same}")


if __name__ == '__main__':
    main()

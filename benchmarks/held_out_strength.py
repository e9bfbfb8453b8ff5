"""Choose the strength of a prior after training, on images that the network has not seen.

    RUN=nbn_wide_shike_full_stage2-s42
    python validate.py --checkpoint output/full/$RUN/last.pth.tar --data-dir /data/cifar100_lt \\
        --test-list lists/CIFAR100_LT_if10_train.txt --logits-file held_out/$RUN.npz
    python benchmarks/held_out_strength.py held_out/*.npz --train-list lists/CIFAR100_LT_if100_train.txt \\
        --pool-list lists/CIFAR100_LT_if10_train.txt --data-dir /data/cifar100_lt

Of the logits z [N, C] of each image, z - s log p is taken, where p are the shares of the classes in training and s is
the strength (Menon et al., ICLR 2021; 0 leaves the network as it is). A balanced loss shifts the answers as far as
the training images need it. A network that knows these by heart may need more on others: a strength above 0. Images
of the pool that are in the training list are left out, and with them classes of which fewer than `--least` images
remain. The accuracy is the mean over the other classes. The strength with the best mean over all files is the one to
give `nbn-validate --logit-adjustment`. No test image is read.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from frontier import file_of, label_of, rows_of
from prior_strength import is_right, read_logits
from results_page import table

from nbn_timm.errors import InputError, run_cli

STRENGTHS = tuple(round(0.1 * step, 1) for step in range(-3, 8))


def unseen(pool: Sequence[str], train: Sequence[str]) -> np.ndarray:
    """Which rows 'file label' of the pool are of files that the training list has not, bool [N]."""
    used = set(map(file_of, train))
    return np.array([file_of(row) not in used for row in pool])


def mean_accuracy(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray, strength: float, least: int) -> float:
    """Accuracy in percent, mean over the classes with at least `least` images.

    Args:
        logits: [N, C].
        labels: [N].
        counts: Training images of the classes, [C].
        strength: Of the prior.
        least: Images.

    Raises:
        InputError: No class has so many.
    """
    right = is_right(logits, labels, counts / counts.sum(), strength)
    images = np.bincount(labels, minlength=len(counts))
    hits = np.bincount(labels[right], minlength=len(counts))
    counted = images >= least
    if not counted.any():
        raise InputError(f'no class has {least} images that training has not seen: give a smaller --least, or a larger '
                         '--pool-list')
    return float(100 * (hits[counted] / images[counted]).mean())


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    train, pool = (rows_of(path if path.exists() else args.data_dir / path)
                   for path in (args.train_list, args.pool_list))
    kept, expected = unseen(pool, train), np.array([int(label_of(row)) for row in pool])
    counts = np.bincount([int(label_of(row)) for row in train], minlength=expected.max() + 1)
    if not counts.all():
        raise InputError(f"class {counts.argmin()} has no image in '{args.train_list}', so it has no share of them: "
                         'give the list that the networks were trained on')
    found: dict[str, list[float]] = {}
    for path in args.logits:
        if path.stem in found:
            raise InputError(f"two files are called '{path.stem}': give them different names")
        logits, labels = read_logits(path)
        if not np.array_equal(labels, expected):
            raise InputError(f"'{path}' has not the labels of '{args.pool_list}': validate with it as --test-list")
        found[path.stem] = [mean_accuracy(logits[kept], labels[kept], counts, strength, args.least)
                            for strength in STRENGTHS]
    means = np.mean(list(found.values()), axis=0)
    print(table(('strength', *found), [(f'{strength:g}', *(f'{of_run[place]:.2f}' for of_run in found.values()))
                                       for place, strength in enumerate(STRENGTHS)]))
    images = np.bincount(expected[kept], minlength=len(counts))
    counted = images[images >= args.least]
    best = STRENGTHS[means.argmax()]
    print(f'\n{counted.sum():,} unseen images of {len(counted)} classes, beside {(~kept).sum():,} of training; '
          f'best on average: {best:g}')


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('logits', type=Path, nargs='+', help='files of nbn-validate --logits-file on the pool')
    parser.add_argument('--train-list', type=Path, required=True, help='the images that the networks were trained on')
    parser.add_argument('--pool-list', type=Path, required=True, help='more images of the same classes')
    parser.add_argument('--data-dir', type=Path, default=Path(), help='folder of the lists')
    parser.add_argument('--least', type=int, default=20, help='images of a class that counts')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(run_cli(main, 'held_out_strength.py'))

"""What a network is to be good at: the share of each class among the pictures that it will meet."""
from pathlib import Path

import torch

from nbn_timm.data.classes import Classes, read_counts
from nbn_timm.errors import InputError, nearest

BALANCED, NATURAL = 'balanced', 'natural'


def target_shares(target: str, classes: Classes) -> torch.Tensor:
    """Share of each class among the pictures to come, float64 [C], summing to 1.

    Args:
        target: 'balanced' for equal shares, 'natural' for those of the training images, or a file of numbers per class
            in a form of `read_counts`: of pictures that were met, say, or fractions of how much each class matters.
        classes: The training set's. A class without training images counts as having one where shares are natural.

    Raises:
        InputError: There is no such file, it is of other classes, or a class of it has no share.
    """
    if target == BALANCED:
        return torch.full((classes.num_classes,), 1 / classes.num_classes, dtype=torch.float64)
    if target == NATURAL:
        numbers = classes.tensor().clamp(min=1)
        return numbers / numbers.sum()
    if not Path(target).exists():
        raise InputError(f"there is no target '{target}': give {BALANCED}, {NATURAL}, or a file of a number per "
                         f'class{nearest(target, (BALANCED, NATURAL))}')
    given, _ = read_counts(target, shares=True).of(classes)
    numbers = given.tensor()
    if not bool((numbers > 0).all()):
        name = given.names[int((numbers <= 0).nonzero()[0])]
        raise InputError(f"class '{name}' has no share in the target '{target}', so it would never be the answer: give "
                         'each class a number above 0')
    return numbers / numbers.sum()

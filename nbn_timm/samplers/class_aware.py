"""All classes in turn (Shen et al., "Relay Backpropagation", ECCV 2016; the class-balanced sampling of
the released code of Kang et al., "Decoupling Representation and Classifier", ICLR 2020)."""
from typing import Any

import numpy as np

from nbn_timm.errors import InputError
from nbn_timm.key_values import check_number
from nbn_timm.samplers.sampler import FLAG, EpochSampler, register_sampler


@register_sampler('class_aware')
class ClassAware(EpochSampler):
    """A shuffled cycle through the classes; each visit gives the next `k` images of the class's own shuffled cycle.

    In each round through the classes every class that has images is visited once, in an order drawn anew. A class's
    images come in a random order, each once before the next random order begins, so that a class of fewer than `k`
    images repeats some within a visit. The epoch ends after N images.

    An image of several classes comes as one of each of them, and one of none never. So it is in Wu et al.,
    "Distribution-Balanced Loss", ECCV 2020; their code has k = 3 and reduce = 4, and an epoch goes on with the cycles
    of the one before, while each begins its own here.

    The `k` images of a visit follow each other. With w ranks they are dealt out to min(k, w) of them, and all ranks
    together see in one step the images that one process with the whole batch would see. No shuffling of batches is
    needed: images of a class are in random order, so none of their places is special.

    Args:
        k: Images per visit, at least 1; 4 in the released code of decoupling.
        reduce: The epoch ends after C n_max / `reduce` images instead, with C classes that have images and n_max images
            of the largest, so that each class gives n_max / `reduce`.

    Raises:
        InputError: `k` is no number from 1, or `reduce` is no number above 0 or leaves no image.
    """

    balances = True
    label_sets = True

    def __init__(self, *args: Any, k: int = 4, reduce: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.k = check_number("sampler 'class_aware'", FLAG, 'k', k, low=1, whole=True)
        if reduce is not None:
            check_number("sampler 'class_aware'", FLAG, 'reduce', reduce, above=True)
        self.reduce = reduce
        if not self.epoch_length:
            raise InputError(f"sampler 'class_aware' would draw no image with reduce={reduce:g}: give a smaller number")

    @property
    def epoch_length(self) -> int:
        if self.reduce is None:
            return super().epoch_length
        return int(self.groups.counts.max() * len(self.groups.counts) / self.reduce)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        groups, length = self.groups, self.epoch_length
        num_classes, k = len(groups.counts), min(self.k, length)
        visits = -(-length // k)
        rounds = -(-visits // num_classes)
        visited = rng.permuted(np.tile(np.arange(num_classes), (rounds, 1)), axis=1).ravel()[:visits]

        # Orders of its images that each class goes through, one behind the other: random keys sort within an order.
        orders = -(-k * np.bincount(visited, minlength=num_classes) // groups.counts)
        of_class = np.repeat(np.arange(num_classes), orders)  # class of each order
        size = groups.counts[of_class]
        begin = np.cumsum(size) - size
        place = np.arange(size.sum()) + np.repeat(groups.first[of_class] - begin, size)
        key = np.repeat(np.arange(len(size)), size) + rng.random(len(place))
        cycles = groups.images[place[np.argsort(key)]]

        # In round r a class is visited for the r-th time, 0-based.
        begin_of_class = np.cumsum(orders * groups.counts) - orders * groups.counts
        start = begin_of_class[visited] + np.arange(visits) // num_classes * k
        return cycles[(start[:, None] + np.arange(k)).ravel()[:length]]

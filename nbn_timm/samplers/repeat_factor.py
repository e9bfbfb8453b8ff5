"""Images of rare classes several times per epoch (Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance
Segmentation", CVPR 2019, repeat factor sampling)."""
from typing import Any

import numpy as np

from nbn_timm.data.label_sets import images_per_class, is_label_sets
from nbn_timm.key_values import check_number
from nbn_timm.samplers.sampler import FLAG, EpochSampler, register_sampler, with_length


@register_sampler('repeat_factor')
class RepeatFactor(EpochSampler):
    """Each image of class c comes r(c) = max(1, sqrt(t / f(c))) times on average, f(c) being the class's share of N.

    r(c) is rounded at random for every image and epoch, up with a probability of its fractional part. The images are
    not rounded independently but systematically: in random order, an image is rounded up where the running sum of
    fractional parts, from a random start, passes a whole number. Each image keeps its probability, and epochs differ
    in length by at most one image, which is filled up with the epoch's first. So `len`, the number of updates and
    with it the learning-rate schedule hold for every epoch, and all ranks agree on them.

    An image of several classes has the largest r of them, as in LVIS, and one of none has 1.

    The epoch has the sum of r over all images, rounded up.

    Args:
        threshold: t; classes with a larger share of the images are not repeated.

    Raises:
        InputError: `threshold` is no share.
    """

    balances = True
    label_sets = True

    def __init__(self, *args: Any, threshold: float = 0.001, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("sampler 'repeat_factor'", FLAG, 'threshold', threshold, high=1, above=True)
        counts = np.maximum(images_per_class(self.targets), 1)
        of_class = np.maximum(1, np.sqrt(threshold * len(self.targets) / counts))
        if is_label_sets(self.targets):
            factors = np.ones(len(self.targets))
            for label, factor in enumerate(of_class):  # all at once would be [N, C] in float64
                np.maximum(factors, factor * self.targets[:, label], out=factors)
        else:
            factors = of_class[self.targets]
        self.whole = np.floor(factors).astype(np.int64)  # of each image's r, int64 [N]
        self.fraction = factors - self.whole  # what is left of it, float64 [N]

    @property
    def epoch_length(self) -> int:
        return int(self.whole.sum()) + int(np.ceil(self.fraction.sum()))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(len(self.targets))
        indices = np.repeat(order, self._repeats(order, rng.random()))
        del order  # an epoch of many images takes memory
        rng.shuffle(indices)
        return with_length(indices, self.epoch_length)

    def _repeats(self, order: np.ndarray, start: float) -> np.ndarray:
        """How often each image comes, int64 [N], in the given order of the images."""
        reached = self.fraction[order]
        np.cumsum(reached, out=reached)
        reached += start
        repeats = np.floor(reached, out=reached).astype(np.int64)
        repeats[1:] -= repeats[:-1].copy()
        repeats += self.whole[order]
        return repeats

"""How often `--imbalance auto` leaves strength 1 where 1 is exactly right.

    python benchmarks/strength_by_chance.py

Twenty classes at factor 50 are normal distributions of eight dimensions with random means, and the logits are the true
posteriors in the proportions of training. So no strength is better than 1 for equal shares, and whatever else is chosen
on a validation split is chance. Prints, for two sizes of the split, how often that is, and what it costs in points of
mean class accuracy on 200 other pictures of each class.
"""
import statistics

import torch

from nbn_timm.data import Classes
from nbn_timm.imbalance import StrengthCurve, target_shares

CLASSES, DIMENSIONS, FACTOR, LARGEST, TEST, DRAWS = 20, 8, 50, 100, 200, 300


def one_draw(seed: int, share: float) -> tuple[float, float]:
    """The strength that is chosen on a validation split of that share, and the points that it gains over strength 1."""
    random = torch.Generator().manual_seed(seed)
    counts = [round(LARGEST * FACTOR ** (-label / (CLASSES - 1))) for label in range(CLASSES)]
    classes = Classes(tuple(counts), tuple(map(str, range(CLASSES))), 'normal distributions')
    means = torch.randn(CLASSES, DIMENSIONS, generator=random)

    def pictures(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(numbers))
        points = means[labels] + torch.randn(len(labels), DIMENSIONS, generator=random)
        return classes.prior().log().float() - torch.cdist(points, means).square() / 2, labels

    curve = StrengthCurve(classes, target_shares('balanced', classes))
    curve.update(*pictures([max(1, round(share * count)) for count in counts]))
    chosen = curve.choose()
    logits, labels = pictures([TEST] * CLASSES)
    right = [int(((logits + offset).argmax(dim=1) == labels).sum()) for offset in (chosen.offset, curve.offset(1))]
    return chosen.tau, 100 * (right[0] - right[1]) / len(labels)


def main() -> None:
    print('| validation pictures per training picture | another strength | points, all draws | points, where so |')
    print('|---|---|---|---|')
    for share in (0.2, 0.8):
        draws = [one_draw(seed, share) for seed in range(DRAWS)]
        others = [gain for tau, gain in draws if tau != 1]
        print(f'| {share:g} | {len(others)} of {DRAWS} | {statistics.mean(gain for _, gain in draws):+.2f} | '
              f'{statistics.mean(others):+.2f} |', flush=True)


if __name__ == '__main__':
    main()

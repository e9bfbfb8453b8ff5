"""Settings of an evaluation."""
from dataclasses import dataclass

from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE
from nbn_timm.data.shift import UNIFORM
from nbn_timm.settings import AT_LEAST_1, NOT_NEGATIVE, Settings, Values, setting


@dataclass(frozen=True)
class EvalBatchSettings(Settings):
    """How many images go through the network at once."""

    title = 'batch'

    batch_size: int = setting(256, 'images per process', limits=AT_LEAST_1, short='-b', kind='machine')


@dataclass(frozen=True)
class AdjustmentSettings(Settings):
    """What is changed of the logits."""

    title = 'logits'

    logit_adjustment: float = setting(
        0.0, 'subtract TAU times the logarithm of the training prior from the logits', limits=NOT_NEGATIVE,
        metavar='TAU')


def _on_all_images(name: str, others: Values) -> str | None:
    part = others.test_distribution
    return None if part in (None, UNIFORM) else f'has no effect with --test-distribution {part}, but with {UNIFORM}'


@dataclass(frozen=True)
class PostHocSettings(Settings):
    """What is changed of a finished network before it is evaluated."""

    title = 'post-hoc'

    tau_norm: float | None = setting(None, "divide each class's weight vector by its length to the power TAU",
                                     limits=NOT_NEGATIVE, metavar='TAU')
    test_agnostic: bool = setting(
        False, 'add the accuracy under forward and backward long-tailed class distributions, on the images of SADE',
        effect=_on_all_images)


@dataclass(frozen=True)
class LabelSetSettings(Settings):
    """What is told of pictures that can be of several classes."""

    title = 'pictures of several classes'

    thresholds: str = setting(
        'per_class', 'from which probability on a class is told: per_class has the greatest F1 of each class on the '
        'validation split, if there is one; half is one half', choices=('per_class', 'half'))


def _counted(name: str, others: Values) -> str | None:
    return 'has no effect with --counts-from none' if others.counts_from == 'none' else None


@dataclass(frozen=True)
class ShotSettings(Settings):
    """What counts as many, medium and few."""

    title = 'many, medium and few shot'

    counts_from: str | None = setting(
        None, 'source of the training images per class', choices=('dataset', 'file', 'checkpoint', 'none'),
        unset='file if --class-counts is given, else checkpoint if it has them, else dataset (its training split)')
    many_shot: int | None = setting(None, 'many: more training images than this', limits=NOT_NEGATIVE,
                                    unset=f"the benchmark's, {MANY_ABOVE} for own images", effect=_counted)
    few_shot: int | None = setting(None, 'few: fewer training images than this', limits=NOT_NEGATIVE,
                                   unset=f"the benchmark's, {FEW_BELOW} for own images", effect=_counted)

"""What to train with, from the class counts alone."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbn_timm.data.classes import Classes
from nbn_timm.errors import InputError
from nbn_timm.imbalance.target import BALANCED, NATURAL


@dataclass(frozen=True)
class TrainingChoice:
    """A loss and a sampler, and why.

    Attributes:
        loss, loss_kwargs, sampler: By the names of their registries.
        trained_tau: Strength of the prior that the loss takes off the logits: those of cross-entropy still hold all
            of it (0), those of balanced softmax none (1).
        why: A sentence without a full stop.
    """

    loss: str
    sampler: str
    why: str
    trained_tau: float
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """What a person should know."""
        return f"--imbalance auto takes loss '{self.loss}' and sampler '{self.sampler}': {self.why}."

    def settings(self) -> dict[str, Any]:
        """As settings of a training."""
        return {'loss': self.loss, 'loss_kwargs': dict(self.loss_kwargs), 'sampler': self.sampler,
                'sampler_kwargs': {}}


def choose_training(classes: Classes | None, target: str = BALANCED) -> TrainingChoice:
    """The loss and the sampler for a target.

    Cross-entropy is consistent for the class shares that it is trained on. Its form with the logarithm of the prior
    added to the logits, balanced softmax, is so for equal shares (Menon et al., "Long-Tail Learning via Logit
    Adjustment", ICLR 2021, section 5), whatever the imbalance, and other targets are one offset away from these. Either
    wants each picture as often as any other: a sampler that also evens out the classes would correct twice.

    Args:
        classes: The training set's, with their counts.
        target: See `target_shares`.

    Raises:
        InputError: The counts are not known.
    """
    if classes is None or classes.counts is None:
        raise InputError('--imbalance auto needs the training images per class, and this training set cannot be '
                         'counted: give them with --class-counts FILE')
    factor = f'the largest class has {classes.imbalance_factor:.4g} times the pictures of the smallest'
    if target == NATURAL:
        return TrainingChoice('cross_entropy', 'instance_balanced', trained_tau=0, why=(
            f'{factor}, and classes are to count as often as they occur, which is what cross-entropy aims at'))
    if classes.imbalance_factor == 1:
        return TrainingChoice('cross_entropy', 'instance_balanced', trained_tau=0, why=(
            'all classes have the same number of pictures, so there is nothing to correct'))
    aim = 'all classes are to count alike' if target == BALANCED else f"classes are to count as '{target}' says"
    return TrainingChoice('balanced_softmax', 'instance_balanced', trained_tau=1, why=(
        f'{factor}, and {aim}; a balanced sampler beside it would correct twice'))

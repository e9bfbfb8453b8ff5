"""Ways to a head by name, made of the losses, samplers, heads and second stages of this package."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbn_timm.errors import InputError, nearest
from nbn_timm.layers.head import LINEAR
from nbn_timm.losses import LOSSES, number_of_views, takes_experts, takes_streams


@dataclass(frozen=True)
class HeadMethod:
    """How a head comes about.

    Attributes:
        about: In a few words.
        kind: A key of `HEADS`.
        loss, sampler: By their names.
        loss_kwargs: The loss's own settings.
        adjust: What is done to the trained head for each of `TAUS`, of which the validation chooses; None for nothing.
        second_stage: The stage that gives the head instead of a training.
    """

    about: str = ''
    kind: str = LINEAR
    loss: str = 'cross_entropy'
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = 'instance_balanced'
    adjust: str | None = None
    second_stage: str | None = None

    @property
    def training(self) -> tuple[Any, ...]:
        """What tells two trainings apart."""
        return self.kind, self.loss, tuple(sorted(self.loss_kwargs.items())), self.sampler, self.second_stage


METHODS: dict[str, HeadMethod] = {
    'linear': HeadMethod('linear head, cross-entropy'),
    'class_balanced': HeadMethod('linear head, cross-entropy, classes equally often', sampler='class_balanced'),
    'balanced_softmax': HeadMethod('linear head, balanced softmax', loss='balanced_softmax'),
    'logit_adjustment': HeadMethod('linear, minus tau times the log prior', adjust='logit_adjustment'),
    'tau_norm': HeadMethod('linear, class vectors divided by their length to the power tau', adjust='tau_norm'),
    'cosine': HeadMethod('cosine head, cross-entropy', kind='cosine'),
    'ldam': HeadMethod('cosine head, LDAM', kind='cosine', loss='ldam'),
    'rectified': HeadMethod('rectified head, cross-entropy', kind='rectified'),
    'ncm': HeadMethod('nearest class mean', second_stage='ncm'),
}


def head_method(name: str) -> HeadMethod:
    """The method of a name: one of `METHODS`, or a loss, which then trains a linear head.

    Raises:
        InputError: There is none, or the loss takes what features have not.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in LOSSES:
        raise InputError(f"unknown head '{name}' (there are {', '.join(METHODS)}, and any loss for a linear head)"
                         f'{nearest(name, [*METHODS, *LOSSES])}')
    if takes_experts(name) or takes_streams(name) or number_of_views(name) > 1:
        raise InputError(f"loss '{name}' takes several experts or views of an image, which cached features have not: "
                         'leave it out of --heads')
    return HeadMethod(f'linear head, {name}', loss=name)

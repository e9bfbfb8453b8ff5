"""Attacks by name: an attack is one file in this folder with one `@register_attack` line."""
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import nn

from nbn_timm.errors import InputError, nearest, quoted
from nbn_timm.registry import Registry

_LONGEST = 6  # digits of a number of steps


@dataclass(frozen=True)
class Bound:
    """What all attacks of an evaluation are given.

    Attributes:
        eps: Largest change of a value of a pixel in [0, 1].
        step: Length of a step.
        seed: Of what an attack draws by itself.
    """

    eps: float
    step: float
    seed: int = 0


class Attack(ABC):
    """Called with a network in evaluation, gives pictures that it may take for another class.

    Args:
        bound: How far it may go.
        steps: How many steps it makes; None is its own number.

    Attributes:
        title: For people.
        usual_steps: Their number without one in the name; None if the number is no setting of this attack.
    """

    title: ClassVar[str]
    usual_steps: ClassVar[int | None] = None

    def __init__(self, bound: Bound, steps: int | None = None) -> None:
        self.bound = bound
        self.steps = steps or self.usual_steps or 1

    @property
    def label(self) -> str:
        """Title with the steps, where these can be chosen."""
        return self.title if self.usual_steps is None else f'{self.title}-{self.steps}'

    @abstractmethod
    def __call__(
            self, network: nn.Module, pixels: torch.Tensor, target: torch.Tensor, noise: torch.Tensor,
    ) -> torch.Tensor:
        """The changed pictures.

        Args:
            network: Maps pixels to logits; in evaluation mode.
            pixels: In [0, 1], float32 [B, C, H, W].
            target: Labels [B].
            noise: In [-1, 1], of the shape of the pixels: where in the bound to begin.
        """


AttackT = TypeVar('AttackT', bound=Attack)
ATTACKS: Registry[Attack] = Registry('attack')


def register_attack(name: str) -> Callable[[type[AttackT]], type[AttackT]]:
    """Class decorator: make the attack available to `nbn-validate --attack` under a name of letters.

    An attack whose number of steps can be chosen has it after its name: `pgd20`.
    """
    if not re.fullmatch('[a-z]+', name):
        raise ValueError(f"the attack '{name}' has a name of other than small letters, and digits are its steps")
    return ATTACKS.register(name)


def attack_names() -> str:
    """All names, for people."""
    return ', '.join(name + ('' if attack.usual_steps is None else str(attack.usual_steps))
                     for name, attack in sorted(ATTACKS.items()))


def create_attack(name: str, bound: Bound) -> Attack:
    """An attack by its name, with the number of steps behind it where there is one, as `pgd20`.

    Raises:
        InputError: There is none of that name, or its steps are not to be chosen.
    """
    letters, digits = re.fullmatch(r'(.*?)([0-9]*)', name, re.DOTALL).groups()  # type: ignore[union-attr]
    if letters not in ATTACKS:
        raise InputError(f"unknown attack '{name}' (there are {attack_names()}){nearest(letters, ATTACKS)}")
    attack = ATTACKS[letters]
    if digits and (attack.usual_steps is None or not digits.strip('0')):
        raise InputError(f"attack '{name}' has no such number of steps: give {letters}")
    if len(digits) > _LONGEST:
        raise InputError(f'attack {quoted(name)} would make more steps than any run ends: give at most '
                         f'{10 ** _LONGEST - 1:,}')
    return attack(bound, int(digits) if digits else None)

"""What all methods of adversarial training share: their registry, what they attack by, and what they minimise.

A method is one file in this folder: a subclass of `AdversarialTraining` with one `@register_adversarial` line.
"""
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F

from nbn_timm.attacks import agreement
from nbn_timm.registry import Registry

Output = torch.Tensor | tuple[torch.Tensor, ...]  # of a network in training: logits, or logits and features
Network = Callable[[torch.Tensor], Output]
Loss = Callable[[Output, torch.Tensor], torch.Tensor]
STARTS = ('uniform', 'positive', 'gaussian', 'none')


class AdversarialTraining(ABC):
    """A method of adversarial training around the loss of a run.

    Args:
        weight: Of the part that compares the picture with the attacked one; None is that of the method's authors.
        temperature: Divides logits in the attack and in that part, but not in the loss.

    Attributes:
        usual_start: Where its authors begin an attack, one of `STARTS`.
        usual_weight: Of its authors; None where nothing is compared.
        sees_picture: What the attack climbs depends on the logits of the picture itself.
    """

    usual_start: ClassVar[str]
    usual_weight: ClassVar[float | None] = None
    sees_picture: ClassVar[bool] = False

    def __init__(self, weight: float | None = None, temperature: float = 1.0) -> None:
        self.weight = (self.usual_weight or 0.0) if weight is None else weight
        self.temperature = temperature

    def objective(
            self, logits: torch.Tensor, target: torch.Tensor, of_picture: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the attack climbs, summed over the pictures: cross-entropy, unless a method has another.

        Args:
            logits: Of the changed pictures in evaluation, float32 [B, C], by the temperature.
            target: Labels [B].
            of_picture: The same of the pictures themselves, without a gradient, where `sees_picture`.
        """
        return F.cross_entropy(logits, target, reduction='sum')

    @abstractmethod
    def loss(
            self,
            network: Network,
            loss: Loss,
            images: torch.Tensor,
            attacked: torch.Tensor,
            target: torch.Tensor,
    ) -> torch.Tensor:
        """What is minimised, a number.

        Args:
            network: In training; every call counts in the statistics of BatchNorm.
            loss: Of the run.
            images: Normalised [B, 3, H, W].
            attacked: What the attack has made of them.
            target: Labels [B].
        """

    def logits_of(self, output: Output) -> torch.Tensor:
        """The logits of a network's output in float32, by the temperature."""
        return (output[0] if isinstance(output, tuple) else output).float() / self.temperature

    def divergence(self, attacked: Output, picture: Output) -> torch.Tensor:
        """KL(picture || attacked), the mean over the batch; a gradient flows to both."""
        return agreement(self.logits_of(attacked), self.logits_of(picture)).mean()


ADVERSARIAL: Registry[AdversarialTraining] = Registry('adversarial training')


def register_adversarial(name: str) -> Callable[[type[AdversarialTraining]], type[AdversarialTraining]]:
    """Class decorator: make a method available to `nbn-train --adversarial` under `name`."""
    return ADVERSARIAL.register(name)


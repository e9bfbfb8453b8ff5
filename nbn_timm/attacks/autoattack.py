"""AutoAttack and its first half, by torchattacks.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020.
"""
from typing import Any, ClassVar

import torch
from torch import nn

from nbn_timm.attacks.attack import Attack, Bound, register_attack
from nbn_timm.errors import InputError

TARGETS = 9  # classes that targeted attacks aim at, the likeliest wrong ones, as in the authors' own AutoAttack
QUERIES = 5000


@register_attack('apgd')
class APGD(Attack):
    """APGD on cross-entropy, then targeted APGD on the difference of logits ratio, on what withstood the first.

    RoBal's tables call this AutoAttack: its authors leave out the other two parts, which find little more.
    """

    title = 'APGD'
    usual_steps = 100  # as in the authors' code; torchattacks makes 10 unless it is told
    parts: ClassVar[tuple[str, ...]] = ('apgd', 'apgdt')

    def __init__(self, bound: Bound, steps: int | None = None) -> None:
        super().__init__(bound, steps)
        try:
            import torchattacks
        except ImportError as error:
            raise InputError(f'--attack {type(self).title.lower()} needs torchattacks, which is not installed: '
                             "pip install --no-deps 'torchattacks>=3.5.1' scipy") from error
        self.library: Any = torchattacks

    def __call__(
            self, network: nn.Module, pixels: torch.Tensor, target: torch.Tensor, noise: torch.Tensor,
    ) -> torch.Tensor:
        """See `Attack`; the library draws by itself, from the seed, and torch's own generators go on as they were.

        Raises:
            InputError: There are fewer than four classes, of which the ratio is made.
        """
        with torch.no_grad():
            classes = network(pixels[:1]).shape[1]
        if classes < 4:
            raise InputError(f'--attack {self.title.lower()} compares four logits, and this network has {classes} '
                             'classes: give pgd20 and cw20')
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            attack = self.library.MultiAttack(self._attacks(network, min(TARGETS + 1, classes)))
            return attack(pixels, target).detach()

    def _attacks(self, network: nn.Module, classes: int) -> list[Any]:
        bound: dict[str, Any] = dict(eps=self.bound.eps, norm='Linf', seed=self.bound.seed, n_restarts=1)
        known = {
            'apgd': lambda: self.library.APGD(network, steps=self.steps, loss='ce', **bound),
            'apgdt': lambda: self.library.APGDT(network, steps=self.steps, n_classes=classes, **bound),
            'fab': lambda: self.library.FAB(
                network, steps=self.steps, multi_targeted=True, n_classes=classes, **bound),
            'square': lambda: self.library.Square(network, n_queries=QUERIES, **bound)}
        return [known[part]() for part in self.parts]


@register_attack('autoattack')
class AutoAttack(APGD):
    """The standard AutoAttack: the two of `APGD`, then FAB and Square, each on what withstood the ones before."""

    title = 'AutoAttack'
    parts = ('apgd', 'apgdt', 'fab', 'square')

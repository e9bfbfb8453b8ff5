"""Settings of attacks in an evaluation."""
from dataclasses import dataclass

from nbn_timm.attacks.attack import Attack, Bound, create_attack
from nbn_timm.attacks.pixels import EPS, STEP
from nbn_timm.settings import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, Settings, only_with, setting


@dataclass(frozen=True)
class AttackSettings(Settings):
    """Accuracy under attack."""

    title = 'attacks'
    about = 'Accuracy on pictures that are changed so that the network errs, beside that on the pictures themselves.'

    attack: tuple[str, ...] | None = setting(
        None, 'fgsm, pgd, cw, mim, apgd or autoattack, with the number of steps where there are some, as pgd20',
        nargs=0, metavar='NAME')
    attack_eps: float = setting(EPS, 'largest change of a value, where pixels are 0 to 1', limits=PROBABILITY,
                                effect=only_with('attack'))
    attack_step: float = setting(STEP, 'length of a step of pgd, cw and mim', limits=POSITIVE,
                                 effect=only_with('attack'))
    attack_images: int | None = setting(None, 'attack so many pictures, evenly spaced in the split', limits=AT_LEAST_1,
                                        unset='all', effect=only_with('attack'))
    attack_seed: int = setting(0, 'of where attacks begin', limits=NOT_NEGATIVE, effect=only_with('attack'))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attacks()

    def attacks(self) -> dict[str, Attack]:
        """The attacks by name, in the order given.

        Raises:
            InputError: There is none of that name, or its library is missing.
        """
        bound = Bound(self.attack_eps, self.attack_step, self.attack_seed)
        return {name: create_attack(name, bound) for name in self.attack or ()}

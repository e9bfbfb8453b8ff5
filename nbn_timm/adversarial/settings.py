"""Settings of adversarial training."""
from dataclasses import dataclass

from nbn_timm.adversarial.adversarial import ADVERSARIAL, STARTS
from nbn_timm.attacks.network import RUNNING, STATISTICS
from nbn_timm.attacks.pixels import EPS, STEP
from nbn_timm.settings import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, Settings, Values, only_with, setting


def _compared(name: str, others: Values) -> str | None:
    if not others.adversarial:
        return 'has no effect without --adversarial'
    if ADVERSARIAL[others.adversarial].usual_weight is None:
        return f'has no effect on --adversarial {others.adversarial}, which compares nothing'
    return None


@dataclass(frozen=True)
class AdversarialSettings(Settings):
    """Training on attacked pictures."""

    title = 'adversarial training'
    of_training = True

    adversarial: str | None = setting(None, 'how to train on pictures that are changed so that the network errs',
                                      choices=lambda: ADVERSARIAL)
    adv_eps: float = setting(EPS, 'largest change of a value, where pixels are 0 to 1', limits=PROBABILITY,
                             effect=only_with('adversarial'))
    adv_step: float = setting(STEP, 'length of a step of the attack', limits=POSITIVE, effect=only_with('adversarial'))
    adv_steps: int = setting(10, 'steps of the attack', limits=AT_LEAST_1, effect=only_with('adversarial'))
    adv_start: str | None = setting(
        None, 'where the attack begins: anywhere in the bound, in its positive half, near the picture, or at it',
        choices=STARTS, unset="as the method's authors have it", effect=only_with('adversarial'))
    adv_weight: float | None = setting(None, 'of what compares picture and attacked picture', limits=NOT_NEGATIVE,
                                       unset="the method's authors'", effect=_compared)
    adv_temperature: float = setting(1.0, 'divides logits in the attack and in that comparison', limits=POSITIVE,
                                     effect=only_with('adversarial'))
    adv_bn: str = setting(
        RUNNING, 'what BatchNorm normalises by in the attack: its running statistics, or those of the batch, which are '
        'forgotten, or update the running ones', choices=STATISTICS, effect=only_with('adversarial'))

"""timm's mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019)."""
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup

from nbn_timm.errors import InputError
from nbn_timm.mixing.mixing import ALWAYS, Mixing, MixingRun, register_mixing
from nbn_timm.settings import NOT_NEGATIVE, PROBABILITY, Settings, Values, all_of, is_on, only_with, setting


def _on(name: str, others: Values) -> str | None:
    return None if is_on(others.mixup) or is_on(others.cutmix) else 'has no effect without --mixup or --cutmix'


@dataclass(frozen=True)
class MixupSettings(Settings):
    """Mixup and CutMix."""

    title = 'mixup and CutMix'

    mixup: float = setting(0.0, 'parameter of the Beta distribution; 0 for none', limits=NOT_NEGATIVE, metavar='ALPHA')
    cutmix: float = setting(0.0, 'parameter of the Beta distribution; 0 for none', limits=NOT_NEGATIVE, metavar='ALPHA')
    mixup_switch_prob: float = setting(0.5, 'of CutMix where both are on', limits=PROBABILITY, metavar='P',
                                       effect=all_of(only_with('mixup'), only_with('cutmix')))
    mixup_mode: str = setting('batch', 'what a lambda is drawn for', choices=('batch', 'pair', 'elem'), effect=_on)


@register_mixing('mixup', MixupSettings, 'mixup', 'cutmix')
class TimmMixup(Mixing):
    """`timm.data.Mixup`, which pairs image i with image B - 1 - i; of an odd batch it is not given the last image.

    Args:
        num_classes: C.
        smoothing: Label smoothing, in [0, 1].
        mixup_alpha: Mixup's Beta distribution; 0 for none.
        cutmix_alpha: CutMix's Beta distribution; 0 for none.
        prob: That a batch, a pair or an image is mixed.
        switch_prob: Of CutMix where both are on.
        mode: A lambda for each 'batch', 'pair' or 'elem'.
        epochs: The 0-based epochs in which batches are mixed.
    """

    def __init__(
            self,
            num_classes: int,
            smoothing: float = 0.0,
            mixup_alpha: float = 0.0,
            cutmix_alpha: float = 0.0,
            prob: float = 1.0,
            switch_prob: float = MixupSettings.mixup_switch_prob,
            mode: str = MixupSettings.mixup_mode,
            epochs: range = ALWAYS,
    ) -> None:
        super().__init__(num_classes, smoothing, epochs=epochs)
        self.mixup = Mixup(mixup_alpha, cutmix_alpha, prob=prob, switch_prob=switch_prob, mode=mode,
                           label_smoothing=smoothing, num_classes=num_classes)

    @classmethod
    def create(cls, settings: Any, run: MixingRun) -> 'TimmMixup':
        """Mixup, CutMix, or one of them at random for each batch."""
        if run.batch_size < 2:
            raise InputError(f'--{cls.switched_on(settings)[0]} mixes the images of a batch: give a --batch-size of at '
                             'least 2')
        return cls(run.num_classes, run.smoothing, settings.mixup, settings.cutmix, run.common.mixup_prob,
                   settings.mixup_switch_prob, settings.mixup_mode, run.common.active)

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        even = len(target) // 2 * 2
        return self.mixup(images[:even], target[:even])

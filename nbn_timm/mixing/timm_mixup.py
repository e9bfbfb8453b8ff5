"""timm's mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019)."""
import torch
from timm.data import Mixup

from nbn_timm.mixing.mixing import ALWAYS, Mixing


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
            switch_prob: float = 0.5,
            mode: str = 'batch',
            epochs: range = ALWAYS,
    ) -> None:
        super().__init__(num_classes, smoothing, epochs=epochs)
        self.mixup = Mixup(mixup_alpha, cutmix_alpha, prob=prob, switch_prob=switch_prob, mode=mode,
                           label_smoothing=smoothing, num_classes=num_classes)

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        even = len(target) // 2 * 2
        return self.mixup(images[:even], target[:even])

"""Equalisation loss (Tan et al., "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020)."""
import torch
from class_loss import CLASS_LOSSES, SigmoidLoss

from nbn_timm.key_values import check_number

FLAG = '--class-loss-kwargs'


@CLASS_LOSSES.register('equalization')
class EqualizationLoss(SigmoidLoss):
    """Binary cross-entropy in which objects of other classes say nothing against a rare class; the background does.

    Args:
        image_counts, num_images: See `ClassLoss`.
        threshold: Share of the training images below which a class is rare, the paper's lambda; the authors' for
            LVIS v0.5 by default.
        prior: Probability that each class has at first.

    Raises:
        InputError: A setting is out of range.
    """

    rare: torch.Tensor

    def __init__(
            self,
            image_counts: torch.Tensor,
            num_images: int,
            threshold: float = 0.00177,
            prior: float = 0.001,
    ) -> None:
        check_number('class loss equalization', FLAG, 'threshold', threshold, high=1)
        check_number('class loss equalization', FLAG, 'prior', prior, high=1, above=True, below=True)
        super().__init__(image_counts, num_images, prior)
        self.register_buffer('rare', image_counts / num_images < threshold, persistent=False)

    def weights(self, labels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        spared = (labels > 0)[:, None] & self.rare
        return 1 - spared * (1 - target)

"""Federated loss (Zhou et al., "Probabilistic two-stage detection", arXiv 2103.07461, as in the code of CenterNet2)."""
import torch
from class_loss import CLASS_LOSSES, SigmoidLoss

from nbn_timm.key_values import check_number

FLAG = '--class-loss-kwargs'


@CLASS_LOSSES.register('federated')
class FederatedLoss(SigmoidLoss):
    """Binary cross-entropy over the classes of the batch's proposals and some more, drawn anew for each batch.

    A picture of LVIS is not annotated for all classes, so that an unlabelled proposal is a weak sign against a class.
    Only the drawn classes learn from it. They are drawn without replacement, in proportion to
    (training images) ** power.

    Args:
        image_counts, num_images: See `ClassLoss`.
        classes: How many count in a batch, those of its proposals and the background among them; more if the proposals
            have more, all classes if there are fewer.
        power: Of the training images.
        prior: Probability that each class has at first.

    Raises:
        InputError: A setting is out of range.
    """

    frequency: torch.Tensor

    def __init__(
            self,
            image_counts: torch.Tensor,
            num_images: int,
            classes: int = 50,
            power: float = 0.5,
            prior: float = 0.01,
    ) -> None:
        what = 'class loss federated'
        check_number(what, FLAG, 'classes', classes, low=1, whole=True)
        check_number(what, FLAG, 'power', power)
        check_number(what, FLAG, 'prior', prior, high=1, above=True, below=True)
        super().__init__(image_counts, num_images, prior)
        self.classes = classes
        self.register_buffer('frequency', image_counts.float() ** power, persistent=False)

    def weights(self, labels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        present = labels.unique()
        counting = target.new_zeros(self.num_classes + 1)
        counting[present] = 1
        others = self.frequency.clone()
        others[present[present > 0] - 1] = 0
        more = min(self.classes - len(present), int((others > 0).sum()))
        if more > 0:
            counting[torch.multinomial(others, more) + 1] = 1
        return counting[1:]

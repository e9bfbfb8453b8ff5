"""Label-aware smoothing (Zhong et al., "Improving Calibration for Long-Tailed Recognition" (MiSLAS), CVPR 2021, section
3.2).
"""
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses.checks import check_choice, check_number
from nbn_timm.losses.loss import register_loss, require_counts
from nbn_timm.losses.targets import as_distribution

SHAPES = ('concave', 'linear', 'convex', 'power')


def smoothing_per_class(
        class_counts: ClassCounts,
        head: float,
        tail: float,
        shape: str,
        power: float | None = None,
) -> torch.Tensor:
    """Smoothing of each class, from `tail` at the smallest class to `head` at the largest; float64 [C].

    With r = (n - n_min) / (n_max - n_min) it is tail + (head - tail) * f(r), where f is

    - 'concave': sin(pi r / 2);
    - 'linear': r;
    - 'convex': 1 - cos(pi r / 2), which is the paper's 1 + sin(3 pi / 2 + pi r / 2);
    - 'power': r ** power, which the authors' code calls 'exp'.

    If all classes are equally large, r is 0.
    """
    counts = class_counts.tensor()
    r = (counts - counts.min()) / (counts.max() - counts.min()).clamp(min=1)
    if shape == 'concave':
        r = torch.sin(torch.pi * r / 2)
    elif shape == 'convex':
        r = 1 - torch.cos(torch.pi * r / 2)
    elif shape == 'power':
        assert power is not None
        r = r ** power
    return tail + (head - tail) * r


@register_loss('label_aware_smoothing')
class LabelAwareSmoothing(nn.Module):
    """Cross-entropy with label smoothing that depends on the label: more of it for frequent classes.

    The smoothed target is (1 - e_y) at y plus e_y / C everywhere, as in the authors' code and in usual label smoothing.
    `others=True` is the paper's form, e_y / (C - 1) on the other classes alone. The authors use it in a second stage,
    for the classifier. Soft targets are smoothed label by label.

    Args:
        class_counts: Training images per class.
        head: Smoothing of the largest class, in [0, 1].
        tail: Smoothing of the smallest class, in [0, 1].
        shape: How the smoothing grows with the number of images, see `smoothing_per_class`.
        power: Of shape 'power'.
        others: Spread a label's smoothing over the other classes only.

    Raises:
        InputError: No class counts, or a setting out of range or without effect.
    """

    smoothing_of: torch.Tensor

    def __init__(
            self,
            class_counts: ClassCounts | None,
            head: float = 0.4,
            tail: float = 0.1,
            shape: str = 'concave',
            power: float | None = None,
            others: bool = False,
    ) -> None:
        super().__init__()
        name = 'label_aware_smoothing'
        counts = require_counts(class_counts, name)
        check_number(name, 'head', head, high=1)
        check_number(name, 'tail', tail, high=1)
        check_choice(name, 'shape', shape, SHAPES)
        if shape == 'power':
            check_number(name, 'power', power, above=True)  # type: ignore[arg-type]
        elif power is not None:
            raise InputError(f"loss '{name}' has power={power!r}, which shape '{shape}' does not use: leave it out, or "
                             'give shape=power')
        self.others = others
        smoothing = smoothing_per_class(counts, head, tail, shape, power)
        self.register_buffer('smoothing_of', smoothing.float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        labels = as_distribution(target, logits.shape[1])
        spread = labels * self.smoothing_of  # what each label gives away
        if self.others:
            received = (spread.sum(dim=1, keepdim=True) - spread) / (logits.shape[1] - 1)
        else:
            received = spread.sum(dim=1, keepdim=True) / logits.shape[1]
        return F.cross_entropy(logits.float(), labels - spread + received)

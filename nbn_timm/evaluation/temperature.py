"""Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017)."""
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nbn_timm.evaluation.thresholds import told_rightly

CALIBRATION = 'calibration'  # key of checkpoints and records
HOTTEST, COLDEST = 100.0, 0.01  # temperatures
_HALVINGS = 100


@dataclass(frozen=True)
class FittedTemperature:
    """A temperature, by which logits are divided before the softmax, and what it was fitted on.

    Attributes:
        temperature: Above 1 for a network that is too sure of itself.
        split: Of the data, 'val'.
        images: Of that split.
        nll, nll_before: Mean negative log-likelihood of these images, with the temperature and with 1.
        use_ema: The logits are those of averaged weights.
    """

    temperature: float
    split: str
    images: int
    nll: float
    nll_before: float
    use_ema: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> 'FittedTemperature | None':
        """What `to_dict` gave; None of anything else."""
        number = data.get('temperature') if isinstance(data, Mapping) else None
        if not isinstance(number, int | float) or not COLDEST <= number <= HOTTEST:
            return None
        known = {key: data[key] for key in ('split', 'images', 'nll', 'nll_before', 'use_ema') if key in data}
        try:
            found = cls(float(number), **known)
        except TypeError:
            return None
        numbers = (found.nll, found.nll_before)
        return found if told_rightly(found) and all(isinstance(one, int | float) for one in numbers) else None


def temperature_of(
        fitted: FittedTemperature | None,
        asked: float | None = None,
        changed: str | None = None,
) -> tuple[float, str]:
    """The temperature that makes probabilities of a network's logits, and what a person should know of it.

    Args:
        fitted: What the network records.
        asked: Takes its place.
        changed: The flag that has changed the logits since it was fitted.
    """
    if asked is not None:
        return asked, f'probabilities by temperature {asked:g}, as asked for'
    if fitted is None:
        return 1.0, ('probabilities are not calibrated: the model records no temperature (nbn-validate --split val '
                     '--fit-temperature fits one)')
    if changed is not None:
        return 1.0, f'probabilities are not calibrated: the temperature was fitted without {changed}'
    return fitted.temperature, (f'probabilities by temperature {fitted.temperature:.3f}, fitted on {fitted.images:,} '
                                f'images of the {"validation" if fitted.split == "val" else fitted.split} split')


def calibrate(
        logits: torch.Tensor,
        labels: torch.Tensor,
        split: str,
        use_ema: bool = False,
) -> FittedTemperature | None:
    """Fit a temperature on the logits [N, C] and labels [N] of a split; None where there is no best one."""
    temperature = fit_temperature(logits, labels)
    if temperature is None:
        return None
    before, after = (F.cross_entropy(logits.double() / divisor, labels).item() for divisor in (1.0, temperature))
    return FittedTemperature(round(temperature, 6), split, len(labels), round(after, 6), round(before, 6), use_ema)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float | None:
    """The temperature with the least negative log-likelihood.

    That is convex in the inverse of the temperature, so its derivative, mean over images of E_p[z] - z_y, is zero once;
    the place is found by halving. If every image is right, or the logits tell nothing of the labels, it is nowhere.

    Args:
        logits: [N, C].
        labels: int64 [N].

    Returns:
        The temperature, or None if it lies outside `COLDEST` to `HOTTEST`.
    """
    logits = logits.double()
    of_label = logits.gather(1, labels[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected = ((logits * inverse).softmax(dim=1) * logits).sum(dim=1)
        return (expected - of_label).mean().item()

    low, high = 1 / HOTTEST, 1 / COLDEST
    if not slope(low) < 0 < slope(high):
        return None
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5

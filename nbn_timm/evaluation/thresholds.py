"""From which probability on a class is told of a picture that can be of several."""
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

THRESHOLDS = 'thresholds'  # key of checkpoints and records
HALF = 0.5


@dataclass(frozen=True)
class Thresholds:
    """Probabilities from which on a class is told, and what they were chosen on.

    Attributes:
        values: Of each class, from 0 to 1; a single one is that of all classes.
        split: Of the data; None if they were not chosen on data.
        images: Of that split.
        use_ema: They were chosen for averaged weights.
    """

    values: tuple[float, ...]
    split: str | None = None
    images: int = 0
    use_ema: bool = False

    @classmethod
    def fixed(cls, value: float = HALF) -> 'Thresholds':
        """The same one for all classes."""
        return cls((value,))

    @classmethod
    def chosen(cls, logits: np.ndarray, sets: np.ndarray, split: str, use_ema: bool = False) -> 'Thresholds':
        """For each class the one with the greatest F1 on a split.

        It lies halfway between the probability of the last picture that is told and of the next one. Of several places
        with the same F1 the one with the greatest probability is taken. A class that no picture is of keeps one half.

        Args:
            logits: [N, C].
            sets: Label sets, [N, C].
            split: Its name.
            use_ema: The logits are those of averaged weights.
        """
        probabilities = _sigmoid(logits)
        values = [_best(probabilities[:, label], sets[:, label]) for label in range(logits.shape[1])]
        return cls(tuple(values), split, len(logits), use_ema)

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """Which classes are told of pictures with logits [N, C], uint8 [N, C]."""
        return (_sigmoid(logits) >= np.array(self.values)).astype(np.uint8)

    def in_words(self) -> str:
        """For people."""
        if self.split is None:
            return f'a class is told from a probability of {self.values[0]:g} on'
        return (f'thresholds of each class, {min(self.values):.3f} to {max(self.values):.3f}, chosen by F1 on '
                f'{self.images:,} images of the {"validation" if self.split == "val" else self.split} split')

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints."""
        return {**asdict(self), 'values': list(self.values)}

    @classmethod
    def from_dict(cls, data: Any, num_classes: int | None = None) -> 'Thresholds | None':
        """What `to_dict` gave; None of anything else, and of thresholds for another number of classes."""
        values = data.get('values') if isinstance(data, Mapping) else None
        if not isinstance(values, list | tuple) or not values or not all(
                isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            return None
        if len(values) > 1 and num_classes not in (None, len(values)):
            return None
        found = cls(tuple(map(float, values)),
                    **{key: data[key] for key in ('split', 'images', 'use_ema') if key in data})
        return found if told_rightly(found) else None


def told_rightly(found: Any) -> bool:
    """Whether what is recorded of a choice on data, as `split`, `images` and `use_ema`, can be so."""
    return (isinstance(found.split, str | None) and type(found.images) is int and found.images >= 0
            and isinstance(found.use_ema, bool))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """In float64, in which probabilities near 1 differ."""
    return torch.from_numpy(np.asarray(logits, dtype=np.float64)).sigmoid().numpy()


def _best(probabilities: np.ndarray, members: np.ndarray) -> float:
    """The threshold with the greatest F1 of one class: probabilities [N] and whether a picture is of it [N]."""
    if not members.any():
        return HALF
    order = np.argsort(-probabilities, kind='stable')
    ranked = probabilities[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    hits = np.cumsum(members[order], dtype=np.int64)[last]
    best = int(np.argmax(2 * hits / (last + 1 + members.sum())))
    below = ranked[last[best] + 1] if last[best] + 1 < len(ranked) else 0.0
    return float((ranked[last[best]] + below) / 2)

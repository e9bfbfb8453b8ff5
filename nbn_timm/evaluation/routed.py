"""Evaluation of routed experts: accuracy, and how many experts it took."""
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import unwrap_model

from nbn_timm.evaluation.evaluator import LongTailEvaluator
from nbn_timm.evaluation.result import EvalResult


@dataclass(frozen=True)
class RoutedResult(EvalResult):
    """An `EvalResult` with the cost of routing."""

    experts_used: tuple[int, ...]  # images that were given 1, 2, ... experts
    multiply_adds: tuple[int, ...]  # of an image that is given 1, 2, ... experts

    @property
    def shares(self) -> tuple[float, ...]:
        """Percentage of the images that were given 1, 2, ... experts."""
        return tuple(100 * images / self.num_samples for images in self.experts_used)

    @property
    def mean_experts(self) -> float:
        """Experts per image."""
        return sum(number * images for number, images in enumerate(self.experts_used, start=1)) / self.num_samples

    @property
    def mean_multiply_adds(self) -> float:
        """Multiply-adds per image."""
        costs = zip(self.experts_used, self.multiply_adds, strict=True)
        return sum(images * cost for images, cost in costs) / self.num_samples

    def metrics(self) -> dict[str, float | None]:
        """Those of `EvalResult` and the experts per image."""
        return {**super().metrics(), 'mean_experts': round(self.mean_experts, 6)}

    def to_dict(self) -> dict[str, Any]:
        """Those of `EvalResult` and the cost of routing, JSON-able."""
        return {**super().to_dict(), 'routing': {
            'experts_used': list(self.experts_used),
            'share_percent': [round(share, 6) for share in self.shares],
            'multiply_adds': list(self.multiply_adds),
            'mean_multiply_adds': round(self.mean_multiply_adds),
        }}

    def table(self) -> str:
        """The table of `EvalResult` with the experts used below it."""
        lines = [f'{f"{number} expert" + "s" * (number > 1):<20}{share:>9.2f}%{"":>9}{images:>9}' for
                 number, (share, images) in enumerate(zip(self.shares, self.experts_used, strict=True), start=1)]
        lines.append(f'{"Multiply-adds":<20}{self.mean_multiply_adds / 1e6:>9.1f}M  per image, of '
                     f'{self.multiply_adds[-1] / 1e6:.1f}M with all experts')
        return '\n'.join([super().table(), '', *lines])


class RoutingEvaluator(LongTailEvaluator):
    """Evaluate a `RoutedExperts`; exact for any number of processes like its base.

    Args:
        multiply_adds: Of an image that is given 1, 2, ... experts, see `RoutedExperts.multiply_adds`.
        args, kwargs: See `LongTailEvaluator`.
    """

    def __init__(self, multiply_adds: Sequence[int], *args: Any, **kwargs: Any) -> None:
        self.multiply_adds = tuple(multiply_adds)
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget everything seen so far."""
        super().reset()
        self.experts_used = torch.zeros(len(self.multiply_adds), dtype=torch.int64, device=self.device)

    def predict(self, model: torch.nn.Module, images: torch.Tensor) -> Any:
        """Logits [B, C] and experts used [B]."""
        return unwrap_model(model).route(images)  # type: ignore[operator]

    @torch.no_grad()
    def update(self, output: Any, target: torch.Tensor) -> None:
        """Add a batch: the output of `predict`, labels [B]."""
        logits, used = output
        before = self.num_samples
        super().update(logits, target)
        counted = used[:self.num_samples - before]  # without a distributed sampler's padding
        self.experts_used += torch.bincount(counted - 1, minlength=len(self.experts_used))

    def compute(self, distributed: bool = False) -> RoutedResult:
        """Return the result over everything seen, summed over all processes if `distributed`."""
        result = super().compute(distributed)
        experts_used = self.experts_used.clone()
        if distributed:
            dist.all_reduce(experts_used)
        found = {field.name: getattr(result, field.name) for field in fields(result)}
        return RoutedResult(**found, experts_used=tuple(experts_used.tolist()), multiply_adds=self.multiply_adds)

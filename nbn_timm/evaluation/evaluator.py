"""Evaluation over a dataset, exact under any number of processes."""
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationEvaluator, evaluation_sample_limit

from nbn_timm.bars import with_bar
from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, ClassCounts, ShotSplit
from nbn_timm.errors import InputError
from nbn_timm.evaluation.calibration import BINS, Calibration, bin_of, from_units, whole_units
from nbn_timm.evaluation.predictions import FeatureLengths, Predictions
from nbn_timm.evaluation.result import EvalResult, Result

# Matrix products of up to three rows take other ways on CPUs, measured for 3 to 1000 classes. Without padding,
# images that a batch size or a number of processes leaves over would get logits with other last bits.
_FEWEST = 8


ResultT = TypeVar('ResultT', bound=Result)
FoundT = TypeVar('FoundT', bound=Result, covariant=True)


class Evaluator(Protocol[FoundT]):
    """What `evaluate` asks of an evaluator."""

    max_samples: int | None

    def reset(self) -> None: ...

    def watching(self, model: nn.Module) -> AbstractContextManager[None]: ...

    def predict(self, model: nn.Module, images: torch.Tensor) -> Any: ...

    def update(self, output: Any, target: torch.Tensor) -> None: ...

    def compute(self, distributed: bool = False) -> FoundT: ...


def shot_split_of(class_counts: ClassCounts | None, num_classes: int, many: int, few: int) -> ShotSplit | None:
    """The many-, medium- and few-shot classes of a model; None where the training images are not known.

    Raises:
        InputError: The counts are of another number of classes.
    """
    if class_counts is None:
        return None
    if class_counts.num_classes != num_classes:
        raise InputError(
            f'the class counts from {class_counts.source} are for {class_counts.num_classes} classes but the model '
            f'has {num_classes}: give the counts of the training set that the model was trained on')
    return None if class_counts.counts is None else class_counts.shot_split(many, few)


class LongTailEvaluator(ClassificationEvaluator):
    """Accumulate loss, top-1, top-5, per-class counts of hits and of predictions, and what calibration needs.

    Every count is an integer and every sum of per-image numbers exact, so that splitting the images over processes or
    batches does not change the result. Tied logits are ranked by class index, on every device.

    Args:
        num_classes: C, the length of the model's output.
        class_counts: Training images per class, for the many/medium/few splits; None reports none.
        device: Device for the running totals, normally the model output's device.
        max_samples: Ignore predictions beyond this many examples (padding of a distributed sampler).
        many: A class with more training images than this is many-shot.
        few: A class with fewer training images than this is few-shot.
        logit_offset: [C], added to all logits, see `logit_offset`; None adds nothing.

    Raises:
        InputError: `class_counts` is of another number of classes.
    """

    def __init__(
            self,
            num_classes: int,
            class_counts: ClassCounts | None = None,
            device: torch.device | str | None = None,
            max_samples: int | None = None,
            many: int = MANY_ABOVE,
            few: int = FEW_BELOW,
            logit_offset: torch.Tensor | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.shot_split = shot_split_of(class_counts, num_classes, many, few)
        self.groups = ('all',) if self.shot_split is None else tuple(name for name, _ in self.shot_split.items())
        self.group_of_class = torch.zeros(num_classes, dtype=torch.int64, device=device)
        for group, (_, labels) in enumerate(self.shot_split.items() if self.shot_split else ()):
            self.group_of_class[list(labels)] = group
        self.logit_offset = None if logit_offset is None else logit_offset.to(device, torch.float32)
        self.keeps_logits = self.keeps_hits = self.keeps_predictions = False
        self.temperature = 1.0
        self.feature_lengths = FeatureLengths()
        super().__init__(device, max_samples=max_samples)

    def reset(self) -> None:
        """Forget everything seen so far."""
        super().reset()
        self.losses = ExactSum(self.device)
        self.class_correct = torch.zeros(self.num_classes, dtype=torch.int64, device=self.device)
        self.class_total = torch.zeros_like(self.class_correct)
        self.class_predicted = torch.zeros_like(self.class_correct)
        # Images, hits and sums of confidence by group of classes and bin.
        self.confidences = torch.zeros(3, len(self.groups) * BINS, dtype=torch.int64, device=self.device)
        self.brier = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.kept_hits: list[torch.Tensor] = []
        self.kept_predictions: list[Predictions] = []
        self.faults = torch.zeros(2, dtype=torch.int64, device=self.device)  # non-finite outputs, labels out of range

    def keep_logits(self) -> None:
        """Remember the logits of every image from now on, see `logits`."""
        self.keeps_logits = True

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, C] as they were judged and labels [N] of this process's images, on the CPU."""
        outputs, targets = zip(*self.kept, strict=True)
        return torch.cat(outputs), torch.cat(targets)

    def keep_hits(self) -> None:
        """Remember of every image from now on whether it was recognised, see `hits`."""
        self.keeps_hits = True

    def hits(self) -> torch.Tensor:
        """Whether the largest logit of each image of this process is its label's, bool [N], on the CPU."""
        return torch.cat(self.kept_hits)

    def keep_predictions(self, temperature: float = 1.0) -> None:
        """Remember what is said of every image from now on, with logits divided by a temperature; see `predictions`."""
        self.keeps_predictions, self.temperature = True, temperature

    def predictions(self) -> Predictions:
        """What was said of this process's images."""
        return Predictions.concatenate(self.kept_predictions)

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around calls of the model: look at what predictions are kept with."""
        return self.feature_lengths.watching(model) if self.keeps_predictions else nullcontext()

    def predict(self, model: nn.Module, images: torch.Tensor) -> Any:
        """What `update` takes, from a model in eval mode."""
        return model(images)

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits [B, C] of any floating type, labels [B]; more logits than labels are padding.

        Raises:
            InputError: The output is not [B, C].
        """
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[1] != self.num_classes:
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise InputError(
                f'the model returned {shape} where logits [batch, {self.num_classes}] were expected: '
                'check --model and --num-classes')
        if self.max_samples is not None:
            target = target[:max(0, self.max_samples - self.num_samples)]
        output = output[:len(target)]
        self.num_samples += len(output)
        output = output.float()
        if self.logit_offset is not None:
            output = output + self.logit_offset
        if self.keeps_logits:
            self.kept.append((output.cpu(), target.cpu()))

        # Faults are counted here and reported by compute(): every process then raises, and none waits for another.
        valid = (target >= 0) & (target < self.num_classes)
        self.faults += torch.stack([(~output.isfinite().all(dim=1)).sum(), (~valid).sum()])
        target = target.clamp(0, self.num_classes - 1)
        if self.keeps_predictions:
            lengths = self.feature_lengths.last
            self.kept_predictions.append(
                Predictions.of_logits(output / self.temperature, target,
                                      None if lengths is None else lengths[:len(output)]))

        rank = _rank_of_target(output, target)
        top1, top5 = rank < 1, rank < 5
        if self.keeps_hits:
            self.kept_hits.append(top1.cpu())
        self.losses.add(F.cross_entropy(output, target, reduction='none'))
        self.counts += torch.stack([torch.ones_like(top1).sum(), top1.sum(), top5.sum()])
        self.class_correct += torch.bincount(target[top1], minlength=self.num_classes)
        self.class_total += torch.bincount(target, minlength=self.num_classes)
        self.class_predicted += torch.bincount(likeliest_class(output), minlength=self.num_classes)

        probabilities = output.softmax(dim=1)
        confidence = probabilities.amax(dim=1)
        place = self.group_of_class[target] * BINS + bin_of(confidence)
        number = self.confidences.shape[1]
        self.confidences[0] += torch.bincount(place, minlength=number)
        self.confidences[1] += torch.bincount(place[top1], minlength=number)
        self.confidences[2].index_add_(0, place, whole_units(confidence))
        of_label = probabilities.gather(1, target[:, None])[:, 0]
        self.brier += whole_units(probabilities.square().sum(dim=1) - 2 * of_label + 1).sum()

    def compute(self, distributed: bool = False) -> EvalResult:
        """Return the result over everything seen, summed over all processes if `distributed`.

        Raises:
            InputError: No image was seen, a logit was not finite or a label was out of range.
        """
        sums = [self.faults, self.counts, self.class_correct, self.class_total, self.class_predicted, self.losses.parts,
                *self.confidences, self.brier]
        totals = torch.cat(sums)
        if distributed:
            dist.all_reduce(totals)
        faults, counts, correct, total, predicted, losses, *confidences, brier = (
            part.tolist() for part in totals.split([len(part) for part in sums]))
        refuse_faults(faults[0], faults[1], counts[0], self.num_classes)
        return EvalResult(
            loss=ExactSum.mean(losses, counts[0]),
            top5=100 * counts[2] / counts[0],
            per_class_correct=tuple(correct),
            per_class_total=tuple(total),
            shot_split=self.shot_split,
            per_class_predicted=tuple(predicted),
            brier=from_units(brier[0]) / counts[0],
            calibration={name: Calibration(*(tuple(row[group * BINS:(group + 1) * BINS]) for row in confidences))
                         for group, name in enumerate(self.groups)},
        )


class ExactSum:
    """Sum of float32 numbers without rounding, and so the same in whatever order and groups they come.

    A finite float32 is an integer below 2^24 times a power of two, of which there are 255. The integers are summed for
    each power by itself; they would overflow after 2^39 numbers.

    Attributes:
        parts: [256], int64: the sum over the numbers with that biased exponent, the last one not finite. Parts of
            several processes may be added.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.parts = torch.zeros(256, dtype=torch.int64, device=device)

    def add(self, values: torch.Tensor) -> None:
        """Add float32 numbers [N]."""
        bits = values.float().view(torch.int32).to(torch.int64)
        exponent = bits >> 23 & 0xff
        integer = (bits & 0x7fffff) | (exponent > 0).to(torch.int64) << 23
        self.parts.index_add_(0, exponent, torch.where(bits < 0, -integer, integer))

    @staticmethod
    def mean(parts: Sequence[int], number: int) -> float:
        """The sum by the number of its terms, rounded once; infinite if one of them was not finite."""
        if parts[255]:
            return math.inf
        # 2^-149 is the smallest float32, of which all others are multiples.
        total = sum(part << max(exponent - 1, 0) for exponent, part in enumerate(parts))
        return total / (number << 149)


def evaluate(
        model: nn.Module,
        loader: Iterable[Any],
        evaluator: Evaluator[ResultT],
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
        channels_last: bool = False,
        distributed: bool = False,
) -> ResultT:
    """Run `model` over `loader` and return what `evaluator` found; the model is left in eval mode.

    Args:
        model: Maps images [B, 3, H, W] to logits [B, C].
        loader: Yields (images, targets); its padding of an uneven distributed split is not counted.
        evaluator: Is reset first.
        device: Where the model is.
        amp_dtype: Autocast to this type; None computes in the model's own.
        channels_last: Give the model channels-last images.
        distributed: Sum over all processes of the default group.

    Raises:
        InputError: The output does not fit the labels, or is not finite.
    """
    evaluator.reset()
    evaluator.max_samples = evaluation_sample_limit(loader)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.eval()
    with torch.inference_mode(), evaluator.watching(model):
        for images, target in with_bar(loader, 'evaluation'):
            if len(images) < _FEWEST:
                images = images[torch.arange(_FEWEST, device=images.device) % len(images)]
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                output = evaluator.predict(model, images)
            evaluator.update(output, target.to(device, non_blocking=True))
    return evaluator.compute(distributed)


def likeliest_class(output: torch.Tensor) -> torch.Tensor:
    """The first class with the greatest logit of each row [B, C], on every device."""
    index = torch.arange(output.shape[1], device=output.device)
    best = output == output.amax(dim=1, keepdim=True)
    return torch.where(best, index, output.shape[1] - 1).amin(dim=1)


def _rank_of_target(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Number of classes ahead of the label in each row; topk would break ties by device and batch shape."""
    score = output.gather(1, target[:, None])
    index = torch.arange(output.shape[1], device=output.device)
    return ((output > score) | ((output == score) & (index < target[:, None]))).sum(dim=1)


def refuse_faults(non_finite: int, out_of_range: int, num_samples: int, num_classes: int) -> None:
    """Refuse an evaluation of nothing, of labels that there are not, or with logits that are not finite.

    Raises:
        InputError: It is one.
    """
    if not num_samples:
        raise InputError('no image was evaluated: check that the evaluation split is not empty')
    if out_of_range:
        raise InputError(
            f'{out_of_range} of {num_samples} labels are outside 0..{num_classes - 1}: '
            'the model has fewer classes than the dataset, check --num-classes and the list')
    if non_finite:
        raise InputError(
            f'the model gave NaN or infinite logits for {non_finite} of {num_samples} images: the weights have '
            'diverged, or float16 overflowed (try --amp-dtype bfloat16)')

"""`--imbalance auto` for a head: the loss by the class counts, the strength of logit adjustment by the validation."""
import time
from collections.abc import Sequence

import torch

from nbn_timm.data import Classes
from nbn_timm.data.splits import SHOT_LIMITS
from nbn_timm.evaluation import EvalResult, LongTailEvaluator
from nbn_timm.imbalance import ChosenStrength, StrengthCurve, TrainingChoice, choose_training, target_shares
from nbn_timm.imbalance.settings import ImbalanceSettings
from nbn_timm.probe.comparison import ComparedHead, parts_of
from nbn_timm.probe.features import Features
from nbn_timm.probe.heads import fit_head, head_logits
from nbn_timm.probe.methods import HeadMethod
from nbn_timm.probe.settings import HeadSettings

AUTO = 'auto'


def auto_head(
        train: Features,
        val: Features | None,
        classes: Classes,
        wanted: ImbalanceSettings,
        settings: HeadSettings | None = None,
        *,
        shot_limits: tuple[int, int] = SHOT_LIMITS,
        seed: int = 42,
) -> tuple[ComparedHead, TrainingChoice, ChosenStrength]:
    """The linear head for a target, and why it is that one.

    Args:
        train: Features of the training images.
        val: Of validation images; None measures the strength on parts of the training images that are held out.
        classes: With the training images per class.
        wanted: The target, and what may be given up for it.
        settings: Of the training.
        shot_limits: Of many and few, see `ClassCounts.shot_split`.
        seed: Of the trainings and of the parts.

    Raises:
        InputError: The counts are not known, or the target is of other classes.
    """
    settings = settings or HeadSettings()
    begun = time.perf_counter()
    choice = choose_training(classes, wanted.target)
    method = HeadMethod(loss=choice.loss, loss_kwargs=choice.loss_kwargs, sampler=choice.sampler)
    curve = StrengthCurve(classes, target_shares(wanted.target, classes), choice.trained_tau,
                          device=train.labels.device)
    told: list[tuple[torch.Tensor, torch.Tensor]] = []
    on_all = None
    for part, held in parts_of(train, val, settings.folds, seed):
        head = fit_head(part, classes, method, settings, seed)
        on_all = head if val is not None else None
        told.append((head_logits(head.folded(), held.plain), held.labels))
        curve.update(*told[-1])
    chosen = curve.choose(wanted.allowed_drop, wanted.target)
    kept = (on_all or fit_head(train, classes, method, settings, seed)).folded()
    offset = chosen.offset.to(kept.bias.device)
    with torch.no_grad():
        kept.bias += offset
    result = _evaluated(told, offset, classes, shot_limits)
    return ComparedHead(AUTO, result, chosen.tau, time.perf_counter() - begun, kept, method), choice, chosen


def _evaluated(
        told: Sequence[tuple[torch.Tensor, torch.Tensor]],
        offset: torch.Tensor,
        classes: Classes,
        shot_limits: tuple[int, int],
) -> EvalResult:
    evaluator = LongTailEvaluator(classes.num_classes, classes, offset.device, None, *shot_limits)
    for logits, labels in told:
        evaluator.update(logits + offset, labels)
    return evaluator.compute()

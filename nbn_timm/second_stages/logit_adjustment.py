"""Logit adjustment of a finished network (Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021)."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from nbn_timm.errors import InputError
from nbn_timm.imbalance import ChosenStrength, StrengthCurve, target_shares
from nbn_timm.imbalance.target import BALANCED
from nbn_timm.key_values import check_number
from nbn_timm.second_stages.classifier import linear_classifiers, linear_form, vectors, write_linear
from nbn_timm.second_stages.second_stage import FLAG, FitData, FitReport, FittedSecondStage, register_second_stage

_LARGEST_TAU = 100  # beyond it there is nothing to see


def why_not_adjustable(model: nn.Module) -> str | None:
    """Why the logits of a model cannot be given an offset that stays in it; None if they can."""
    try:
        classifiers = linear_classifiers(model, 'logit adjustment')
    except InputError as error:
        return str(error)
    if any(classifier.bias is None for classifier in classifiers.values()):
        return 'its classifier has no bias that could hold it'
    return None


@register_second_stage('logit_adjustment')
class LogitAdjustment(FittedSecondStage):
    """Take the training prior off the logits, and add the target's; nothing is trained.

    What is added to the logits goes into the classifier's bias, so the result is an ordinary model of the same
    architecture that all commands and formats take. The strength is measured on the validation split, see
    `StrengthCurve`; without one it is 1.

    Args:
        tau: Strength by hand; None measures it.
        target: See `target_shares`.
        trained_tau: Strength by which the training loss has already taken off the prior: 0 of cross-entropy, 1 of
            balanced softmax.
        allowed_drop: Percentage points of overall accuracy that may be given up; None for any number.
    """

    def __init__(
            self,
            tau: float | None = None,
            target: str = BALANCED,
            trained_tau: float = 0.0,
            allowed_drop: float | None = None,
    ) -> None:
        what = '--stage logit_adjustment'
        if tau is not None:
            check_number(what, FLAG, 'tau', tau, high=_LARGEST_TAU)
        if allowed_drop is not None:
            check_number(what, FLAG, 'allowed_drop', allowed_drop, high=100)
        check_number(what, FLAG, 'trained_tau', trained_tau, high=_LARGEST_TAU)
        self.tau, self.target = tau, target
        self.trained_tau, self.allowed_drop = trained_tau, allowed_drop

    def fit(self, model: nn.Module, data: FitData) -> FitReport:
        """Measure the strength and write the offset into the bias."""
        reason = why_not_adjustable(model)
        if reason:
            raise InputError(f'the logits of this network cannot be adjusted for good, since {reason}: give '
                             '--logit-adjustment TAU to nbn-validate and nbn-predict instead')
        chosen = self.choose(model, data)
        self.write(model, chosen)
        return FitReport(chosen.lines())

    def choose(self, model: nn.Module, data: FitData) -> ChosenStrength:
        """The strength for a model in eval mode, which stays as it is.

        Raises:
            InputError: The training images per class are not known, or the target is of other classes.
        """
        classes = data.splits.class_counts
        if classes is None:
            raise InputError('logit adjustment needs the training images per class: give them with --class-counts FILE')
        curve = StrengthCurve(classes, target_shares(self.target, classes), self.trained_tau, device=data.device)
        if self.tau is not None:
            return ChosenStrength(self.tau, curve.offset(self.tau), None, None, None, None, 'given by hand', 0)
        if data.splits.val is None:
            return curve.consistent()
        self._measure(curve, model, data, data.splits.val)
        return curve.choose(self.allowed_drop, self.target)

    def _measure(self, curve: StrengthCurve, model: nn.Module, data: FitData, dataset: Dataset) -> None:
        classifiers = list(linear_classifiers(model, 'logit adjustment').values())
        forms = [linear_form(classifier) for classifier in classifiers]
        for inputs, labels in data.classifier_inputs(model, classifiers, dataset):
            logits = [F.linear(vectors(features), weight.float(), None if bias is None else bias.float())
                      for features, (weight, bias) in zip(inputs, forms, strict=True)]
            curve.update(torch.stack(logits).mean(dim=0), labels.to(data.device))
        if data.distributed:
            curve.reduce()

    @staticmethod
    def write(model: nn.Module, chosen: ChosenStrength) -> None:
        """Add the offset to the bias of each classifier, in place."""
        for classifier in linear_classifiers(model, 'logit adjustment').values():
            weight, bias = linear_form(classifier)
            zero = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            write_linear(classifier, weight, (zero if bias is None else bias) + chosen.offset.to(weight))

"""tau-normalisation of the classifier (Kang et al., "Decoupling Representation and Classifier for Long-Tailed
Recognition", ICLR 2020, section 4.3).
"""
import csv
import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.timm_datasets import SelectedSamples
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult
from nbn_timm.evaluation.result import LOWER_IS_BETTER
from nbn_timm.key_values import check_number
from nbn_timm.layers import RectifiedLinear
from nbn_timm.second_stages.classifier import linear_classifiers, linear_form, vectors, write_linear
from nbn_timm.second_stages.second_stage import FLAG, FitData, FitReport, FittedSecondStage, register_second_stage

CURVE_FILE = 'tau_curve.csv'
_LARGEST_TAU, _MOST_VALUES = 100, 1000  # beyond these there is nothing to see, and lengths to that power overflow


def tau_normalize(model: nn.Module, tau: float, keep_bias: bool | None = None) -> None:
    """Divide the weight vector of each class by its length to the power `tau`, in place.

    Args:
        model: A timm model with a linear classifier, or one for each expert.
        tau: 0 leaves the weights as they are, 1 gives all of them unit length.
        keep_bias: None drops the bias, as published, but keeps that of a rectified classifier, which is what
            rectification comes down to.

    Raises:
        InputError: The classifier is not linear.
    """
    for classifier in linear_classifiers(model, 'tau-normalisation').values():
        write_linear(classifier, *normalized_form(classifier, tau, keep_bias))


def normalized_form(
        classifier: nn.Module,
        tau: float,
        keep_bias: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight w_c / |w_c|^tau [C, D] and bias [C] of a linear classifier, see `tau_normalize`."""
    weight, bias = linear_form(classifier)
    length = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    keep = isinstance(classifier, RectifiedLinear) if keep_bias is None else keep_bias
    return weight / length ** tau, bias if keep else None


@register_second_stage('tau_norm')
class TauNormalization(FittedSecondStage):
    """Normalise the classifier by the tau that is best on the validation split; nothing is trained.

    Without a validation split tau is given by hand, or chosen on a balanced part of the training set. A first stage
    that was trained on that part knows it, which makes small tau look better than they are.

    The result is an ordinary model of the same architecture. The curve, one row per tau with many, medium and few, is
    written to `tau_curve.csv`, measured on the validation split, on that part of the training set, or with tau by hand
    on the test split if it may be watched.

    Args:
        tau: By hand; None chooses the best of the curve.
        holdout: Choose on so many training images of each class (all of a smaller class), drawn by the seed.
        keep_bias: See `tau_normalize`.
        max_tau, step: The curve goes from 0 to `max_tau` by steps; 2 and 0.1 are the authors'.
    """

    def __init__(
            self,
            tau: float | None = None,
            holdout: int | None = None,
            keep_bias: bool | None = None,
            max_tau: float = 2.0,
            step: float = 0.1,
    ) -> None:
        what = '--stage tau_norm'
        if holdout is not None:
            check_number(what, FLAG, 'holdout', holdout, low=1, whole=True)
        if tau is not None:
            check_number(what, FLAG, 'tau', tau, high=_LARGEST_TAU)
        check_number(what, FLAG, 'max_tau', max_tau, high=_LARGEST_TAU, above=True)
        check_number(what, FLAG, 'step', step, low=max_tau / _MOST_VALUES, high=max_tau)
        if tau is not None and holdout is not None:
            raise InputError('tau is given by hand, so there is nothing to choose on a holdout: give one of both')
        self.tau = tau
        self.holdout = holdout
        self.keep_bias = keep_bias
        self.taus = [round(index * step, 6) for index in range(int(max_tau / step + 1e-6) + 1)]

    def fit(self, model: nn.Module, data: FitData) -> FitReport:
        """Measure the curve, choose tau, normalise."""
        dataset, where = self._split(data)
        if dataset is None and self.tau is None:
            raise InputError('there is no validation split to choose tau on: give one, or tau itself as --stage-kwargs '
                             'tau=1.0, or choose on training images with --stage-kwargs holdout=5')
        taus = sorted({*self.taus, *([] if self.tau is None else [self.tau])})
        curve = {} if dataset is None else self._curve(model, data, dataset, taus)
        tau, reason = self.tau, 'given by hand'
        if tau is None:
            tau, reason = _best(curve, data.metric), f'the best {data.metric} on {where}'
        tau_normalize(model, tau, self.keep_bias)
        lines = [f'tau       {tau:g}, {reason}']
        if not curve:
            return FitReport(lines)
        lines.append(f'curve     {len(curve)} values of tau on {where}, in {CURVE_FILE}')
        return FitReport(lines, {CURVE_FILE: _curve_text(curve, tau, where)})

    def _split(self, data: FitData) -> tuple[Dataset | None, str]:
        """What the curve is measured on, and its name."""
        splits = data.splits
        if self.holdout is not None:
            return _balanced_part(data, self.holdout), f'{self.holdout} training images per class, seed {data.seed}'
        if splits.val is not None:
            return splits.val, 'the validation split'
        if self.tau is not None and data.watch_test and splits.test is not None:
            return splits.test, 'the test split'
        return None, ''

    def _curve(self, model: nn.Module, data: FitData, dataset: Dataset, taus: list[float]) -> dict[float, EvalResult]:
        classifiers = list(linear_classifiers(model, 'tau-normalisation').values())
        forms = {tau: [normalized_form(classifier, tau, self.keep_bias) for classifier in classifiers] for tau in taus}
        evaluators = {tau: data.evaluator() for tau in taus}
        for inputs, target in data.classifier_inputs(model, classifiers, dataset):
            for tau, evaluator in evaluators.items():
                logits = [F.linear(vectors(features), weight.float(), None if bias is None else bias.float())
                          for features, (weight, bias) in zip(inputs, forms[tau], strict=True)]
                evaluator.update(torch.stack(logits).mean(dim=0), target)
        return {tau: evaluator.compute(data.distributed) for tau, evaluator in evaluators.items()}


def _best(curve: dict[float, EvalResult], metric: str) -> float:
    """The tau of the best result; of equal ones the smallest."""
    values = {tau: result.metrics()[metric] for tau, result in curve.items()}
    if None in values.values():
        raise InputError(f"there is no image to measure '{metric}' on: choose tau by another --eval-metric")
    better: Any = min if metric in LOWER_IS_BETTER else max
    return better(values, key=values.__getitem__)


def _curve_text(curve: dict[float, EvalResult], chosen: float, where: str) -> str:
    file = io.StringIO()
    rows = {tau: result.metrics() for tau, result in curve.items()}
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['tau', 'chosen', 'measured_on', *next(iter(rows.values()))])
    for tau, metrics in rows.items():
        values: list[Any] = ['' if value is None else value for value in metrics.values()]
        writer.writerow([tau, int(tau == chosen), where, *values])
    return file.getvalue()


def _balanced_part(data: FitData, per_class: int) -> Dataset:
    """`per_class` training images of each class, drawn by the seed."""
    splits = data.splits
    if splits.train is None or splits.train_targets is None or isinstance(splits.train, IterableDataset):
        raise InputError('the labels of the training images are not known beforehand, or they are a stream, so no part '
                         'of them can be held out: give tau by hand')
    order = np.random.default_rng(data.seed).permutation(len(splits.train_targets))
    by_class = order[np.argsort(splits.train_targets[order], kind='stable')]  # grouped by class, shuffled inside
    labels = splits.train_targets[by_class]
    position = np.arange(len(labels)) - np.searchsorted(labels, labels)  # inside the class
    chosen = np.sort(by_class[position < per_class])
    if isinstance(splits.train, LabelledImages):
        return splits.train.select(chosen)
    return SelectedSamples(splits.train, chosen, splits.train_targets)

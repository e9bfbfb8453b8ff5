"""Long-tailed evaluation: top-1, top-5, many/medium/few and per-class accuracy, average precision of label sets.

All of it is exact for any number of processes.
"""
from nbn_timm.evaluation.evaluator import LongTailEvaluator, evaluate
from nbn_timm.evaluation.label_sets import LabelSetEvaluator, LabelSetResult, average_precision
from nbn_timm.evaluation.posthoc import logit_offset
from nbn_timm.evaluation.result import EvalResult, Result
from nbn_timm.evaluation.robust import AttackedLoader, RobustAccuracy
from nbn_timm.evaluation.routed import RoutedResult, RoutingEvaluator
from nbn_timm.evaluation.shifted import ShiftedAccuracy, shifted_accuracy

__all__ = [
    'AttackedLoader', 'EvalResult', 'LabelSetEvaluator', 'LabelSetResult', 'LongTailEvaluator', 'Result',
    'RobustAccuracy', 'RoutedResult', 'RoutingEvaluator', 'ShiftedAccuracy', 'average_precision', 'evaluate',
    'logit_offset', 'shifted_accuracy',
]

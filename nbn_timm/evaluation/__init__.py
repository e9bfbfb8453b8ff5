"""Long-tailed evaluation: top-1, top-5, many/medium/few and per-class accuracy, exact for any number of processes."""
from nbn_timm.evaluation.evaluator import LongTailEvaluator, evaluate
from nbn_timm.evaluation.result import EvalResult
from nbn_timm.evaluation.routing import RoutedResult, RoutingEvaluator

__all__ = ['EvalResult', 'LongTailEvaluator', 'RoutedResult', 'RoutingEvaluator', 'evaluate']

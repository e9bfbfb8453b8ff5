"""Accuracies of a model from the files in which train.py and validate.py leave them."""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import split_model_name_tag

from nbn_timm.datasets import benchmarks
from nbn_timm.errors import InputError
from nbn_timm.evaluation.result import METRICS
from nbn_timm.files import open_regular

ACCURACIES = tuple(name for name in METRICS if name != 'loss')

# Post-hoc changes of what validate.py evaluated that do not travel with the weights.
_CHANGES = {'tau_norm': '--tau-norm', 'logit_adjustment': '--logit-adjustment'}


def results_beside(checkpoint: str, use_ema: bool, epoch: int | None) -> dict[str, Any] | None:
    """Test accuracies that train.py wrote beside a checkpoint, if they are of that file and of those weights.

    Args:
        checkpoint: The file.
        use_ema: The averaged weights are meant.
        epoch: Of the checkpoint, from 1; None for a stage of one pass. The result may be older, if the run went on.
    """
    path = Path(checkpoint)
    beside = path.parent / 'test.json'
    if not path.is_file() or not beside.is_file():
        return None
    results = _read(beside)
    weights = weights_of(results)
    same = weights.get('file') == path.name and weights.get('epoch') == epoch
    # A run of a second stage may have asked only some experts for an image.
    if not same or results.get('use_ema', use_ema) != use_ema or 'mean_experts' in results:
        return None
    return summarize_results(results)


def weights_of(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which weights a test.json is of: their 'file', their 'epoch' from 1, and what they were 'chosen_by'.

    Earlier versions told it in a sentence alone.
    """
    weights = results.get('weights')
    if isinstance(weights, Mapping):
        return weights
    sentence = str(results.get('checkpoint'))
    trained = re.match(r'epoch (\d+) .*?\(([^)]+)\)(?:.*chosen by (.*))?', sentence)
    if trained:
        return {'file': trained[2], 'epoch': int(trained[1]), 'chosen_by': trained[3]}
    return {'file': sentence.partition(',')[0], 'epoch': None, 'chosen_by': None}


def results_of(path: str, use_ema: bool, architecture: str) -> dict[str, Any]:
    """Accuracies in a results file of validate.py or in a test.json of train.py.

    Args:
        path: Of the file.
        use_ema: The averaged weights are meant.
        architecture: Of the model that is meant.

    Raises:
        InputError: The file is none of these, or is of something else than the weights by themselves.
    """
    results = _read(Path(path))
    evaluated = str(results.get('model') or architecture)
    names = {architecture, *(f'{architecture}_{dataset}' for dataset in benchmarks())}  # a model and its aliases
    if ':' not in evaluated and split_model_name_tag(evaluated)[0] not in names:
        raise InputError(f"the results file '{path}' is of the model '{evaluated}', and this is '{architecture}': give "
                         'the results of this model')
    changed = [flag for key, flag in _CHANGES.items() if results.get(key)]
    if results.get('routed') or 'mean_experts' in results:
        changed.append('a router')
    if changed:
        raise InputError(f"the results file '{path}' is of an evaluation with {' and '.join(changed)}, which does not "
                         'travel with the weights: evaluate without it')
    if 'use_ema' in results and results['use_ema'] != use_ema:
        kind = 'averaged' if results['use_ema'] else 'plain'
        raise InputError(f"the results file '{path}' is of the {kind} weights and the others are pushed: "
                         f"{'add' if results['use_ema'] else 'leave out'} --use-ema or evaluate again")
    return summarize_results(results)


def summarize_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of the entries of a results file those that a record keeps as 'test'."""
    splits = results.get('splits')
    return {
        'split': results.get('split', 'test'),
        'images': results['num_samples'],
        **{key: results[key] for key in ACCURACIES if key in results},
        **({'splits': {key: splits[key] for key in ('many_above', 'few_below')}} if splits else {}),
        **({'precision': results['precision']} if results.get('precision') else {}),
        'classes': results['num_classes'],
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            results = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the results file '{path}' cannot be read ({error}): give a file of validate.py "
                         '--results-file, or a test.json of train.py') from error
    needed = ('top1', 'num_samples', 'num_classes')
    if not isinstance(results, dict) or not all(isinstance(results.get(key), int | float) for key in needed):
        raise InputError(f"'{path}' is no results file ({', '.join(needed)} are not all there): give a file of "
                         'validate.py --results-file, or a test.json of train.py')
    return results

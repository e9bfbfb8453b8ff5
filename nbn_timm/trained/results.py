"""Accuracies of a network, and the files in which train.py and validate.py leave them."""
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm.models import split_model_name_tag

from nbn_timm.datasets import benchmarks
from nbn_timm.errors import InputError
from nbn_timm.evaluation.result import METRICS
from nbn_timm.files import read_json_object
from nbn_timm.models.weight_files import DIGEST
from nbn_timm.seals import tell_changes

ACCURACIES = tuple(name for name in METRICS if name != 'loss')

_logger = logging.getLogger(__name__)

# Post-hoc changes of what validate.py evaluated that do not travel with the weights.
_CHANGES = {'tau_norm': '--tau-norm', 'logit_adjustment': '--logit-adjustment', 'routed': 'a router',
            'mean_experts': 'a router'}


@dataclass(frozen=True)
class Results:
    """Accuracies of a network.

    Attributes:
        split: Of the data, 'test' or 'val'.
        images: Of that split.
        accuracies: In percent, by their names in `ACCURACIES`; those that are known.
        shot_limits: Many is above the first number of training images, few below the second.
        precision: Of the computation; None where it is not recorded.
    """

    split: str
    images: int
    accuracies: Mapping[str, float]
    shot_limits: tuple[int, int] | None = None
    precision: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> 'Results':
        """Read what `to_dict` wrote, or a file of `EvalResult.write_json`.

        Args:
            data: Of a JSON file.
            where: The file, in words for people.

        Raises:
            InputError: `data` is not of that form.
        """
        images = data.get('images', data.get('num_samples'))
        limits = data.get('splits') or {}
        found = {name: data[name] for name in ACCURACIES if data.get(name) is not None}
        keys = ('many_above', 'few_below') if limits else ()
        whole = isinstance(limits, Mapping) and all(key in limits for key in keys) and 'top1' in found
        numbers = [images, *found.values(), *(limits[key] for key in keys)] if whole else []
        # NaN is in no range.
        if not whole or not all(isinstance(number, int | float) and 0 <= number < 1e15 for number in numbers):
            raise InputError(f'{where} has no results that can be read (images, top1 and other accuracies in '
                             'percent): evaluate again')
        return cls(data.get('split', 'test'), int(images), found,
                   (limits['many_above'], limits['few_below']) if limits else None, data.get('precision') or None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        limits = {} if self.shot_limits is None else {
            'splits': dict(zip(('many_above', 'few_below'), self.shot_limits, strict=True))}
        return {'split': self.split, 'images': self.images, **self.accuracies, **limits,
                **({'precision': self.precision} if self.precision else {})}


@dataclass(frozen=True)
class EvaluatedWeights:
    """Which weights of a run were evaluated.

    Attributes:
        file: In the folder of the run.
        epoch, epochs: Of the weights and of the run, from 1.
        chosen_by: What chose that epoch; None for the last one.
        second_stage: One of one pass that gave them, which has no epochs.
        head: On cached features, which has no epochs of a run either.
    """

    file: str
    epoch: int | None = None
    epochs: int | None = None
    chosen_by: str | None = None
    second_stage: str | None = None
    head: str | None = None

    @classmethod
    def of_results(cls, results: Mapping[str, Any]) -> 'EvaluatedWeights':
        """What a test.json says of them; earlier versions told it in a sentence alone."""
        weights = results.get('weights')
        if isinstance(weights, Mapping):
            return cls(str(weights.get('file')), *map(weights.get, ('epoch', 'epochs', 'chosen_by', 'stage', 'head')))
        sentence = str(results.get('checkpoint'))
        trained = re.match(r'epoch (\d+) .*?\(([^)]+)\)(?:.*chosen by (.*))?', sentence)
        if trained:
            return cls(trained[2], int(trained[1]), chosen_by=trained[3])
        return cls(sentence.partition(',')[0])

    @property
    def metric(self) -> str | None:
        """The metric of the validation split that `chosen_by` names; None without such a split."""
        _, validated, metric = str(self.chosen_by or '').rpartition('validation ')
        return metric if validated else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {'file': self.file, 'stage': self.second_stage} if self.second_stage else {
            key: value for key, value in asdict(self).items() if key != 'second_stage' and (key != 'head' or value)}

    def in_words(self) -> str:
        """For people."""
        if self.second_stage:
            return f'{self.file}, --stage {self.second_stage}'
        if self.head:
            return f'{self.file}, head {self.head} on cached features, chosen by {self.chosen_by}'
        if self.chosen_by is None:
            return f'epoch {self.epoch} ({self.file}), the last one, since none was chosen by validation'
        return f'epoch {self.epoch} of {self.epochs} ({self.file}), chosen by {self.chosen_by}'


@dataclass(frozen=True)
class ResultsFile:
    """A test.json of train.py, or a results file of validate.py.

    Attributes:
        results: The accuracies.
        num_classes: Of the network.
        model: Its name; None where the file has none.
        weights: Of a run.
        use_ema: They are averaged weights; None where the file does not say.
        changes: What was evaluated beside the weights and does not travel with them, in words.
        digest: `weights_digest` of the weights; None in a file of an earlier version.
    """

    results: Results
    num_classes: int
    model: str | None
    weights: EvaluatedWeights
    use_ema: bool | None
    changes: tuple[str, ...]
    digest: str | None = None

    @classmethod
    def read(cls, path: Path) -> 'ResultsFile':
        """Read a file.

        Raises:
            InputError: It is none of these.
        """
        hint = 'give a file of validate.py --results-file, or a test.json of train.py'
        data = read_json_object(path, f"the results file '{path}'", hint)
        tell_changes(data, f"the results file '{path}'")
        needed = ('top1', 'num_samples', 'num_classes')
        if not all(isinstance(data.get(key), int | float) for key in needed):
            raise InputError(f"'{path}' is no results file ({', '.join(needed)} are not all there): {hint}")
        changes = dict.fromkeys(said for key, said in _CHANGES.items() if data.get(key))
        return cls(Results.from_dict(data, f"'{path}'"), data['num_classes'], data.get('model'),
                   EvaluatedWeights.of_results(data), data.get('use_ema'), tuple(changes), data.get(DIGEST))


def results_beside(
        checkpoint: str,
        use_ema: bool,
        epoch: int | None,
        digest: str | None = None,
) -> ResultsFile | None:
    """Test accuracies that train.py wrote beside a checkpoint, if they are of that file and of those weights.

    Where the digests do not agree, or there is none as in files of earlier versions, a warning says so.

    Args:
        checkpoint: The file.
        use_ema: The averaged weights are meant.
        epoch: Of the checkpoint, from 1; None for a second stage of one pass. The result may be older, if the run went
            on.
        digest: `weights_digest` of the weights that are meant; None looks at the file and the epoch alone.
    """
    path = Path(checkpoint)
    beside = path.parent / 'test.json'
    if not path.is_file() or not beside.is_file():
        return None
    found = ResultsFile.read(beside)
    same = (found.weights.file, found.weights.epoch) == (path.name, epoch) and found.use_ema in (None, use_ema)
    if not same or found.changes:  # a run of a second stage may have asked only some experts for an image
        return None
    if digest is None or found.digest == digest:
        return found
    if found.digest is None:
        _logger.warning("The accuracies in '%s' are of an earlier version, which did not record by a digest of which "
                        "weights they are: make sure that '%s' is as it was then.", beside, path.name)
        return found
    _logger.warning("The accuracies in '%s' are of other weights than '%s' has now, so they are not told: evaluate "
                    'again with validate.py --results-file, and give that file.', beside, path.name)
    return None


def results_of(path: str, use_ema: bool, architecture: str, digest: str) -> ResultsFile:
    """Accuracies in a results file of validate.py or in a test.json of train.py.

    Args:
        path: Of the file.
        use_ema: The averaged weights are meant.
        architecture: Of the model that is meant.
        digest: `weights_digest` of its weights.

    Raises:
        InputError: The file is none of these, or is of something else than the weights by themselves.
    """
    found = ResultsFile.read(Path(path))
    evaluated = found.model or architecture
    names = {architecture, *(f'{architecture}_{dataset}' for dataset in benchmarks())}  # a model and its aliases
    if ':' not in evaluated and split_model_name_tag(evaluated)[0] not in names:
        raise InputError(f"the results file '{path}' is of the model '{evaluated}', and this is '{architecture}': give "
                         'the results of this model')
    if found.changes:
        raise InputError(f"the results file '{path}' is of an evaluation with {' and '.join(found.changes)}, which "
                         'does not travel with the weights: evaluate without it')
    if found.use_ema not in (None, use_ema):
        kind = 'averaged' if found.use_ema else 'plain'
        raise InputError(f"the results file '{path}' is of the {kind} weights and the others are pushed: "
                         f"{'add' if found.use_ema else 'leave out'} --use-ema or evaluate again")
    if found.digest not in (None, digest):
        raise InputError(f"the results file '{path}' is of other weights of '{architecture}' than these: evaluate "
                         'these with validate.py')
    return found

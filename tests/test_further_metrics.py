"""Macro F1, harmonic mean, worst class, calibration, NLL and Brier: against the field's code, on any processes."""
import json

import numpy as np
import pytest
import torch
from forks import run_ranks
from test_evaluation import COUNTS, NUM_CLASSES, make_counts, make_predictions, run

from nbn_timm.evaluation import LongTailEvaluator
from nbn_timm.evaluation.calibration import Calibration
from nbn_timm.evaluation.result import FURTHER_METRICS
from nbn_timm.training.log import RunLog
from nbn_timm.training.run_checkpoint import Best, is_better

pytestmark = pytest.mark.fast


@pytest.fixture(scope='module')
def predictions():
    logits, target = make_predictions()
    return 3 * logits, target  # as confident as trained networks are


@pytest.fixture(scope='module')
def result(predictions):
    return run(LongTailEvaluator(NUM_CLASSES, make_counts()), *predictions)


def test_precision_and_f1_agree_with_scikit_learn(predictions, result):
    metrics = pytest.importorskip('sklearn.metrics')
    logits, target = predictions
    predicted = logits.argmax(1).numpy()
    precision, _, f1, _ = metrics.precision_recall_fscore_support(
        target.numpy(), predicted, labels=range(NUM_CLASSES), zero_division=np.nan)
    assert result.per_class_predicted == tuple(np.bincount(predicted, minlength=NUM_CLASSES))
    assert [result.precision(label) for label in range(NUM_CLASSES)] == pytest.approx(100 * precision)
    assert [result.f1(label) for label in range(NUM_CLASSES)] == pytest.approx(100 * f1)
    assert result.macro_f1 == pytest.approx(100 * metrics.f1_score(target.numpy(), predicted, average='macro'))


def test_calibration_and_losses_agree_with_torchmetrics(predictions, result):
    classification = pytest.importorskip('torchmetrics').classification
    logits, target = predictions
    error = classification.MulticlassCalibrationError(NUM_CLASSES, n_bins=15, norm='l1')
    assert result.metrics()['ece'] == pytest.approx(100 * error(logits, target).item(), abs=1e-4)
    shot = torch.as_tensor(COUNTS)[target]
    for name, of in (('many', shot > 100), ('medium', (shot >= 20) & (shot <= 100)), ('few', shot < 20)):
        error.reset()
        assert result.metrics()[f'ece_{name}'] == pytest.approx(100 * error(logits[of], target[of]).item(), abs=1e-4)
    assert result.metrics()['nll'] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), abs=1e-5)
    wanted = torch.nn.functional.one_hot(target, NUM_CLASSES)
    brier = (logits.double().softmax(1) - wanted).square().sum(1).mean()
    assert result.brier == pytest.approx(brier.item(), abs=1e-6)


def test_harmonic_mean_and_worst_class(predictions, result):
    recalls = [correct / total for correct, total in zip(result.per_class_correct, result.per_class_total, strict=True)
               if total]
    assert len(recalls) == NUM_CLASSES - 1
    assert result.harmonic_mean == pytest.approx(100 * len(recalls) / sum(1 / recall for recall in recalls))
    assert result.worst_class == pytest.approx(100 * min(recalls))
    never = run(LongTailEvaluator(3), torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 2]))
    assert (never.harmonic_mean, never.worst_class) == (0, 0)
    assert never.macro_f1 == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert never.precision(2) is None and never.f1(2) == 0


def test_a_class_that_is_neither_there_nor_predicted_does_not_count():
    result = run(LongTailEvaluator(4), 9 * torch.eye(4)[:3], torch.arange(3))
    assert result.f1(3) is None and result.macro_f1 == 100


def test_a_confidence_on_the_border_belongs_to_the_bin_below():
    """(lower, upper], as in Guo et al.; 0 and 1 have their place too."""
    bins = Calibration.of(np.array([0.0, 1 / 15, 0.07, 1.0]), np.array([True, False, True, True]))
    assert bins.images == (2, 1, *[0] * 12, 1) and bins.correct == (1, 1, *[0] * 12, 1)
    assert bins.bars()[14] == (100, 100, 1) and bins.bars()[5] is None
    assert Calibration.of(np.zeros(0), np.zeros(0)).error is None


def test_the_parts_of_a_calibration_are_those_of_all(predictions, result):
    logits, target = predictions
    probabilities = logits.softmax(1)
    whole = Calibration.of(probabilities.amax(1).numpy(), (logits.argmax(1) == target).numpy())
    assert Calibration.together(result.calibration.values()) == whole
    assert whole.error == result.calibration_error()


def test_order_and_batches_change_no_bit(predictions, result):
    logits, target = predictions
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(1))
    for size in (7, 997):
        other = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits[order], target[order], size)
        assert other == result


def _compare_ranks(logits, target, expected) -> None:
    torch.distributed.init_process_group('gloo')
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    evaluator = LongTailEvaluator(NUM_CLASSES, make_counts())
    evaluator.update(logits[rank::size], target[rank::size])
    assert evaluator.compute(distributed=True) == expected


def test_two_processes_find_the_same(predictions, result):
    run_ranks(_compare_ranks, *predictions, result)


def test_they_are_in_json_and_in_a_table_of_their_own(result, tmp_path):
    result.write_json(tmp_path / 'result.json')
    data = json.loads((tmp_path / 'result.json').read_text())
    assert all(data[name] == pytest.approx(result.metrics()[name]) for name in FURTHER_METRICS)
    assert data['per_class']['predicted'] == list(result.per_class_predicted)
    assert set(result.headline()) == {'loss', 'top1', 'top5', 'mean_class', 'many', 'medium', 'few'}
    lines = {line[:20].strip(): line[20:].split() for line in result.further_table().splitlines()}
    assert lines['Macro F1'] == [f'{result.macro_f1:.2f}']
    assert lines['Calibration error'] == [
        f'{data[name]:.2f}' for name in ('ece', 'ece_many', 'ece_medium', 'ece_few')]
    unknown = run(LongTailEvaluator(3), torch.eye(3), torch.arange(3))
    assert 'n/a' in unknown.further_table() and unknown.metrics()['ece_few'] is None
    assert unknown.metrics()['ece'] is not None


@pytest.mark.parametrize(('name', 'higher'), [('macro_f1', True), ('ece', False), ('nll', False), ('brier', False)])
def test_a_checkpoint_can_be_chosen_by_them(name, higher):
    assert is_better(2.0, Best(1.0, 0), name) is higher
    assert is_better(1.0, Best(2.0, 0), name) is not higher


def test_a_summary_that_an_older_version_began_keeps_its_columns(tmp_path):
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,lr\n0,2.0,2.1,10.0,0.1\n')
    log = RunLog(tmp_path, start_epoch=1)
    log.write(1, {'loss': 1.0}, {'loss': 1.1, 'top1': 20.0, 'macro_f1': 15.0}, 0.05)
    assert (tmp_path / 'summary.csv').read_text().splitlines()[1:] == ['0,2.0,2.1,10.0,0.1', '1,1.0,1.1,20.0,0.05']
    assert json.loads((tmp_path / 'log.jsonl').read_text())['eval_macro_f1'] == 15.0


def test_values_of_a_summary_stay_below_their_names(tmp_path, caplog):
    """Also where a column is of no metric, as a wrong bit makes one: the row would have a cell too few."""
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_tgp1,lr\n0,2.0,2.1,10.0,0.1\n')
    log = RunLog(tmp_path, start_epoch=1)
    for epoch in (1, 2):
        log.write(epoch, {'loss': 1.0}, {'loss': 1.1, 'top1': 20.0}, 0.05)
    assert (tmp_path / 'summary.csv').read_text().splitlines()[2:] == ['1,1.0,1.1,,0.05', '2,1.0,1.1,,0.05']
    assert caplog.text.count('The columns eval_tgp1 of') == 1

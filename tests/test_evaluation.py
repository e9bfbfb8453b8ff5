"""The evaluator against torchmetrics, numpy and timm, and its independence of the number of processes."""
import csv
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from forks import run_ranks
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.task import ClassificationEvaluator
from torch.utils.data import DataLoader, TensorDataset

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult, LongTailEvaluator, evaluate
from nbn_timm.evaluation.evaluator import ExactSum
from nbn_timm.seals import sealed

pytestmark = pytest.mark.fast

# 12 classes: four many (>100), four medium (20..100, both ends included), four few (<20).
COUNTS = (500, 300, 150, 101, 100, 60, 30, 20, 19, 10, 5, 1)
NUM_CLASSES = len(COUNTS)


def make_counts(counts=COUNTS) -> ClassCounts:
    return ClassCounts(tuple(counts), tuple(f'class {i}' for i in range(len(counts))), 'a test')


def make_predictions(num_samples=997, num_classes=NUM_CLASSES, seed=0):
    """Logits that are right about a third of the time, on an unbalanced set that lacks the last class."""
    rng = np.random.default_rng(seed)
    target = rng.choice(num_classes - 1, num_samples, p=np.arange(1, num_classes) / sum(range(1, num_classes)))
    logits = rng.normal(size=(num_samples, num_classes))
    logits[np.arange(num_samples), target] += 1.
    return torch.from_numpy(logits).float(), torch.from_numpy(target)


def run(evaluator, logits, target, batch_size=64) -> EvalResult:
    for start in range(0, len(target), batch_size):
        evaluator.update(logits[start:start + batch_size], target[start:start + batch_size])
    return evaluator.compute()


def test_metrics_agree_with_torchmetrics():
    classification = pytest.importorskip('torchmetrics').classification
    logits, target = make_predictions()
    result = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits, target)
    kwargs = dict(num_classes=NUM_CLASSES)
    micro = classification.MulticlassAccuracy(average='micro', **kwargs)(logits, target)
    top5 = classification.MulticlassAccuracy(average='micro', top_k=5, **kwargs)(logits, target)
    recall = classification.MulticlassRecall(average='none', **kwargs)(logits, target)[:-1]
    assert result.top1 == pytest.approx(100 * micro.item(), abs=1e-4)
    assert result.top5 == pytest.approx(100 * top5.item(), abs=1e-4)
    assert result.mean_class == pytest.approx(100 * recall.double().mean().item(), abs=1e-4)
    measured = [c / t for c, t in zip(result.per_class_correct[:-1], result.per_class_total[:-1], strict=True)]
    np.testing.assert_allclose(measured, recall.numpy(), atol=1e-6)


def test_splits_and_loss_agree_with_numpy():
    logits, target = make_predictions()
    result = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits, target)
    x, y, counts = logits.numpy().astype(np.float64), target.numpy(), np.array(COUNTS)
    hit, seen = x.argmax(1) == y, counts[y]
    assert result.many == pytest.approx(100 * hit[seen > 100].mean())
    assert result.medium == pytest.approx(100 * hit[(seen >= 20) & (seen <= 100)].mean())
    assert result.few == pytest.approx(100 * hit[seen < 20].mean())
    loss = np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y]
    assert result.loss == pytest.approx(loss.mean(), abs=1e-6)
    assert result.num_samples == len(y)


def test_the_sum_of_losses_is_exact_in_any_order():
    """Against rational arithmetic: over all sizes that float32 has, subnormal ones and negative ones included."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator) * 10.0 ** torch.randint(-44, 38, (5000,), generator=generator)
    exact = float(sum(map(Fraction, values.tolist())) / 5000)
    for order in (torch.arange(5000), torch.randperm(5000, generator=generator)):
        total = ExactSum()
        for part in values[order].split(7):
            total.add(part)
        assert ExactSum.mean(total.parts.tolist(), 5000) == exact
    small = ExactSum()
    small.add(torch.full((3,), 0.1))
    assert ExactSum.mean(small.parts.tolist(), 3) == torch.tensor(0.1).item()
    small.add(torch.tensor([math.inf]))
    assert ExactSum.mean(small.parts.tolist(), 4) == math.inf


def test_an_image_that_is_left_over_gives_the_same_loss():
    """Matrix products of up to three rows differ in the last bits, and 53 = 2 x 26 + 1 = 10 x 5 + 3."""
    torch.manual_seed(0)
    model = timm.create_model('resnet20_nbn', num_classes=NUM_CLASSES)
    images, target = torch.randn(53, 3, 16, 16), torch.arange(53) % NUM_CLASSES
    losses = {evaluate(model, list(zip(images.split(size), target.split(size), strict=True)),
                       LongTailEvaluator(NUM_CLASSES), torch.device('cpu')).loss for size in (1, 5, 26, 53)}
    assert len(losses) == 1


def test_agrees_with_timms_evaluator():
    logits, target = make_predictions()
    result = run(LongTailEvaluator(NUM_CLASSES, max_samples=900), logits, target)
    reference = ClassificationEvaluator(max_samples=900)
    for start in range(0, len(target), 50):
        reference.update(logits[start:start + 50], target[start:start + 50])
    expected = reference.compute()
    assert (result.top1, result.top5) == (pytest.approx(expected['top1']), pytest.approx(expected['top5']))
    assert result.loss == pytest.approx(expected['loss'], rel=1e-6)
    assert result.num_samples == 900


def test_thresholds_are_settable():
    logits, target = make_predictions()
    split = run(LongTailEvaluator(NUM_CLASSES, make_counts(), many=200, few=50), logits, target).shot_split
    assert split is not None
    assert (split.many, split.few) == ((0, 1), (6, 7, 8, 9, 10, 11))


def test_batching_and_order_do_not_change_the_result():
    logits, target = make_predictions()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(1))
    one = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits, target, batch_size=997)
    other = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits[order], target[order], batch_size=7)
    assert one.to_dict() == other.to_dict()


def test_ties_go_to_the_lower_class():
    evaluator = LongTailEvaluator(8)
    result = run(evaluator, torch.zeros(8, 8), torch.arange(8))
    assert result.per_class_correct == (1, 0, 0, 0, 0, 0, 0, 0)
    assert result.top5 == 62.5


def test_half_precision_logits_are_scored_in_float32():
    logits, target = make_predictions()
    half = run(LongTailEvaluator(NUM_CLASSES), logits.bfloat16(), target)
    assert half.to_dict() == run(LongTailEvaluator(NUM_CLASSES), logits.bfloat16().float(), target).to_dict()


def test_empty_split_is_none_and_prints_na():
    logits, target = make_predictions(num_classes=3)
    result = run(LongTailEvaluator(3, make_counts((900, 50, 40))), logits, target)
    assert result.few is None and result.metrics()['few'] is None
    few = next(line for line in result.table().splitlines() if line.startswith('Few'))
    assert few.split() == ['Few', '(<20)', 'n/a', '0', '0']
    assert 'nan' not in result.table()


def test_split_whose_classes_are_not_in_the_test_set_is_none():
    result = run(LongTailEvaluator(3, make_counts((900, 50, 4))), torch.eye(3)[:2], torch.arange(2))
    assert result.few is None
    assert result.mean_class == 100.


def test_without_class_counts_only_the_splits_are_missing():
    logits, target = make_predictions()
    metrics = run(LongTailEvaluator(NUM_CLASSES), logits, target).metrics()
    assert [metrics[name] for name in ('many', 'medium', 'few')] == [None] * 3
    assert None not in (metrics['top1'], metrics['top5'], metrics['mean_class'], metrics['loss'])


def test_fewer_than_five_classes():
    logits, target = make_predictions(num_classes=3)
    result = run(LongTailEvaluator(3), logits, target)
    assert result.top5 == 100.
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())


def test_reset_forgets():
    logits, target = make_predictions()
    evaluator = LongTailEvaluator(NUM_CLASSES, make_counts())
    first = run(evaluator, logits, target)
    evaluator.reset()
    assert run(evaluator, logits, target) == first


@pytest.mark.parametrize('num_samples', [97, 98, 99, 2])
def test_padding_of_three_ranks_is_not_counted(num_samples):
    """Three evaluators fed as three ranks' samplers would, their integer counts added by hand."""
    logits, target = make_predictions(num_samples)
    dataset = TensorDataset(logits, target)
    whole = run(LongTailEvaluator(NUM_CLASSES), logits, target)
    parts, fed = [], 0
    for rank in range(3):
        sampler = OrderedDistributedSampler(dataset, num_replicas=3, rank=rank)
        evaluator = LongTailEvaluator(NUM_CLASSES, max_samples=sampler.num_valid_samples)
        for output, labels in DataLoader(dataset, batch_size=5, sampler=sampler):
            evaluator.update(output, labels)
            fed += len(labels)
        parts.append(evaluator)
    assert fed == 3 * math.ceil(num_samples / 3)
    assert tuple(sum(p.class_total for p in parts).tolist()) == whole.per_class_total
    assert tuple(sum(p.class_correct for p in parts).tolist()) == whole.per_class_correct
    losses = sum(part.losses.parts for part in parts)
    assert ExactSum.mean(losses.tolist(), num_samples) == whole.loss


class Scores(nn.Module):
    """A fixed linear classifier; its dropout shows whether it was put into eval mode."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, NUM_CLASSES, generator=generator))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x.flatten(1)) @ self.weight


def image_set(num_samples=101):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(num_samples, 3, 4, 4, generator=generator)
    return TensorDataset(images, torch.randint(NUM_CLASSES, (num_samples,), generator=generator))


def rank_loader(dataset, rank, world_size):
    sampler = OrderedDistributedSampler(dataset, num_replicas=world_size, rank=rank) if world_size > 1 else None
    return DataLoader(dataset, batch_size=16, sampler=sampler)


def evaluate_images(dataset, rank=0, world_size=1, model=None, **kwargs) -> EvalResult:
    evaluator = LongTailEvaluator(NUM_CLASSES, make_counts())
    loader = rank_loader(dataset, rank, world_size)
    return evaluate(model or Scores(), loader, evaluator, torch.device('cpu'), distributed=world_size > 1, **kwargs)


def test_evaluate_runs_the_model_in_eval_mode():
    dataset = image_set()
    images, target = dataset.tensors
    with torch.no_grad():
        logits = Scores().eval()(images)
    direct = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits, target)
    assert evaluate_images(dataset).to_dict() == direct.to_dict()


def test_evaluate_under_autocast_and_channels_last():
    result = evaluate_images(image_set(), amp_dtype=torch.bfloat16, channels_last=True)
    exact = evaluate_images(image_set())
    assert result.num_samples == exact.num_samples
    assert result.loss != exact.loss
    assert result.loss == pytest.approx(exact.loss, rel=2e-2)


def test_evaluate_twice_with_one_evaluator_counts_once():
    loader = rank_loader(image_set(), 0, 1)
    evaluator = LongTailEvaluator(NUM_CLASSES, make_counts())
    first = evaluate(Scores(), loader, evaluator, torch.device('cpu'))
    assert evaluate(Scores(), loader, evaluator, torch.device('cpu')) == first


def distributed_worker(folder):
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    try:
        result = evaluate_images(image_set(), rank, 2)
        # A label that only one rank sees as wrong must be reported by both, or the other would wait for ever.
        dataset = image_set(9)
        dataset.tensors[1][1] = NUM_CLASSES
        with pytest.raises(InputError, match='1 of 9 labels'):
            evaluate_images(dataset, rank, 2)
        result.write_json(folder / f'{rank}.json')
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    run_ranks(distributed_worker, tmp_path)
    expected = sealed(evaluate_images(image_set()).to_dict())
    assert [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2)] == [expected, expected]


def test_files(tmp_path):
    logits, target = make_predictions()
    result = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits, target)
    result.write_json(tmp_path / 'result.json', model='resnet32')
    data = json.loads((tmp_path / 'result.json').read_text())
    assert data['model'] == 'resnet32' and data['top1'] == round(result.top1, 6)
    splits = [data['splits'][name] for name in ('many', 'medium', 'few')]
    assert [split['classes'] for split in splits] == [4, 4, 4]
    assert sum(split['images'] for split in splits) == data['num_samples']

    result.write_per_class_csv(tmp_path / 'classes.csv', make_counts())
    with open(tmp_path / 'classes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['shot'] for row in rows] == ['many'] * 4 + ['medium'] * 4 + ['few'] * 4
    assert [int(row['train_images']) for row in rows] == list(COUNTS)
    assert [int(row['test_images']) for row in rows] == np.bincount(target, minlength=NUM_CLASSES).tolist()
    assert [int(row['correct']) for row in rows] == list(result.per_class_correct)
    assert rows[0]['name'] == 'class 0'
    assert float(rows[0]['accuracy']) == pytest.approx(100 * int(rows[0]['correct']) / int(rows[0]['test_images']))
    assert rows[-1]['accuracy'] == ''
    assert sorted(path.name for path in tmp_path.iterdir()) == ['classes.csv', 'result.json']


def test_table_shows_the_numbers():
    logits, target = make_predictions()
    result = run(LongTailEvaluator(NUM_CLASSES, make_counts()), logits, target)
    lines = {line[:20].strip(): line[20:].split() for line in result.table().splitlines()}
    assert lines['All'] == [f'{result.top1:.2f}', '12', '997']
    assert lines['Mean class'] == [f'{result.mean_class:.2f}', '11']
    assert lines['Medium (20-100)'][:2] == [f'{result.medium:.2f}', '4']
    assert lines['Loss'] == [f'{result.loss:.4f}']


@pytest.mark.parametrize('output', [torch.zeros(2, 7), torch.zeros(2, 12, 3), SimpleNamespace()])
def test_output_of_the_wrong_shape_is_refused(output):
    with pytest.raises(InputError, match='logits'):
        LongTailEvaluator(12).update(output, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize('label', [-1, 12])
def test_label_out_of_range_is_refused(label):
    with pytest.raises(InputError, match=r'1 of 3 labels are outside 0\.\.11'):
        run(LongTailEvaluator(12), torch.zeros(3, 12), torch.tensor([0, label, 3]))


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(3, 12)
    logits[1, 4] = value
    with pytest.raises(InputError, match='1 of 3 images'):
        run(LongTailEvaluator(12), logits, torch.tensor([0, 1, 2]))


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(InputError, match='no image'):
        LongTailEvaluator(12).compute()


def test_counts_of_another_number_of_classes_are_refused():
    with pytest.raises(InputError, match='12 classes but the model has 10'):
        LongTailEvaluator(10, make_counts())

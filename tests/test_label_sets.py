"""Pictures of several classes: losses, samplers, evaluation and thresholds, without a training."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nbn_timm.data import Classes
from nbn_timm.errors import InputError
from nbn_timm.evaluation import LabelSetEvaluator, average_precision
from nbn_timm.evaluation.thresholds import Thresholds
from nbn_timm.losses import create_loss
from nbn_timm.samplers import create_sampler

pytestmark = pytest.mark.fast

CLASSES = Classes((120, 40, 15, 4, 1), tuple('abcde'), 'a test', label_sets=True, images=150)
LOGITS = [[1.5, -0.5, 0.25, -2.0, 0.0], [0.0, 2.0, -1.0, 0.5, -3.0], [-1.25, 0.75, 3.0, -0.25, 1.0]]
SETS = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.uint8)

# Value and gradient of the authors' code on these inputs: wutong16/DistributionBalancedLoss, commit 14460d0
# (ResampleLoss, its mean), and Alibaba-MIIL/ASL, commit 8c9e0bd (AsymmetricLoss).
PUBLISHED = {
    'of COCO-MLT': ('distribution_balanced', {}, 0.5838879942893982, [
        [-0.00053792, 0.00228388, 0.0466942, -0.15972728, 0.03050565],
        [-0.01280669, -0.00050107, -0.11528698, 0.10030609, 0.0],
        [4.693e-05, 0.03126381, 0.04213878, 0.00959116, -0.00997874]]),
    'of VOC-MLT': ('distribution_balanced', {'mu': 0.3, 'neg_scale': 5.0}, 0.521798849105835, [
        [-0.00036095, 3.194e-05, 0.05492545, -0.15852579, 0.03050565],
        [-0.00791618, -0.00031841, -0.1115391, 0.1632387, 0.0],
        [0.0, 0.02349068, 0.02512019, 0.00128089, -0.00855397]]),
    'without the focal factor': ('distribution_balanced', {'gamma': 0.0}, 0.486076682806015, [
        [-0.00304314, 0.00626445, 0.0294666, -0.0652334, 0.0321035],
        [-0.0110537, -0.00587041, -0.05393219, 0.05091276, 0.00014127],
        [0.00123037, 0.01339305, 0.02051714, 0.01619712, -0.02157069]]),
    'asymmetric': ('asymmetric', {'reduction': 'sum'}, 5.19801139831543, [
        [-0.06331918, 0.01712967, 0.12967068, -0.99911737, 0.07311709],
        [-0.4232868, -0.02753599, -0.79264963, 0.20887372, 0.0],
        [0.0008623, 0.30743846, 0.61713755, 0.0372782, -0.13392046]]),
    'asymmetric, as trained': ('asymmetric', {'reduction': 'sum', 'detach_factor': True}, 5.19801139831543, [
        [-0.03327908, 0.00402226, 0.03472064, -0.77580351, 0.0186392],
        [-0.25, -0.01420935, -0.53444666, 0.05903042, -0.0],
        [0.00018613, 0.09208283, 0.30773106, 0.00909561, -0.07232948]]),
    'asymmetric of other exponents': (
        'asymmetric', {'reduction': 'sum', 'detach_factor': True, 'gamma_neg': 2.0, 'gamma_pos': 0.0, 'clip': 0.0},
        9.067950248718262, [
            [-0.18242556, 0.05381351, 0.17767164, -0.88079709, 0.125],
            [-0.5, -0.11920296, -0.7310586, 0.24117538, 0.00010667],
            [0.01104489, 0.31329408, 0.86436337, 0.08392615, -0.2689414]]),
}


@pytest.mark.parametrize('case', PUBLISHED)
def test_losses_of_label_sets_are_the_authors(case):
    """Within 6e-8 of the value and 3e-8 of the gradient; the pinned gradients have eight decimals."""
    name, settings, value, gradient = PUBLISHED[case]
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = create_loss(name, CLASSES, **settings)(logits, SETS)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-7)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=4e-8)


def test_bce_is_that_of_torch():
    loss = create_loss('bce')(torch.tensor(LOGITS), SETS)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(torch.tensor(LOGITS), SETS.float()))


def test_a_label_is_a_set_of_one():
    labels = torch.tensor([0, 2, 4])
    for name in ('bce', 'asymmetric', 'distribution_balanced'):
        loss = create_loss(name, CLASSES)
        torch.testing.assert_close(loss(torch.tensor(LOGITS), labels),
                                   loss(torch.tensor(LOGITS), F.one_hot(labels, 5).to(torch.uint8)))


# Samplers

MATRIX = np.array([
    [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0],
    [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=np.uint8)

# How often the authors' ClassAwareSampler (same commit; num_samples_cls=3, reduce=4) draws each image in the first
# epoch, mean of 20,000 runs.
THEIRS = [0.874, 0.25, 1.502, 0.251, 2.748, 0.629, 2.119, 0.246, 0.0, 0.25, 0.875, 0.254]


def test_class_aware_draws_label_sets_as_the_authors():
    drawn = np.zeros(len(MATRIX))
    for seed in range(700):
        sampler = create_sampler('class_aware', MATRIX, seed=seed, k=3, reduce=4)
        drawn += np.bincount(list(sampler), minlength=len(MATRIX))
    assert len(sampler) == int(10 * 4 / 4)
    np.testing.assert_allclose(drawn / 700, THEIRS, atol=0.12)  # four standard errors


def test_a_visit_is_of_one_class():
    indices = list(create_sampler('class_aware', MATRIX, seed=1, k=3, reduce=2))
    for start in range(0, len(indices) - 2, 3):
        assert MATRIX[indices[start:start + 3]].all(axis=0).any()


def test_an_image_of_no_class_is_never_drawn_by_class():
    for name in ('class_aware', 'class_balanced', 'square_root'):
        drawn = {index for epoch in range(20) for index in create_sampler(name, MATRIX, seed=epoch)}
        assert drawn == set(range(12)) - {8}, name
    assert set(create_sampler('instance_balanced', MATRIX)) == set(range(12))


def test_repeat_factors_are_those_of_the_rarest_class():
    """LVIS: r = max over the classes of an image of sqrt(t / f), at least 1."""
    sampler = create_sampler('repeat_factor', MATRIX, threshold=0.5)
    shares = MATRIX.sum(axis=0) / len(MATRIX)
    expected = [max([1.0, *np.sqrt(0.5 / shares[row.astype(bool)])]) for row in MATRIX]
    np.testing.assert_allclose(sampler.whole + sampler.fraction, expected)


def test_other_samplers_refuse_label_sets():
    with pytest.raises(InputError, match="'reverse' draws images by their one class.*class_aware"):
        create_sampler('reverse', MATRIX)
    with pytest.raises(InputError, match='no training image is of any class'):
        create_sampler('class_aware', np.zeros((3, 2), dtype=np.uint8))


# Evaluation

def some_scores(images=200, classes=6, ties=True):
    rng = np.random.default_rng(0)
    sets = (rng.random((images, classes)) < [0.5, 0.3, 0.2, 0.1, 0.02, 0.0]).astype(np.uint8)
    scores = rng.normal(size=(images, classes)).astype(np.float32) + sets
    return (np.round(scores, 1) if ties else scores), sets


@pytest.mark.parametrize('ties', [True, False])
def test_average_precision_is_that_of_scikit_learn_and_torchmetrics(ties):
    metrics = pytest.importorskip('sklearn.metrics')
    scores, sets = some_scores(ties=ties)
    found = average_precision(scores, sets)
    np.testing.assert_allclose(found[:5], metrics.average_precision_score(sets[:, :5], scores[:, :5], average=None),
                               rtol=1e-12)
    assert np.isnan(found[5])
    torchmetrics = pytest.importorskip('torchmetrics.functional.classification')
    theirs = torchmetrics.multilabel_average_precision(
        torch.from_numpy(scores).double().sigmoid()[:, :5], torch.from_numpy(sets[:, :5]).long(), 5, average=None)
    np.testing.assert_allclose(found[:5], theirs, rtol=1e-5)


def evaluated(scores, sets, sizes, **settings):
    classes = Classes((200, 120, 100, 20, 19, 1), tuple('abcdef'), 'a test', label_sets=True, images=300)
    evaluator = LabelSetEvaluator(6, classes, many=99, few=20, **settings)
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        evaluator.update(torch.from_numpy(scores[part]), torch.from_numpy(sets[part]))
        begin += size
    return evaluator.compute()


def test_the_result_of_label_sets():
    metrics = pytest.importorskip('sklearn.metrics')
    scores, sets = some_scores()
    result = evaluated(scores, sets, [200])
    found, precisions = result.metrics(), metrics.average_precision_score(sets[:, :5], scores[:, :5], average=None)
    told = scores >= 0
    expected = {
        'loss': F.binary_cross_entropy_with_logits(torch.from_numpy(scores).double(), torch.from_numpy(sets).double()),
        'map': 100 * precisions.mean(), 'map_many': 100 * precisions[:3].mean(), 'map_medium': 100 * precisions[3],
        'map_few': 100 * precisions[4],  # class f has no picture
        'micro_f1': 100 * metrics.f1_score(sets, told, average='micro'),
        'macro_f1': 100 * metrics.f1_score(sets, told, average='macro')}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=2e-5 if name == 'loss' else 2e-6), name
    assert 'Many (>99)' in result.table() and 'Macro F1' in result.further_table()


def test_batches_and_padding_change_nothing():
    scores, sets = some_scores()
    whole = evaluated(scores, sets, [200])
    assert evaluated(scores, sets, [7, 93, 99, 1]) == whole
    padded = LabelSetEvaluator(6, max_samples=3)
    padded.update(torch.from_numpy(scores[:5]), torch.from_numpy(sets[:5]))
    assert padded.compute().num_samples == 3


def test_the_per_class_file(tmp_path):
    scores, sets = some_scores()
    result = evaluated(scores, sets, [200])
    result.write_per_class_csv(tmp_path / 'a.csv', None)
    rows = (tmp_path / 'a.csv').read_text().splitlines()
    assert rows[0].startswith('class,name,train_images,shot,test_images,average_precision')
    assert rows[6].startswith('5,,,few,0,,0,')


@pytest.mark.parametrize('output, target, message', [
    (torch.zeros(2, 3), torch.zeros(2, 6, dtype=torch.uint8), r'returned \[2, 3\]'),
    (torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64), 'label sets .batch, 6. were expected'),
    (torch.full((2, 6), torch.nan), torch.zeros(2, 6, dtype=torch.uint8), 'NaN or infinite logits for 2 of 2'),
])
def test_faults_of_an_evaluation_are_one_sentence(output, target, message):
    evaluator = LabelSetEvaluator(6)
    with pytest.raises(InputError, match=message):
        evaluator.update(output, target)
        evaluator.compute()


# Thresholds

def test_thresholds_have_the_greatest_f1_that_there_is():
    metrics = pytest.importorskip('sklearn.metrics')
    scores, sets = some_scores()
    chosen = Thresholds.chosen(scores, sets, 'val')
    assert chosen.values[5] == 0.5 and chosen.images == 200
    told = chosen.answers(scores)
    probabilities = torch.from_numpy(scores).double().sigmoid().numpy()
    for label in range(5):
        best = max(metrics.f1_score(sets[:, label], probabilities[:, label] >= value)
                   for value in np.unique(probabilities[:, label]))
        assert metrics.f1_score(sets[:, label], told[:, label]) == pytest.approx(best)
    assert evaluated(scores, sets, [200], thresholds=chosen).macro_f1 > evaluated(scores, sets, [200]).macro_f1


def test_thresholds_pass_through_json():
    chosen = Thresholds((0.25, 0.75), 'val', 10, True)
    assert Thresholds.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    assert Thresholds.from_dict(chosen.to_dict(), 3) is None and Thresholds.from_dict(None) is None
    assert Thresholds.from_dict({'values': [2.0]}) is None
    for key, value in (('images', '10'), ('images', None), ('images', -1), ('split', [1]), ('use_ema', 'no')):
        assert Thresholds.from_dict({**chosen.to_dict(), key: value}) is None
    assert Thresholds.fixed().in_words() == 'a class is told from a probability of 0.5 on'

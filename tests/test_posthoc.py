"""Post-hoc methods of validate.py against independent computations, on one process and two."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forks import run_ranks
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import validate
from nbn_timm.data import ClassCounts
from nbn_timm.data.shift import ClassShift, shifted_indices
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult, LongTailEvaluator, RoutingEvaluator, logit_offset

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]
COUNTS = (400, 3, 100, 20, 19, 150)  # not in label order


def class_counts(*counts: int) -> ClassCounts:
    return ClassCounts(counts, tuple(f'class {label}' for label in range(len(counts))), 'a test')


def result_with(correct, total) -> EvalResult:
    return EvalResult(1.0, 100.0, tuple(correct), tuple(total), None)


# Logit adjustment

@pytest.mark.parametrize('evaluator_class', [LongTailEvaluator, RoutingEvaluator])
def test_adjusted_logits_are_evaluated(evaluator_class):
    """log(p / prior^tau), written out; also behind a router."""
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(200, 6)) * 2, rng.integers(0, 6, 200)
    routing = evaluator_class is RoutingEvaluator
    offset = logit_offset(class_counts(*COUNTS), 1.5)
    evaluator = evaluator_class(*([[1, 2]] if routing else []), 6, logit_offset=offset)
    output = torch.from_numpy(logits).float()
    evaluator.update((output, torch.ones(200, dtype=torch.int64)) if routing else output, torch.from_numpy(target))
    result = evaluator.compute()
    hits, losses = [0] * 6, []
    for row, label in zip(logits, target, strict=True):
        weights = [math.exp(z) / (count / sum(COUNTS)) ** 1.5 for z, count in zip(row, COUNTS, strict=True)]
        hits[label] += weights.index(max(weights)) == label
        losses.append(-math.log(weights[label] / sum(weights)))
    assert result.per_class_correct == tuple(hits)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_no_prior_is_no_adjustment():
    assert logit_offset(class_counts(5, 0), 0.0) is None
    with pytest.raises(InputError, match="class 'class 1' of a test has no training image"):
        logit_offset(class_counts(5, 0), 1.0)


# Through validate.py

@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    """37 images in a test list and a network with a classifier that is worth normalising."""
    folder = tmp_path_factory.mktemp('posthoc')
    rng = np.random.default_rng(0)
    lines = []
    for index in range(37):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f'{index}.png')
        lines.append(f'{index}.png {index % 6}\n')
    (folder / 'test.txt').write_text(''.join(lines))
    torch.manual_seed(0)
    model = timm.create_model('resnet20', num_classes=6)
    for _ in range(20):
        model.train()(torch.randn(16, 3, 16, 16))
    with torch.no_grad():
        model.fc.weight *= torch.tensor([9, 1, 3, 5, 2, 7])[:, None] * 5
        model.fc.bias.copy_(torch.arange(6) / 3)
    torch.save({'state_dict': model.state_dict(), 'class_counts': class_counts(*COUNTS).to_dict(),
                'args': {'model': 'resnet20', 'dataset': 'list', 'data_dir': str(folder), 'img_size': 16,
                         'test_list': str(folder / 'test.txt')}}, folder / 'last.pth.tar')
    return folder


def arguments(work: Path, *more: str) -> list[str]:
    return ['--checkpoint', str(work / 'last.pth.tar'), '--device', 'cpu', '--workers', '0', '-b', '8', *more]


def test_all_post_hoc_flags_on_two_processes_and_one(work, tmp_path):
    flags = ['--logit-adjustment', '0.7', '--tau-norm', '0.4', '--test-agnostic']
    written = []
    for processes in (1, 2):
        path = tmp_path / f'{processes}.json'
        run_ranks(validate.main, arguments(work, *flags, '--results-file', str(path)), size=processes)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    result = json.loads(written[0])
    assert (result['logit_adjustment'], result['tau_norm']) == (0.7, 0.4)

    state = torch.load(work / 'last.pth.tar', weights_only=True)['state_dict']
    model = timm.create_model('resnet20', num_classes=6).eval()
    model.load_state_dict(state)
    weight = state['fc.weight'].double().numpy()
    weight = weight / np.linalg.norm(weight, axis=1, keepdims=True) ** 0.4
    correct, total, hits = np.zeros(6, int), np.zeros(6, int), []
    mean, std = (np.float32(result[key])[:, None, None] for key in ('mean', 'std'))
    for line in (work / 'test.txt').read_text().splitlines():
        name, label = line.split()
        image = (np.asarray(Image.open(work / name), dtype=np.float32).transpose(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            features = model.forward_head(model.forward_features(torch.from_numpy(image[None])), pre_logits=True)
        logits = weight @ features[0].double().numpy() - 0.7 * np.log(np.array(COUNTS) / sum(COUNTS))
        hits.append(logits.argmax() == int(label))
        correct[int(label)] += hits[-1]
        total[int(label)] += 1
    assert (result['per_class']['correct'], result['per_class']['total']) == (correct.tolist(), total.tolist())
    assert 0 < correct.sum() < 37
    assert result['test_agnostic']['uniform'] == result['top1']
    for name, accuracy in result['test_agnostic'].items():
        shift = ClassShift.parse(name)
        if shift is not None:
            images = shifted_indices(np.arange(37) % 6, class_counts(*COUNTS), shift)
            assert accuracy == pytest.approx(100 * np.mean(np.array(hits)[images]), abs=1e-6)
            path = tmp_path / f'{name}.json'
            validate.main(arguments(work, *flags[:-1], '--test-distribution', name, '--results-file', str(path)))
            assert json.loads(path.read_text())['top1'] == accuracy


def test_shifted_tests_are_parts_of_the_whole_one(work, tmp_path):
    path = tmp_path / 'whole.json'
    validate.main(arguments(work, '--test-agnostic', '--test-distribution', 'uniform', '--results-file', str(path)))
    assert json.loads(path.read_text())['num_samples'] == 37
    with pytest.raises(InputError, match='--test-agnostic has no effect with --test-distribution forward_3, but with'):
        validate.main(arguments(work, '--test-agnostic', '--test-distribution', 'forward_3'))


@pytest.mark.parametrize('flags', [['--test-agnostic'], ['--logit-adjustment', '1']])
def test_what_needs_counts_says_so(flags, work):
    with pytest.raises(InputError, match='need the training images per class'):
        validate.main(arguments(work, '--counts-from', 'none', *flags))


def test_normalising_under_a_router_is_refused(tmp_path, work):
    from nbn_timm.models import RoutedExperts
    model = RoutedExperts(timm.create_model('resnet32_ride', num_classes=6), top_k=4)
    record = torch.load(work / 'last.pth.tar', weights_only=True)
    torch.save({**record, 'state_dict': model.state_dict(), 'args': {**record['args'], 'model': 'resnet32_ride'}},
               tmp_path / 'last.pth.tar')
    with pytest.raises(InputError, match='add --all-experts'):
        validate.main(arguments(tmp_path, '--tau-norm', '1'))

"""The page of a run, and the comparison of two, where a picture can be of several classes."""
import json
import re
import shutil

import numpy as np
import pytest
import torch

from nbn_timm.cli import report
from nbn_timm.data import Classes
from nbn_timm.errors import InputError
from nbn_timm.evaluation.label_sets import (
    LabelSetEvaluator,
    LabelSetPredictions,
    average_precision,
    drawn_average_precision,
)
from nbn_timm.evaluation.thresholds import Thresholds
from nbn_timm.report import read_run
from nbn_timm.report.bootstrap import draws_of
from nbn_timm.report.label_set_comparison import intervals
from nbn_timm.report.label_sets import beyond, class_table, mistake_table, pictures

pytestmark = pytest.mark.fast

NAMES = ('cat', 'dog', '<b>emu</b>', 'fox')
CLASSES = Classes((200, 60, 40, 9), NAMES, 'the test', label_sets=True, images=250)
SETS = (np.random.default_rng(1).random((60, 4)) < [0.6, 0.4, 0.3, 0.2]).astype(np.uint8)
SUMMARY = 'epoch,train_loss,eval_loss,eval_map,eval_map_many,eval_map_medium,eval_map_few,lr\n0,.7,.7,40,50,30,20,.1\n'


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Figures take the time; one test draws them."""
    monkeypatch.setattr('nbn_timm.pages.figures.can_draw', lambda: False)


def write_run(folder, seed, strength=1.0, thresholds=(0.5, 0.4, 0.6, 0.3)):
    """What a finished run of 60 pictures leaves."""
    logits = np.random.default_rng(seed).normal(size=SETS.shape) + strength * (2.0 * SETS - 1)
    logits = torch.from_numpy(logits.astype(np.float32))
    judge = LabelSetEvaluator(4, CLASSES, thresholds=Thresholds(thresholds, 'val', 30))
    judge.update(logits, torch.from_numpy(SETS))
    result = judge.compute()
    folder.mkdir()
    result.write_json(folder / 'test.json', checkpoint='epoch 1 of 1', thresholds=judge.thresholds.to_dict())
    result.write_per_class_csv(folder / 'test_per_class.csv', CLASSES)
    judge.predictions().write(folder / 'test_predictions.npz')
    (folder / 'summary.csv').write_text(SUMMARY)
    (folder / 'args.yaml').write_text('dataset: ""\nmodel: resnet20\nloss: bce\n')
    return folder


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / 'weak', 0, 0.4)
    write_run(tmp_path / 'strong', 1, 1.2)
    return tmp_path


class Numbers:
    """A gallery that shows which pictures it is asked for."""

    def uri(self, index):
        return None

    def name(self, index):
        return str(index)

    def row(self, indices):
        return list(indices)


def page_of(*runs, output):
    report.main([*map(str, runs), '--output', str(output)])
    return output.read_text()


def test_the_page_of_a_run(runs, monkeypatch):
    monkeypatch.undo()  # draw
    page = page_of(runs / 'weak', output=runs / 'x.html')
    results = json.loads((runs / 'weak' / 'test.json').read_text())
    assert page.count('<svg') == 6
    for title in ('Many, medium and few', 'Classes', 'Told and wrong', 'Missed', 'Confident and wrong', 'Overlooked',
                  'Training', 'Settings'):
        assert re.search(rf'<h2[^>]*>{title}</h2>', page), title
    assert f'<b>{results["map"]:.2f}</b>' in page and f'<b>{results["macro_f1"]:.2f}</b>' in page
    assert '<b>emu</b>' not in page and '&lt;b&gt;emu&lt;/b&gt;' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and '<script' not in page
    assert 'thresholds of each class, 0.300 to 0.600, chosen by F1 on 30 images of the validation split' in page


def test_classes_and_pictures_are_those_of_the_predictions(runs):
    run = read_run(runs / 'weak')
    kept, told = run.label_sets, run.told_sets
    np.testing.assert_array_equal(kept.sets, SETS)
    precision = 100 * average_precision(kept.logits, SETS)
    for label, row in enumerate(class_table(run).rows):  # the classes are in the order of the training images
        hits = int((told[:, label] & SETS[:, label]).sum())
        assert row[:4] == [NAMES[label], CLASSES.counts[label], ('many', 'medium', 'medium', 'few')[label],
                           int(SETS[:, label].sum())]
        assert row[4] == pytest.approx(precision[label], abs=1e-5) and row[5].value == run.thresholds.values[label]
        assert row[6] == told[:, label].sum() and row[7] == pytest.approx(100 * hits / told[:, label].sum())
    wrong, missed = (told == 1) & (SETS == 0), (told == 0) & (SETS == 1)
    for of_kind, is_told in ((wrong, True), (missed, False)):
        rows = mistake_table(run, Numbers(), is_told).rows
        assert [row[1] for row in rows] == sorted(of_kind.sum(axis=0).tolist(), reverse=True)
        for row in rows:
            assert all(of_kind[index, NAMES.index(row[0])] for index in row[3])
    shown = pictures(run, Numbers())
    margin = np.where(wrong, beyond(run), -1).max(axis=1)
    order = [int(picture.lines[-1]) for picture in shown['surprising']]
    assert order == sorted(np.flatnonzero(wrong.any(axis=1)), key=lambda index: -margin[index])[:12]
    assert all(missed[int(picture.lines[-1])].any() for picture in shown['missed'])
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(kept.logits).double(), torch.from_numpy(SETS).double(), reduction='none').mean(dim=1).numpy()
    np.testing.assert_allclose(kept.losses, losses, rtol=1e-12)
    worst = [int(picture.lines[-1]) for picture in shown['worst']]
    assert worst == sorted(worst, key=lambda index: -losses[index]) and not set(worst) & set(order)


def test_an_unfinished_run_and_one_without_predictions(runs):
    (runs / 'weak' / 'test_predictions.npz').unlink()
    page = page_of(runs / 'weak', output=runs / 'x.html')
    assert 'There is nothing of single pictures' in page and 'Classes' in page and 'Told and wrong' not in page
    (runs / 'new').mkdir()
    (runs / 'new' / 'summary.csv').write_text(SUMMARY)
    assert 'There is no test.json' in page_of(runs / 'new', output=runs / 'x.html')
    assert read_run(runs / 'new').of_sets


@pytest.mark.parametrize('change, said', [
    (lambda text: text.replace('"correct": [', '"correct": [999,', 1), 'the numbers of the classes are none'),
    (lambda text: re.sub(r'"num_samples": \d+', '"num_samples": 3', text), 'do not add up'),
    (lambda text: re.sub(r'"average_precision": \[\s*[\d.]+', '"average_precision": [7', text), 'average precision'),
    (lambda text: re.sub(r'"map": [\d.]+', '"map": "x"', text), 'map is no number')])
def test_impossible_numbers_are_named(runs, change, said):
    file = runs / 'weak' / 'test.json'
    assert change(file.read_text()) != file.read_text()
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=said):
        read_run(runs / 'weak')


def test_predictions_that_are_damaged_or_of_another_evaluation(runs):
    shutil.copy(runs / 'strong' / 'test_predictions.npz', runs / 'weak')
    run = read_run(runs / 'weak')
    assert run.label_sets is None and 'is not of the evaluation in test.json' in run.notes[0]
    LabelSetPredictions(SETS, np.full(SETS.shape, np.nan, np.float32)).write(runs / 'weak' / 'test_predictions.npz')
    with pytest.raises(InputError, match='a label or a logit is none.*--logits-file'):
        read_run(runs / 'weak')


# Two runs -------------------------------------------------------------------------------------------------------------

def test_a_comparison(runs, monkeypatch):
    monkeypatch.setattr('nbn_timm.report.label_set_comparison.RESAMPLES', 50)
    page = page_of(runs / 'weak', runs / 'strong', output=runs / 'x.html')
    assert '<h2>strong less weak</h2>' in page and '<td>mAP (mean over the classes, %)</td>' in page
    assert 'Only strong tells all labels of these right' in page and 'Classes that gain most' in page


def test_intervals_are_of_the_differences_of_the_results(runs):
    first, run = read_run(runs / 'weak'), read_run(runs / 'strong')
    found = {name: interval for name, _, _, interval in intervals(first, run, 300)}
    metrics = {'mAP': 'map', 'mAP many': 'map_many', 'mAP medium': 'map_medium', 'mAP few': 'map_few',
               'Micro F1': 'micro_f1', 'Macro F1': 'macro_f1'}
    assert found.keys() == metrics.keys()
    for name, metric in metrics.items():
        assert found[name].mean == pytest.approx(run.results[metric] - first.results[metric], abs=2e-6)
        assert found[name].low < found[name].high
    assert found['mAP'].verdict == 1


def test_a_draw_is_judged_as_its_pictures_would_be():
    """Drawing a picture twice is the same as having it twice, and the interval is that of a plain bootstrap."""
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(40, 4)).round(1)  # with equal ones
    sets = SETS[:40].copy()
    sets[:, 3] = np.arange(40) == 7
    draws = np.concatenate(list(draws_of(40, 30)))
    assert (draws.sum(axis=1) == 40).all()
    found = drawn_average_precision(scores, sets, draws)
    for row, drawn in zip(found, draws, strict=True):
        chosen = np.repeat(np.arange(40), drawn)
        np.testing.assert_allclose(row, average_precision(scores[chosen], sets[chosen]), rtol=1e-12)
    assert np.isnan(found[draws[:, 7] == 0, 3]).all() and not np.isnan(found[draws[:, 7] > 0, 3]).any()


def test_runs_of_two_kinds_are_not_compared(runs):
    (runs / 'one').mkdir()
    (runs / 'one' / 'args.yaml').write_text('model: resnet20\n')
    with pytest.raises(InputError, match='of weak can be of several classes and those of one are of one'):
        report.main([str(runs / 'weak'), str(runs / 'one'), '--output', str(runs / 'x.html')])

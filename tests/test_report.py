"""The page of a run and the comparison of several: what they say, what they do without, how a browser shows them."""
import csv
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from test_train_run import data_flags, images  # noqa: F401  (the fixture)

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import push, report, train, validate
from nbn_timm.config import build_parser, read_given
from nbn_timm.errors import InputError
from nbn_timm.evaluation.predictions import Predictions
from nbn_timm.evaluation.temperature import FittedTemperature
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.report import NormSizes, norm_sizes, read_run
from nbn_timm.report.bootstrap import paired_interval
from nbn_timm.report.comparison import intervals
from nbn_timm.report.figures import draw_lengths, draw_sizes
from nbn_timm.report.recipe import differing_settings, repeating_command
from nbn_timm.report.single import (
    about_probabilities,
    class_table,
    confusion_counts,
    feature_lengths,
    pair_table,
    worst_pictures,
)
from nbn_timm.settings import plain
from nbn_timm.training.settings import TrainSettings

FIGURES = True
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ['--model', 'resnet20_nbn', '--img-size', '8', '--device', 'cpu', '--workers', '0', '--epochs', '2', '-b', '4']


@pytest.fixture(scope='module')
def runs(images, tmp_path_factory) -> Path:  # noqa: F811
    """Two runs: plain cross-entropy, and balanced softmax from another seed."""
    folder = tmp_path_factory.mktemp('runs')
    flags = [*data_flags(images), *FLAGS, '--output', str(folder)]
    pytest.importorskip('matplotlib')
    train.main([*flags, '--experiment', 'plain'])
    train.main([*flags, '--experiment', 'balanced', '--loss', 'balanced_softmax', '--seed', '7', '--no-decay-1d',
                '--opt-kwargs', 'nesterov=True'])
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take the time."""
    monkeypatch.setattr('nbn_timm.pages.figures.can_draw', lambda: False)


def page_of(*arguments, output: Path) -> str:
    report.main([*map(str, arguments), '--output', str(output)])
    return output.read_text()


def test_a_run_ends_with_its_page(runs):
    page = (runs / 'plain' / 'report.html').read_text()
    assert page.count('<svg') == 10 and page.count('src="data:image/png;base64,') >= 4
    for title in ('Many, medium and few', 'Classes', 'Confusion', 'Confident and wrong', 'Calibration', 'Training',
                  'Normalisation', 'Settings'):
        assert re.search(rf'<h2[^>]*>{title}</h2>', page), title
    results = json.loads((runs / 'plain' / 'test.json').read_text())
    assert f'<b>{results["top1"]:.2f}</b>' in page and f'<b>{results["brier"]:.4f}</b>' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and '<script' not in page


def test_nbn_report_writes_the_same_page_from_the_files(runs, tmp_path):
    assert page_of(runs / 'balanced', output=tmp_path / 'x.html') == (runs / 'balanced' / 'report.html').read_text()


def test_the_command_repeats_the_run(runs):
    """Typed as it stands it amounts to the same settings."""
    page = (runs / 'balanced' / 'report.html').read_text()
    text = re.search(r'<pre>(.*?)</pre>', page, re.DOTALL)[1].replace('&#39;', "'").replace('&amp;', '&')
    words = shlex.split(text)
    assert words[0] == 'nbn-train' and words[-2:] == ['--experiment', 'balanced-again']
    again, once = train.parse_train(words[1:]).values(), read_run(runs / 'balanced').settings
    assert {name for name, value in again.items() if once.get(name, value) != value} == {'output', 'experiment'}
    several = repeating_command(once, TrainSettings, 'x', processes=4)
    assert several.startswith('torchrun --nproc-per-node 4 -m nbn_timm.cli.train --')


@pytest.mark.parametrize('groups', [TrainSettings, ProbeSettings])
@pytest.mark.parametrize('flags', [
    ['--val-groups', 'groups.csv', '--val-seed', '3'], ['--dataset', 'csv', '--group-column', 'place'], []])
def test_the_command_repeats_a_run_whose_validation_part_was_drawn(groups, flags):
    """The split file takes the place of the draw and of all that belongs to it, else the command is refused."""
    parser = build_parser(groups, 'x', '')
    drawn = ['--dataset', 'folder', '--data-dir', 'pictures', '--val-fraction', '0.2']
    once = read_given(groups, parser, [*drawn, *flags])
    once.check_effects(once.settings())
    record = {name: plain(value) for name, value in once.settings().values().items()}
    record['split_file'] = 'output/x/split.csv'
    words = shlex.split(repeating_command(record, groups, 'x'))
    again = read_given(groups, parser, words[1:])
    again.check_effects(again.settings())
    assert words[words.index('--split-file') + 1] == 'output/x/split.csv'
    assert not {'--val-fraction', '--val-groups', '--val-seed', '--group-column'} & set(words)


def test_without_the_page_the_predictions_are_kept(images, tmp_path):  # noqa: F811
    train.main([*data_flags(images), *FLAGS, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'x',
                '--no-report'])
    assert not (tmp_path / 'x' / 'report.html').exists()
    assert read_run(tmp_path / 'x').predictions is not None


def test_results_of_other_weights_are_not_told(runs, tmp_path, capsys):
    def shown(folder: Path) -> list[bool]:
        """Whether the accuracy of the test is on the page, in a comparison and in a model card."""
        card = tmp_path / f'{folder.name}-card'
        push.main([str(folder), '--output', str(card), '--overwrite'])
        top1 = f'<b>{json.loads((folder / "test.json").read_text())["top1"]:.2f}</b>'
        of_card = 'Accuracy in percent on the test split' in (card / 'README.md').read_text()
        return [top1 in page_of(folder, output=tmp_path / 'x.html'), of_card]

    folder = tmp_path / 'plain'
    shutil.copytree(runs / 'plain', folder)
    assert shown(folder) == [True, True]
    capsys.readouterr()
    file = folder / json.loads((folder / 'test.json').read_text())['weights']['file']
    checkpoint = torch.load(file, weights_only=True)
    for key in {'state_dict', 'state_dict_ema'} & checkpoint.keys():
        checkpoint[key] = {name: value + 0.05 if value.is_floating_point() else value
                           for name, value in checkpoint[key].items()}
    torch.save(checkpoint, file)
    assert shown(folder) == [False, False]
    said = 'The results in test.json are of other weights than'
    assert said in (tmp_path / 'x.html').read_text() and said in capsys.readouterr().out
    assert f'plain: {said}' in page_of(runs / 'balanced', folder, output=tmp_path / 'both.html')
    assert 'There is no test.json' not in (tmp_path / 'x.html').read_text()


class Numbers:
    """A gallery that shows which pictures it is asked for."""

    def uri(self, index):
        return None

    def name(self, index):
        return str(index)

    def row(self, indices):
        return list(indices)


def test_classes_confusion_and_pictures_are_those_of_the_predictions(runs):
    run = read_run(runs / 'plain')
    kept = Predictions.read(runs / 'plain' / 'test_predictions.npz')
    pairs = Counter(zip(kept.labels.tolist(), kept.predicted.tolist(), strict=True))
    counts = confusion_counts(run)
    assert {(row, column): counts[row, column] for row, column in zip(*np.nonzero(counts), strict=True)} == pairs
    for row, told in zip(run.classes, counts.sum(axis=0), strict=True):
        assert row.predicted == told
    with open(runs / 'plain' / 'test_per_class.csv', newline='') as file:
        written = list(csv.DictReader(file))
    for row, of_file in zip(class_table(run).rows, written, strict=True):  # the classes are in the order of the images
        assert row[:4] == [of_file['name'], int(of_file['train_images']), of_file['shot'], int(of_file['test_images'])]
        assert row[4:] == [None if not of_file[name] else pytest.approx(float(of_file[name]))
                           for name in ('precision', 'accuracy', 'f1')]
    shown = pair_table(run, Numbers()).rows
    wrong = {pair: count for pair, count in pairs.items() if pair[0] != pair[1]}
    assert [row[2] for row in shown] == sorted(wrong.values(), reverse=True)
    for label, guess, count, pictures, *_ in shown:
        names = run.names
        assert wrong[names.index(label), names.index(guess)] == count
        assert all(names[kept.labels[index]] == label and names[kept.predicted[index]] == guess for index in pictures)
    order = [int(picture.lines[-1]) for picture in worst_pictures(run, Numbers())['surprising']]
    assert order == sorted(np.flatnonzero(~kept.correct), key=lambda index: -kept.confidence[index])


def test_feature_lengths_are_means_over_the_pictures_of_the_shots(runs):
    run = read_run(runs / 'plain')
    kept, shots = run.predictions, [row.shot for row in run.classes]
    expected = {shot: np.mean([length for length, label in zip(kept.feature_length, kept.labels, strict=True)
                               if shots[label] == shot]) for shot in dict.fromkeys(shots)}
    assert feature_lengths({'x': run})['x'] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def older(runs, tmp_path) -> Path:
    """The run as an earlier version would have left it."""
    folder = tmp_path / 'older'
    shutil.copytree(runs / 'plain', folder)
    (folder / 'test_predictions.npz').unlink()
    results = json.loads((folder / 'test.json').read_text())
    known = ('top1', 'top5', 'mean_class', 'many', 'medium', 'few', 'loss', 'num_samples', 'num_classes', 'splits',
             'checkpoint', 'weights', 'use_ema')
    (folder / 'test.json').write_text(json.dumps({
        **{key: results[key] for key in known},
        'per_class': {key: results['per_class'][key] for key in ('correct', 'total')}}))
    lines = (folder / 'test_per_class.csv').read_text().splitlines()
    (folder / 'test_per_class.csv').write_text('\n'.join(','.join(line.split(',')[:7]) for line in lines) + '\n')
    return folder


@pytest.mark.usefixtures('undrawn')
def test_a_run_of_an_earlier_version_gives_what_is_there(older, runs, tmp_path):
    page = page_of(older, output=tmp_path / 'x.html')
    assert 'nbn-report --evaluate' in page and 'Confident and wrong' not in page and 'Classes' in page
    assert '#settings' in page
    again = page_of(older, '--evaluate', '--device', 'cpu', '--names', 'plain', output=tmp_path / 'x.html')
    assert 'nbn-report --evaluate' not in again
    for part in ('cards', 'pictures'):
        pattern = rf'<div class="{part}">.*?\n</div>\n'
        assert re.findall(pattern, again, re.DOTALL) == re.findall(
            pattern, (runs / 'plain' / 'report.html').read_text(), re.DOTALL)


def test_a_run_of_timm_gives_curves_and_settings(tmp_path):
    (tmp_path / 'args.yaml').write_text('model: resnet18\nlr: 0.05\naug_repeats: 0\n')
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'
                                          '0,2.0,2.1,10.0,30.0,0.1\n1,1.0,1.1,20.0,40.0,0.05\n2,0.9')
    page = page_of(tmp_path, output=tmp_path / 'report.html')
    assert page.count('<svg') == 3 and 'aug_repeats' in page and '<pre>' not in page
    assert read_run(tmp_path).curve('eval_top1') == ([1, 2], [10.0, 20.0])


@pytest.mark.usefixtures('undrawn')
def test_a_checkpoint_alone_can_be_evaluated(runs, tmp_path):
    shutil.copy(runs / 'plain' / 'model_best.pth.tar', tmp_path / 'alone.pth.tar')
    page = page_of(tmp_path / 'alone.pth.tar', '--evaluate', '--device', 'cpu', output=tmp_path / 'x.html')
    assert 'Confident and wrong' in page and 'id="training"' not in page
    page = page_of(tmp_path / 'alone.pth.tar', output=tmp_path / 'x.html')
    assert 'nbn-report --evaluate evaluates its network' in page


@pytest.mark.parametrize(('file', 'said'), [
    ('test.json', "is no checkpoint: give the folder"), ('args.yaml', 'is no checkpoint'),
    ('test_predictions.npz', 'is no checkpoint'), ('last.pth.tar', 'are of model_best.pth.tar, and this is last')])
def test_of_files_only_the_checkpoint_of_the_results_is_taken(runs, file, said):
    with pytest.raises(InputError, match=said):
        report.main([str(runs / 'plain' / file)])


@pytest.mark.usefixtures('undrawn')
def test_pictures_that_are_gone_are_told(runs, tmp_path):
    page = page_of(runs / 'plain', '--data-dir', tmp_path, output=tmp_path / 'x.html')
    assert 'The pictures are not at hand' in page or 'src="data:image' not in page
    assert 'Confident and wrong' in page


def test_a_page_tells_which_temperature_its_probabilities_are_of(runs):
    page = (runs / 'plain' / 'report.html').read_text()
    run = read_run(runs / 'plain')
    assert 'on this page are those of the network as it is: temperature 1.' in page
    assert ('nbn-predict divides' in page) == (run.calibration is not None)
    warm, cold = (replace(run, name=name, results={**run.results, 'calibration': FittedTemperature(
        temperature, 'val', 1200, 1.0, 1.1).to_dict()}) for name, temperature in (('warm', 1.25), ('cold', 0.8)))
    assert about_probabilities([warm]).endswith(
        'nbn-predict divides the logits by 1.250, fitted on 1,200 images of the validation split, and so is less sure '
        'than told here.')
    assert re.search(r'the networks as they are: temperature 1. nbn-predict divides the logits of warm by 1.250,.*; '
                     r'of cold by 0.800,.* and so is surer than told here\.$', about_probabilities([warm, cold]))


def test_without_matplotlib_a_line_says_how_to_get_figures(runs, tmp_path, monkeypatch):
    monkeypatch.setattr('nbn_timm.pages.figures.can_draw', lambda: False)
    monkeypatch.setattr('nbn_timm.report.single.can_draw', lambda: False)
    page = page_of(runs / 'plain', output=tmp_path / 'x.html')
    assert '<svg' not in page and 'pip install &#39;nbn_timm[plots]&#39;' in page and 'Confident and wrong' in page


def test_names_are_escaped_and_never_formulas(runs, tmp_path):
    folder = tmp_path / 'odd'
    shutil.copytree(runs / 'plain', folder)
    text = (folder / 'test_per_class.csv').read_text().splitlines()
    text[1] = re.sub(r'^0,[^,]*', '0,<script>alert(1)</script> $x_', text[1])
    (folder / 'test_per_class.csv').write_text('\n'.join(text) + '\n')
    page = page_of(folder, output=tmp_path / 'x.html')
    assert '<script' not in page and '&lt;script&gt;alert(1)&lt;/script&gt; $x_' in page


@pytest.mark.parametrize(('file', 'content', 'said'), [
    ('test.json', '{"top1"', "test.json' cannot be read"), ('summary.csv', 'epoch,lr\n1,x\n', "summary.csv' cannot be"),
    ('args.yaml', 'a: [', "args.yaml' cannot be read"), ('test_predictions.npz', 'x', '--save-predictions')])
def test_a_damaged_file_is_named(runs, tmp_path, file, content, said):
    shutil.copytree(runs / 'plain', tmp_path / 'x')
    (tmp_path / 'x' / file).write_text(content)
    with pytest.raises(InputError, match=said):
        report.main([str(tmp_path / 'x')])


@pytest.mark.parametrize(('file', 'change', 'said'), [
    ('summary.csv', lambda text: text.replace('epoch', 'epoci', 1), 'it has no column epoch'),
    ('summary.csv', lambda text: text + '1' * 200_000 + ',2\n', 'field larger'),
    ('summary.csv', lambda text: f'{text[:-1]},1\n', 'cannot be read'),
    ('args.yaml', lambda text: text + '? 1\n: 2\n', 'a name of a setting is none'),
    ('args.yaml', lambda text: text + 'aug_splits: [' + '[' * 5000, 'cannot be read'),
    ('args.yaml', lambda text: f"{text}a: &a [{', '.join('x' * 9)}]\n" + ''.join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip('abcdef', 'bcdefg', strict=True)),
     'more than 100,000 values'),
    ('args.yaml', lambda text: text.replace('val_split: null', 'val_split: 3'), "what is recorded of 'val_split' is 3"),
    ('test.json', lambda text: text.replace('"num_samples": ', '"num_samples": "x" '), 'cannot be read'),
    ('test.json', lambda text: text.replace('"num_classes"', '"classes"'), "no 'num_classes'"),
    ('test.json', lambda text: re.sub('"top5": .*,', '"top5": NaN,', text), 'top5 is no number'),
    ('test.json', lambda text: re.sub('"ece": .*,', '"ece": [1],', text), 'ece is no number'),
    ('test.json', lambda text: re.sub('"top1": .*,', '"top1": 1.5,', text), 'do not add up'),
    ('test.json', lambda text: text.replace('"few_below"', '"few_bilow"'), 'few_below'),
    ('test_per_class.csv', lambda text: re.sub(',(many|medium|few),', ',most,', text, count=1), 'impossible values'),
    ('test_per_class.csv', lambda text: text.rpartition('\n')[0].rpartition('\n')[0] + '\n', 'different evaluations')])
def test_impossible_values_in_the_files_of_a_run_are_named(runs, tmp_path, file, change, said):
    shutil.copytree(runs / 'plain', tmp_path / 'x', ignore=shutil.ignore_patterns('*.tar'))
    text = (tmp_path / 'x' / file).read_text()
    (tmp_path / 'x' / file).write_text(change(text))
    assert change(text) != text
    with pytest.raises(InputError, match=said):
        report.main([str(tmp_path / 'x'), '--data-dir', str(tmp_path)])


def test_predictions_of_another_evaluation_are_left_out(runs, tmp_path):
    shutil.copytree(runs / 'plain', tmp_path / 'x', ignore=shutil.ignore_patterns('*.tar'))
    kept = Predictions.read(tmp_path / 'x' / 'test_predictions.npz')
    other = (kept.top + 1) % len(read_run(runs / 'plain').classes)
    replace(kept, top=other).write(tmp_path / 'x' / 'test_predictions.npz')
    run = read_run(tmp_path / 'x')
    assert run.predictions is None and run.notes[0].startswith('test_predictions.npz has other hits than test.json')


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match='is no folder of a run'):
        report.main([str(tmp_path)])
    with pytest.raises(InputError, match='different --names'):
        report.main([str(tmp_path), str(tmp_path)])


# Several runs ---------------------------------------------------------------------------------------------------------

def test_a_comparison_of_two_runs(runs, tmp_path):
    page = page_of(runs / 'plain', runs / 'balanced', output=tmp_path / 'x.html')
    assert '<h2>balanced less plain</h2>' in page and 'paired bootstrap' in page
    assert '<td>loss</td><td>cross_entropy</td><td>balanced_softmax</td>' in page
    assert 'tells these right' in page and page.count('<svg') >= 6
    first, other = (read_run(runs / name) for name in ('plain', 'balanced'))
    found = {name: (number, interval) for name, number, _, interval in intervals(first, other)}
    for name, metric in (('Top-1', 'top1'), ('Mean class', 'mean_class'), ('Few', 'few'),
                         ('NLL (less is better)', 'nll')):
        number, interval = found[name]
        assert interval.mean == pytest.approx(other.results[metric] - first.results[metric], abs=1e-4)
        assert interval.low <= interval.mean <= interval.high
    assert found['Top-1'][0] == 4 and found['Mean class'][0] == 4


@pytest.mark.usefixtures('undrawn')
def test_runs_on_other_pictures_are_not_paired(runs, older, tmp_path):
    page = page_of(older, runs / 'plain', output=tmp_path / 'x.html')
    assert 'older has no predictions' in page and 'paired bootstrap' not in page
    kept = Predictions.read(runs / 'plain' / 'test_predictions.npz')
    kept[np.arange(len(kept))[::-1]].write(older / 'test_predictions.npz')
    assert 'evaluated on other pictures' in page_of(older, runs / 'plain', output=tmp_path / 'x.html')


@pytest.mark.usefixtures('undrawn')
def test_pictures_of_the_same_names_and_labels_are_told_apart_by_their_content(
        runs, images, tmp_path, capsys):  # noqa: F811
    """Two test sets alike in names, number and labels; and one set in two folders."""
    first = runs / 'plain'
    shutil.copytree(images, tmp_path / 'images')

    def evaluated(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(first, folder)
        validate.main(['--checkpoint', str(first / 'model_best.pth.tar'), *data_flags(tmp_path / 'images', 'test'),
                       '--temperature', '1', '--device', 'cpu', '--workers', '0', '--save-predictions',
                       str(folder / 'test_predictions.npz')])
        return folder

    page = page_of(first, evaluated('moved'), output=tmp_path / 'x.html')
    assert 'Differences on the same pictures' in page
    for path in (tmp_path / 'images').glob('test_*.png'):
        path.write_bytes(path.read_bytes() + b' ')  # another picture by its digest, and the same to the network
    page = page_of(first, evaluated('other'), output=tmp_path / 'x.html')
    assert ('other cannot be compared picture by picture with plain, since they were evaluated on other pictures.'
            in page) and 'paired bootstrap' not in page
    assert 'other cannot be compared' in capsys.readouterr().out
    page = page_of(tmp_path / 'other', '--data-dir', images, output=tmp_path / 'x.html')
    assert 'not those that were evaluated' in page and 'src="data:image' not in page


@pytest.mark.usefixtures('undrawn')
def test_of_predictions_without_a_digest_it_is_said_that_the_pictures_are_not_known(runs, tmp_path):
    shutil.copytree(runs / 'balanced', tmp_path / 'before')
    file = tmp_path / 'before' / 'test_predictions.npz'
    replace(Predictions.read(file), digest=None).write(file)
    page = page_of(runs / 'plain', tmp_path / 'before', output=tmp_path / 'x.html')
    assert 'Whether before was evaluated on the same pictures as plain is not known' in page
    assert 'before kept no digest' in page and 'on the same pictures, with' not in page and 'paired bootstrap' in page


def test_a_split_file_of_the_run_itself_differs_by_what_is_in_it(runs, tmp_path):
    """Each run keeps its own; another folder alone is no other setting."""
    pair = []
    for name in ('one', 'other'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'split.csv').write_text('path,split\n')
        pair.append(replace(read_run(runs / 'plain'), name=name, folder=tmp_path / name, settings={
            'split_file': f'output/{name}/split.csv', 'lr': 0.1, 'output': name}))
    assert differing_settings(pair) == []
    (tmp_path / 'other' / 'split.csv').write_text('path,split\na.png,val\n')
    assert differing_settings(pair) == [('split_file', ['output/one/split.csv', 'output/other/split.csv'])]
    (tmp_path / 'other' / 'split.csv').unlink()
    assert len(differing_settings(pair)) == 1
    shutil.copytree(tmp_path / 'one', tmp_path / 'renamed')
    assert differing_settings([pair[0], replace(pair[0], folder=tmp_path / 'renamed')]) == []


@pytest.mark.usefixtures('undrawn')
def test_a_copied_run_with_a_drawn_split_has_its_pictures(images, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Of the test split, and of the drawn one where there is no test."""
    monkeypatch.chdir(tmp_path)
    train.main(['--dataset', 'list', '--data-dir', str(images), '--train-list', str(images / 'train.txt'),
                '--val-fraction', '0.3', *FLAGS, '--epochs', '1', '--no-report', '--output', 'out', '--experiment',
                'a'])
    shutil.move(tmp_path / 'out' / 'a', tmp_path / 'copy')
    page = page_of('copy', '--data-dir', images, output=tmp_path / 'x.html')
    assert 'not at hand' not in page and 'src="data:image' in page


@pytest.mark.usefixtures('undrawn')
def test_the_command_that_repeats_a_run_has_the_folder_of_its_pictures(images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / 'before')
    train.main(['--dataset', 'list', '--data-dir', 'before', '--train-list', str(images / 'train.txt'),
                '--val-fraction', '0.3', *FLAGS, '--epochs', '1', '--no-report', '--output', 'out', '--experiment',
                'a'])
    shutil.move(tmp_path / 'before', tmp_path / 'moved')
    assert '--data-dir moved' in page_of('out/a', '--data-dir', 'moved', output=tmp_path / 'x.html')
    (tmp_path / 'empty').mkdir()
    page = page_of('out/a', '--data-dir', 'empty', output=tmp_path / 'x.html')
    assert '--data-dir before' in page and 'not at hand' in page


@pytest.mark.parametrize('values', [np.repeat([1.0, 0.0, -1.0], [30, 150, 20]),
                                    np.random.default_rng(0).normal(0.1, 1, 200)])
def test_intervals_agree_with_scipy(values):
    stats = pytest.importorskip('scipy.stats')
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method='percentile', rng=0).confidence_interval
    found = paired_interval(values, resamples=20_000)
    width = expected.high - expected.low
    assert found.mean == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=0.04 * width)
    assert found == paired_interval(values, resamples=20_000)
    assert paired_interval(np.full(9, 2.0)).verdict == 1 and paired_interval(np.full(9, -2.0)).verdict == -1


# Inside the network ---------------------------------------------------------------------------------------------------

def test_sizes_of_nbn_are_those_that_it_applies():
    model = timm.create_model('resnet20_nbn', num_classes=4)
    torch.manual_seed(0)
    layers = [module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
              and name.startswith('layer3')]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
    sizes = norm_sizes(model)
    assert sizes.nbn and sizes.layers == len(layers) and sizes.weight.shape == (64,)
    applied = [layer.effective_affine() if hasattr(layer, 'effective_affine') else (layer.weight, layer.bias)
               for layer in layers]
    for part, found in enumerate((sizes.weight, sizes.bias)):
        expected = np.mean([np.sort(np.abs(pair[part].detach().numpy()))[::-1] for pair in applied], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not norm_sizes(timm.create_model('resnet18', num_classes=4)).nbn


def test_a_network_without_batch_norm_has_no_sizes():
    with pytest.raises(InputError, match='BatchNorm'):
        norm_sizes(timm.create_model('test_vit', num_classes=4))


# In a browser ---------------------------------------------------------------------------------------------------------

_MEASURE = """<script>addEventListener('load', () => { const wide = [...document.querySelectorAll('main *')].filter(
  one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll, pre'));
  document.documentElement.setAttribute('data-found', JSON.stringify({width: innerWidth,
  over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  wide: wide.map(one => one.outerHTML.slice(0, 80)),
  fetched: performance.getEntriesByType('resource').map(one => one.name).filter(name => !name.startsWith('data:')),
  broken: [...document.images].filter(one => !one.naturalWidth).length}));});</script>"""


@pytest.mark.skipif(BROWSER is None, reason='no Chromium')
@pytest.mark.parametrize('several', [False, True])
def test_a_phone_shows_all_of_it_and_fetches_nothing(runs, tmp_path, several):
    chosen = ['plain', 'balanced'] if several else ['plain']
    page = page_of(*(runs / name for name in chosen), output=tmp_path / 'page.html')
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', '', page)
    (tmp_path / 'page.html').write_text(open_page.replace('</body>', f'{_MEASURE}</body>'))
    # A frame, since a browser's window has a least width.
    (tmp_path / 'phone.html').write_text('<iframe src="page.html" width="390" height="800" style="border: 0"></iframe>'
                                         "<script>addEventListener('load', () => document.body.append(frames[0]."
                                         "document.documentElement.getAttribute('data-found')))</script>")
    done = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files',
         f'--user-data-dir={tmp_path / "profile"}', '--virtual-time-budget=20000', '--dump-dom',
         (tmp_path / 'phone.html').as_uri()], capture_output=True, text=True, timeout=240)
    found = json.loads(re.search(r'\{"width".*\}', done.stdout.replace('&lt;', '<').replace('&gt;', '>'))[0])
    assert found == {'width': 390, 'over': 0, 'wide': [], 'fetched': [], 'broken': 0}


@pytest.mark.parametrize('sizes', [np.linspace(0.505, 0.504, 64), np.zeros(64), np.full(64, 2.0)])
def test_a_line_of_sizes_has_room_above_it(sizes):
    axes = pytest.importorskip('matplotlib.figure').Figure().add_subplot()
    draw_sizes(axes, {'x': NormSizes(sizes, sizes, 1, True)}, 'weight', '|g|')
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.04 * sizes[0]


def test_a_shot_without_a_class_has_no_place_in_the_figure():
    axes = pytest.importorskip('matplotlib.figure').Figure().add_subplot()
    draw_lengths(axes, {'one': {'medium': 4.0, 'few': 3.0}, 'other': {'few': 2.0}})
    assert [label.get_text() for label in axes.get_xticklabels()] == ['medium', 'few']
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in axes.patches] == [-0.2, 0.8, 1.2]

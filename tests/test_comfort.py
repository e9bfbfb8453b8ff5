"""What makes a training comfortable: bars, early stopping, the rate by the batch, averages of short runs, memory."""
import io
import json
import os
import select
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
import nbn_timm.cli.train as train
import nbn_timm.training.run as run
from nbn_timm.bars import bar, with_bar, with_bar_or_lines
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult
from nbn_timm.training.checkpointing import checkpoint_gradients
from nbn_timm.training.combinations import doubtful
from nbn_timm.training.keeper import Keeper
from nbn_timm.training.optim import OptimizerSettings
from nbn_timm.training.progress import Progress
from nbn_timm.training.run_checkpoint import BEST, LAST, Best
from nbn_timm.training.settings import TrainSettings
from nbn_timm.training.sweep import read_result

MODEL = ['--model', 'resnet20_nbn', '--img-size', '8', '--device', 'cpu', '--workers', '0']


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Class folders of 10, 6 and 3 training images and 2 others of each class, in its colour and noise."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, counts in (('train', (10, 6, 3)), ('val', (2, 2, 2)), ('test', (2, 2, 2))):
        for label, count in enumerate(counts):
            folder = root / split / 'abc'[label]
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (8, 8, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index}.png')
    return root


def flags(images: Path, output: Path, name: str, *more: str) -> list[str]:
    return ['--dataset', 'folder', '--data-dir', str(images), *MODEL, '-b', '4', '--output', str(output),
            '--experiment', name, *more]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def with_metrics(monkeypatch, values) -> None:
    """Let the evaluations of the validation split find these top-1 accuracies, of 100 images."""
    found = iter(values)
    original = run.Plan.evaluate

    def evaluate(plan, model, dataset, evaluator=None):
        if dataset is not plan.splits.val or evaluator is not None:  # the report's, or that of the temperature
            return original(plan, model, dataset, evaluator)
        correct = next(found)
        return EvalResult(1.0, 100.0, (correct, 0, 0), (98, 1, 1), None)
    monkeypatch.setattr(run.Plan, 'evaluate', evaluate)


# Early stopping and evaluation at intervals --------------------------------------------------------------------------

def test_patience_ends_the_run_and_the_best_epoch_is_reported(images, tmp_path, monkeypatch, capsys):
    with_metrics(monkeypatch, [50, 60, 55, 60, 70])
    train.main(flags(images, tmp_path, 'stopped', '--epochs', '9', '--patience', '2'))
    assert len(rows(tmp_path / 'stopped')) == 4  # the second is the best, an equal one is not better
    weights = json.loads((tmp_path / 'stopped' / 'test.json').read_text())['weights']
    assert weights == {'file': BEST, 'epoch': 2, 'epochs': 4, 'chosen_by': 'validation top1'}
    out = capsys.readouterr().out
    assert 'not become better since epoch 2, so the run ends after epoch 4 of 9 (--patience 2)' in out
    train.main(flags(images, tmp_path, 'stopped', '--epochs', '9', '--patience', '2', '--resume', 'auto'))
    assert len(rows(tmp_path / 'stopped')) == 4  # it has ended


def test_a_run_with_patience_resumes_to_the_same_end(images, tmp_path, monkeypatch):
    metrics = [50, 60, 55, 54, 53]
    more = ['--epochs', '9', '--patience', '3', '--model-ema']
    with_metrics(monkeypatch, metrics)
    train.main(flags(images, tmp_path, 'whole', *more))
    with_metrics(monkeypatch, metrics)
    original, calls = run.train_one_epoch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(run, 'train_one_epoch', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(images, tmp_path, 'killed', *more))
    monkeypatch.setattr(run, 'train_one_epoch', original)
    train.main(flags(images, tmp_path, 'killed', *more, '--resume', 'auto'))
    whole, killed = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ('whole', 'killed'))
    assert whole['epoch'] == killed['epoch'] == 4
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(value, killed[key][name]) for name, value in whole[key].items())
    assert (tmp_path / 'whole' / 'test.json').read_text() == (tmp_path / 'killed' / 'test.json').read_text()


def test_val_interval_evaluates_these_epochs_and_the_last(images, tmp_path):
    train.main(flags(images, tmp_path, 'seldom', '--epochs', '5', '--val-interval', '2'))
    found = rows(tmp_path / 'seldom')
    assert [row['eval_top1'] is not None for row in found] == [False, True, False, True, True]
    assert [row['epoch'] for row in found] == [0, 1, 2, 3, 4]
    table = [line.split(',') for line in (tmp_path / 'seldom' / 'summary.csv').read_text().splitlines()]
    assert len({len(line) for line in table}) == 1 and table[1][table[0].index('eval_top1')] == ''
    assert torch.load(tmp_path / 'seldom' / BEST)['epoch'] in (1, 3, 4)


def test_the_last_epoch_is_kept_whatever_the_validation_says(images, tmp_path, monkeypatch):
    with_metrics(monkeypatch, [30, 50, 40])
    train.main(flags(images, tmp_path, 'last', '--epochs', '3', '--kept-epoch', 'last'))
    assert torch.load(tmp_path / 'last' / BEST)['epoch'] == 2
    weights = json.loads((tmp_path / 'last' / 'test.json').read_text())['weights']
    assert weights['epoch'] == 3 and weights['chosen_by'] == '--kept-epoch last and not by validation top1'
    assert read_result(tmp_path / 'last').validation == 40  # by which a sweep compares
    with pytest.raises(InputError, match='--kept-epoch last keeps every one: give --kept-epoch best'):
        train.main(flags(images, tmp_path, 'both', '--kept-epoch', 'last', '--patience', '2'))


def test_a_run_that_has_ended_with_its_best_epoch_is_not_said_to_end_with_its_last():
    settings = TrainSettings().with_values(kept_epoch='last', epochs=3)
    keeper = Keeper(SimpleNamespace(settings=settings, folder='run'), None, None, None)
    for best, begun in ((None, 3), (Best(50.0, 2), 3), (Best(50.0, 1), 2)):  # the third goes on
        keeper.best = best
        keeper._refuse_earlier(begun)
    keeper.best = Best(50.0, 1)
    with pytest.raises(InputError, match="'run' has ended with epoch 2 of 3, its best one, .*evaluate last.pth.tar"):
        keeper._refuse_earlier(3)


def test_patience_waits_for_an_evaluation(images, tmp_path, monkeypatch):
    with_metrics(monkeypatch, [60, 50, 40])
    train.main(flags(images, tmp_path, 'both', '--epochs', '9', '--val-interval', '3', '--patience', '2'))
    assert len(rows(tmp_path / 'both')) == 6


@pytest.mark.parametrize('given, sentence', [
    (['--patience', '3'], '--patience has no effect without a validation split'),
    (['--val-interval', '3'], '--val-interval has no effect without a validation split or --watch-test'),
    (['--lr', '0.1', '--lr-base', '0.1'], '--lr has no effect with --lr-base'),
    (['--lr-base-size', '64'], '--lr-base-size has no effect without --lr-base'),
    (['--no-model-ema-warmup'], '--no-model-ema-warmup has no effect without --model-ema'),
])
@pytest.mark.fast
def test_what_would_have_no_effect_is_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        train.parse_train(['--dataset', 'cifar10_lt', '--model', 'resnet20', *given])


@pytest.mark.fast
@pytest.mark.parametrize('given, said', [
    (dict(opt='adamw'), 'rate 0.1 is for SGD, and --opt adamw usually has 0.0001 to 0.003: give --lr 0.001'),
    (dict(opt='lookahead_lion'), 'for SGD'), (dict(opt='adamw', lr=1e-3), None),
    (dict(opt='adamw', lr_base=5e-4), None),
    (dict(opt='sgd'), None), (dict(opt='adadelta'), None),
    (dict(warmup_epochs=5, epochs=5), 'since the warm-up of 5 epochs is not shorter than the 5 of the run'),
    (dict(warmup_epochs=4, epochs=5), None),
])
def test_a_rate_that_was_hardly_meant_is_told(given, said):
    told = doubtful(TrainSettings().with_values(**given), None)
    assert [said in sentence for sentence in told] == [True] * (said is not None)


# The rate by the batch ---------------------------------------------------------------------------------------------

@pytest.mark.fast
@pytest.mark.parametrize('opt, scale, rate', [
    ('momentum', None, 0.1 * 64 / 256), ('adamw', None, 0.1 * (64 / 256) ** 0.5), ('lamb', None, 0.05),
    ('adamw', 'linear', 0.025), ('momentum', 'sqrt', 0.05),
])
def test_the_rate_follows_the_batch_as_in_timm(opt, scale, rate):
    settings = OptimizerSettings(opt=opt, lr_base=0.1, lr_base_scale=scale)
    assert settings.for_batch(64).lr == pytest.approx(rate, rel=1e-12)
    assert OptimizerSettings(opt=opt, lr=0.3).for_batch(64).lr == 0.3


def test_a_run_with_lr_base_has_that_rate(images, tmp_path, capsys):
    train.main(flags(images, tmp_path, 'rate', '--epochs', '1', '--lr-base', '0.32', '--grad-accum-steps', '2'))
    assert rows(tmp_path / 'rate')[0]['lr'] == pytest.approx(0.32 * 8 / 256)
    assert 'Learning rate 0.01, from --lr-base 0.32 for 256 images per update (linear).' in capsys.readouterr().out


# Averaged weights --------------------------------------------------------------------------------------------------

def test_the_average_of_a_short_run_follows_its_weights(images, tmp_path):
    """After 30 updates timm's default average is still 99 % of the first weights; by the growing decay it is not."""
    far = {}
    for name, more in (('grown', []), ('fixed', ['--no-model-ema-warmup'])):
        train.main(flags(images, tmp_path, name, '--epochs', '6', '--lr', '0.05', '--model-ema', *more))
        state = torch.load(tmp_path / name / LAST, weights_only=True)
        raw, averaged = state['state_dict'], state['state_dict_ema']
        means = [key for key in raw if key.endswith('running_mean')]
        far[name] = (sum((raw[key] - averaged[key]).norm() for key in means)
                     / sum(raw[key].norm() for key in means)).item()
    assert far['grown'] < 0.3 < 0.8 < far['fixed']


@pytest.mark.fast
def test_the_decay_grows_up_to_its_setting():
    average = timm.utils.ModelEmaV3(torch.nn.Linear(2, 2), decay=0.9998, use_warmup=True)
    assert [average.get_decay(updates) for updates in (1, 2, 9, 1001)] == pytest.approx(
        [0, 1 - 2 ** (-2 / 3), 1 - 9 ** (-2 / 3), 1 - 1001 ** (-2 / 3)])
    assert average.get_decay(10 ** 7) == 0.9998


# Gradient checkpointing --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['resnet20_nbn', 'resnet18', 'resnet32_ride_nbn'])
def test_checkpointing_changes_nothing_but_the_memory(name):
    """Weights and BatchNorm statistics, to the bit; timm's own would count each batch twice."""
    states = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3).train()
        if checkpointed:
            checkpoint_gradients(model, name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            output = model(torch.randn(4, 3, 32, 32))
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_model_without_checkpointing_is_refused(images, tmp_path):
    with pytest.raises(InputError, match='leave out --grad-checkpointing'):
        checkpoint_gradients(timm.create_model('inception_v3', num_classes=2), 'inception_v3')
    train.main(flags(images, tmp_path, 'checkpointed', '--epochs', '1', '--grad-checkpointing'))
    assert rows(tmp_path / 'checkpointed')


# Bars --------------------------------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def epoch_on(monkeypatch, stdout, lines) -> str:
    """What an epoch of six updates draws on a terminal, with a line every two of them."""
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.setattr(sys, 'stdout', stdout)
    progress = Progress(3, 6, 2, lines.append, clock=iter(range(1000)).__next__, with_bar=True)
    progress.start(0)
    for update in range(6):
        progress.advance(4 * (update + 1))
        if progress.due(update):
            progress.show(update, 0.5, 0.1, 4 * (update + 1))
    progress.end()
    return terminal.getvalue()


@pytest.mark.fast
def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch):
    lines = []
    drawn = epoch_on(monkeypatch, Terminal(), lines)
    assert 'epoch 1/3' in drawn and '/6' in drawn
    assert len(lines) == 1 and 'step 6/6' in lines[0] and 'images/s' in lines[0] and 'left' in lines[0]


@pytest.mark.fast
def test_a_file_gets_every_line(monkeypatch):
    lines = []
    epoch_on(monkeypatch, io.StringIO(), lines)
    assert [line.split('step ')[1][:3] for line in lines] == ['2/6', '4/6', '6/6']


@pytest.mark.fast
def test_a_terminal_that_tells_no_width_gets_a_bar_too(monkeypatch):
    """As that of `script` without a terminal around it."""
    ours, theirs = os.openpty()
    with open(theirs, 'w') as terminal:
        assert terminal.isatty() and os.get_terminal_size(theirs).columns == 0
        monkeypatch.setattr(sys, 'stderr', terminal)
        with bar(6, 'epoch 1/3', mininterval=0) as shown:
            shown.update(2)
        assert list(with_bar_or_lines([1, 2], 2, 'pictures', terminal)) == [1, 2]
        drawn = ''
        while ' pictures/s' not in drawn and select.select([ours], [], [], 10)[0]:
            drawn += os.read(ours, 10_000).decode()
    os.close(ours)
    assert 'epoch 1/3' in drawn and '2/6' in drawn and ' pictures/s' in drawn


@pytest.mark.fast
def test_batches_pass_a_bar_unchanged(monkeypatch):
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, 'stderr', stream)
        assert list(with_bar([1, 2, 3], 'evaluation')) == [1, 2, 3]
        assert ('evaluation' in stream.getvalue()) == drawn
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert list(with_bar(iter('ab'), 'evaluation')) == ['a', 'b']

"""nbn-sweep: which trainings it runs, what it makes of their results, and that a test split chooses nothing."""
import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nbn_timm.cli.train as train
from nbn_timm.cli import sweep
from nbn_timm.errors import InputError
from nbn_timm.training.sweep import TrialResult, claim_folder, read_result, trials


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 4), ('test', 4)):
        for label in range(2):
            folder = root / split / 'ab'[label]
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index}.png')
    return root


def common(images: Path) -> list[str]:
    return ['--dataset', 'folder', '--data-dir', str(images), '--model', 'resnet20', '--img-size', '8', '--device',
            'cpu', '--workers', '0', '-b', '4', '--epochs', '2']


@pytest.fixture
def in_process(monkeypatch):
    """Trainings in this process, of which the list of commands is given."""
    commands = []

    def run(flags, log):
        commands.append(list(flags))
        try:
            train.main(flags)
        except InputError:
            return False
        return True
    monkeypatch.setattr(sweep, 'run_training', run)
    return commands


@pytest.mark.fast
def test_all_combinations_with_all_seeds():
    found = trials({'lr': ['0.1', '0.05'], 'model_ema': ['true', 'false'], 'scale': ['0.2 1']}, [1, 2])
    assert len(found) == 8 and len({trial.folder for trial in found}) == 8
    assert found[0].flags == ('--lr=0.1', '--model-ema', '--scale', '0.2', '1', '--seed=1')
    assert found[-1].flags == ('--lr=0.05', '--no-model-ema', '--scale', '0.2', '1', '--seed=2')
    assert found[0].folder == 'lr-0.1-model_ema-true-scale-0.2_1-s1'


def test_a_sweep_from_the_flags_to_the_table(images, tmp_path, in_process, capsys):
    command = ['--set', 'lr=0.05,0', '--seeds', '1', '2', '--output', str(tmp_path / 'sweep'), '--', *common(images)]
    sweep.main(command)
    assert len(in_process) == 4
    rows = list(csv.DictReader((tmp_path / 'sweep' / 'sweep.csv').open(newline='')))
    for row in rows:
        values = []
        for seed in (1, 2):
            log = (tmp_path / 'sweep' / f'lr-{row["lr"]}-s{seed}' / 'log.jsonl').read_text().splitlines()
            values.append(max(json.loads(line)['eval_top1'] for line in log))
        assert row['values'] == ' '.join(map(str, values)) and row['metric'] == 'top1'
        assert float(row['mean']) == pytest.approx(statistics.fmean(values), abs=1e-5)
        assert float(row['sd']) == pytest.approx(statistics.stdev(values), abs=1e-5)
    assert float(rows[0]['mean']) >= float(rows[1]['mean'])
    out = capsys.readouterr().out
    assert f'Best by validation: lr={rows[0]["lr"]}, test top1' in out and 'nbn-train --dataset folder' in out

    sweep.main(command)
    assert len(in_process) == 4 and 'there already' in capsys.readouterr().out  # nothing was left to do
    sweep.main(['--set', 'lr=0.05,0', '--seeds', '1', '2', '3', *command[command.index('--output'):]])
    assert len(in_process) == 6  # the new seed alone
    with pytest.raises(InputError, match='holds a sweep of other trainings'):
        sweep.main([*command[command.index('--output'):], '--weight-decay', '0'])


def test_an_interrupted_sweep_goes_on(images, tmp_path, in_process, monkeypatch):
    """The run that was interrupted resumes, and one that failed is tried again."""
    original, calls = train.train, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments)
    monkeypatch.setattr(train, 'train', interrupted)
    command = ['--seeds', '1', '2', '3', '--output', str(tmp_path), '--', *common(images)]
    with pytest.raises(KeyboardInterrupt):
        sweep.main(command)
    sweep.main(command)
    experiments = [flags[flags.index('--experiment') + 1] for flags in in_process]
    assert experiments == ['s1', 's2', 's2', 's3']
    assert all(flags[-2:] == ['--resume', 'auto'] for flags in in_process)


def test_a_failed_training_does_not_stop_the_others(images, tmp_path, in_process, monkeypatch):
    original = train.train

    def fails(settings, *rest):
        if settings.optimizer.lr == 9:
            raise InputError('the loss became NaN')
        original(settings, *rest)
    monkeypatch.setattr(train, 'train', fails)
    with pytest.raises(InputError, match='1 of 2 trainings have failed'):
        sweep.main(['--set', 'lr=9,0.05', '--output', str(tmp_path), '--', *common(images)])
    assert len(list(csv.DictReader((tmp_path / 'sweep.csv').open(newline='')))) == 1


@pytest.mark.fast
def test_a_yaml_file_says_the_same(images, tmp_path):
    file = tmp_path / 'sweep.yaml'
    file.write_text('set:\n  lr: [0.1, 0.05]\n  loss: [cross_entropy, balanced_softmax]\nseeds: [7, 8]\n'
                    f'train: {" ".join(common(images))}\n')
    told = sweep.parse_args([str(file)])
    same = sweep.parse_args(['--set', 'lr=0.1,0.05', '--set', 'loss=cross_entropy,balanced_softmax', '--seeds', '7',
                             '8', '--', *common(images)])
    assert told == same and len(told.trials) == 8


@pytest.mark.fast
@pytest.mark.parametrize('given, sentence', [
    (['--set', 'lrr=1,2'], "there is no setting 'lrr' to sweep over; did you mean 'lr'"),
    (['--set', 'lr'], 'names no values'),
    (['--set', 'seed=1,2'], "'seed' is not swept"),
    (['--set', 'model_ema=maybe'], 'neither: give true or false'),
    (['--set', 'decay_rate=0.1,0.2'], '--decay-rate is for --sched step or multistep'),
])
def test_what_is_wrong_is_told_before_the_first_training(images, given, sentence):
    with pytest.raises(InputError, match=sentence):
        sweep.parse_args([*given, '--', *common(images)])


def test_the_test_split_never_chooses(images, tmp_path):
    with pytest.raises(InputError, match='has no validation split here'):
        sweep.parse_args(['--', '--dataset', 'cifar10_lt', '--data-dir', str(tmp_path), '--model', 'resnet20'])
    (tmp_path / 'test.json').write_text(json.dumps({'weights': {'file': 'last.pth.tar', 'chosen_by': None}}))
    with pytest.raises(InputError, match='the test split is not for choosing'):
        read_result(tmp_path)


GOOD_RESULT = '{"top1": 50.0, "weights": {"chosen_by": "validation top1", "epoch": 2}}'
GOOD_LOG = '{"epoch": 0, "eval_top1": 3}\n{"epoch": 1, "eval_top1": 4}\n'


def test_the_value_of_the_best_epoch_is_read(tmp_path):
    (tmp_path / 'test.json').write_text(GOOD_RESULT)
    (tmp_path / 'log.jsonl').write_text(GOOD_LOG)
    assert read_result(tmp_path) == TrialResult('top1', 4.0, 50.0)


@pytest.mark.parametrize(('result', 'log'), [
    (GOOD_RESULT[:20], GOOD_LOG), ('\udcff', GOOD_LOG), ('[1]', GOOD_LOG), ('{"weights": "x"}', GOOD_LOG),
    (GOOD_RESULT, GOOD_LOG[:-4]), (GOOD_RESULT, '\udcff\n'), (GOOD_RESULT, None), (GOOD_RESULT, '[0]\n'),
    (GOOD_RESULT.replace('2', '-2'), GOOD_LOG), (GOOD_RESULT.replace('2', '[2]'), GOOD_LOG),
    (GOOD_RESULT.replace('n top1', 'n none'), GOOD_LOG), (GOOD_RESULT.replace('"top1"', '"top"'), GOOD_LOG),
    (GOOD_RESULT, GOOD_LOG.replace('4', 'null'))])
def test_damaged_files_of_a_training_are_one_sentence(tmp_path, result, log):
    (tmp_path / 'test.json').write_text(result, errors='surrogateescape')
    if log is not None:
        (tmp_path / 'log.jsonl').write_text(log, errors='surrogateescape')
    with pytest.raises(InputError, match='remove the folder .*, and the same command trains it again'):
        read_result(tmp_path)


@pytest.mark.parametrize('content', ['{', '\udcff', '"x"', '{"train": 3}', '{"train": ["a"]}'])
def test_a_folder_of_another_or_a_damaged_sweep_is_refused(tmp_path, content):
    (tmp_path / 'sweep.json').write_text(content, errors='surrogateescape')
    with pytest.raises(InputError, match='give another --output'):
        claim_folder(tmp_path, ['b'])


def test_a_sweep_without_end_is_refused_at_once():
    values = [str(number) for number in range(1, 101)]
    with pytest.raises(InputError, match='make 10,000,000,000 trainings, and a sweep has 1,000 at most'):
        trials(dict.fromkeys(['lr', 'momentum', 'weight_decay', 'min_lr', 'warmup_lr'], values), [42])


def test_an_output_that_is_a_file_and_open_quotes_are_one_sentence(images, tmp_path):
    place = tmp_path / 'file'
    place.write_text('train: "--lr \'0.1"\n')
    with pytest.raises(InputError, match='no command line .No closing quotation.: correct the quotes'):
        sweep.parse_args([str(place)])
    with pytest.raises(InputError, match='cannot be made .*: choose another one'):
        sweep.main(['--output', str(place), '--', *common(images)])

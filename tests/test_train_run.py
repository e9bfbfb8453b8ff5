"""Whole runs of train.py on generated images: interruption, several processes, bad input."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from forks import run_ranks
from PIL import Image

import nbn_timm.cli.train as train
import nbn_timm.cli.validate as validate
import nbn_timm.models.create
import nbn_timm.training.run as run
from nbn_timm.errors import InputError, run_cli
from nbn_timm.training.run_checkpoint import BEST, LAST

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
MODEL = ['--model', 'resnet20_nbn', '--img-size', '8', '--device', 'cpu', '--workers', '0']


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """20 training images of classes with 10, 6, 3 and 1, and 8 others, each image of its class's colour and noise."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, counts in (('train', (10, 6, 3, 1)), ('val', (1, 1, 1, 1)), ('test', (1, 1, 1, 1))):
        lines = []
        for label, count in enumerate(counts):
            for index in range(count):
                pixels = rng.integers(0, 80, (8, 8, 3)) + 50 * label
                name = f'{split}_{label}_{index}.png'
                Image.fromarray(pixels.astype(np.uint8)).save(root / name)
                lines.append(f'{name} {label}\n')
        (root / f'{split}.txt').write_text(''.join(lines))
    return root


def data_flags(root: Path, *splits: str) -> list[str]:
    lists = [f'--{split}-list={root}/{split}.txt' for split in splits or ('train', 'val', 'test')]
    return ['--dataset', 'list', '--data-dir', str(root), *lists]


def weights(folder: Path, name: str = LAST) -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)['state_dict']


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def assert_same(first, second) -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def test_a_killed_run_that_resumes_ends_where_the_uninterrupted_one_does(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '--workers', '1', '--epochs', '4', '-b', '4', '--log-interval', '1',
             '--model-ema', '--model-ema-decay', '0.9', '--mixup', '0.5', '--cutmix', '0.5', '--smoothing', '0.1',
             '--drop', '0.2', '--reprob', '0.3', '--loss', 'balanced_softmax', '--sampler', 'class_balanced',
             '--warmup-epochs', '1', '--sched-on-updates', '--clip-grad', '5', '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])

    command = [sys.executable, '-u', str(ROOT / 'train.py'), *flags, '--experiment', 'killed']
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('epoch 3/4  step 2/5'):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / 'killed' / LAST)['epoch'] == 1
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])

    for name in (LAST, BEST):
        whole, killed = (torch.load(tmp_path / run / name, weights_only=True) for run in ('whole', 'killed'))
        assert whole['epoch'] == killed['epoch']
        for key in ('state_dict', 'state_dict_ema', 'optimizer', 'best', 'metric'):
            assert_same(whole[key], killed[key])
    whole_rows, killed_rows = rows(tmp_path / 'whole'), rows(tmp_path / 'killed')
    assert [row['epoch'] for row in killed_rows] == [0, 1, 2, 3]
    for one, other in zip(whole_rows, killed_rows, strict=True):
        for key in one.keys() - {'time', 'train_images_per_second'}:
            assert one[key] == other[key], key
    assert (tmp_path / 'whole' / 'test.json').read_text() == (tmp_path / 'killed' / 'test.json').read_text()


@pytest.mark.parametrize('method', [['--remix', '1'], ['--cmo', '1', '--cmo-skip-first', '1', '--cmo-skip-last', '0']])
def test_a_mixed_run_resumes_in_the_middle_as_if_nothing_had_happened(images, tmp_path, method, monkeypatch):
    flags = [*data_flags(images, 'train', 'test'), *MODEL, '--workers', '1', '--epochs', '3', '-b', '4',
             '--global-batch-size', '8', '--smoothing', '0.1', '--loss', 'balanced_softmax', '--amp', '--amp-dtype',
             'bfloat16', '--channels-last', '--reprob', '0.3', '--cutout', '3', '--mixup-off-epoch', '3', *method,
             '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])
    train_one_epoch = run.train_one_epoch

    def killed(task, loader, *args):
        if args[4] == 2:  # in the middle of the third epoch
            loader = [batch for batch, _ in zip(loader, range(3), strict=False)]
            train_one_epoch(task, loader, *args)
            raise KeyboardInterrupt
        return train_one_epoch(task, loader, *args)

    monkeypatch.setattr(run, 'train_one_epoch', killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, '--experiment', 'killed'])
    monkeypatch.undo()
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    whole, killed = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ('whole', 'killed'))
    for key in ('epoch', 'state_dict', 'optimizer'):
        assert_same(whole[key], killed[key])
    losses = [[row['train_loss'] for row in rows(tmp_path / run)] for run in ('whole', 'killed')]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def train_and_keep_the_state(flags: list[str]) -> None:
    """A rank of `run_two_processes`, which leaves what it ends with beside the checkpoints."""
    original = run.report_run

    def report(plan, task, *rest):
        torch.save(task.get_checkpoint_state(), plan.folder / f'rank{plan.world.rank}.pt')
        original(plan, task, *rest)

    run.report_run = report
    train.main(flags)


def run_two_processes(flags: list[str]) -> None:
    run_ranks(train_and_keep_the_state, flags)


@pytest.mark.fast
def test_two_processes_share_everything_batch_norm_included(images, tmp_path):
    flags = [*data_flags(images, 'train', 'test'), *MODEL, '--epochs', '2', '-b', '4', '--output', str(tmp_path),
             '--cmo', '1', '--cmo-skip-first', '0', '--cmo-skip-last', '0']
    run_two_processes([*flags, '--experiment', 'two'])
    folder = tmp_path / 'two'
    first, second = (torch.load(folder / f'rank{rank}.pt')['state_dict'] for rank in (0, 1))
    assert_same(first, second)
    assert_same(first, weights(folder))
    assert len(rows(folder)) == 2
    # A finished run that resumes has nothing left to do but the evaluation: here by one process.
    train.main([*flags, '--experiment', 'one', '--resume', str(folder / LAST)])
    assert (tmp_path / 'one' / 'test.json').read_text() == (folder / 'test.json').read_text()


def test_processes_and_accumulation_are_one_large_batch(images, tmp_path):
    """Without BatchNorm and augmentation, 8 images are 8 images however they are divided; 20 leave a group of 4."""
    flags = [*data_flags(images, 'train', 'test'), '--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size',
             '32', '--device', 'cpu', '--workers', '0', '--no-aug', '--global-batch-size', '8', '--epochs', '2',
             '--lr', '0.05', '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'one'])
    train.main([*flags, '--experiment', 'halves', '-b', '4'])
    run_two_processes([*flags, '--experiment', 'two'])
    expected = weights(tmp_path / 'one')
    for other in ('halves', 'two'):
        for key, value in weights(tmp_path / other).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5, msg=f'{other}: {key}')
    losses = [[row['train_loss'] for row in rows(tmp_path / run)] for run in ('one', 'halves', 'two')]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize('batch, updates', [(('-b', '6'), 3), (('-b', '3', '--grad-accum-steps', '2'), 3),
                                            (('-b', '4', '--grad-accum-steps', '3'), 1)])
def test_a_smaller_last_update_is_left_out_if_asked(batch, updates, images, tmp_path, monkeypatch):
    """Of 20 images; the released codes of Kang et al., BALMS, LADE and Bag of Tricks do so."""
    taken = []
    original = run.train_one_epoch

    def watched(*args, **kwargs):
        result = original(*args, **kwargs)
        taken.append((args[4].updates_per_epoch, result.images))
        return result
    monkeypatch.setattr(run, 'train_one_epoch', watched)
    train.main([*data_flags(images, 'train', 'test'), *MODEL, *batch, '--drop-last', '--epochs', '1', '--output',
                str(tmp_path)])
    size = math.prod(int(word) for word in batch if word.isdigit())
    assert taken == [(updates, updates * size)]


def test_a_run_leaves_its_files_and_says_where(images, tmp_path, capsys):
    flags = [*data_flags(images), *MODEL, '--epochs', '2', '--output', str(tmp_path)]
    train.main(flags)
    folder = tmp_path / 'resnet20_nbn-list-s42'
    printed = capsys.readouterr().out
    assert str(folder) in printed
    assert 'chosen by validation top1' in printed
    assert {path.name for path in folder.iterdir()} == {
        '.lock', 'args.yaml', 'summary.csv', 'log.jsonl', LAST, 'last-1.pth.tar', BEST, 'test.json', 'report.html',
        'test_per_class.csv', 'test_predictions.npz'}
    columns = (folder / 'summary.csv').read_text().splitlines()[0].split(',')
    assert {f'eval_{name}' for name in ('top1', 'top5', 'many', 'medium', 'few', 'mean_class', 'loss')} < set(columns)
    checkpoint = torch.load(folder / LAST, weights_only=True)
    assert checkpoint['class_counts']['counts'] == [10, 6, 3, 1]
    assert (checkpoint['arch'], checkpoint['epoch'], checkpoint['version']) == ('resnet20_nbn', 1, 2)

    with pytest.raises(train.InputError, match='--resume auto'):
        train.main(flags)
    before = torch.load(folder / LAST, weights_only=True)['state_dict']
    train.main(['--config', str(folder / 'args.yaml'), '--experiment', 'again'])  # args.yaml is a config
    assert_same(before, weights(tmp_path / 'again'))


def test_best_is_the_best_validation_epoch_and_survives_a_resume(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '-b', '4', '--lr', '0.05', '--output', str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', '3', '--sched', 'constant', '--eval-metric', 'loss'])
    train.main([*flags, '--epochs', '5', '--sched', 'constant', '--eval-metric', 'loss', '--resume', 'auto'])
    losses = [row['eval_loss'] for row in rows(tmp_path / 'run')]
    best = torch.load(tmp_path / 'run' / BEST, weights_only=True)
    assert len(losses) == 5
    assert best['epoch'] == int(np.argmin(losses))
    assert best['best'] == {'epoch': int(np.argmin(losses)), 'metric': min(losses)}
    assert torch.load(tmp_path / 'run' / LAST, weights_only=True)['best'] == best['best']


def test_without_a_validation_split_the_last_epoch_is_reported_and_said_so(images, tmp_path, capsys):
    train.main([*data_flags(images, 'train', 'test'), *MODEL, '--epochs', '2', '--watch-test',
                '--output', str(tmp_path), '--experiment', 'run'])
    printed = capsys.readouterr().out
    assert 'has no validation split' in printed
    assert 'since none was chosen by validation' in printed
    assert not (tmp_path / 'run' / BEST).exists()
    assert torch.load(tmp_path / 'run' / LAST)['best'] is None
    result = json.loads((tmp_path / 'run' / 'test.json').read_text())
    assert rows(tmp_path / 'run')[-1]['eval_top1'] == result['top1']  # the watched last epoch is what is reported
    for split in ('many', 'medium'):
        assert result[split] is None


def test_a_compiled_run_saves_plain_keys_and_resumes(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '--model-ema', '--output', str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', '1', '--torchcompile', 'eager'])
    plain = nbn_timm.models.create.create_model('resnet20_nbn', 4).state_dict()
    checkpoint = torch.load(tmp_path / 'run' / LAST, weights_only=True)
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys() == plain.keys()
    train.main([*flags, '--epochs', '2', '--resume', 'auto'])
    assert len(rows(tmp_path / 'run')) == 2


def test_a_run_keeps_its_folder_to_itself(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '--output', str(tmp_path), '--epochs', '1']
    train.main([*flags, '--experiment', 'one'])
    train.main([*flags, '--experiment', 'two', '--seed', '7'])
    before = (tmp_path / 'two' / LAST).read_bytes()
    with pytest.raises(InputError, match="already holds a run .* would overwrite"):
        train.main([*flags, '--experiment', 'two', '--resume', str(tmp_path / 'one' / LAST)])
    assert (tmp_path / 'two' / LAST).read_bytes() == before
    with FileLock(tmp_path / 'one' / '.lock'), pytest.raises(InputError, match='another run is at work'):
        train.main([*flags, '--experiment', 'one', '--resume', 'auto'])


def test_what_a_killed_save_left_behind_is_cleared_away(images, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / f'.{LAST}.abc.tmp').write_bytes(b'half a checkpoint')
    train.main([*data_flags(images), *MODEL, '--output', str(tmp_path), '--experiment', 'run', '--epochs', '1'])
    assert not list(folder.glob('.*.tmp'))


def test_a_run_resumed_into_another_folder_forgets_the_best_of_the_old_one(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '--output', str(tmp_path)]
    train.main([*flags, '--epochs', '1', '--experiment', 'old'])
    train.main([*flags, '--epochs', '2', '--experiment', 'new', '--resume', str(tmp_path / 'old' / LAST)])
    assert torch.load(tmp_path / 'new' / BEST, weights_only=True)['epoch'] == 1
    assert json.loads((tmp_path / 'new' / 'test.json').read_text())['checkpoint'].startswith('epoch 2 of 2')


def test_the_best_is_remembered_however_the_checkpoint_is_spelled(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '--output', str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', '1'])
    last = tmp_path / 'run' / LAST
    state = torch.load(last, weights_only=True)
    state['best']['metric'] = 1000.0  # no epoch can beat it
    torch.save(state, last)
    train.main([*flags, '--epochs', '2', '--resume', str(tmp_path / 'run' / '..' / 'run' / LAST)])
    assert torch.load(last, weights_only=True)['best'] == {'metric': 1000.0, 'epoch': 0}


def test_an_interrupted_command_says_so_in_one_line(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_cli(interrupted, 'nbn-train') == 130
    assert capsys.readouterr().err == 'nbn-train: interrupted\n'


def test_nbn_added_to_a_timm_model_is_trained_resumed_and_validated(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '--model', 'test_resnet', '--add-nbn', '--img-size', '64',
             '--output', str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', '1'])
    train.main([*flags, '--epochs', '2', '--resume', 'auto'])
    assert [key for key in weights(tmp_path / 'run') if key.endswith('scale.alpha')]
    validate.main(['--checkpoint', str(tmp_path / 'run' / LAST), '--device', 'cpu', '--workers', '0',
                   '--results-file', str(tmp_path / 'result.json')])
    first, second = (json.loads(path.read_text()) for path in (
        tmp_path / 'run' / 'test.json', tmp_path / 'result.json'))
    assert first['per_class'] == second['per_class']


def test_weights_to_start_from_and_no_learning_change_nothing(images, tmp_path):
    flags = [*data_flags(images), *MODEL, '--output', str(tmp_path)]
    train.main([*flags, '--epochs', '1', '--experiment', 'first'])
    train.main([*flags, '--epochs', '1', '--experiment', 'second', '--seed', '7', '--lr', '0', '--initial-checkpoint',
                str(tmp_path / 'first' / LAST)])
    first, second = weights(tmp_path / 'first'), weights(tmp_path / 'second')
    for key in first:
        if 'running' not in key and 'tracked' not in key:
            assert torch.equal(first[key], second[key]), key


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(images, tmp_path, capsys, monkeypatch):
    resource = pytest.importorskip('resource')
    flags = [*data_flags(images), *MODEL, '--output', str(tmp_path), '--experiment', 'run']
    train.main([*flags, '--epochs', '1'])
    before = (tmp_path / 'run' / LAST).read_bytes()
    monkeypatch.setattr(sys, 'argv', ['nbn-train', *flags, '--epochs', '2', '--resume', 'auto'])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # larger files are refused as by a full disk
    try:
        assert train.console() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.startswith('nbn-train: error: cannot write')
    assert error.count('\n') == 1
    assert 'intact' in error
    assert (tmp_path / 'run' / LAST).read_bytes() == before
    assert not list((tmp_path / 'run').glob('.*.tmp'))


@pytest.fixture
def broken(images, tmp_path) -> Path:
    """The images once more, to be broken."""
    for path in images.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line)


def an_empty_list(root):
    (root / 'train.txt').write_text('')


def a_label_out_of_range(root):
    append(root / 'train.txt', 'train_0_0.png 4\n')


def a_negative_label(root):
    append(root / 'train.txt', 'train_0_0.png -1\n')


def a_missing_image(root):
    (root / 'train_0_3.png').unlink()


def a_truncated_jpeg(root):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / 'train_0_3.png', format='JPEG')
    (root / 'train_0_3.png').write_bytes((root / 'train_0_3.png').read_bytes()[:1500])


@pytest.mark.parametrize('damage, message', [
    (an_empty_list, 'train.txt'),
    (a_label_out_of_range, 'label'),
    (a_negative_label, 'label'),
    (a_missing_image, 'train_0_3.png'),
    (a_truncated_jpeg, 'train_0_3.png'),
])
@pytest.mark.parametrize('workers', ['0', '1'])
def test_broken_data_is_one_sentence(broken, damage, message, workers, capsys, monkeypatch):
    damage(broken)
    monkeypatch.setattr(sys, 'argv', [
        'nbn-train', *data_flags(broken), *MODEL, '--workers', workers, '--num-classes', '4', '--epochs', '1',
        '--output', str(broken / 'output')])
    assert train.console() == 1
    error = capsys.readouterr().err
    assert error.startswith('nbn-train: error: ')
    assert error.count('\n') == 1
    assert message in error


@pytest.mark.parametrize('flags, message', [
    (['--model', 'resnet20_nbm'], "did you mean 'resnet20_nbn"),
    (['--sync-bn'], '--sync-bn needs GPUs'),
    (['--eval-metric', 'many'], 'no class of'),
    (['--mixup', '1', '-b', '1'], '--mixup'),
    (['--remix', '1', '--loss', 'hcm'], "loss 'hcm' takes labels and no mixed targets"),
    (['--cmo', '1'], '--cmo would mix in none of the 1 epochs'),
    (['--force-color-jitter', '--aa', 'cifar10'], '--force-color-jitter'),
    (['--initial-checkpoint', 'nothing.pth'], 'nothing.pth'),
    (['--resume', 'nothing.pth'], 'nothing.pth'),
    (['--lr', '1e30', '--epochs', '3'], 'epoch'),
    (['--config', 'nothing.yaml'], 'nothing.yaml'),
    (['--device', 'gpu'], '--device'),
])
def test_wrong_flags_are_one_sentence(images, tmp_path, flags, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [
        'nbn-train', *data_flags(images), *MODEL, '-b', '4', '--epochs', '1', '--output', str(tmp_path), *flags])
    assert train.console() == 1
    error = capsys.readouterr().err
    assert error.startswith('nbn-train: error: ')
    assert error.count('\n') == 1
    assert message in error


def test_the_command_itself_fails_without_a_traceback(tmp_path):
    config = tmp_path / 'typo.yaml'
    config.write_text('modle: resnet20_nbn\n')
    command = [sys.executable, str(ROOT / 'train.py'), '--config', str(config)]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr == f"nbn-train: error: config '{config}' has an unknown key 'modle'; did you mean 'model'?\n"

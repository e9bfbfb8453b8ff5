"""validate.py from the command line: its numbers, its processes, its sentences for bad input."""
import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forks import Ended, run_python
from pictures import write_test_list
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import train, validate
from nbn_timm.data import ClassCounts
from nbn_timm.datasets import benchmark_of
from nbn_timm.seals import SEAL

ROOT = Path(__file__).parents[1]
MODEL = 'resnet20_nbn'
# Six classes: two many, two medium, two few (strict thresholds 100 and 20).
COUNTS = ClassCounts((400, 150, 100, 20, 19, 3), ('ant', 'bee', 'cat', 'dog', 'eel', 'fox'), 'the training of a test')
INPUT = ('--img-size', '16', '--workers', '0', '--batch-size', '8', '--device', 'cpu')


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    """37 images in a test list, class counts, and a checkpoint as the training writes it."""
    folder = tmp_path_factory.mktemp('validate')
    write_test_list(folder, 37)
    (folder / 'counts.json').write_text(json.dumps({'counts': COUNTS.counts, 'names': COUNTS.names}))
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=6)
    for _ in range(20):
        model.train()(torch.randn(16, 3, 16, 16))  # statistics that are not those of initialisation
    model.fc.weight.data *= 50
    ema = {key: value * 0.5 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save(
        {'arch': MODEL, 'epoch': 3, 'state_dict': model.state_dict(), 'state_dict_ema': ema, 'version': 2,
         'class_counts': COUNTS.to_dict(),
         'args': {'model': MODEL, 'dataset': 'list', 'data_dir': str(folder), 'test_list': str(folder / 'test.txt'),
                  'train_list': 'gone.txt', 'img_size': 16, 'model_kwargs': {}, 'lr': 0.1}},
        folder / 'last.pth.tar')
    torch.save(model.state_dict(), folder / 'bare.pth')
    return folder


def listed(work: Path, checkpoint='bare.pth', model=MODEL) -> list[str]:
    """The flags for a checkpoint that says nothing about itself."""
    return ['--model', model, '--checkpoint', str(work / checkpoint), '--dataset', 'list', '--data-dir', str(work),
            '--test-list', str(work / 'test.txt'), '--class-counts', str(work / 'counts.json'), *INPUT]


def result_of(arguments, tmp_path, name='result.json') -> dict:
    validate.main([*arguments, '--results-file', str(tmp_path / name)])
    return json.loads((tmp_path / name).read_text())


def fails(arguments, monkeypatch, capsys) -> str:
    """Run the console command, which must fail, and return its one sentence."""
    monkeypatch.setattr(sys, 'argv', ['nbn-validate', *map(str, arguments)])
    assert validate.console() == 1
    error = capsys.readouterr().err
    assert error.startswith('nbn-validate: error: ')
    assert error.count('\n') == 1 and 'Traceback' not in error
    return error


@pytest.mark.fast
def test_numbers_are_those_of_the_model(work, tmp_path, capsys):
    """Against a plain loop with its own preprocessing: the centre 16x16 of each 16x20 image."""
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    result = result_of([*listed(work), '--crop-pct', '1', '--mean', *map(str, mean), '--std', *map(str, std),
                        '--interpolation', 'bilinear', '--per-class-file', str(tmp_path / 'classes.csv')], tmp_path)
    model = timm.create_model(MODEL, num_classes=6)
    model.load_state_dict(torch.load(work / 'bare.pth', weights_only=True))
    model.eval()
    correct, losses, seen, told = np.zeros(6, int), [], np.zeros(6, int), np.zeros(6, int)
    for line in (work / 'test.txt').read_text().splitlines():
        name, label = line.split()
        image = Image.open(work / name).crop((0, 2, 16, 18))
        x = (np.asarray(image, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
        with torch.no_grad():
            logits = model(torch.from_numpy(x.transpose(2, 0, 1)[None])).double().log_softmax(1)[0]
        correct[int(label)] += int(logits.argmax()) == int(label)
        told[int(logits.argmax())] += 1
        seen[int(label)] += 1
        losses.append(-logits[int(label)].item())
    assert result['num_samples'] == 37
    assert result['per_class'] == {'correct': correct.tolist(), 'total': seen.tolist(), 'predicted': told.tolist()}
    assert result['loss'] == pytest.approx(np.mean(losses), abs=2e-5)
    assert result['many'] == pytest.approx(100 * correct[:2].sum() / seen[:2].sum(), abs=1e-6)
    assert result['medium'] == pytest.approx(100 * correct[2:4].sum() / seen[2:4].sum(), abs=1e-6)
    assert result['few'] == pytest.approx(100 * correct[4:].sum() / seen[4:].sum(), abs=1e-6)
    with open(tmp_path / 'classes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['name'] for row in rows] == list(COUNTS.names)
    assert [int(row['correct']) for row in rows] == correct.tolist()
    printed = capsys.readouterr().out
    assert f'{result["top1"]:.2f}' in printed and 'counts.json' in printed


def test_checkpoint_says_what_the_flags_leave_open(work, tmp_path, capsys):
    """Model, data, input size and class counts come from the checkpoint; its lost training list is not needed."""
    own = result_of(['--checkpoint', str(work / 'last.pth.tar'), '-j', '0', '-b', '8', '--device', 'cpu'], tmp_path)
    explicit = result_of(listed(work), tmp_path)
    assert own['input_size'] == [3, 16, 16]
    assert 'the training of a test' in own['class_counts']
    same = set(own) - {'weights', 'class_counts', SEAL}
    assert {key: own[key] for key in same} == {key: explicit[key] for key in same}
    assert '--use-ema' in capsys.readouterr().out


def test_flags_win_over_the_checkpoint(work, tmp_path):
    arguments = ['--checkpoint', str(work / 'last.pth.tar'), *INPUT, '--img-size', '24', '--many-shot', '300']
    result = result_of(arguments, tmp_path)
    assert result['input_size'] == [3, 24, 24]
    assert [result['splits'][name]['classes'] for name in ('many', 'medium', 'few')] == [1, 3, 2]


def test_averaged_weights_are_others(work, tmp_path):
    arguments = ['--checkpoint', str(work / 'last.pth.tar'), *INPUT]
    assert result_of([*arguments, '--use-ema'], tmp_path)['loss'] != result_of(arguments, tmp_path)['loss']


def test_folding_changes_nothing(work, tmp_path):
    plain, folded = result_of(listed(work), tmp_path), result_of([*listed(work), '--fuse'], tmp_path)
    assert folded['folded'] and folded['loss'] == pytest.approx(plain['loss'], abs=1e-5)
    assert folded['per_class'] == plain['per_class']


def test_bfloat16_and_channels_last(work, tmp_path):
    result = result_of([*listed(work), '--amp', '--amp-dtype', 'bfloat16', '--channels-last'], tmp_path)
    assert result['precision'] == 'bfloat16'
    assert result['loss'] == pytest.approx(result_of(listed(work), tmp_path)['loss'], rel=0.05)


def test_counts_from_the_dataset(work, tmp_path):
    """A training list with 30, 12 and 1 images of three classes, of which none is read."""
    train = tmp_path / 'train.txt'
    train.write_text(''.join(f'absent.png {label}\n' for label in [0] * 130 + [1] * 12 + [5]))
    arguments = ['--checkpoint', str(work / 'last.pth.tar'), *INPUT, '--train-list', str(train), '--counts-from',
                 'dataset']
    result = result_of(arguments, tmp_path)
    assert [result['splits'][name]['classes'] for name in ('many', 'medium', 'few')] == [1, 0, 5]
    assert result['medium'] is None
    assert 'train' in result['class_counts']


def test_counts_from_none(work, tmp_path, capsys):
    arguments = ['--checkpoint', str(work / 'last.pth.tar'), *INPUT, '--num-classes', '6', '--counts-from', 'none']
    result = result_of([*arguments, '--per-class-file', str(tmp_path / 'classes.csv')], tmp_path)
    assert result['many'] is None and result['splits'] is None and result['top1'] is not None
    assert 'n/a' in capsys.readouterr().out
    assert len((tmp_path / 'classes.csv').read_text().splitlines()) == 7


def test_config_gives_defaults(work, tmp_path):
    (tmp_path / 'eval.yaml').write_text(f'checkpoint: {work / "last.pth.tar"}\nfew-shot: 10\nimg-size: 24\n')
    result = result_of(['--config', str(tmp_path / 'eval.yaml'), *INPUT], tmp_path)
    assert result['splits']['few']['classes'] == 1
    assert result['input_size'] == [3, 16, 16]


def run_script(*arguments, processes=1) -> subprocess.CompletedProcess | Ended:
    if processes == 1:
        return run_python(ROOT / 'validate.py', *arguments)
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / 'validate.py'), *map(str, arguments)],
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)


def test_two_processes_write_the_same_file_as_one(work, tmp_path):
    written, kept, tables = [], [], []
    for processes in (1, 2):
        path, logits = tmp_path / f'{processes}.json', tmp_path / f'{processes}.npz'
        table = tmp_path / f'{processes}.csv'
        done = run_script('--checkpoint', work / 'last.pth.tar', *INPUT, '--results-file', path,
                          '--logits-file', logits, '--save-predictions', table, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('Mean class') == 1  # one process prints
        written.append(path.read_bytes())
        tables.append(table.read_bytes())
        with np.load(logits) as arrays:
            kept.append({name: arrays[name] for name in ('logits', 'labels')})
    assert written[0] == written[1] and tables[0] == tables[1]
    result = json.loads(written[0])
    assert result['num_samples'] == 37
    assert_rows_are_of_the_logits(tmp_path / '1.csv', work, **kept[0])
    for name, array in kept[0].items():
        assert np.array_equal(array, kept[1][name])
    logits, labels = torch.from_numpy(kept[0]['logits']), torch.from_numpy(kept[0]['labels'])
    listed = [int(line.split()[1]) for line in (work / 'test.txt').read_text().splitlines()]
    assert labels.tolist() == listed
    assert torch.nn.functional.cross_entropy(logits.double(), labels).item() == pytest.approx(result['loss'], rel=1e-6)


def assert_rows_are_of_the_logits(table, work, logits, labels) -> None:
    with open(table, newline='') as file:
        rows = list(csv.DictReader(file))
    listed = [line.split()[0] for line in (work / 'test.txt').read_text().splitlines()]
    assert [row['path'] for row in rows] == [str(work / name) for name in listed]
    assert [row['label'] for row in rows] == [COUNTS.names[label] for label in labels]
    order = np.argsort(-logits, axis=1, kind='stable')
    probabilities = np.exp(logits - logits.max(1, keepdims=True).astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    for index, row in enumerate(rows):
        assert [row[f'top{rank}'] for rank in range(1, 6)] == [COUNTS.names[label] for label in order[index, :5]]
        assert [float(row[f'probability{rank}']) for rank in range(1, 6)] == pytest.approx(
            probabilities[index, order[index, :5]], rel=1e-4)
        assert float(row['label_probability']) == pytest.approx(probabilities[index, labels[index]], rel=1e-4)


class Payload:
    """Unpickled without care, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_malicious_pickle_is_refused(work, tmp_path):
    touched = tmp_path / 'touched'
    torch.save({'state_dict': Payload(touched)}, tmp_path / 'evil.pth')
    done = run_script(*listed(work, checkpoint=tmp_path / 'evil.pth'))
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1 and 'system' in done.stderr and 'Traceback' not in done.stderr
    assert not touched.exists()
    # Not vacuous: the same file does act where code may run.
    torch.load(tmp_path / 'evil.pth', weights_only=False)
    assert touched.exists()


def test_malicious_pickle_that_is_not_torchs_is_refused(work, tmp_path, monkeypatch, capsys):
    (tmp_path / 'plain.pth').write_bytes(pickle.dumps({'state_dict': Payload(tmp_path / 'touched')}))
    assert 'plain.pth' in fails(listed(work, checkpoint=tmp_path / 'plain.pth'), monkeypatch, capsys)
    assert not (tmp_path / 'touched').exists()


def test_wrong_model_is_refused(work, monkeypatch, capsys):
    assert "'resnet20_nbn'" in fails(listed(work, model='resnet20_nnb'), monkeypatch, capsys)


@pytest.mark.parametrize('model', ['resnet32_nbn', 'resnet20'])
def test_checkpoint_of_another_architecture_is_refused(model, work, monkeypatch, capsys):
    sentence = fails(listed(work, model=model), monkeypatch, capsys)
    assert 'bare.pth' in sentence and model in sentence


def test_untrained_weights_are_refused(work, monkeypatch, capsys):
    arguments = listed(work)
    del arguments[2:4]
    assert '--checkpoint' in fails(arguments, monkeypatch, capsys)
    assert '--checkpoint' in fails([*listed(work), '--pretrained'], monkeypatch, capsys)


@pytest.mark.parametrize('source', [None, 'dataset', 'file', 'checkpoint'])
def test_missing_counts_are_an_error_that_says_how_to_give_them(source, work, monkeypatch, capsys):
    arguments = listed(work)
    del arguments[-len(INPUT) - 2:-len(INPUT)]
    assert '--class-counts' not in arguments
    sentence = fails([*arguments, *(['--counts-from', source] if source else [])], monkeypatch, capsys)
    assert '--class-counts' in sentence and '--train-list' in sentence


def test_counts_of_another_dataset_are_refused(work, tmp_path, monkeypatch, capsys):
    (tmp_path / 'seven.json').write_text('[7, 6, 5, 4, 3, 2, 1]')
    arguments = [*listed(work), '--class-counts', tmp_path / 'seven.json', '--num-classes', 6]
    assert '7 classes' in fails(arguments, monkeypatch, capsys)


def test_missing_split_is_refused(work, monkeypatch, capsys):
    arguments = ['--checkpoint', work / 'last.pth.tar', *INPUT, '--split', 'val']
    assert 'no val split' in fails(arguments, monkeypatch, capsys)
    assert '--test-list has no effect with --split val' in fails(
        [*arguments, '--test-list', work / 'test.txt'], monkeypatch, capsys)


def test_missing_averaged_weights_are_refused(work, monkeypatch, capsys):
    assert '--use-ema' in fails([*listed(work), '--use-ema'], monkeypatch, capsys)


@pytest.mark.parametrize('fault, workers', [('missing', 0), ('truncated', 0), ('truncated', 1)])
def test_bad_image_is_refused(fault, workers, work, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'bad.jpg'
    if fault == 'truncated':
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, quality=95)
        path.write_bytes(path.read_bytes()[:1500])
    (tmp_path / 'test.txt').write_text(f'{work / "images/0.png"} 0\n{path} 1\n')
    arguments = [*listed(work), '--test-list', tmp_path / 'test.txt', '--workers', workers]
    assert 'bad.jpg' in fails(arguments, monkeypatch, capsys)


@pytest.mark.parametrize('lines', ['images/0.png 6\n', ''])
def test_bad_list_is_refused(lines, work, tmp_path, monkeypatch, capsys):
    (tmp_path / 'bad.txt').write_text(lines)
    assert 'bad.txt' in fails([*listed(work), '--test-list', tmp_path / 'bad.txt'], monkeypatch, capsys)


@pytest.mark.parametrize('flags', [
    ('--num-classes', '0'), ('--batch-size', '0'), ('--workers', '-1'), ('--img-size', '0'), ('--crop-pct', '0'),
    ('--many-shot', '-1'), ('--few-shot', 'x'), ('--imbalance-factor', '0.5'), ('--imbalance-seed', '-1'),
    ('--input-size', '3', '0', '32'), ('--mean', 'nan'), ('--std', '0')])
def test_impossible_numbers_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        validate.main(['--checkpoint', 'x', *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f'{flags[0]}: ' in error and ' number ' in error


@pytest.mark.parametrize('flags, message', [
    (('--mean', '0.5', '0.5'), 'the mean has 2 numbers and the images have 3 channels'),
    (('--interpolation', 'bilinea'), "unknown interpolation 'bilinea'"),
    (('--input-size', '1', '16', '16'), 'conv1.weight'),
])
def test_impossible_input_formats_are_refused(flags, message, work, monkeypatch, capsys):
    arguments = [*listed(work), *flags]
    if '--input-size' in flags:
        first = arguments.index('--img-size')
        del arguments[first:first + 2]
    assert message in fails(arguments, monkeypatch, capsys)


def test_images_of_another_size_than_the_models_are_refused(work, tmp_path, monkeypatch, capsys):
    for size in (224, 32):
        model = timm.create_model('vit_tiny_patch16_224', img_size=size, depth=1, num_classes=6)
        torch.save(model.state_dict(), tmp_path / f'{size}.pth')
    large, small = ([*listed(work, tmp_path / f'{size}.pth', 'vit_tiny_patch16_224'), '--model-kwargs', 'depth=1']
                    for size in (224, 32))
    assert 'images of 224x224 only and these are 16x16' in fails(large, monkeypatch, capsys)
    assert 'pos_embed' in fails(small, monkeypatch, capsys)
    assert result_of([*small, 'img_size=32', '--img-size', '32'], tmp_path)['num_samples'] == 37


def test_diverged_weights_are_refused(work, tmp_path, monkeypatch, capsys):
    state = torch.load(work / 'bare.pth', weights_only=True)
    state['fc.weight'][0, 0] = float('nan')
    torch.save(state, tmp_path / 'nan.pth')
    assert "'fc.weight' is NaN or infinite" in fails(listed(work, checkpoint=tmp_path / 'nan.pth'), monkeypatch, capsys)
    state['fc.weight'].fill_(3e38)  # finite weights, whose logits overflow
    torch.save(state, tmp_path / 'nan.pth')
    assert '37 of 37 images' in fails(listed(work, checkpoint=tmp_path / 'nan.pth'), monkeypatch, capsys)


def test_unwritable_result_keeps_the_old_file(work, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('old')
    arguments = [*listed(work), '--results-file', tmp_path / 'file' / 'result.json']
    assert 'result.json' in fails(arguments, monkeypatch, capsys)
    assert (tmp_path / 'file').read_text() == 'old'


def test_training_and_validation_report_the_same_numbers(tmp_path):
    pytest.importorskip('sklearn')
    train.main(['--config', 'quickstart', '--epochs', '1', '--device', 'cpu', '--output', str(tmp_path),
                '--experiment', 'run'])
    reported = json.loads((tmp_path / 'run' / 'test.json').read_text())
    arguments = ['--checkpoint', str(tmp_path / 'run' / 'model_best.pth.tar'), '--device', 'cpu', '-j', '0']
    validated = result_of(arguments, tmp_path)
    same = ['loss', 'top1', 'top5', 'mean_class', 'many', 'medium', 'few', 'splits', 'per_class']
    assert {key: validated[key] for key in same} == {key: reported[key] for key in same}


@pytest.mark.parametrize('model, expected', [
    ('resnet50_nbn', 'imagenet_lt'), ('resnext50_nbn_lr_inat18', 'inat18'), ('resnet50_nbn.places_lt', 'places_lt'),
    ('resnet32', 'cifar100_lt'), ('resnet32_nbn_cifar10_lt', 'cifar10_lt'), ('resnet50.a1_in1k', None), (None, None),
    ('no_such_model', None),
])
def test_a_released_checkpoint_is_evaluated_on_the_benchmark_of_its_model(model, expected):
    assert benchmark_of(model) == expected

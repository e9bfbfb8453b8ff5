"""nbn-predict: its numbers against a plain loop and against validate.py, what it finds, its output, its sentences."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from forks import run_python
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.bars import on_terminal, with_bar_or_lines
from nbn_timm.cli import predict, validate
from nbn_timm.data import ClassCounts
from nbn_timm.data.pictures import find_images
from nbn_timm.errors import InputError, drop_stdout
from nbn_timm.evaluation.prediction import TopClasses
from nbn_timm.models import RoutedExperts
from nbn_timm.trained.record import NetworkRecord

ROOT = Path(__file__).parents[1]
# Six classes: two many, two medium, two few (strict thresholds 100 and 20).
COUNTS = ClassCounts((400, 150, 100, 20, 19, 3), ('ant', 'bee', 'cat', 'dog', 'eel', 'fox'), 'the training of a test')

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def trained(name: str, scale: float = 5.0) -> torch.nn.Module:
    """A model with six classes whose statistics are not those of initialisation and whose answers differ."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=6)
    for _ in range(5):
        model.train()(torch.randn(16, 3, 16, 16))
    for key, value in model.named_parameters():
        if key.startswith('fc.') and value.ndim == 2:
            value.data *= scale
    return model.eval()


def save(path: Path, arch: str, model: torch.nn.Module, folder: Path) -> None:
    torch.save(
        {'arch': arch, 'epoch': 3, 'state_dict': model.state_dict(), 'version': 2, 'class_counts': COUNTS.to_dict(),
         'args': {'model': arch, 'dataset': 'folder', 'data_dir': str(folder), 'model_kwargs': {},
                  'input_size': (3, 16, 16), 'mean': MEAN, 'std': STD, 'interpolation': 'bilinear', 'crop_pct': 1.0}},
        path)


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    """39 images in class folders, a checkpoint as the training writes it, one with routing, and bare weights."""
    folder = tmp_path_factory.mktemp('predict')
    rng = np.random.default_rng(0)
    for index in range(39):
        path = folder / 'test' / COUNTS.names[index % 6] / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)
    model = trained('resnet20_nbn')
    save(folder / 'last.pth.tar', 'resnet20_nbn', model, folder)
    torch.save(model.state_dict(), folder / 'bare.pth')
    routed = RoutedExperts(trained('resnet32_ride', scale=1.0), top_k=5)
    with torch.no_grad():  # so that about half of the images ask for more experts
        routed.router.decide.bias -= routed.train()(torch.randn(39, 3, 16, 16))[0].median()
    save(folder / 'routed.pth.tar', 'resnet32_ride', routed, folder)
    return folder


def flags(work: Path, checkpoint: str = 'last.pth.tar') -> list[str]:
    return ['--model', str(work / checkpoint), '--device', 'cpu', '--workers', '0']


def records(arguments, tmp_path) -> list[dict]:
    predict.main([*map(str, arguments), '--json', '--output', str(tmp_path / 'found.jsonl')])
    return [json.loads(line) for line in (tmp_path / 'found.jsonl').read_text().splitlines()]


def fails(arguments, monkeypatch, capsys) -> str:
    """Run the console command, which must fail, and return what it said on the standard error."""
    monkeypatch.setattr(sys, 'argv', ['nbn-predict', *map(str, arguments)])
    assert predict.console() == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith('nbn-predict: error: ') and 'Traceback' not in error
    return error


@pytest.mark.fast
def test_probabilities_are_those_of_the_model(work, tmp_path):
    """Against a plain loop with its own preprocessing: 16x20 images to 16 pixels is their centre."""
    found = records([*flags(work), '--topk', 6, work / 'test' / 'bee'], tmp_path)
    model = trained('resnet20_nbn')
    assert [Path(record['file']).name for record in found] == ['1.png', '7.png', '13.png', '19.png', '25.png', '31.png',
                                                               '37.png']
    for record in found:
        image = Image.open(record['file']).crop((0, 2, 16, 18))
        x = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
        with torch.no_grad():
            logits = model(torch.from_numpy(x.transpose(2, 0, 1)[None]).float())[0].double().numpy()
        expected = np.exp(logits - logits.max())
        expected /= expected.sum()
        order = np.argsort(-expected)
        assert [entry['class'] for entry in record['predictions']] == order.tolist()
        assert [entry['probability'] for entry in record['predictions']] == pytest.approx(expected[order], abs=1e-5)
        for entry in record['predictions']:
            assert entry['name'] == COUNTS.names[entry['class']]
            assert entry['train_images'] == COUNTS.counts[entry['class']]
            assert entry['shot'] == ('many', 'many', 'medium', 'medium', 'few', 'few')[entry['class']]
        assert sum(entry['probability'] for entry in record['predictions']) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize('checkpoint, given', [
    ('last.pth.tar', []),
    ('last.pth.tar', ['--batch-size', '8', '--workers', '2']),
    ('last.pth.tar', ['--fuse', '--logit-adjustment', '1.5', '--channels-last']),
    ('last.pth.tar', ['--amp', '--amp-dtype', 'bfloat16']),
    ('routed.pth.tar', []),
    ('routed.pth.tar', ['--all-experts', '--fuse']),
])
def test_top_1_is_validate_s(checkpoint, given, work, tmp_path):
    """Class by class, over a whole labelled folder."""
    found = records([*flags(work, checkpoint), *given, work / 'test'], tmp_path)
    hits = [sum(record['predictions'][0]['name'] == name for record in found
                if Path(record['file']).parent.name == name) for name in COUNTS.names]
    validate.main(['--checkpoint', str(work / checkpoint), '--device', 'cpu', '--workers', '0', *given,
                   '--results-file', str(tmp_path / 'result.json')])
    result = json.loads((tmp_path / 'result.json').read_text())
    assert len(found) == result['num_samples'] == 39
    assert hits == result['per_class']['correct']
    assert 0 < sum(hits) < 39


def test_flags_change_what_they_say(work, tmp_path):
    """The agreement above would hold for flags without effect, too."""
    def distribution(*arguments):
        return [{entry['class']: entry['probability'] for entry in record['predictions']} for record in records(
            [*arguments, '--topk', 6, work / 'test'], tmp_path)]

    plain, adjusted = distribution(*flags(work)), distribution(*flags(work), '--logit-adjustment', '1')
    assert distribution(*flags(work), '--amp', '--amp-dtype', 'bfloat16') != plain
    prior = np.array(COUNTS.counts) / sum(COUNTS.counts)
    for before, after in zip(plain, adjusted, strict=True):
        expected = np.array([before[label] / prior[label] for label in range(6)])
        assert [after[label] for label in range(6)] == pytest.approx(expected / expected.sum(), rel=1e-4)
    routed = flags(work, 'routed.pth.tar')
    assert distribution(*routed, '--all-experts') != distribution(*routed)


def test_text_for_people(work, capsys):
    image = work / 'test' / 'ant' / '0.png'
    predict.main([*flags(work), '-k', '2', str(image), str(image)])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 6 and lines[0] == lines[3] == str(image)
    label = next(label for label, name in enumerate(COUNTS.names) if f' {name} ' in lines[1])
    assert f'({COUNTS.counts[label]} training images, ' in lines[1]
    assert float(lines[1].split('%')[0]) >= float(lines[2].split('%')[0])
    assert 'the training of a test' in printed.err and '2 images' in printed.err


def test_unknown_names_and_counts(work, tmp_path, capsys):
    """Bare weights record neither: classes are numbers, frequencies n/a."""
    given = [*flags(work, 'bare.pth'), '--arch', 'resnet20_nbn', work / 'test' / 'ant']
    entry = records(given, tmp_path)[0]['predictions'][0]
    assert entry['name'] == str(entry['class']) and entry['train_images'] is None and entry['shot'] is None
    predict.main([*map(str, given), '--topk', '1'])
    assert capsys.readouterr().out.splitlines()[1].endswith('(training images n/a)')
    (tmp_path / 'counts.json').write_text(json.dumps({'counts': COUNTS.counts, 'names': COUNTS.names}))
    known = records([*given, '--class-counts', tmp_path / 'counts.json'], tmp_path)[0]['predictions'][0]
    assert known['name'] == COUNTS.names[entry['class']] and known['train_images'] == COUNTS.counts[entry['class']]


def test_topk_is_at_most_all(work, tmp_path):
    assert len(records([*flags(work), '--topk', 100, work / 'test' / 'fox' / '5.png'], tmp_path)[0]['predictions']) == 6


def test_equal_logits_are_ranked_by_label():
    """As validate.py ranks them."""
    top = TopClasses(COUNTS.names, COUNTS, topk=4)
    assert [found.label for found in top(torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0, 1.0]]))[0]] == [1, 3, 0, 2]


# Which files ------------------------------------------------------------------------------------------------------

def test_folders_are_searched_in_natural_order(tmp_path):
    for name in ('b/10.png', 'b/2.PNG', 'b/a/1.webp', 'a.jpeg', 'notes.txt', '.hidden.png', '.thumbs/x.png', 'b/x.csv'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path, tmp_path / 'notes.txt', tmp_path / 'gone.png'])
    assert [os.path.relpath(file, tmp_path) for file in found.files] == [
        'a.jpeg', 'b/2.PNG', 'b/10.png', 'b/a/1.webp', 'notes.txt', 'gone.png']
    assert found.notes == (f"left out of '{tmp_path}': 2 hidden files or folders (such as '.hidden.png'), "
                           "1 .txt file ('notes.txt'), 1 .csv file ('x.csv')",)


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / 'store').mkdir()
    (tmp_path / 'store' / 'x.png').touch()
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / 'link').symlink_to(tmp_path / 'store')
    (tmp_path / 'store' / 'back').symlink_to(tmp_path / 'pictures')
    assert [os.path.relpath(file, tmp_path) for file in find_images([tmp_path / 'pictures']).files] == [
        'pictures/link/x.png']


def test_skipped_files_are_counted(work, tmp_path, capsys):
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / 'copy.png').write_bytes((work / 'test' / 'ant' / '0.png').read_bytes())
    predict.main([*flags(work), str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == str(tmp_path / 'copy.png') and '1 .txt file ' in printed.err


@pytest.mark.parametrize('workers', ['0', '1'])
def test_unreadable_images_are_reported_and_the_others_predicted(workers, work, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    whole = (work / 'test' / 'ant' / '0.png').read_bytes()
    for name in ('a.png', 'c.png', 'd.png'):
        (folder / name).write_bytes(whole)
    (folder / 'b.png').write_bytes(whole[:200])
    text = tmp_path / 'text.doc'
    text.write_text('no image')
    arguments = [*flags(work), '--workers', workers, '-b', '2', folder, 'gone.jpg', text]
    error = fails([*arguments, '--json', '--output', tmp_path / 'found.jsonl'], monkeypatch, capsys)
    assert '3 of 6 images' in error
    for name in ('b.png', 'gone.jpg', 'text.doc'):
        assert sum(name in line for line in error.splitlines()) == 1
    found = [json.loads(line) for line in (tmp_path / 'found.jsonl').read_text().splitlines()]
    assert [Path(record['file']).name for record in found] == [
        'a.png', 'b.png', 'c.png', 'd.png', 'gone.jpg', 'text.doc']
    assert ['error' in record for record in found] == [False, True, False, False, True, True]
    alone = records([*flags(work), folder / 'a.png'], tmp_path)[0]['predictions']
    for record in (found[0], found[2], found[3]):  # beside a broken one in the batch, too
        assert [entry['class'] for entry in record['predictions']] == [entry['class'] for entry in alone]
    fails(arguments, monkeypatch, capsys)  # for people: the same without the broken ones


def test_text_leaves_unreadable_images_to_the_standard_error(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['nbn-predict', *flags(work), 'gone.jpg', str(work / 'test' / 'ant' / '0.png')])
    assert predict.console() == 1
    printed = capsys.readouterr()
    assert 'gone.jpg' not in printed.out and '0.png' in printed.out and 'gone.jpg' in printed.err


def test_pictures_are_turned_upright_as_in_training(work, tmp_path):
    image = Image.open(work / 'test' / 'ant' / '0.png').crop((0, 2, 16, 18))
    exif = image.getexif()
    exif[0x0112] = 6
    for name, picture in (('plain', image), ('turned', image.transpose(Image.Transpose.ROTATE_270))):
        picture.save(tmp_path / f'{name}.png')
    image.save(tmp_path / 'tagged.png', exif=exif)
    plain, tagged, turned = (records([*flags(work), tmp_path / f'{name}.png'], tmp_path)[0]['predictions']
                             for name in ('plain', 'tagged', 'turned'))
    assert tagged == turned != plain


def test_odd_names_are_printed(work, tmp_path):
    """A name that is no UTF-8, on a terminal that knows ASCII only."""
    path = os.path.join(os.fsencode(tmp_path), b'caf\xe9.png')
    with open(path, 'wb') as file:
        file.write((work / 'test' / 'ant' / '0.png').read_bytes())
    done = run_python('-m', 'nbn_timm.cli.predict', *flags(work), os.fsdecode(path),
                      environment={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 0, done.stderr
    assert r'caf\udce9.png' in done.stdout


# Output -----------------------------------------------------------------------------------------------------------

class Writer:
    """A stream with nothing but what printing takes, as notebooks and other programs put in the place of a file."""

    def __init__(self):
        self.text = ''

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_standard_output_that_is_no_file_takes_the_answers(work, monkeypatch):
    streams = Writer(), Writer()
    monkeypatch.setattr(sys, 'stdout', streams[0])
    monkeypatch.setattr(sys, 'stderr', streams[1])
    predict.main([*flags(work), '--csv', str(work / 'test' / 'ant' / '0.png')])
    assert streams[0].text.startswith('file,') and 'nbn-predict: 1 image in' in streams[1].text
    assert list(with_bar_or_lines([1, 2], 2, 'pictures')) == [1, 2] and not on_terminal()
    drop_stdout()  # as when nobody takes what is printed: nothing to do


def test_a_reader_that_stops_is_no_crash(work):
    command = [sys.executable, '-m', 'nbn_timm.cli.predict', *flags(work), '-b', '1', *[str(work / 'test')] * 40]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith('.png\n')
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=300) == 1
    assert 'Traceback' not in error and 'BrokenPipe' not in error


def test_output_is_whole_or_untouched(work, tmp_path, monkeypatch, capsys):
    output = tmp_path / 'found.txt'
    output.write_text('old')
    state = torch.load(work / 'bare.pth', weights_only=True)
    state['fc.weight'][0, 0] = float('nan')
    torch.save(state, tmp_path / 'nan.pth')
    arguments = ['--model', tmp_path / 'nan.pth', '--arch', 'resnet20_nbn', '--device', 'cpu', work / 'test']
    assert 'NaN' in fails([*arguments, '--output', output], monkeypatch, capsys)
    assert output.read_text() == 'old' and len(list(tmp_path.iterdir())) == 2
    assert 'found.txt' in fails([*flags(work), '--output', output / 'below', work / 'test'], monkeypatch, capsys)
    predict.main([*flags(work), '--output', str(output), str(work / 'test' / 'ant' / '0.png')])
    assert output.read_text().startswith(str(work)) and not capsys.readouterr().out


# What is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, message', [
    (['{work}/test'], 'no --model'),
    (['--model', '{work}/last.pth.tar', '{work}/gone.png'], "'{work}/gone.png'"),
    (['--model', '{work}/last.pth.tar', '{work}/empty'], 'no image in'),
    (['--model', '{work}/gone.pth', '{work}/test'], 'gone.pth'),
    (['--model', 'resnet20_nnb', '{work}/test'], 'resnet20_nnb'),
    (['--model', '{work}/last.pth.tar', '--all-experts', '{work}/test'], '--all-experts'),
    (['--model', '{work}/last.pth.tar', '--use-ema', '{work}/test'], '--use-ema'),
    (['--model', '{work}/last.pth.tar', '--device', 'cup', '{work}/test'], 'cup'),
    (['--model', '{work}/bare.pth', '--arch', 'resnet20_nbn', '--logit-adjustment', '1', '{work}/test'],
     '--class-counts'),
])
def test_bad_input_is_one_sentence(arguments, message, work, monkeypatch, capsys):
    (work / 'empty').mkdir(exist_ok=True)
    error = fails([argument.format(work=work) for argument in arguments], monkeypatch, capsys)
    assert error.count('\n') == 1 and message.format(work=work) in error


def test_counts_of_another_number_of_classes_are_refused():
    with pytest.raises(InputError, match='6 classes'):
        TopClasses(('a', 'b'), COUNTS)


@pytest.mark.parametrize('given', [('--topk', '0'), ('--batch-size', '0'), ('--logit-adjustment', '-1')])
def test_impossible_numbers_are_usage_errors(given, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(['--model', 'x', *given, 'y.png'])
    assert caught.value.code == 2 and given[0] in capsys.readouterr().err


# Names of classes -------------------------------------------------------------------------------------------------

def named(name, num_classes, counts=None, label_names=None, settings=None):
    model = SimpleNamespace(num_classes=num_classes)
    return predict.class_names(SimpleNamespace(
        name=name, model=model, classes=counts, label_names=tuple(label_names or ()),
        record=NetworkRecord(settings or {})))


def numbered(size: int) -> ClassCounts:
    return ClassCounts((1,) * size, tuple(map(str, range(size))), 'a list file')


@pytest.mark.fast
def test_names_of_classes():
    assert named('resnet20', 6, COUNTS) == COUNTS.names
    assert named('resnet20', 6, numbered(6)) == ('0', '1', '2', '3', '4', '5')
    assert named('resnet20', 2, None, ['yes', 'no']) == ('yes', 'no')
    assert named('resnet20', 3, None, ['yes', 'no']) == ('0', '1', '2')


def test_names_of_imagenet_are_timms():
    """For weights of ImageNet, and never for a thousand classes of one's own."""
    names = named('resnet18.a1_in1k', 1000)
    assert len(names) == 1000 and names[0].startswith('tench') and 'goldfish' in names[1]
    assert named('resnet50_nbn', 1000, numbered(1000), settings={'dataset': 'imagenet_lt'}) == names
    assert named('resnet50_nbn.imagenet_lt', 1000, numbered(1000)) == names
    assert named('resnet18.a1_in1k', 1000, numbered(1000), settings={'dataset': 'list'})[0] == '0'
    assert named('resnet18', 1000)[0] == '0'
    assert named('resnet18.a1_in1k', 10)[0] == '0'

"""Answers of nbn-predict beyond the likeliest classes: calibrated, as a table, 'not sure', and of a watched folder."""
import csv
import importlib.util
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
import nbn_timm.cli.train as train
from nbn_timm.cli import demo, predict, validate
from nbn_timm.cli.answer_forms import form_of
from nbn_timm.cli.demo import DemoSettings
from nbn_timm.data import ClassCounts
from nbn_timm.data.watching import FolderWatch
from nbn_timm.errors import InputError
from nbn_timm.evaluation.prediction import PredictedClass
from nbn_timm.evaluation.temperature import FittedTemperature, calibrate, fit_temperature
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training.run_checkpoint import BEST

COUNTS = ClassCounts((400, 20, 3), ('ant', 'bee', 'cat'), 'the training of a test')


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    """Folders of pictures whose colour nearly tells their class, and a run of four epochs on them."""
    folder = tmp_path_factory.mktemp('answers')
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('val', 20), ('test', 4)):
        for label, name in enumerate(COUNTS.names):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 90, (8, 8, 3)) + 55 * label + rng.integers(0, 60)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f'{index}.png')
    train.main(['--dataset', 'folder', '--data-dir', str(folder), '--model', 'resnet20_nbn', '--img-size', '8',
                '--device', 'cpu', '--workers', '0', '-b', '12', '--epochs', '4', '--lr', '0.05', '--output',
                str(folder), '--experiment', 'run'])
    return folder


def flags(work: Path) -> list[str]:
    return ['--model', str(work / 'run' / BEST), '--device', 'cpu', '--workers', '0']


def answers(work, tmp_path, *more) -> list[dict]:
    predict.main([*flags(work), '--json', '--output', str(tmp_path / 'found.jsonl'), *map(str, more)])
    return [json.loads(line) for line in (tmp_path / 'found.jsonl').read_text().splitlines()]


# Temperature -------------------------------------------------------------------------------------------------------

@pytest.mark.fast
@pytest.mark.parametrize('true', [0.4, 1.0, 3.0])
def test_the_temperature_is_that_of_the_labels(true):
    """Labels drawn from softmax(z / T) have T, up to the noise of 40,000 draws; and no neighbour is better."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40_000, 5, generator=generator)
    labels = torch.multinomial((logits / true).softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(true, rel=0.03)
    best = F.cross_entropy(logits.double() / found, labels)
    assert all(F.cross_entropy(logits.double() / (found * factor), labels) >= best for factor in (0.99, 1.01))


@pytest.mark.fast
def test_where_every_image_is_right_there_is_no_temperature():
    assert fit_temperature(torch.eye(3) * 5, torch.arange(3)) is None
    assert fit_temperature(torch.zeros(3, 3), torch.arange(3)) is None
    assert calibrate(torch.eye(3), torch.arange(3), 'val') is None


@pytest.mark.fast
def test_a_record_keeps_the_temperature():
    found = FittedTemperature(1.5, 'val', 60, 0.5, 0.6)
    record = NetworkRecord(calibration=found)
    assert NetworkRecord.from_dict(json.loads(json.dumps(record.to_dict())), 'a test').calibration == found
    for damaged in (None, 3, {}, {'temperature': -1}, {'temperature': 'hot'}, {'temperature': 1.5},
                    {**found.to_dict(), 'images': '60'}, {**found.to_dict(), 'split': 3},
                    {**found.to_dict(), 'nll': None}, {**found.to_dict(), 'use_ema': 'no'}):
        assert FittedTemperature.from_dict(damaged) is None


def test_a_training_calibrates_on_its_validation_split(work, tmp_path, capsys):
    """The kept temperature is that of the validation logits, which another evaluation writes."""
    kept = torch.load(work / 'run' / BEST, weights_only=True)['calibration']
    assert json.loads((work / 'run' / 'test.json').read_text())['calibration'] == kept
    assert kept['split'] == 'val' and kept['images'] == 60 and kept['nll'] < kept['nll_before']
    copy = tmp_path / 'copy.pth.tar'
    state = torch.load(work / 'run' / BEST, weights_only=True)
    state.pop('calibration')
    torch.save(state, copy)
    validate.main(['--checkpoint', str(copy), '--split', 'val', '--logits-file', str(tmp_path / 'logits.npz'),
                   '--fit-temperature', '--device', 'cpu', '--workers', '0'])
    written = np.load(tmp_path / 'logits.npz')
    expected = fit_temperature(torch.from_numpy(written['logits']), torch.from_numpy(written['labels']))
    again = torch.load(copy, weights_only=True)
    assert again['calibration']['temperature'] == pytest.approx(expected, abs=1e-5) == kept['temperature']
    assert all(torch.equal(value, again['state_dict'][key]) for key, value in state['state_dict'].items())
    assert 'fitted on the 60 images of the validation split' in capsys.readouterr().out


def test_predictions_are_divided_by_it(work, tmp_path, capsys):
    kept = torch.load(work / 'run' / BEST, weights_only=True)['calibration']['temperature']
    one = work / 'test' / 'bee' / '0.png'
    calibrated, plain, cold = (answers(work, tmp_path, one, *more)[0]['predictions']
                               for more in ([], ['--temperature', '1'], ['--temperature', '0.5']))
    assert f'temperature {kept:.3f}, fitted on 60 images of the validation split' in capsys.readouterr().err
    order = [found['class'] for found in plain]
    assert order == [found['class'] for found in calibrated] == [found['class'] for found in cold]
    logits = np.log([found['probability'] for found in plain])
    for found, temperature in ((calibrated, kept), (cold, 0.5)):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        assert [each['probability'] for each in found] == pytest.approx(expected.tolist(), rel=1e-6)
    answers(work, tmp_path, one, '--logit-adjustment', '1')
    assert 'fitted without --logit-adjustment' in capsys.readouterr().err


def test_saved_predictions_are_calibrated_and_say_so(work, tmp_path, capsys):
    kept = torch.load(work / 'run' / BEST, weights_only=True)['calibration']['temperature']
    for name, more, temperature in (('kept', [], kept), ('raw', ['--temperature', '1'], 1.0)):
        validate.main(['--checkpoint', str(work / 'run'), '--device', 'cpu', '--workers', '0', '--save-predictions',
                       str(tmp_path / f'{name}.csv'), '--logits-file', str(tmp_path / 'logits.npz'), *more])
        logits = torch.from_numpy(np.load(tmp_path / 'logits.npz')['logits']).double()
        with open(tmp_path / f'{name}.csv', newline='') as file:
            told = [float(row['probability1']) for row in csv.DictReader(file)]
        assert told == pytest.approx((logits / temperature).softmax(dim=1).amax(dim=1).tolist(), rel=1e-4)
    said = capsys.readouterr().out
    assert f"kept.csv': probabilities by temperature {kept:.3f}, fitted on 60 images" in said
    assert "raw.csv': probabilities by temperature 1, as asked for" in said


@pytest.mark.parametrize('given, sentence', [
    (['--split', 'test', '--fit-temperature'], 'is for --split val'),
    (['--split', 'val', '--fit-temperature', '--logit-adjustment', '1'], 'no effect with --logit-adjustment'),
])
def test_a_temperature_is_never_fitted_on_test_images(work, given, sentence):
    with pytest.raises(InputError, match=sentence):
        validate.main(['--checkpoint', str(work / 'run' / BEST), '--device', 'cpu', '--workers', '0', *given])


def test_bare_weights_have_no_place_for_a_temperature(work, tmp_path):
    state = torch.load(work / 'run' / BEST, weights_only=True)
    torch.save(state['state_dict'], tmp_path / 'bare.pth')
    with pytest.raises(InputError, match='in which a temperature has no place'):
        validate.main(['--checkpoint', str(tmp_path / 'bare.pth'), '--model', 'resnet20_nbn', '--dataset', 'folder',
                       '--data-dir', str(work), '--input-size', '3', '8', '8', '--split', 'val', '--fit-temperature',
                       '--device', 'cpu', '--workers', '0'])


# Forms -------------------------------------------------------------------------------------------------------------

def test_a_table_has_a_row_per_file(work, tmp_path, monkeypatch, capsys):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    table = tmp_path / 'found.csv'
    files = [str(work / 'test' / 'ant'), str(tmp_path / 'broken.png')]
    monkeypatch.setattr(sys, 'argv', ['nbn-predict', *flags(work), '--csv', '-o', str(table), '-k', '2', '--threshold',
                                      '1', *files])
    assert predict.console() == 1  # for the broken one
    rows = list(csv.DictReader(table.open(newline='')))
    found = answers(work, tmp_path, work / 'test' / 'ant', '-k', '2', '--threshold', '1')
    assert len(rows) == 5 and 'broken.png' in rows[4]['file'] and 'cannot be read' in rows[4]['error']
    for row, record in zip(rows, found, strict=False):
        first, second = record['predictions']
        assert record['sure'] is False and row['answer'] == 'not sure' and row['file'] == record['file']
        assert (row['name'], row['name_2']) == (first['name'], second['name'])
        assert float(row['probability']) == first['probability']
        assert int(row['train_images']) == first['train_images'] == 12 and row['shot'] == 'few'
    predict.main([*flags(work), '--csv', '-o', str(table), '--threshold', '0', files[0]])
    assert all(row['answer'] == row['name'] for row in csv.DictReader(table.open(newline='')))
    predict.main([*flags(work), '--threshold', '1', files[0]])
    assert 'not sure: no class has a probability of 100.00%' in capsys.readouterr().out
    with pytest.raises(InputError, match='--csv has no effect with --json'):
        predict.main([*flags(work), '--csv', '--json', files[0]])


# A watched folder --------------------------------------------------------------------------------------------------

@pytest.mark.fast
def test_a_file_is_ready_when_it_has_not_changed_and_comes_once(work, tmp_path):
    picture = (work / 'test' / 'ant' / '0.png').read_bytes()
    watch = FolderWatch(str(tmp_path))
    assert watch.ready() == []
    new = tmp_path / 'new.png'
    new.write_bytes(picture[:20])
    assert watch.ready() == []  # seen for the first time
    new.write_bytes(picture)
    assert watch.ready() == []  # it has grown
    assert watch.ready() == [str(new)]
    watch.done(str(new), True)
    assert watch.ready() == []
    (tmp_path / '.hidden.png').write_bytes(picture)
    (tmp_path / 'text.txt').write_text('no picture')
    assert watch.ready() == watch.ready() == []


@pytest.mark.fast
def test_a_file_that_stays_unreadable_is_given_up_until_it_changes(tmp_path):
    watch, path = FolderWatch(str(tmp_path)), tmp_path / 'a.png'
    path.write_bytes(b'half')
    looks = 0
    watch.ready()
    while watch.ready():
        watch.done(str(path), False)
        looks += 1
    assert looks == 10
    path.write_bytes(b'whole')
    assert watch.ready() == [] and watch.ready() == [str(path)]


def test_a_watched_folder_is_answered_until_ctrl_c(work, tmp_path, monkeypatch, capsys):
    inbox, found = tmp_path / 'inbox', tmp_path / 'found.jsonl'
    inbox.mkdir()
    pictures = sorted((work / 'test' / 'cat').iterdir())
    shutil.copy(pictures[0], inbox / 'first.png')
    whole = pictures[1].read_bytes()

    def visit(number: int) -> None:
        """What happens while the command sleeps for the n-th time."""
        if number == 3:
            (inbox / 'second.png').write_bytes(whole[:-40])  # it looks finished and is not
        if number == 6:
            (inbox / 'second.png').write_bytes(whole)
        if number in (10, 16):
            raise KeyboardInterrupt
    visits = iter(range(1, 100))
    monkeypatch.setattr(predict.time, 'sleep', lambda seconds: visit(next(visits)))
    command = [*flags(work), '--json', '--output', str(found), '--watch', str(inbox)]
    predict.main(command)
    told = capsys.readouterr().err
    assert '2 images answered' in told and 'cannot be read' not in told
    lines = [json.loads(line) for line in found.read_text().splitlines()]
    assert [Path(line['file']).name for line in lines] == ['first.png', 'second.png']
    assert all('predictions' in line for line in lines)

    shutil.copy(pictures[2], inbox / 'third.png')
    predict.main(command)  # goes on in the same file
    lines = [json.loads(line) for line in found.read_text().splitlines()]
    assert [Path(line['file']).name for line in lines] == ['first.png', 'second.png', 'third.png']
    assert 'of which 2 pictures are answered already' in capsys.readouterr().err


ANSWER = (PredictedClass(0, 'ant', 0.75, 3, 'few'), PredictedClass(1, 'bee, "wild"', 0.25, None, None))
FORMS = {'text': (False, False), 'json': (True, False), 'csv': (False, True)}


def written(form, *files) -> bytes:
    text = form.head + ''.join(form.entry(file, ANSWER, None) for file in files)
    return text.encode('utf-8', errors='backslashreplace')


@pytest.mark.fast
@pytest.mark.parametrize('kind', FORMS)
def test_answers_are_added_behind_whole_ones_of_the_same_form(kind, tmp_path):
    form, path = form_of(*FORMS[kind], topk=2, threshold=None), tmp_path / 'found'
    names = ['in/a.png', 'in/b, "c".png', 'in/\udcff.png']
    assert form.go_on(str(path)) == frozenset() and not path.exists()
    whole = written(form, *names)
    path.write_bytes(whole + form.entry('in/d.png', ANSWER, None).encode()[:6])
    assert form.go_on(str(path)) == {form.name(name) for name in names}
    assert path.read_bytes() == whole
    for name in names:
        Path(tmp_path, name).parent.mkdir(exist_ok=True)
    watch = FolderWatch(str(tmp_path / 'in'), {form.name(str(tmp_path / names[2]))}, form.name)
    for name in names[1:]:
        Path(tmp_path, name).write_bytes(b'x')
    watch.ready()
    assert watch.ready() == [str(tmp_path / names[1])]


@pytest.mark.fast
@pytest.mark.parametrize('kind', FORMS)
def test_nothing_is_added_to_another_file(kind, tmp_path):
    form, path = form_of(*FORMS[kind], topk=2, threshold=None), tmp_path / 'found'
    others = [written(form_of(*FORMS[other], topk=2, threshold=None), 'a.png', 'b.png') for other in FORMS
              if other != kind]
    if kind == 'csv':
        others.append(written(form_of(False, True, topk=3, threshold=None)))
    for content in (*others, b'\xff\xfe\n', b'[1]\n', b'my notes\nof today\n'):
        path.write_bytes(content)
        with pytest.raises(InputError, match='no answers can be added to .*: give another --output') as error:
            form.go_on(str(path))
        assert '\n' not in str(error.value) and path.read_bytes() == content


def test_answers_of_a_watched_folder_go_into_a_pipe_and_a_full_device_is_told(work, tmp_path, monkeypatch):
    def interrupt(seconds):
        if next(visits) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(predict.time, 'sleep', interrupt)
    os.mkfifo(tmp_path / 'pipe')
    command = [*flags(work), '--json', '--watch', str(work / 'test' / 'ant'), '--output']
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / 'pipe').read_text()), daemon=True)
    reader.start()
    visits = iter(range(1, 9))
    predict.main([*command, str(tmp_path / 'pipe')])
    reader.join(60)
    assert len(got[0].splitlines()) == 4
    if os.path.exists('/dev/full'):
        visits = iter(range(1, 9))
        with pytest.raises(InputError, match="'/dev/full' cannot be written .*: free some space"):
            predict.main([*command, '/dev/full'])


@pytest.mark.parametrize('given, sentence', [
    (['--watch', '{work}/gone'], "there is no folder '.*gone' to --watch"),
    (['--watch', '{work}', '{work}/test'], '--watch looks at one folder'),
    ([], 'there are no images'),
])
def test_what_cannot_be_watched_is_told(work, given, sentence):
    with pytest.raises(InputError, match=sentence):
        predict.main([*flags(work), *(part.format(work=work) for part in given)])


# A page ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def network(work) -> predict.Network:
    """What is behind the page; Gradio is not needed for it."""
    settings = DemoSettings.of({'model': str(work / 'run' / BEST), 'topk': 2, 'threshold': 0.99})
    return demo.open_demo(settings, torch.device('cpu'))


def test_the_page_shows_what_nbn_predict_says(work, tmp_path, network):
    one = work / 'test' / 'bee' / '0.png'
    best, second = answers(work, tmp_path, one, '-k', '2')[0]['predictions']
    shown = demo.show(network, str(one))
    assert shown.probabilities == {best['name']: best['probability'], second['name']: second['probability']}
    assert shown.rows[0] == [best['name'], f"{best['probability']:.2%}", 12, 'few']
    assert shown.sentence == (
        f"Not sure: {best['name']} is likeliest, but {best['probability']:.1%} is below 99%. Training has seen 12 "
        'pictures of it (few).')
    assert demo.show(network, None).rows == []
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    assert demo.show(network, str(tmp_path / 'broken.png')).sentence.startswith("image 'broken.png' cannot be read")


def test_examples_of_the_page_are_spread_over_their_folder(work, tmp_path):
    found = demo.example_files(str(work / 'train'))
    assert len(found) == len(set(found)) == demo.MOST_EXAMPLES
    assert {Path(file).parent.name for file in found} == {'ant', 'bee', 'cat'}
    assert demo.example_files(None) == [] and len(demo.example_files(str(work / 'test'))) == 12
    with pytest.raises(InputError, match='there is no picture in the folder'):
        demo.example_files(str(tmp_path))


def test_examples_are_pictures_that_a_browser_shows(tmp_path):
    told: list[str] = []
    for index in range(2):
        Image.new('RGB', (4, 4)).save(tmp_path / f'{index}.tif')
    with pytest.raises(InputError, match=r'browsers show none of the pictures in .* \(\.tif\): give --examples as PNG'):
        demo.example_files(str(tmp_path), told.append)
    Image.new('RGB', (4, 4)).save(tmp_path / 'x.PNG')
    assert demo.example_files(str(tmp_path), told.append) == [str(tmp_path / 'x.PNG')]
    assert told == [f"2 of 3 pictures in '{tmp_path}' are no examples, since browsers do not show them (.tif)"]


def look_first(sent):
    """As Gradio's picture does."""
    raise OSError('Truncated File Read')


@pytest.mark.parametrize('real', [False, True])
def test_a_damaged_picture_reaches_the_sentence_of_this_package(network, tmp_path, monkeypatch, real):
    """Gradio would look at the picture first and show a traceback."""
    (tmp_path / 'cut.jpg').write_bytes(b'\xff\xd8\xff\xe0 no picture')
    if real:
        gradio = pytest.importorskip('gradio')
        page = demo.build_page(network, [])
        picture = next(block for block in page.blocks.values() if isinstance(block, gradio.Image))
        answer = next(iter(page.fns.values())).fn
    else:
        part = MagicMock(preprocess=look_first)
        monkeypatch.setitem(sys.modules, 'gradio', MagicMock(Image=lambda **_: part))
        demo.build_page(network, [])
        picture, answer = part, part.change.call_args.args[0]
    sentence, probabilities, rows = answer(picture.preprocess(SimpleNamespace(path=str(tmp_path / 'cut.jpg'))))
    assert sentence.startswith("### image 'cut.jpg' cannot be read") and not probabilities and not rows
    assert answer(None)[0] == '### Choose a picture.'
    if not real:
        with pytest.raises(OSError, match='Truncated'):  # what comes in another way than as a file
            picture.preprocess(SimpleNamespace(path=None))


def test_without_gradio_the_page_says_what_to_install(network, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(InputError, match='pip install'):
        demo.build_page(network, [])


# torch.hub ---------------------------------------------------------------------------------------------------------

def test_torch_hub_opens_the_models():
    root = str(Path(__file__).parent.parent)
    model = torch.hub.load(root, 'resnet32_nbn', source='local', pretrained=True)
    expected = timm.create_model('resnet32_nbn.cifar100_lt', pretrained=True)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    grey = torch.hub.load(root, 'resnet20_nbn', source='local', num_classes=3, in_chans=1)
    assert grey(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    specification = importlib.util.spec_from_file_location('hubconf', Path(root, 'hubconf.py'))
    hubconf = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hubconf)
    assert {'resnet32_ride', 'resnext50_nbn', 'resnet32_shike'} <= {
        name for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith('_')}

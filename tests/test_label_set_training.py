"""Pictures of several classes from files to answers: CSV files, published lists, training, evaluation, prediction."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nbn_timm.cli import predict, prepare, push, report, train, validate
from nbn_timm.data import Classes, DataSettings
from nbn_timm.data.label_sets import label_sets, labels_of
from nbn_timm.data.photometric import Distortion, PhotometricCrop, draw_crop
from nbn_timm.data.splits import Known
from nbn_timm.data.val_split import draw_validation
from nbn_timm.datasets import create_splits
from nbn_timm.datasets.coco_mlt import CocoMLT
from nbn_timm.datasets.label_set_benchmark import digest_of
from nbn_timm.datasets.voc_mlt import VocMLT
from nbn_timm.errors import InputError
from nbn_timm.evaluation.thresholds import Thresholds
from nbn_timm.files import git_blob_id
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.training.label_sets import for_label_sets
from nbn_timm.training.settings import TrainSettings

CELLS = {'train': ['cat;dog', 'dog', 'cat; bird', '', 'dog;cat;bird', 'dog', 'cat', 'dog;dog'],
         'val': ['dog', 'cat;dog', 'bird', ''], 'test': ['cat', 'dog', 'bird;cat']}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Small pictures whose colours follow their labels, and their CSV files."""
    folder, rng = tmp_path_factory.mktemp('sets'), np.random.default_rng(0)
    for part, cells in CELLS.items():
        rows = ['file,label']
        for number, cell in enumerate(cells):
            pixels = rng.integers(0, 90, (16, 16, 3))
            for channel, name in enumerate(('bird', 'cat', 'dog')):
                pixels[..., channel] += 150 * (name in cell)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{part}{number}.png')
            rows.append(f'{part}{number}.png,{cell}')
        (folder / f'{part}.csv').write_text('\n'.join(rows) + '\n')
    return folder


def settings_of(folder, **more):
    return DataSettings('csv', str(folder), train_csv='train.csv', val_csv='val.csv', test_csv='test.csv',
                        **{'label_separator': ';', **more})


@pytest.mark.fast
def test_csv_files_of_several_labels(pictures):
    splits = create_splits(settings_of(pictures), label_sets=True)
    assert splits.classes == Classes((2, 4, 5), ('bird', 'cat', 'dog'), splits.classes.source, True, 8)
    assert splits.classes.total == 8 and splits.label_sets
    assert splits.train_targets.tolist() == [
        [0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    image, target = splits.train[4]
    assert target.tolist() == [1, 1, 1] and labels_of(target) == (0, 1, 2) and labels_of(2) == (2,)
    assert Classes.from_dict(json.loads(json.dumps(splits.classes.to_dict()))) == splits.classes
    assert 'label_sets' not in Classes((1,), ('a',), 'x').to_dict()  # as before


@pytest.mark.fast
def test_label_sets_take_the_order_of_a_network(pictures):
    known = Known(Classes((3, 3, 3, 3), ('dog', 'emu', 'cat', 'bird'), 'a network', True, 9), 'a network')
    splits = create_splits(settings_of(pictures), known=known, label_sets=True)
    assert splits.classes.names == ('dog', 'emu', 'cat', 'bird') and splits.classes.counts == (5, 0, 4, 2)
    assert splits.train_targets[2].tolist() == [0, 0, 1, 1]
    assert splits.test.targets.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]
    of_one = Known(Classes((3, 3, 3), ('dog', 'cat', 'bird'), 'a network'), 'a network')
    with pytest.raises(InputError, match='a network gives one class for an image, and csv has a set of classes'):
        create_splits(settings_of(pictures), known=of_one, label_sets=True)


@pytest.mark.fast
def test_who_does_not_take_label_sets_is_told(pictures):
    with pytest.raises(InputError, match='can be of several classes here, which this command does not take'):
        create_splits(settings_of(pictures))
    with pytest.raises(InputError, match='of which no long tail is'):
        create_splits(settings_of(pictures, imbalance_factor=2.0), label_sets=True)
    data = DataSettings('csv', train_csv=str(pictures / 'train.csv'), label_separator='|')
    assert any("has the --label-separator '|', so each is one label" in note
               for note in create_splits(data, label_sets=True).notes)
    with pytest.raises(InputError, match='--label-separator is empty'):
        create_splits(settings_of(pictures, label_separator=''), label_sets=True)


@pytest.mark.fast
def test_an_unknown_label_is_named(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / 'a')
    (tmp_path / 'a' / 'val.csv').write_text('file,label\nval0.png,dog;cta\n')
    with pytest.raises(InputError, match="label 'cta' in line 2.*did you mean 'cat'"):
        create_splits(settings_of(tmp_path / 'a'), label_sets=True)


@pytest.mark.fast
def test_a_drawn_validation_split_has_a_share_of_every_class():
    rng = np.random.default_rng(0)
    sets = (rng.random((400, 4)) < [0.5, 0.2, 0.05, 0.02]).astype(np.uint8)
    chosen = draw_validation([f'{number}.png' for number in range(400)], sets, 0.25)
    shares = sets[chosen].sum(axis=0) / sets.sum(axis=0)
    assert (abs(shares - 0.25) < 0.08).all()


# Photometric distortion: pixels of the authors' PhotoMetricDistortion (wutong16/DistributionBalancedLoss, commit
# 14460d0) with these draws, in RGB, to three decimals.
PIXELS = np.array([[[10, 20, 30], [200, 100, 50]], [[0, 0, 0], [90, 255, 40]]], dtype=np.float32)
DISTORTED = [
    (Distortion(-20.0, 1.25, True, 0.7, -12.0),
     [[[-5.0, 7.25, 12.5], [225.0, 111.25, 93.75]], [[-25.0, -25.0, -25.0], [187.0, 293.75, 105.625]]]),
    (Distortion(15.0, 0.6, False, 1.4, 10.0, (1, 2, 0)),
     [[[15.8, 27.0, 10.2], [66.0, 3.0, 129.0]], [[9.0, 9.0, 9.0], [162.0, -18.6, -6.7]]]),
    (Distortion(), PIXELS.tolist()),
]


@pytest.mark.fast
@pytest.mark.parametrize('distortion, pixels', DISTORTED)
def test_distortion_is_the_authors(distortion, pixels):
    np.testing.assert_allclose(distortion(PIXELS), pixels, atol=1e-3)


@pytest.mark.fast
def test_crops_keep_most_of_a_picture():
    torch.manual_seed(0)
    for _ in range(200):
        left, top, right, bottom = draw_crop(100, 60)
        assert 0 <= left < right <= 100 and 0 <= top < bottom <= 60
        assert right - left >= 79 and bottom - top >= 47
    assert draw_crop(100, 10) == (0, 0, 100, 10)  # never within the ratio
    assert PhotometricCrop((8, 12), Image.Resampling.BILINEAR)(Image.new('RGB', (100, 60))).size == (12, 8)


# Published lists

def write_voc(folder, monkeypatch):
    names = {'VOC2012': {'2008_1': ['dog', 'person', 'dog'], '2008_2': ['bus']}, 'VOC2007': {'1': ['cat'], '2': []}}
    for year, images in names.items():
        (folder / year / 'Annotations').mkdir(parents=True)
        (folder / year / 'JPEGImages').mkdir()
        for name, objects in images.items():
            found = ''.join(f'<object><name>{one}</name></object>' for one in objects)
            (folder / year / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{found}</annotation>')
            Image.new('RGB', (20, 10)).save(folder / year / 'JPEGImages' / f'{name}.jpg')
    (folder / 'VOC2007' / 'ImageSets' / 'Main').mkdir(parents=True)
    (folder / 'VOC2007' / 'ImageSets' / 'Main' / 'test.txt').write_text('1\n2\n')
    publish(VocMLT, folder, monkeypatch, '2008_2\n2008_1\n')


def write_coco(folder, monkeypatch):
    (folder / 'annotations').mkdir(parents=True)
    categories = [{'id': 3 * label, 'name': name.replace('_', ' ')} for label, name in enumerate(CocoMLT.names)]
    for part, images in {'train2017': {7: [0, 9, 9], 5: [3]}, 'val2017': {1: [0], 2: []}}.items():
        (folder / part).mkdir()
        for number in images:
            Image.new('RGB', (20, 10)).save(folder / part / f'{number:012d}.jpg')
        objects = [{'image_id': number, 'category_id': 3 * label, 'bbox': [0, 0, 2, 2], 'area': 4}
                   for number, labels in images.items() for label in labels]
        too_thin = {'image_id': 5 if part == 'train2017' else 1, 'category_id': 6, 'bbox': [0, 0, 0.5, 9], 'area': 4}
        (folder / 'annotations' / f'instances_{part}.json').write_text(json.dumps({
            'categories': categories, 'annotations': [*objects, too_thin],
            'images': [{'id': number, 'file_name': f'{number:012d}.jpg'} for number in images]}))
    publish(CocoMLT, folder, monkeypatch, '5\n7\n')


def publish(benchmark, folder, monkeypatch, ids):
    """Let the benchmark be one of these few images."""
    source = folder / 'source'
    source.mkdir()
    (source / benchmark.list_name).write_text(ids)
    known = benchmark(benchmark.title.lower().replace('-', '_'))
    monkeypatch.setattr(benchmark, 'list_blob', git_blob_id(source / benchmark.list_name))
    monkeypatch.setattr(benchmark, 'digest', digest_of(known.train_images(ids.split(), folder)))
    monkeypatch.setattr(benchmark, 'published', benchmark.published.__class__(2, None, 2, 2, 1, (0, 0, 0)))


@pytest.mark.fast
@pytest.mark.parametrize('name, write, train_sets, test_sets', [
    ('voc_mlt', write_voc, [(5,), (11, 14)], [(7,), ()]),
    ('coco_mlt', write_coco, [(3,), (0, 9)], [(0,), ()]),
])
def test_prepare_makes_csv_files_of_the_annotations(name, write, train_sets, test_sets, tmp_path, monkeypatch, capsys):
    write(tmp_path, monkeypatch)
    prepare.main([name, '--data-dir', str(tmp_path), '--source', str(tmp_path / 'source')])
    assert 'is complete: 4 images' in capsys.readouterr().out
    splits = create_splits(DataSettings(name, str(tmp_path)), label_sets=True)
    assert [labels_of(row) for row in splits.train.targets] == train_sets
    assert [labels_of(row) for row in splits.test.targets] == test_sets
    assert splits.shot_limits == (99, 20) and splits.classes.images == 2
    assert splits.train.image(0).size == (20, 10)
    next((tmp_path).glob('*/*/1.jpg' if name == 'voc_mlt' else 'val2017/*1.jpg')).unlink()
    with pytest.raises(InputError, match='is incomplete, 1 images are missing'):
        prepare.main([name, '--data-dir', str(tmp_path)])


@pytest.mark.fast
def test_prepare_refuses_other_labels_and_other_lists(tmp_path, monkeypatch):
    write_voc(tmp_path, monkeypatch)
    arguments = ['voc_mlt', '--data-dir', str(tmp_path), '--source', str(tmp_path / 'source')]
    monkeypatch.setattr(VocMLT, 'digest', '0' * 64)
    with pytest.raises(InputError, match='are not the published ones .digest'):
        prepare.main(arguments)
    (tmp_path / 'voc_mlt_ids.txt').write_text('2008_1\n')
    with pytest.raises(InputError, match='is not the published list of VOC-MLT'):
        prepare.main(arguments)
    with pytest.raises(InputError, match="'voc_mlt_train.csv' is not in .*nbn-prepare voc_mlt"):
        create_splits(DataSettings('voc_mlt', str(tmp_path)), label_sets=True)


# A run

def command(folder, output, *more):
    return ['--dataset', 'csv', '--data-dir', str(folder), '--train-csv', 'train.csv', '--val-csv', 'val.csv',
            '--test-csv', 'test.csv', '--label-separator', ';', '--model', 'resnet20_nbn', '--img-size', '16',
            '--output', str(output), '--experiment', 'run', '--epochs', '2', '--batch-size', '4', '-j', '0',
            '--device', 'cpu', *more]


@pytest.fixture(scope='module')
def run(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp('output')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('nbn_timm.pages.figures.can_draw', lambda: False)  # figures take the time
        train.main(command(pictures, output, '--loss', 'bce', '--sampler', 'class_aware', '--lr', '0.05'))
    return output / 'run'


def test_a_run_reports_average_precision_and_keeps_thresholds(run, pictures):
    result, record = json.loads((run / 'test.json').read_text()), checkpoint_record(str(run / 'model_best.pth.tar'))
    assert {'map', 'map_many', 'map_few', 'micro_f1', 'macro_f1'} <= result.keys() and result['num_samples'] == 3
    assert result['weights']['chosen_by'] == 'validation map'
    assert record.thresholds.split == 'val' and len(record.thresholds.values) == 3
    assert Thresholds.from_dict(result['thresholds']) == record.thresholds
    assert record.classes.label_sets and record.classes.images == 8
    lines = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    assert len(lines) == 2 and all('eval_map' in line and 'eval_top1' not in line for line in lines)


def test_a_run_ends_with_its_page(run, tmp_path, monkeypatch):
    monkeypatch.setattr('nbn_timm.pages.figures.can_draw', lambda: False)
    page = (run / 'report.html').read_text()
    assert 'src="data:image/png;base64,' in page and '<td>bird</td>' in page and '<pre>nbn-train ' in page
    report.main([str(run), '--output', str(tmp_path / 'x.html')])
    assert (tmp_path / 'x.html').read_text() == page
    (run / 'test_predictions.npz').rename(tmp_path / 'kept.npz')
    try:
        report.main([str(run), '--output', str(tmp_path / 'y.html'), '--evaluate', '--device', 'cpu'])
    finally:
        (tmp_path / 'kept.npz').rename(run / 'test_predictions.npz')
    again = (tmp_path / 'y.html').read_text()
    pattern = r'<div class="(?:cards|pictures)">.*?\n</div>\n'
    assert re.findall(pattern, again, re.DOTALL) == re.findall(pattern, page, re.DOTALL) != []


def test_validation_finds_what_the_run_found(run, pictures, tmp_path):
    file = str(run / 'model_best.pth.tar')
    validate.main(['--checkpoint', file, '--results-file', str(tmp_path / 'a.json'), '--save-predictions',
                   str(tmp_path / 'a.csv'), '--device', 'cpu', '-j', '0'])
    found, before = (json.loads(path.read_text()) for path in (tmp_path / 'a.json', run / 'test.json'))
    assert {key: found[key] for key in ('map', 'micro_f1', 'loss', 'per_class')} == {
        key: before[key] for key in ('map', 'micro_f1', 'loss', 'per_class')}
    rows = (tmp_path / 'a.csv').read_text().splitlines()
    assert rows[0] == 'path,labels,answer,probability of bird,probability of cat,probability of dog'
    assert rows[3].startswith(f'{pictures / "test2.png"},bird; cat,')
    with pytest.raises(InputError, match='--fit-temperature is not for images that can be of several classes'):
        validate.main(['--checkpoint', file, '--split', 'val', '--fit-temperature', '--device', 'cpu', '-j', '0'])


def test_prediction_tells_a_set_of_classes(run, pictures, capsys):
    file, record = run / 'model_best.pth.tar', checkpoint_record(str(run / 'model_best.pth.tar'))
    with np.load(run / 'test_predictions.npz') as kept:
        told = record.thresholds.answers(kept['logits'])
        assert kept['digest'].shape == (32,)
    images = [str(pictures / f'test{number}.png') for number in range(3)]
    predict.main(['--model', str(file), '--json', '--device', 'cpu', *images])
    out, err = capsys.readouterr()
    for line, expected in zip(out.splitlines(), told, strict=True):
        assert {found['class'] for found in json.loads(line)['predictions']} == set(labels_of(expected))
    assert 'thresholds of each class' in err
    predict.main(['--model', str(file), '--threshold', '1', '--device', 'cpu', images[0]])
    assert 'no class reaches its threshold' in capsys.readouterr().out
    predict.main(['--model', str(file), '--threshold', '0', '--csv', '--device', 'cpu', images[0]])
    head, row = capsys.readouterr().out.splitlines()
    assert head == 'file,answer,probabilities,error' and sorted(row.split(',')[1].split('; ')) == ['bird', 'cat', 'dog']
    with pytest.raises(InputError, match='--topk is for networks that give one class'):
        predict.main(['--model', str(file), '--topk', '2', '--device', 'cpu', images[0]])


def test_a_second_stage_is_refused(run, pictures, tmp_path):
    with pytest.raises(InputError, match='--stage crt is not for pictures of several classes'):
        train.main(command(pictures, tmp_path, '--stage', 'crt', '--initial-checkpoint', str(run / 'last.pth.tar')))


@pytest.mark.fast
@pytest.mark.parametrize('more, message', [
    ([], "loss 'cross_entropy' is not for pictures of several classes.*asymmetric or bce"),
    (['--loss', 'bce', '--mixup', '0.2'], '--mixup is not for pictures of several classes'),
    (['--loss', 'bce', '--sampler', 'reverse'], "sampler 'reverse' is not for.*class_aware"),
    (['--loss', 'bce', '--eval-metric', 'top5'], '--eval-metric top5 is not for.*map_many'),
    (['--imbalance', 'auto'], '--imbalance auto is not for pictures of several classes'),
    (['--loss', 'bce', '--kd-checkpoint', 'x.pth'], '--kd-checkpoint is not for'),
    (['--loss', 'bce', '--more-train', 'x.csv'], '--more-train is not for'),
    (['--loss', 'bce', '--smoothing', '0.1'], "loss 'bce' has no setting 'smoothing'"),
])
def test_what_is_for_one_class_is_refused_in_a_sentence(more, message, pictures, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        train.main(command(pictures, tmp_path, *more))
    assert '\n' not in str(error.value)


@pytest.mark.fast
def test_what_is_for_several_classes_is_refused_for_one(tmp_path):
    with pytest.raises(InputError, match='--eval-metric map is for pictures of several classes'):
        for_label_sets(TrainSettings.of({'dataset': 'csv', 'eval_metric': 'map'}), None)
    with pytest.raises(InputError, match='--thresholds is for pictures of several classes.*leave it out'):
        train.main(['--config', 'quickstart', '--thresholds', 'half', '--output', str(tmp_path)])


@pytest.mark.fast
def test_label_sets_of_labels():
    assert label_sets([[0, 2], [], [1]], 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_who_has_no_form_for_sets_says_so(run, tmp_path):
    file = str(run / 'last.pth.tar')
    with pytest.raises(InputError, match='tells accuracies.*gives a set of classes'):
        push.main([file, '--output', str(tmp_path / 'pushed')])

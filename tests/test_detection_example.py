"""examples/detection: losses and repeat factors by the authors' numbers, AP of a hand-made case, one step of training.

Reference numbers are of CenterNet2's `sigmoid_cross_entropy_loss` with `get_fed_loss_inds`, of `eql_loss` in
eql.detectron2, both on the logits below, and worked out by hand where a test says so.
"""
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.models.detection.roi_heads import RoIHeads

from nbn_timm.errors import InputError
from nbn_timm.layers import nbn_layers
from nbn_timm.layers.frozen import is_frozen
from nbn_timm.samplers import create_sampler
from nbn_timm.training.distributed import World

pytest.importorskip('faster_coco_eval')
EXAMPLE = Path(__file__).parent.parent / 'examples' / 'detection'
sys.path.append(str(EXAMPLE))

import average_precision as ap  # noqa: E402
import detection_data as data  # noqa: E402
import detector as parts  # noqa: E402
import make_digits  # noqa: E402
import train_detection  # noqa: E402
from class_loss import CLASS_LOSSES  # noqa: E402

LABELS = torch.tensor([0, 3, 1, 0, 5])
COUNTS = torch.tensor([9., 0, 4, 100, 16, 0])


def logits() -> torch.Tensor:
    return (torch.linspace(-2, 2, 35).double().sin().reshape(5, 7) * 2).requires_grad_()


@pytest.mark.parametrize('name, settings, value, gradient', [
    ('federated', {'classes': 5}, 3.906786595547101,
     [0.0, 0.02977227456634531, 0.0, -0.1625231862718514, 0.042920205981667424, 0.04958210053332933, 0.0]),
    ('equalization', {'threshold': 0.01}, 3.6505670755531674,
     [0.0, 0.0, 0.0, -0.1625231862718514, 0.042920205981667424, 0.04958210053332933, 0.0]),
])
def test_losses_are_those_of_their_authors(name, settings, value, gradient):
    """Federated, only class 4 can be drawn: 1, 3, 5 and the background are there, and 2 and 6 have no image."""
    scores = logits()
    loss = CLASS_LOSSES[name](COUNTS, 1000, **settings)(scores, LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert scores.grad[1].tolist() == pytest.approx(gradient, rel=1e-12)


def test_federated_loss_takes_all_classes_where_there_are_fewer_than_it_wants():
    scores = logits()
    CLASS_LOSSES['federated'](COUNTS + 1, 1000)(scores, LABELS).backward()
    assert (scores.grad[:, 1:] != 0).all() and not scores.grad[:, 0].any()


def test_sigmoid_losses_begin_at_their_prior():
    layer = torch.nn.Linear(8, 7)
    loss = CLASS_LOSSES['federated'](COUNTS, 1000, prior=0.02)
    loss.initialise(layer)
    assert loss.scores(layer(torch.zeros(1, 8))).tolist() == [pytest.approx([0.02] * 6)]


def test_repeat_factors_are_those_of_lvis():
    """r = max over the classes of a picture of max(1, sqrt(t / f)): f is .8, .2 and .1 here, and t .4."""
    sets = np.zeros((10, 3), np.uint8)
    sets[:8, 0] = sets[7:9, 1] = sets[9, 2] = 1
    sampler = create_sampler('repeat_factor', sets, threshold=0.4)
    assert (sampler.whole + sampler.fraction).tolist() == pytest.approx([1] * 7 + [math.sqrt(2)] * 2 + [2])


def annotations(lvis: bool) -> data.Annotations:
    """Three classes, frequent, common and rare, in two images; class 1 is in both, 2 in the first, 3 in the second."""
    boxes = {1: [(1, 1), (2, 1)], 2: [(1, 2)], 3: [(2, 3)]}
    objects = [(image, category) for pairs in boxes.values() for image, category in pairs]
    images = [{'id': image, 'file_name': f'{image}.png', 'height': 64, 'width': 64} for image in (1, 2)]
    categories = [{'id': category, 'name': str(category)} for category in (3, 1, 2)]
    if lvis:
        images[0] |= {'neg_category_ids': [], 'not_exhaustive_category_ids': [1]}
        images[1] |= {'neg_category_ids': [2], 'not_exhaustive_category_ids': []}
        for category in categories:
            category['frequency'] = ' fcr'[category['id']]
    square = [10 * 1.0, 10, 30, 10, 30, 30, 10, 30]
    return data.Annotations(Path('truth.json'), {'images': images, 'categories': categories, 'annotations': [
        {'id': index, 'image_id': image, 'category_id': category, 'bbox': [10, 10, 20, 20], 'area': 400,
         'segmentation': [square]} for index, (image, category) in enumerate(objects, 1)]})


def detection(image: int, label: int, score: float, side: int = 20) -> dict:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 10:30, 10:10 + side] = 1
    found = {'boxes': torch.tensor([[10., 10, 10 + side, 30]]), 'labels': torch.tensor([label]),
             'scores': torch.tensor([score]), 'masks': mask}
    result, = ap.as_results(found, image, [1, 2, 3])
    return result


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
@pytest.mark.parametrize('lvis', [True, False])
def test_ap_of_a_case_by_hand(kind, lvis):
    """Class 1: one right, one of overlap .75, which counts up to .75, 6 of 10 overlaps; a false one in front of them.

    LVIS leaves that false one out, since image 1 was not searched through for class 1; in COCO's form it counts.
    Class 2: right, and a false one before it in image 2, which has it as absent. Class 3: not found; its detection in
    image 1 is of a class that LVIS did not search there.
    """
    truth = annotations(lvis)
    results = [detection(1, 1, 0.9, 5), detection(1, 1, 0.8), detection(2, 1, 0.7, 15), detection(1, 2, 0.5),
               detection(2, 2, 0.6), detection(1, 3, 0.4)]
    first = (6 * 1 + 4 * 51 / 101) / 10 if lvis else (6 * 2 / 3 + 4 * 51 / 101 / 2) / 10
    got = ap.average_precision(truth, ['f', 'c', 'r'], results, kind)
    assert got == pytest.approx({'AP': 100 * (first + 0.5 + 0) / 3, 'APr': 0, 'APc': 50, 'APf': 100 * first})


def test_ap_of_no_detection_and_of_no_class_of_a_kind():
    got = ap.average_precision(annotations(True), ['f', 'f', 'r'], [], 'segm')
    assert got['AP'] == got['APr'] == got['APf'] == 0 and math.isnan(got['APc'])
    assert 'n/a' in ap.table({'segm': got})


def test_masks_of_an_image_of_which_no_detection_counts():
    """faster-coco-eval 1.8.0 fails on these by itself."""
    truth = annotations(True)
    truth.content['annotations'] = [one for one in truth.content['annotations'] if one['image_id'] == 1]
    truth.content['images'][1]['neg_category_ids'] = []
    got = ap.average_precision(truth, ['f', 'c', 'r'], [detection(1, 1, 0.9), detection(2, 1, 0.8)], 'segm')
    assert got['APf'] == pytest.approx(100)


def test_annotations_in_both_forms(tmp_path):
    lvis, coco = annotations(True), annotations(False)
    assert lvis.labels == {1: 1, 2: 2, 3: 3} and lvis.image_counts.tolist() == [2, 1, 1]
    assert data.class_frequencies(lvis, lvis) == ['f', 'c', 'r'] and data.class_frequencies(coco, coco) == ['r'] * 3
    assert [data.frequency_of(count) for count in (10, 11, 100, 101)] == ['r', 'c', 'c', 'f']
    other = annotations(False)
    other.content['images'][0] = {'id': 1, 'coco_url': 'http://images.cocodataset.org/train2017/000000391895.jpg'}
    assert other.image_path(Path('lvis'), 0) == Path('lvis/train2017/000000391895.jpg')
    other.content['annotations'][0]['iscrowd'] = 1
    assert [len(objects) for objects in other.objects] == [1, 2]
    with pytest.raises(InputError, match='has no list of images'):
        (tmp_path / 'wrong.json').write_text('{}')
        data.Annotations.read(tmp_path / 'wrong.json')


def reread(folder: Path, content: dict, masks: bool = True) -> data.Annotations:
    (folder / 'a.json').write_text(json.dumps(content))
    return data.Annotations.read(folder / 'a.json', masks)


GONE = object()


@pytest.mark.parametrize('kind, key, value, reason', [
    ('annotations', 'bbox', GONE, 'annotation 1 {file} has no bbox: give'),
    ('annotations', 'bbox', None, 'annotation 1 {file} has the bbox null, which is not four numbers'),
    ('annotations', 'bbox', [], 'which is not four numbers'),
    ('annotations', 'bbox', [1, 2, 3], 'which is not four numbers'),
    ('annotations', 'bbox', 'abcd', 'which is not four numbers'),
    ('annotations', 'bbox', ['1', '2', '30', '30'], 'which is not four numbers'),
    ('annotations', 'bbox', [2, 2, math.inf, 20], '[2, 2, Infinity, 20], which is not four numbers of at most 100,000'),
    ('annotations', 'bbox', [math.nan, 2, 20, 20], 'which is not four numbers'),
    ('annotations', 'bbox', [2, 2, 1e30, 20], 'which is not four numbers'),
    ('annotations', 'bbox', [2, 2, 10 ** 400, 20], 'which is not four numbers'),
    ('annotations', 'bbox', [20, 20, -10, 10], 'with a negative side'),
    ('annotations', 'bbox', [-500, 2, 20, 20], 'outside of its image of 64 x 64 pixels: correct it or take'),
    ('annotations', 'bbox', [2, 64, 20, 20], 'outside of its image'),
    ('annotations', 'id', GONE, 'entry 1 of the annotations {file} has no id: give a whole number'),
    ('annotations', 'id', 2, 'annotation 2 {file} is there twice: give each an id of its own'),
    ('annotations', 'image_id', GONE, 'annotation 1 {file} has no image_id: give a whole number'),
    ('annotations', 'image_id', '1', 'annotation 1 {file} has the image_id "1": give a whole number'),
    ('annotations', 'image_id', 99, 'annotation 1 {file} has the image_id 99, which the file lacks'),
    ('annotations', 'category_id', GONE, 'has no category_id'),
    ('annotations', 'category_id', [1], 'has the category_id [1]: give a whole number'),
    ('annotations', 'category_id', True, 'has the category_id true: give a whole number'),
    ('annotations', 'category_id', 4, 'has the category_id 4, which the file lacks'),
    ('annotations', 'iscrowd', None, 'has the iscrowd null: give 0 or 1'),
    ('annotations', 'segmentation', GONE, 'has no segmentation: give --no-masks'),
    ('annotations', 'segmentation', [], 'has no segmentation: give --no-masks'),
    ('annotations', 'segmentation', 'x', 'has the segmentation "x", which is neither polygons'),
    ('annotations', 'segmentation', [[1, 2, 3]], 'which is neither polygons'),
    ('annotations', 'segmentation', [[1, 2, 3, 4, 5, 6, 7]], 'which is neither polygons'),
    ('annotations', 'segmentation', [[1, 2, 3, 4, 5, 1e30]], 'which is neither polygons'),
    ('annotations', 'segmentation', [[1, 2, 3, 4, 5, math.nan]], 'which is neither polygons'),
    ('annotations', 'segmentation', [['1', '2', '3', '4', '5', '6']], 'which is neither polygons'),
    ('annotations', 'segmentation', [1, 2, 3, 4, 5, 6], 'which is neither polygons'),
    ('annotations', 'segmentation', [[1, 2, 3, 4, 5, [6]]], 'which is neither polygons'),
    ('annotations', 'segmentation', {'size': [64, 64]}, 'nor run lengths of the size [64, 64]'),
    ('annotations', 'segmentation', {'size': [64, 64], 'counts': [1, 2]}, 'nor run lengths'),
    ('annotations', 'segmentation', {'size': [64, 64], 'counts': 'abc'}, 'nor run lengths'),
    ('annotations', 'segmentation', {'size': [64, 64], 'counts': '1234'}, 'nor run lengths'),
    ('annotations', 'segmentation', {'size': [64, 32], 'counts': [2048]}, 'nor run lengths'),
    ('images', 'id', GONE, 'entry 1 of the images {file} has no id: give'),
    ('images', 'id', 'x', 'entry 1 of the images {file} has the id "x": give'),
    ('images', 'id', 2, 'image 2 {file} is there twice'),
    ('images', 'width', GONE, 'image 1 {file} has no width: give the pixels'),
    ('images', 'height', 0, 'image 1 {file} has the height 0: give the pixels'),
    ('images', 'file_name', GONE, 'image 1 {file} has no file_name: give the file'),
    ('images', 'file_name', 7, 'image 1 {file} has the file_name 7: give the file'),
    ('images', 'neg_category_ids', GONE, 'image 1 {file} has no neg_category_ids, and others have: give it to all'),
    ('images', 'neg_category_ids', None, 'image 1 {file} has the neg_category_ids null: give a list'),
    ('images', 'neg_category_ids', [[1]], 'give a list of category ids'),
    ('images', 'not_exhaustive_category_ids', [9], 'names category 9 in its not_exhaustive_category_ids'),
    ('categories', 'id', [3], 'entry 1 of the categories {file} has the id [3]: give'),
    ('categories', 'id', 1, 'category 1 {file} is there twice'),
    ('categories', 'name', 7, 'category 3 {file} has the name 7: give'),
    ('categories', 'frequency', ['r'], 'category 3 {file} has the frequency ["r"]: give'),
    ('categories', 'frequency', GONE, 'category 3 {file} has no frequency, and others have: give it to all'),
])
def test_wrong_entries_are_sentences(tmp_path, kind, key, value, reason):
    content = annotations(True).content
    if value is GONE:
        del content[kind][0][key]
    else:
        content[kind][0][key] = value
    with pytest.raises(InputError, match=re.escape(reason.format(file=f"in '{tmp_path / 'a.json'}'"))):
        reread(tmp_path, content)


@pytest.mark.parametrize('kind', ['images', 'annotations', 'categories'])
@pytest.mark.parametrize('entry', [None, 'x', 7, [1]])
def test_entries_that_are_no_objects_are_sentences(tmp_path, kind, entry):
    content = annotations(True).content
    content[kind].append(entry)
    reason = f'entry {len(content[kind])} of the {kind} in .* is {re.escape(json.dumps(entry))} and no object: correct'
    with pytest.raises(InputError, match=reason):
        reread(tmp_path, content)


def test_right_annotations_stay_as_they_are_but_for_boxes_that_reach_out_of_their_images(tmp_path):
    content = annotations(True).content
    boxes = [[0.1, 0.2, 63.9, 63.8], [-4, 50, 20.5, 30], [64.0, 3, 0.5, 9]]  # whole, clipped, less than a pixel
    for one, box in zip(content['annotations'], boxes, strict=False):
        one['bbox'] = box
    got = reread(tmp_path, content)
    content['annotations'][1]['bbox'], content['annotations'][2]['bbox'] = [0, 50, 16.5, 14], [64, 3, 0, 9]
    assert got.content == content
    assert [[one['id'] for one in objects] for objects in got.objects] == [[1], [2, 4]]
    del content['annotations'][0]['segmentation']
    assert len(reread(tmp_path, content, masks=False).objects) == 2


def test_other_categories_in_the_two_files_are_told():
    lvis, swapped, fewer = (annotations(True) for _ in range(3))
    first, second, _ = swapped.categories
    first['name'], second['name'] = second['name'], first['name']
    with pytest.raises(InputError, match=r"other categories .1 is '1', and 1 is '2'.: give two files of one data set"):
        data.class_frequencies(lvis, swapped)
    fewer.content['categories'] = fewer.content['categories'][1:]
    with pytest.raises(InputError, match="3 is '3', and none in its place"):
        data.class_frequencies(lvis, fewer)


def test_federated_annotations_need_no_frequencies_areas_or_ids_from_1_on():
    """faster-coco-eval alone raises KeyError, leaves out areas below 0, and takes an object of id 0 for a miss."""
    truth = annotations(True)
    results = [detection(1, 1, 0.9), detection(2, 1, 0.8), detection(1, 2, 0.7), detection(2, 3, 0.6)]
    for category in truth.content['categories']:
        del category['frequency']
    for number, one in enumerate(truth.content['annotations']):
        one |= {'id': number, 'area': -1}
    before = json.dumps(truth.content)
    letters = data.class_frequencies(truth, truth)
    assert letters == ['r'] * 3
    for kind in ('bbox', 'segm'):
        assert ap.average_precision(truth, letters, results, kind)['APr'] == pytest.approx(100)
    assert json.dumps(truth.content) == before


def one_image(folder: Path, **size: int) -> data.DetectionImages:
    content = {'images': [{'id': 1, 'file_name': 'a.png', 'width': 64, 'height': 32, **size}], 'annotations': [],
               'categories': [{'id': 1}]}
    return data.DetectionImages(reread(folder, content), folder, masks=False)


def test_grey_of_16_bits_looks_like_that_of_8(tmp_path):
    grey = np.arange(2048).reshape(32, 64) // 8
    for values in (grey.astype(np.uint8), (grey * 257).astype(np.uint16)):
        Image.fromarray(values).save(tmp_path / 'a.png')
        image, _ = one_image(tmp_path)[0]
        assert torch.equal((image * 255).round(), torch.from_numpy(grey).float().expand(3, 32, 64))


def test_images_of_another_size_than_their_annotations_are_refused(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter, so that it is 32 x 64 upright
    for exif in (None, turned):
        Image.new('RGB', (64, 32)).save(tmp_path / 'a.png', exif=exif)
        images = one_image(tmp_path, **({'width': 60} if exif is None else {}))
        with pytest.raises(InputError, match=r"^image 1 in '.*a.json' has 6[04] x 32 pixels, and the file '.*a.png', "
                                             'turned upright, (64 x 32|32 x 64): correct the size'):
            images[0]


def test_images_that_are_missing_or_damaged_are_told_apart(tmp_path):
    images = one_image(tmp_path)
    path = tmp_path / 'a.png'
    with pytest.raises(InputError, match=f"^the image '{path}' is missing: check --image-dir$"):
        images[0]
    path.write_text('no picture')
    with pytest.raises(InputError, match=f"^the image '{path}' cannot be read .it is no picture that Pillow knows.: "
                                         'replace it by an intact copy$'):
        images[0]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match='image file is truncated') as told:
        images[0]
    assert str(told.value).count('a.png') == 1


def test_mirrored_boxes_surround_mirrored_masks():
    image = torch.rand(3, 64, 64)
    mask = torch.from_numpy(data.decode_masks(annotations(False).objects[0], 64, 64))
    flipped, target = data.mirrored(image, {'boxes': torch.tensor([[10., 12, 30, 30]] * 2), 'masks': mask})
    assert target['boxes'][0].tolist() == [34, 12, 54, 30] and torch.equal(flipped.flip(2), image)
    columns = target['masks'][0].any(dim=0).nonzero()
    assert (columns.min(), columns.max() + 1) == (34, 54)


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    """A few pictures of the small set, without its photographs."""
    folder = tmp_path_factory.mktemp('detection')
    random = np.random.default_rng(0)
    pools = [random.integers(128, 256, (3, 32, 32, 3), np.uint8) for _ in range(10)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_digits, 'load_photographs', lambda: [np.full((128, 128, 3), 60, np.uint8)])
        categories = {'categories': [{'id': digit + 1, 'name': str(digit), 'frequency': 'f' if digit < 5 else 'r'}
                                     for digit in range(10)]}
        for name, count in (('train', 2), ('val', 1)):
            content = make_digits.draw_split(folder, name, [count] * 10, 4, pools, random)
            (folder / f'{name}.json').write_text(json.dumps(content | categories))
    return folder


def read(folder: Path, *more: str) -> train_detection.DetectionSettings:
    argv = ['--config', str(EXAMPLE / 'digits.yaml'), '--train-json', str(folder / 'train.json'), '--val-json',
            str(folder / 'val.json'), '--image-dir', str(folder), '--no-pretrained', '--model', 'resnet20_nbn',
            '--box-batch', '8', '--proposals', '8', '--head-channels', '8', '--mask-channels', '4',
            '--fpn-channels', '8', '--detections', '3', '--score-threshold', '0', '--decay-epochs', '1',
            '--epochs', '2', *more]
    return train_detection.read_command(argv).settings()


def test_resumed_training_ends_as_an_uninterrupted_one(digits, tmp_path):
    world = World(torch.device('cpu'))
    figures = train_detection.run(read(digits, '--output', str(tmp_path / 'whole')), world)
    assert figures.keys() == {'bbox', 'segm'} and all(0 <= value['AP'] <= 100 for value in figures.values())
    killed = train_detection.Training(read(digits, '--output', str(tmp_path / 'cut')), world)
    before = {name: value.clone() for name, value in killed.detector.state_dict().items()}
    save, saved = killed.save, []

    def save_and_die() -> None:
        save()
        saved.append(killed.epoch)
        raise KeyboardInterrupt

    killed.save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    assert saved == [1]
    with pytest.raises(InputError, match='has a run already'):
        train_detection.run(read(digits, '--output', str(tmp_path / 'cut')), world)
    with pytest.raises(InputError, match='--lr is 0.5 and was'):
        train_detection.run(read(digits, '--output', str(tmp_path / 'cut'), '--resume', '--lr', '0.5'), world)
    train_detection.run(read(digits, '--output', str(tmp_path / 'cut'), '--resume'), world)
    whole, cut = (torch.load(tmp_path / name / 'last.pth') for name in ('whole', 'cut'))
    assert all(torch.equal(value, cut['model'][name]) for name, value in whole['model'].items())
    learned = {name for name, value in before.items() if not torch.equal(value, whole['model'][name])}
    body = {name.removeprefix('backbone.body.') for name in before if name.startswith('backbone.body.')}
    frozen = {name for name in body if name.startswith(('conv1', 'layer1')) or 'conv' not in name}  # norms besides
    assert learned & {f'backbone.body.{name}' for name in body} == {f'backbone.body.{name}' for name in body - frozen}
    assert 'roi_heads.mask_predictor.mask_fcn_logits.weight' in learned
    assert json.loads((tmp_path / 'cut' / 'results.json').read_text())['ap'].keys() == {'bbox', 'segm'}


def test_softmax_heads_compute_what_torchvisions_do(digits):
    training = train_detection.Training(read(digits, '--class-loss', 'softmax'),
                                        World(torch.device('cpu')))
    network, heads = training.detector, training.detector.roi_heads
    network.double()
    images, targets = zip(*(training.loader.dataset[index] for index in range(2)), strict=True)
    images = [image.double() for image in images]

    def outputs() -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        losses = network.train()(images, targets)
        with torch.no_grad():
            return [losses, *network.eval()(images)]

    ours = outputs()
    heads.__class__ = RoIHeads
    for own, original in zip(ours, outputs(), strict=True):
        assert own.keys() == original.keys()
        for name, value in own.items():
            torch.testing.assert_close(value, original[name], rtol=1e-12, atol=1e-12)
    assert len(ours[1]['boxes']) == 3


def test_faster_rcnn_on_annotations_of_coco(digits, tmp_path):
    for name in ('train', 'val'):
        content = json.loads((digits / f'{name}.json').read_text())
        for image in content['images']:
            del image['neg_category_ids'], image['not_exhaustive_category_ids']
        for category in content['categories']:
            del category['frequency']
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    figures = train_detection.run(
        read(digits, '--train-json', str(tmp_path / 'train.json'), '--val-json', str(tmp_path / 'val.json'),
             '--no-masks', '--class-loss', 'equalization', '--repeat-threshold', '0',
             '--epochs', '1', '--output', str(tmp_path / 'run')), World(torch.device('cpu')))
    assert figures.keys() == {'bbox'} and math.isnan(figures['bbox']['APf']) and figures['bbox']['APr'] >= 0
    written = json.loads((tmp_path / 'run' / 'results.json').read_text(), parse_constant=pytest.fail)
    assert written['ap'] == {'bbox': figures['bbox'] | {'APc': None, 'APf': None}}


@pytest.mark.parametrize('model, last', [('resnet32_ride_nbn', 144), ('resnet18', 512)])
def test_any_backbone_is_frozen_as_told(model, last):
    body = parts.create_body(parts.BackboneSettings(model=model, pretrained=False, freeze='layer1', levels=2))
    assert body.feature_info.channels()[-1] == last
    norms = [module for module in body.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all(map(is_frozen, norms)) and bool(nbn_layers(body)) == ('nbn' in model)
    learning = {name.split('.')[0] for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert 'layer2' in learning and not learning & {'conv1', 'bn1', 'layer1'}


def test_backbone_starts_from_a_checkpoint_file(tmp_path):
    network = timm.create_model('resnet20_nbn', num_classes=5)
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'last.pth.tar')
    body = parts.create_body(parts.BackboneSettings(
        model='resnet20_nbn', pretrained=False, initial_checkpoint=str(tmp_path / 'last.pth.tar'), levels=1))
    assert torch.equal(body.conv1.weight, network.conv1.weight)


@pytest.mark.parametrize('settings, reason', [
    (['--anchors', '20'], 'needs 2'), (['--model', 'resnet20_nb'], "did you mean 'resnet20_nbn'"),
    (['--freeze', 'layer9'], 'is no stage'), (['--class-loss-kwargs', 'clases=3'], "did you mean 'classes'"),
    (['--train-json', 'nowhere.json'], 'cannot be read'),
    (['--levels', '9', '--anchors', *'123456789', '10'], 'cannot be a backbone'),
])
def test_wrong_settings_are_sentences(digits, settings, reason):
    with pytest.raises(InputError, match=reason):
        train_detection.Training(read(digits, *settings), World(torch.device('cpu')))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_both_files_are_checked_before_training(digits, tmp_path, split):
    good = (digits / f'{split}.json').read_text()
    path = tmp_path / 'a.json'

    def start(content: dict, *more: str) -> None:
        path.write_text(json.dumps(content))
        train_detection.Training(read(digits, f'--{split}-json', str(path), *more), World(torch.device('cpu')))

    content = json.loads(good)
    content['annotations'][0]['segmentation'] = 'x'
    with pytest.raises(InputError, match=f"^annotation 1 in '{path}' has the segmentation"):
        start(content)
    start(content, '--no-masks')
    content = json.loads(good)
    for name in ('x.png', 'x' * 300 + '.png', '\0x.png'):
        content['images'][0]['file_name'] = name
        with pytest.raises(InputError, match=f"^image 1 in '{path}' is the file '.*x.png', which is missing: check"):
            start(content)


def test_nothing_to_learn_from_is_told(digits, tmp_path):
    content = json.loads((digits / 'train.json').read_text()) | {'annotations': []}
    (tmp_path / 'a.json').write_text(json.dumps(content))
    with pytest.raises(InputError, match='has no box to learn from'):
        train_detection.Training(read(digits, '--train-json', str(tmp_path / 'a.json')), World(torch.device('cpu')))


def test_rate_rises_and_falls():
    rate = train_detection.Rate(train_detection.TrainingSettings(lr=1.0, warmup_steps=10, decay_epochs=(2, 3)), steps=5)
    assert [rate(0, 0), rate(1, 0), rate(2, 0), rate(3, 4)] == pytest.approx([0.001, 0.5005, 0.1, 0.01])


def test_recipe_of_lvis_is_taken():
    given = train_detection.read_command(['--config', str(EXAMPLE / 'lvis_v1.yaml')])
    given.check_effects(given.settings())
    assert given.settings().data.repeat_threshold == 0.001 and given.settings().detector.detections == 300


def test_commands_of_the_page_are_taken():
    """docs/detection.md; test_docs.py knows the package's own commands alone."""
    page = (EXAMPLE.parent.parent / 'docs' / 'detection.md').read_text().replace('\\\n', '')
    lines = re.findall(r'^    .*train_detection\.py (.+)$', page, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        words = [str(EXAMPLE.parent.parent / word) if word.endswith('.yaml') else word for word in shlex.split(line)]
        given = train_detection.read_command(words)
        settings = given.settings()
        given.check_effects(settings)
        parts.create_class_loss(settings.detector, COUNTS, 1000)

"""CAM-based sampling: movements against cv2 and the authors' code, maps by hand, and a whole chain of runs.

On 40 random images the authors' pasting (`cam_based_sampling` of zhangyongshun/BagofTricks-LT, commit ce7859a, with cv2
4.13) and `paste` here gave the same bytes for flips and shifts, and for turns differences of at most one grey level.
"""
import csv
import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forks import run_killed_at
from PIL import Image
from test_train_run import assert_same, data_flags, images  # noqa: F401  (a fixture)

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import train
from nbn_timm.cli.train import parse_train
from nbn_timm.data import ClassCounts
from nbn_timm.data.dataset import ArraySamples
from nbn_timm.data.more_train import MoreTrainSettings, with_more_pictures
from nbn_timm.data.splits import Splits
from nbn_timm.errors import InputError
from nbn_timm.samplers import create_sampler
from nbn_timm.second_stages import create_second_stage
from nbn_timm.second_stages.cam_sampling import move_foreground, paste, pictures_per_class, rotation, stretch, warp
from nbn_timm.training.classifier_inputs import inputs_of
from nbn_timm.training.run_checkpoint import LAST

NET = ['--model', 'resnet20', '--model-kwargs', 'num_blocks=1', '--img-size', '8', '--device', 'cpu', '--workers', '0',
       '-b', '4', '--lr', '0.02', '--log-interval', '1']
MATRIX = [[0.7794228634059949, 0.45, -0.12355715851498716], [-0.45, 0.7794228634059949, 1.4558657048910078]]
TURNED = [[0, 47, 80, 180, 106, 170, 63], [26, 153, 198, 142, 206, 131, 201], [12, 114, 103, 103, 87, 93, 76],
          [10, 75, 149, 65, 157, 54, 165], [0, 49, 157, 128, 146, 91, 17], [0, 11, 118, 193, 27, 0, 0]]
STRETCHED = [[0, 10, 50, 90, 100], [50, 59, 94, 130, 139], [150, 157, 183, 209, 216], [200, 205, 227, 249, 255]]
IMAGE = (np.arange(6 * 7 * 3) * 37 % 251).astype(np.uint8).reshape(6, 7, 3)


@pytest.mark.fast
def test_movements_are_those_of_cv2():
    """Figures of cv2.getRotationMatrix2D, cv2.warpAffine and cv2.resize."""
    matrix = rotation(2.5, 1.5, 30, 0.9)
    assert matrix.tolist() == [pytest.approx(MATRIX[0]), pytest.approx(MATRIX[1])]
    assert np.abs(warp(IMAGE, matrix)[:, :, 0].astype(int) - TURNED).max() <= 1
    assert np.abs(stretch(np.array([[0, 100], [200, 255]], np.uint8), 4, 5).astype(int) - STRETCHED).max() <= 1


@pytest.mark.fast
def test_the_foreground_is_pasted_where_it_was_and_where_it_is():
    heat = np.zeros((6, 7), np.uint8)
    heat[2:4, 1:3] = 200
    shifted = paste(IMAGE, heat, np.array([[1, 0, 3], [0, 1, 1]]))
    copy = np.zeros_like(IMAGE)
    copy[1:, 3:] = IMAGE[:-1, :-3]
    expected = IMAGE.copy()
    for row, column in {(r, c) for r in (2, 3) for c in (1, 2)} | {(r, c) for r in (3, 4) for c in (4, 5)}:
        for channel in range(3):
            if copy[row, column, channel]:  # black does not cover
                expected[row, column, channel] = copy[row, column, channel]
    assert np.array_equal(shifted, expected)
    flipped = paste(IMAGE, heat, np.array([[-1, 0, 6], [0, 1, 0]]))
    region = (heat > 0) | (heat[:, ::-1] > 0)
    assert np.array_equal(flipped, np.where(region[:, :, None] & (IMAGE[:, ::-1] > 0), IMAGE[:, ::-1], IMAGE))


@pytest.mark.fast
def test_a_shifted_foreground_stays_inside_and_each_kind_is_drawn():
    heat = np.zeros((6, 7), np.uint8)
    heat[2:4, 1:3] = 200
    white = np.full((6, 7, 3), 10, np.uint8)
    white[2:4, 1:3] = 250
    kinds = set()
    for seed in range(40):
        drawn = np.random.default_rng(seed)
        kind = int(np.random.default_rng(seed).integers(3))
        moved = move_foreground(white, heat, drawn)
        assert (moved == 250).all(axis=2).sum() >= 4 if kind else moved.max() > 100  # a turned one is interpolated
        kinds.add(kind)
    assert kinds == {0, 1, 2}


@pytest.mark.fast
@pytest.mark.parametrize('most, expected', [(None, [5, 9, 0, 100]), (20, [0, 0, 0, 20]), (100, [0, 9, 0, 100])])
def test_how_many_pictures_a_class_gets(most, expected):
    assert pictures_per_class(np.array([100, 96, 0, 5]), most).tolist() == expected


class Data:
    """What the stage looks at: four images of two classes in memory."""

    distributed, seed, device = False, 3, torch.device('cpu')

    def __init__(self) -> None:
        self.images = np.random.default_rng(0).integers(1, 255, (4, 8, 8, 3)).astype(np.uint8)
        labels = np.array([0, 1, 0, 0])
        counts = ClassCounts((3, 1), ('a', 'b/c'), 'the test')
        self.splits = Splits(ArraySamples(self.images, labels), None, None, counts, None, 2, labels)

    def classifier_inputs(self, model, modules, dataset):
        pixels = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).float() / 255
        return inputs_of(model, modules, [(pixels, torch.from_numpy(dataset.targets))])


@pytest.mark.fast
def test_the_pictures_are_those_of_the_seed_and_of_their_class():
    torch.manual_seed(0)
    model, data = timm.create_model('resnet20', num_classes=2, num_blocks=1).eval(), Data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, again = (create_second_stage('cam_sampling').fit(model, data) for _ in range(2))
    assert found.files['generated.csv'].splitlines() == [
        'file,label', 'generated/000000.png,a', 'generated/000001.png,b/c', 'generated/000002.png,b/c',
        'generated/000003.png,b/c']
    pictures = dict(found.pictures)
    assert pictures == dict(again.pictures) and len(pictures) == 4
    assert_same(model.state_dict(), before)
    rng = np.random.default_rng(3)
    for number, (label, own) in enumerate([(0, [0, 2, 3]), (1, [1]), (1, [1]), (1, [1])]):
        image = data.images[rng.choice(own)]
        with torch.no_grad():
            maps = model.forward_features(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0]
            heat = sum(model.fc.weight[label, channel] * maps[channel] for channel in range(64))
            heat = ((heat - heat.min()) / (heat.max() - heat.min()) * 255).to(torch.uint8).numpy()
        made = np.asarray(Image.open(io.BytesIO(pictures[f'generated/{number:06d}.png'])))
        moved = move_foreground(image, heat, rng)
        assert np.abs(made.astype(int) - moved).mean() < 20  # maps of one image and of a batch may round otherwise
        assert number or np.array_equal(made, moved)


@pytest.mark.fast
def test_what_has_no_maps_is_refused():
    with pytest.raises(InputError, match='pools no maps before its classifier'):
        create_second_stage('cam_sampling').fit(timm.create_model('test_vit', num_classes=2), Data())
    with pytest.raises(InputError, match='not on the mean of its maps'):
        create_second_stage('cam_sampling').fit(
            timm.create_model('resnet20', num_classes=2, num_blocks=1, global_pool='catavgmax').eval(), Data())
    with pytest.raises(InputError, match='most=0: give a whole number from 1'):
        create_second_stage('cam_sampling', most=0)


@pytest.mark.fast
def test_wrong_lists_of_further_pictures(tmp_path):
    splits, file = Data().splits, tmp_path / 'more.csv'
    Image.new('RGB', (8, 8)).save(tmp_path / 'x.png')
    Image.new('RGB', (9, 8)).save(tmp_path / 'y.png')
    for text, message in (('file,label\nx.png,c\n', "line 2 of CSV file .* has the class 'c'"),
                          ('file,label\ny.png,a\n', 'has not the 8x8 pixels of the dataset'),
                          ('file,label\nz.png,a\n', 'z.png'), ('file\nx.png\n', "no column 'label'")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            with_more_pictures(MoreTrainSettings(str(file)), splits)
    file.write_text('file,label\nx.png,b/c\n')
    more = with_more_pictures(MoreTrainSettings(str(file)), splits)
    assert more.train_targets.tolist() == [0, 1, 0, 0, 1] and more.classes.counts == (3, 1) and len(more.train) == 5
    assert '1 further training pictures' in more.notes[-1]
    assert with_more_pictures(MoreTrainSettings(), splits) is splits


@pytest.mark.fast
def test_an_epoch_has_the_draws_that_it_is_asked_for():
    sampler = create_sampler('class_balanced', np.array([0] * 90 + [1] * 10), size=30)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 30 and 5 < sum(index >= 90 for index in drawn) < 25
    with pytest.raises(InputError, match='size=0: give a whole number from 1'):
        create_sampler('class_balanced', np.array([0, 1]), size=0)
    assert parse_train(['--dataset', 'digits_lt', '--model', 'resnet20', '--sampler', 'class_balanced',
                        '--sampler-kwargs', 'size=30']).sampler.sampler_kwargs == {'size': 30}


@pytest.mark.slow
def test_the_chain_of_the_bag_of_tricks(images, tmp_path):  # noqa: F811
    """Mixup, the pictures, balanced draws of all with mixup, killed and resumed, balanced draws of the first alone."""
    common = [*data_flags(images), *NET, '--output', str(tmp_path)]
    train.main([*common, '--epochs', '1', '--mixup', '1', '--experiment', 'first'])
    train.main([*common, '--stage', 'cam_sampling', '--initial-checkpoint', str(tmp_path / 'first' / LAST),
                '--experiment', 'cam'])
    listed = tmp_path / 'cam' / 'generated.csv'
    with open(listed, newline='') as file:
        rows = list(csv.DictReader(file))
    assert [sum(row['label'] == name for row in rows) for name in '0123'] == [1, 5, 8, 10]
    assert all(Image.open(listed.parent / row['file']).size == (8, 8) for row in rows)
    second = [*common, '--epochs', '3', '--more-train', str(listed), '--sampler', 'class_balanced', '--sampler-kwargs',
              'size=20', '--mixup', '1', '--initial-checkpoint', str(tmp_path / 'first' / LAST)]
    train.main([*second, '--experiment', 'whole'])
    run_killed_at('epoch 3/3  step 2/5', train.main, [*second, '--experiment', 'killed'])
    train.main([*second, '--experiment', 'killed', '--resume', 'auto'])
    whole, killed = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ('whole', 'killed'))
    for key in ('state_dict', 'optimizer'):
        assert_same(whole[key], killed[key])
    train.main([*common, '--epochs', '1', '--sampler', 'class_balanced', '--initial-checkpoint',
                str(tmp_path / 'whole' / LAST), '--experiment', 'third'])
    assert Path(tmp_path / 'third' / 'test.json').exists()

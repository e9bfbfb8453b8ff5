"""Pictures of one to four channels, from the file to the answer, and weights in half precision."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import RandomSampler

import nbn_timm  # noqa: F401  (registers the models)
import nbn_timm.cli.train as train
from nbn_timm.cli import predict, validate
from nbn_timm.data import AugmentSettings, DataDefaults, create_eval_loader, create_train_loader, create_transform
from nbn_timm.data.bands import read_bands
from nbn_timm.data.dataset import ImageSamples, picture
from nbn_timm.data.pictures import read_picture
from nbn_timm.data.settings import InputSettings
from nbn_timm.errors import InputError
from nbn_timm.models.create import create_model
from nbn_timm.models.transfer import load_pretrained_file, start_model
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training.run_checkpoint import BEST, LAST

ORIENTATION = 0x0112


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Class folders of RGBA pictures, of which the alpha channel alone tells the class."""
    root = tmp_path_factory.mktemp('channels')
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('val', 6), ('test', 6)):
        for label in range(2):
            folder = root / split / 'ab'[label]
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (8, 8, 4))
                pixels[..., 3] = 60 + 150 * label
                Image.fromarray(pixels.astype(np.uint8), 'RGBA').save(folder / f'{index}.png')
    return root


def flags(images: Path, output: Path, name: str, *more: str) -> list[str]:
    return ['--dataset', 'folder', '--data-dir', str(images), '--model', 'resnet20_nbn', '--img-size', '8', '--device',
            'cpu', '--workers', '0', '-b', '8', '--epochs', '6', '--lr', '0.05', '--output', str(output),
            '--experiment', name, *more]


# Reading -----------------------------------------------------------------------------------------------------------

@pytest.mark.fast
@pytest.mark.parametrize('mode, size', [('L', (2, 3)), ('LA', (2, 3)), ('RGB', (2, 3)), ('RGBA', (2, 3))])
def test_a_picture_is_read_in_the_mode_that_is_asked_for(tmp_path, mode, size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, 'RGBA')
    picture.save(tmp_path / 'a.png')
    read = read_picture(str(tmp_path / 'a.png'), mode)
    assert read.mode == mode and read.size == size
    if 'A' in mode:
        assert np.array_equal(np.asarray(read)[..., -1], pixels[..., 3])
    if mode == 'L':
        assert np.array_equal(np.asarray(read), np.asarray(picture.convert('RGB').convert('L')))
    picture.convert('RGB').save(tmp_path / 'opaque.png')
    if 'A' in mode:
        assert (np.asarray(read_picture(str(tmp_path / 'opaque.png'), mode))[..., -1] == 255).all()


@pytest.mark.fast
@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('training', [False, True])
def test_training_and_evaluation_read_a_turned_picture_upright(tmp_path, channels, training):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    exif = upright.getexif()
    exif[ORIENTATION] = 6  # to be turned clockwise
    upright.save(tmp_path / 'upright.png')
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'turned.png', exif=exif)
    defaults = DataDefaults((channels, 8, 8), (0.5,) * channels, (0.5,) * channels, crop_pct=1.0)
    samples = ImageSamples([str(tmp_path / name) for name in ('upright.png', 'turned.png')], [0, 0])
    loader = create_eval_loader(samples, batch_size=2, defaults=defaults, num_workers=0)
    if training:
        samples.transform = create_transform(defaults, is_training=True, augment=AugmentSettings(no_aug=True))
    images = torch.stack([torch.as_tensor(samples[index][0]) for index in range(2)])
    assert images.shape == (2, channels, 8, 8) and torch.equal(*images)
    if channels == 3:
        assert torch.allclose(images[0].float() / 127.5 - 1, next(iter(loader))[0][0], atol=1e-6)


@pytest.mark.fast
def test_mean_and_std_follow_the_channels():
    grey = DataDefaults().as_trained(InputSettings(in_chans=1, img_size=32))
    assert grey.input_size == (1, 32, 32)
    assert grey.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,)) and len(grey.std) == 1
    assert len(DataDefaults().as_trained(InputSettings(in_chans=4)).mean) == 4
    assert DataDefaults().as_trained(InputSettings(in_chans=4, mean=(0.1, 0.2, 0.3, 0.4))).mean == (0.1, 0.2, 0.3, 0.4)
    assert DataDefaults().as_trained(InputSettings()) == DataDefaults()


@pytest.mark.fast
def test_channels_that_may_stand_in_two_places_and_bytes_in_either_order(tmp_path):
    np.save(tmp_path / 'two.npy', np.zeros((6, 8, 6), np.uint8))
    with pytest.raises(InputError, match='6 x 8 x 6, in which the 6 channels may be the first dimension or the last'):
        read_bands(str(tmp_path / 'two.npy'), 6)
    values = np.arange(6 * 64).reshape(6, 8, 8) * 100
    for order in '<>':
        np.save(tmp_path / f'order{order}.npy', values.astype(f'{order}u2'))
    little, big = (read_bands(str(tmp_path / f'order{order}.npy'), 6) for order in '<>')
    assert torch.equal(little, big) and torch.allclose(big, torch.tensor(values) * (255 / 65535))


# The model ---------------------------------------------------------------------------------------------------------

@pytest.mark.fast
def test_a_pretrained_first_convolution_is_adapted_by_timm():
    name = 'resnet32_nbn.cifar100_lt'
    rgb, grey = (create_model(name, pretrained=True, in_chans=channels) for channels in (None, 1))
    assert torch.allclose(grey.conv1.weight, rgb.conv1.weight.sum(1, keepdim=True), atol=1e-6)
    _, notes = start_model(name, None, None, pretrained=True, in_chans=1)
    assert notes == ['the pretrained weights: the first convolution was adapted from RGB to 1 channel as in timm']
    assert not start_model(name, None, None, pretrained=True, in_chans=3)[1]


@pytest.mark.fast
@pytest.mark.parametrize('channels', [1, 2, 4, 6])
@pytest.mark.parametrize('classes', [3, 5])
def test_weights_in_a_file_are_adapted_by_the_same_rule(tmp_path, channels, classes):
    torch.manual_seed(0)
    rgb = create_model('test_efficientnet', 3)
    torch.save(rgb.state_dict(), tmp_path / 'rgb.pth')
    model = create_model('test_efficientnet', classes, in_chans=channels)
    told = load_pretrained_file(model, tmp_path / 'rgb.pth')
    many = 's' * (channels > 1)
    assert told.endswith(f'; the first convolution was adapted from RGB to {channels} channel{many} as in timm')
    assert told.startswith('all weights' if classes == 3 else 'all but the classifier, which begins anew')
    old, new = rgb.conv_stem.weight, model.conv_stem.weight
    expected = old.sum(1, keepdim=True) if channels == 1 else old.repeat(1, 2, 1, 1)[:, :channels] * 3 / channels
    torch.testing.assert_close(new, expected)
    assert torch.equal(model.blocks[0][0].conv.weight, rgb.blocks[0][0].conv.weight)
    with pytest.raises(InputError, match='they differ in 1 entries .first: conv_stem.weight'):
        torch.save(model.state_dict(), tmp_path / 'other.pth')
        load_pretrained_file(create_model('test_efficientnet', classes, in_chans=5), tmp_path / 'other.pth')


@pytest.mark.fast
def test_the_recorded_mean_follows_the_channels_that_are_asked_for():
    record = NetworkRecord({'model': 'resnet20', 'input_size': [3, 8, 8], 'mean': [0.2, 0.3, 0.4], 'std': [0.1] * 3})
    found = record.inherited(train.TrainSettings, {'in_chans': 1})
    assert found['mean'] == pytest.approx([0.3]) and found['std'] == pytest.approx([0.1]) and found['img_size'] == 8
    assert record.inherited(train.TrainSettings, {})['mean'] == [0.2, 0.3, 0.4]


def test_a_training_on_four_channels_and_what_follows_it(images, tmp_path, capsys):
    train.main(flags(images, tmp_path, 'rgba', '--in-chans', '4', '--color-jitter', '0.1', '--reprob', '0.1'))
    folder = tmp_path / 'rgba'
    found = json.loads((folder / 'test.json').read_text())
    assert found['top1'] > 90  # the class is in the fourth channel
    results = tmp_path / 'result.json'
    validate.main(['--checkpoint', str(folder / BEST), '--device', 'cpu', '--workers', '0',
                   '--results-file', str(results)])
    again = json.loads(results.read_text())
    assert again['top1'] == found['top1'] and again['input_size'] == [4, 8, 8] and len(again['mean']) == 4
    predict.main(['--model', str(folder / BEST), '--device', 'cpu', '--workers', '0', '--json', '--output',
                  str(tmp_path / 'found.jsonl'), str(images / 'test' / 'b')])
    answers = [json.loads(line)['predictions'][0]['name'] for line in (tmp_path / 'found.jsonl').open()]
    assert answers.count('b') >= 5
    train.main(flags(images, tmp_path, 'again', '--initial-checkpoint', str(folder / LAST), '--epochs', '1'))
    assert torch.load(tmp_path / 'again' / LAST)['state_dict']['conv1.weight'].shape[1] == 4


def test_grey_pictures(images, tmp_path):
    train.main(flags(images, tmp_path, 'grey', '--in-chans', '1', '--epochs', '1', '--rotation', '10', '--cutout', '2'))
    assert torch.load(tmp_path / 'grey' / LAST)['state_dict']['conv1.weight'].shape[1] == 1


BANDS = ['--in-chans', '6', '--mean', *['0.5'] * 6, '--std', *['0.3'] * 6]


@pytest.fixture(scope='module')
def bands(tmp_path_factory) -> Path:
    """A CSV file of pictures of six channels, TIFF and NumPy, of which the sixth tells the class."""
    tifffile = pytest.importorskip('tifffile')
    root = tmp_path_factory.mktemp('bands')
    rng = np.random.default_rng(0)
    rows = ['file,label,split']
    for index in range(48):
        values = rng.integers(0, 2 ** 16, (6, 9, 8)).astype(np.uint16)
        values[5] = 13000 + 30000 * (index % 2)
        name = f'{index}.{("tif", "tiff", "npy")[index % 3]}'
        if name.endswith('npy'):
            np.save(root / name, (values / 65535).astype(np.float32))
        elif name.endswith('tiff'):
            tifffile.imwrite(root / name, values, photometric='minisblack')  # a page for each channel
        else:
            tifffile.imwrite(root / name, values.transpose(1, 2, 0), photometric='minisblack', planarconfig='contig')
        rows.append(f'{name},{"ab"[index % 2]},{("train", "train", "val", "test")[index // 2 % 4]}')
    (root / 'all.csv').write_text('\n'.join(rows))
    return root


@pytest.mark.fast
def test_six_channels_are_read_in_every_form_with_the_steps_of_sixteen_bits(bands):
    rng = np.random.default_rng(0)
    for index in range(3):
        values = rng.integers(0, 2 ** 16, (6, 9, 8)).astype(np.uint16)
        values[5] = 13000 + 30000 * (index % 2)
        found = read_picture(str(next(bands.glob(f'{index}.*'))), '6 bands')
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), values.astype(np.float64) / 257, rtol=1e-6)
    samples = ImageSamples([str(bands / '0.tif')], [0])
    samples.mode = '6 bands'
    assert picture(samples, 0).mode == 'RGB' and picture(samples, 0).size == (8, 9)  # as a page shows it


@pytest.mark.fast
def test_the_loaders_normalise_six_channels(bands):
    path = str(next(bands.glob('1.*')))
    mean, std = tuple(np.linspace(0.1, 0.6, 6)), tuple(np.linspace(0.2, 0.3, 6))
    defaults = DataDefaults((6, 9, 8), mean, std, crop_pct=1.0, published=False)
    images, labels = next(iter(create_eval_loader(ImageSamples([path], [3]), batch_size=1, defaults=defaults,
                                                  num_workers=0)))
    centre, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))
    expected = (read_picture(path, '6 bands') / 255 - centre) / spread
    torch.testing.assert_close(images[0], expected.float(), rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [3]
    samples = ImageSamples([path], [3])
    loader = create_train_loader(samples, RandomSampler(samples), batch_size=1, defaults=defaults, num_workers=0,
                                 views=2, augment=AugmentSettings(rotation=5, vflip=0.5), drop_last=False)
    loader.set_epoch(0)
    images, labels = next(iter(loader))
    assert images.shape == (2, 1, 6, 9, 8) and images.dtype == torch.float32 and labels.tolist() == [3]


@pytest.mark.fast
@pytest.mark.parametrize(('name', 'values', 'sentence'), [
    ('a.npy', np.zeros((5, 4, 4), np.uint8), 'has the shape 5 x 4 x 4, and --in-chans asks for 6'),
    ('a.npy', np.zeros((6, 4, 4), np.int32), 'values of type int32, of which it is not known which is white'),
    ('a.npy', np.full((6, 4, 4), 1.5), 'values of type float64'), ('a.npy', None, 'cannot be read'),
    ('a.tif', None, 'cannot be read'), ('a.png', None, 'is no file of 6 channels: give TIFF'),
    ('gone.npy', None, 'is missing')])
def test_what_has_no_six_channels_is_one_sentence(tmp_path, name, values, sentence):
    pytest.importorskip('tifffile')
    if values is not None:
        np.save(tmp_path / name, values)
    elif name != 'gone.npy':
        (tmp_path / name).write_bytes(b'no picture')
    with pytest.raises(InputError, match=sentence):
        read_picture(str(tmp_path / name), '6 bands')


@pytest.mark.fast
def test_without_tifffile_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(InputError, match=r"pip install 'nbn_timm\[multispectral\]'"):
        read_picture(str(tmp_path / 'a.tif'), '6 bands')


@pytest.mark.fast
@pytest.mark.parametrize(('augment', 'sentence'), [
    (dict(aa='rand-m9'), '--aa changes the colours'), (dict(color_jitter=0.2), '--color-jitter changes the colours'),
    (dict(cutout=4), '--cutout is for pictures of up to 4'), (dict(train_interpolation='lanczos'), 'of such pictures')])
def test_augmentation_that_is_not_for_six_channels_is_refused(augment, sentence):
    defaults = DataDefaults((6, 32, 32), (0.5,), (0.5,))
    with pytest.raises(InputError, match=sentence):
        create_transform(defaults, is_training=True, augment=AugmentSettings(**augment))
    create_transform(defaults, is_training=True)  # without the jitter that is the default


def test_a_training_on_six_channels_and_what_follows_it(bands, tmp_path, capsys):
    train.main(['--dataset', 'csv', '--train-csv', str(bands / 'all.csv'), '--model', 'resnet20_nbn', '--img-size', '8',
                '--device', 'cpu', '--workers', '0', '-b', '8', '--epochs', '6', '--lr', '0.05', '--output',
                str(tmp_path), '--experiment', 'six', *BANDS])
    found = json.loads((tmp_path / 'six' / 'test.json').read_text())
    assert found['top1'] > 90  # the class is in the sixth channel
    predict.main(['--model', str(tmp_path / 'six'), '--device', 'cpu', '--workers', '0', '--csv', '--output',
                  str(tmp_path / 'found.csv'), str(bands / '0.tif'), str(bands / '1.tiff')])
    assert (tmp_path / 'found.csv').read_text().count('\n') == 3


@pytest.mark.parametrize('given, sentence', [
    (['--in-chans', '6'], 'of 6 channels no mean and std are known: give --mean and --std with 6 numbers each'),
    (['--in-chans', '1', '--aa', 'cifar10'], '--aa changes the colours of RGB pictures'),
    (['--in-chans', '1', '--grayscale-prob', '0.1'], '--grayscale-prob changes the colours'),
    (['--in-chans', '1', '--in-memory'], 'that is for RGB pictures'),
    (['--model-kwargs', 'in_chans=1'], 'leave in_chans out of --model-kwargs, and give --in-chans'),
    (['--model-dtype', 'float16'], '--model-dtype float16 cannot hold small gradients'),
    (['--model-dtype', 'bfloat16', '--amp'], '--amp keeps weights in float32'),
])
def test_what_cannot_be_is_one_sentence(images, tmp_path, given, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        train.main(flags(images, tmp_path, 'refused', *given))
    assert '\n' not in str(caught.value)


@pytest.mark.fast
def test_channels_beside_a_size_in_full_are_refused():
    with pytest.raises(InputError, match='--in-chans has no effect with --input-size'):
        train.parse_train(['--dataset', 'cifar10_lt', '--model', 'resnet20', '--in-chans', '1', '--input-size',
                           *'1 32 32'.split()])


# Half precision ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_weights_in_bfloat16_train_resume_and_answer(images, tmp_path):
    more = ['--in-chans', '4', '--model-dtype', 'bfloat16', '--model-ema', '--sched', 'constant']
    train.main(flags(images, tmp_path, 'whole', *more, '--epochs', '6'))
    train.main(flags(images, tmp_path, 'parts', *more, '--epochs', '3'))
    train.main(flags(images, tmp_path, 'parts', *more, '--epochs', '6', '--resume', 'auto'))
    state, parts = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ('whole', 'parts'))
    assert state['state_dict']['conv1.weight'].dtype == torch.bfloat16
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(value, parts[key][name]) for name, value in state[key].items())
    assert json.loads((tmp_path / 'whole' / 'test.json').read_text())['precision'] == 'bfloat16'
    for given, precision in (([], 'float32'), (['--model-dtype', 'bfloat16'], 'bfloat16')):
        validate.main(['--checkpoint', str(tmp_path / 'whole' / BEST), '--use-ema', '--device', 'cpu', '--workers', '0',
                       '--results-file', str(tmp_path / 'result.json'), *given])
        result = json.loads((tmp_path / 'result.json').read_text())
        assert result['precision'] == precision and result['top1'] > 60


def test_a_distilled_student_in_bfloat16(images, tmp_path):
    train.main(flags(images, tmp_path, 'teacher', '--epochs', '1'))
    train.main(flags(images, tmp_path, 'student', '--epochs', '1', '--model-dtype', 'bfloat16', '--kd-checkpoint',
                     str(tmp_path / 'teacher' / LAST)))
    assert timm.create_model('resnet20_nbn', num_classes=2).load_state_dict(
        torch.load(tmp_path / 'student' / LAST)['state_dict'])

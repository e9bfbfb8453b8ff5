"""Decoders of JPEG files: the same crops, nearly the same pixels, and Pillow for what they are not for."""
import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from timm.data import ImageDataset
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from nbn_timm.data import AugmentSettings, DataDefaults, ImageSamples, create_eval_loader, create_train_loader
from nbn_timm.data import decoders as decoders_module
from nbn_timm.data import loader as loader_module
from nbn_timm.data.decoders import DECODERS, Box, CannotDecode, DecodedCrop, resized_part
from nbn_timm.data.shard_stream import EvalReading, ShardStream
from nbn_timm.data.shards import open_index
from nbn_timm.data.timm_datasets import SelectedSamples
from nbn_timm.data.transforms import create_transform
from nbn_timm.errors import InputError
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast

FORMAT = DataDefaults(input_size=(3, 32, 32), color_jitter=None)


@pytest.fixture(params=sorted(DECODERS))
def decoder(request):
    if not DECODERS[request.param].available():
        pytest.skip(f'{request.param} is not installed')
    return request.param


def scene(width, height, mode='RGB'):
    """Smooth colours with a few edges, which JPEG keeps well."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), outline=(250, 20, 20), width=3)
    return image.convert(mode)


def jpeg(image, **settings):
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=92, **settings)
    return buffer.getvalue()


def reference(data, box, size, mode=Image.Resampling.BILINEAR):
    """What timm makes of a crop: the picture whole, cut, then resampled."""
    top, left, height, width = box
    with Image.open(io.BytesIO(data)) as image:
        part = image.convert('RGB').crop((left, top, left + width, top + height))
    return np.asarray(part.resize(size[::-1], mode)).astype(int)


def ours(name, data, box, size, mode=InterpolationMode.BILINEAR):
    tool = DECODERS[name]()
    tool.size(data)
    return resized_part(tool, data, Box(*box), size, mode).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize('subsampling', ['4:4:4', '4:2:2', '4:2:0'])
@pytest.mark.parametrize('box', [(0, 0, 63, 131), (13, 37, 60, 50), (5, 16, 33, 40), (40, 99, 57, 32)])
@pytest.mark.parametrize('mode', ['bilinear', 'bicubic', 'lanczos'])
def test_crops_of_full_size_are_pillows_to_a_step(decoder, subsampling, box, mode):
    data = jpeg(scene(131, 97), subsampling=subsampling)
    expected = reference(data, box, (32, 24), Image.Resampling[mode.upper()])
    found = ours(decoder, data, box, (32, 24), InterpolationMode(mode))
    # Where colours are stored at half the width, a part has no neighbour beyond its left and right border.
    inner = slice(None) if subsampling == '4:4:4' else slice(2, -2)
    assert np.abs(found - expected)[:, inner].max() <= 1
    assert np.abs(found - expected).mean() < 0.5


@pytest.mark.parametrize('shrink,box', [(2, (3, 5, 81, 99)), (4, (7, 9, 161, 170)), (8, (1, 2, 300, 357))])
def test_large_crops_are_decoded_smaller(decoder, shrink, box, monkeypatch):
    asked = []
    part = DECODERS[decoder].part

    def told(self, data, box, shrink):
        asked.append(shrink)
        pixels = part(self, data, box, shrink)
        assert pixels.shape[0] >= 32 and pixels.shape[1] >= 32  # never below the size of the output
        return pixels

    monkeypatch.setattr(DECODERS[decoder], 'part', told)
    data = jpeg(scene(400, 320))
    difference = ours(decoder, data, box, (32, 32)) - reference(data, box, (32, 32))
    assert asked == [shrink]
    assert np.abs(difference).mean() < 2
    assert abs(difference.mean()) < 0.3  # no shift of brightness
    # A crop off by one pixel of the file would be seen at an edge.
    moved = reference(data, (box[0], box[1] + 2, *box[2:]), (32, 32)) - reference(data, box, (32, 32))
    assert np.abs(difference).mean() < np.abs(moved).mean()


def test_the_same_crops_and_flips_are_drawn(decoder, tmp_path):
    paths = [str(tmp_path / f'{index}.jpg') for index in range(6)]
    for path in paths:
        scene(150, 110).save(path, quality=95, subsampling='4:4:4')
    images = []
    for name in ('pillow', decoder):
        random.seed(3)
        torch.manual_seed(3)
        loader = create_train_loader(ImageSamples(paths, range(6)), torch.utils.data.SequentialSampler(paths),
                                     batch_size=6, defaults=FORMAT, num_workers=0, decoder=name)
        loader.set_epoch(0)
        (batch, labels), = loader
        images.append(batch)
        assert labels.tolist() == list(range(6))
    assert (images[0] - images[1]).abs().mean() < 0.02  # of a deviation of 1
    assert (images[0] - images[0].flip(3)).abs().mean() > 0.2


def test_crops_are_distributed_as_timms(decoder):
    data = jpeg(scene(80, 120))
    crop = RandomResizedCropAndInterpolation(16)
    drawn = []

    class Noting(DECODERS[decoder]):
        def part(self, data, box, shrink):
            drawn.append((box.height, box.width))
            return super().part(data, box, shrink)

    transform = DecodedCrop(transforms.Compose([crop]), Noting())
    random.seed(0)
    for _ in range(400):
        decoders_module.decoded_crop(transform.decoder, data, crop)
    random.seed(0)
    expected = [crop.get_params(Image.new('1', (80, 120)), crop.scale, crop.ratio)[2:] for _ in range(400)]
    shrunken = [Box(0, 0, height, width) for height, width in expected]
    shrinks = [next((s for s in (8, 4, 2) if s <= min(box.height // 16, box.width // 16)), 1) for box in shrunken]
    for found, box, shrink in zip(drawn, shrunken, shrinks, strict=True):
        assert abs(found[0] - box.height / shrink) <= 2 and abs(found[1] - box.width / shrink) <= 2


@pytest.mark.parametrize('kind', ['png', 'cmyk', 'exif', 'damaged', 'cut off'])
def test_odd_files_go_to_pillow(decoder, kind, tmp_path):
    path, image = tmp_path / 'picture', scene(90, 70)
    if kind == 'png':
        image.save(path, 'PNG')
    elif kind == 'cmyk':
        image.convert('CMYK').save(path, 'JPEG')
    elif kind == 'exif':
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, 'JPEG', exif=exif)
    else:
        data = jpeg(image)
        path.write_bytes(data[:len(data) // 3] if kind == 'cut off' else b'no picture at all')
    whole = AugmentSettings(scale=(1, 1), ratio=(9 / 7, 9 / 7), hflip=0)
    pictures = ImageSamples([str(path)], [0])
    results = []
    for name in ('pillow', decoder):
        create_train_loader(pictures, torch.utils.data.SequentialSampler(pictures), batch_size=1, defaults=FORMAT,
                            augment=whole, num_workers=0, decoder=name)
        random.seed(0)
        try:
            results.append(torch.as_tensor(pictures[0][0]))
        except InputError as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert kind in ('damaged', 'cut off') and results[0] == results[1]
    else:
        assert torch.equal(*results)


def crop_to(size, *crop):
    return transforms.Compose([RandomResizedCropAndInterpolation(size, *crop), MaybePILToTensor()])


def by_both(decoder, path, transform, seeds):
    """What Pillow and the decoder make of a file, each with the same random numbers: pictures, or sentences."""
    for seed in seeds:
        results = []
        for whole in (transform, DecodedCrop(transform, DECODERS[decoder]())):
            random.seed(seed)
            try:
                results.append(ImageSamples([str(path)], [0], whole)[0][0])
            except InputError as error:
                results.append(str(error))
        yield results


@pytest.mark.parametrize('width,height', [(1, 1), (1, 2), (2, 1)])
def test_empty_crops_of_tiny_pictures_are_pillows(decoder, width, height, tmp_path):
    path = tmp_path / 'x.jpg'
    path.write_bytes(jpeg(Image.new('RGB', (width, height), (10, 200, 30))))
    results = list(by_both(decoder, path, crop_to(4), range(60)))
    assert any(not images[0].any() for images in results)  # an empty crop is black
    assert all(torch.equal(*images) for images in results)


def test_orientation_is_found_behind_fill_bytes(decoder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(scene(90, 70), exif=exif)
    path = tmp_path / 'x.jpg'
    path.write_bytes(data.replace(b'\xff\xe1', b'\xff\xff\xff\xe1', 1))  # any number may stand before a mark
    whole = crop_to(16, (1, 1), (7 / 9, 7 / 9))
    (pillows, ours), = by_both(decoder, path, whole, [0])
    assert torch.equal(ours, pillows)


@pytest.mark.parametrize('data', [b'', b'\xff\xd8', b'\xff\xd8\xff', b'\xff\xd8\xff\xe1', b'\xff\xd8\xff\xff'])
def test_marks_may_be_cut_anywhere(data):
    assert not decoders_module._is_upright_and_whole(data)


@pytest.mark.parametrize('progressive', [False, True])
def test_a_file_without_its_end_is_pillows_wherever_the_crop_is(decoder, progressive, tmp_path):
    thumbnail = Image.Exif()
    thumbnail[0x9286] = jpeg(scene(16, 16))  # has an end mark of its own
    data = jpeg(scene(60, 120), exif=thumbnail, progressive=progressive)
    path = tmp_path / 'x.jpg'
    crop = crop_to(8, (0.1, 0.3))
    path.write_bytes(data[:-len(data) // 8])
    for pillows, ours in by_both(decoder, path, crop, range(8)):
        assert isinstance(pillows, str) and ours == pillows
    path.write_bytes(data + b'another picture')
    (_, ours), = by_both(decoder, path, crop, [0])
    assert ours.shape == (3, 8, 8)


def test_damage_that_decoding_meets_gives_pillows_crop(decoder, tmp_path):
    """Pillow reads on behind bad codes, and draws the crop that the decoder drew."""
    data = jpeg(scene(90, 70))
    middle = (len(data) + data.index(b'\xff\xda')) // 2
    path = tmp_path / 'x.jpg'
    path.write_bytes(data[:middle] + b'\xff\xd3' + data[middle + 2:])  # a mark of a restart that has no place there
    crop = crop_to(16, (0.9, 1))
    assert all(torch.equal(ours, pillows) for pillows, ours in by_both(decoder, path, crop, range(8)))
    tool, data = DECODERS[decoder](), path.read_bytes()
    with pytest.raises(CannotDecode):
        resized_part(tool, data, Box(0, 0, *tool.size(data)), (16, 16), InterpolationMode.BILINEAR)


def test_grey_files_become_three_channels(decoder):
    data = jpeg(scene(90, 70, 'L'))
    box, size = (5, 9, 60, 60), (32, 32)
    assert np.abs(ours(decoder, data, box, size) - reference(data, box, size)).max() <= 1


def test_huge_pictures_go_to_pillow_which_warns(decoder, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(CannotDecode):
        decoders_module.decoded_crop(DECODERS[decoder](), jpeg(scene(90, 70)), RandomResizedCropAndInterpolation(8))


def test_colour_changes_follow_as_before(decoder, tmp_path):
    """What has no form for bytes of torch, such as colour jitter, is done to a PIL image by the same steps."""
    path = str(tmp_path / 'x.jpg')
    scene(150, 110).save(path, quality=95, subsampling='4:4:4')
    pipeline = create_transform(DataDefaults(input_size=(3, 32, 32)), is_training=True)
    results = []
    for name in (None, decoder):
        random.seed(1)
        torch.manual_seed(1)
        samples = ImageSamples([path], [0], pipeline if name is None else DecodedCrop(pipeline, DECODERS[name]()))
        results.append(samples[0][0].int())
    assert results[1].shape == (3, 32, 32) and (results[0] - results[1]).abs().max() <= 4


def test_views_are_decoded_each(decoder, tmp_path):
    path = str(tmp_path / 'x.jpg')
    scene(150, 110).save(path)
    samples = ImageSamples([path] * 4, range(4))
    loader = create_train_loader(samples, torch.utils.data.SequentialSampler(samples), batch_size=4, defaults=FORMAT,
                                 num_workers=0, decoder=decoder, views=2)
    loader.set_epoch(0)
    (views, labels), = loader
    assert views.shape == (2, 4, 3, 32, 32) and not torch.equal(views[0], views[1])


def test_workers_read_too_and_evaluation_stays(decoder, tmp_path):
    path = str(tmp_path / 'x.jpg')
    scene(150, 110).save(path)
    samples = ImageSamples([path] * 4, range(4))

    def evaluated():
        (images, _), = create_eval_loader(samples, batch_size=4, defaults=FORMAT, num_workers=0)
        return images

    before = evaluated()
    loader = create_train_loader(samples, torch.utils.data.SequentialSampler(samples), batch_size=4, defaults=FORMAT,
                                 num_workers=1, decoder=decoder)
    loader.set_epoch(0)
    (images, _), = loader
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(evaluated(), before)


class Encoded:
    """A reader of timm's, whose pictures are encoded."""

    def __init__(self, contents):
        self.contents = contents

    def __getitem__(self, index):
        return io.BytesIO(self.contents[index]), index

    def __len__(self):
        return len(self.contents)


def epoch_of(dataset, decoder, views=1):
    """The training images of a dataset in order, by one seed."""
    random.seed(5)
    torch.manual_seed(5)
    loader = create_train_loader(dataset, None if isinstance(dataset, ShardStream) else torch.utils.data
                                 .SequentialSampler(dataset), batch_size=len(dataset), defaults=FORMAT, num_workers=0,
                                 decoder=decoder, views=views)
    (images, labels), = loader
    return images, labels


@pytest.mark.parametrize('views', [1, 2])
def test_shards_and_timms_datasets_give_the_pictures_of_a_folder(decoder, views, tmp_path, monkeypatch):
    """JPEG files and one that goes to Pillow: by the same numbers the very same pixels, wherever they come from."""
    kinds = [('x.jpg', {'quality': 90}), ('y.jpeg', {'quality': 70, 'subsampling': '4:2:0'}), ('z.png', {})]
    paths = [str(tmp_path / name) for name, _ in kinds]
    for path, (_, settings) in zip(paths, kinds, strict=True):
        scene(150, 110).save(path, **settings)
    contents = [Path(path).read_bytes() for path in paths]
    folder = ImageSamples(paths, range(3))
    expected, labels = epoch_of(folder, decoder, views)
    assert not torch.equal(expected, epoch_of(folder, 'pillow', views)[0])

    timms = ImageDataset('', reader=Encoded(contents))
    found, found_labels = epoch_of(timms, decoder, views)
    assert torch.equal(found, expected) and torch.equal(found_labels, labels)
    selected = SelectedSamples(timms, np.array([0, 1, 2]), np.arange(3))
    assert torch.equal(epoch_of(selected, decoder, views)[0], expected)
    assert timms[0][0].__class__ is not bytes and not timms.load_bytes  # an evaluation reads it as before

    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        for label, (name, content) in enumerate(zip('xyz', contents, strict=True)):
            for ending, part in ((kinds[label][0].partition('.')[2], content), ('cls', b'%d' % label)):
                member = tarfile.TarInfo(f'{name}.{ending}')
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    stream = ShardStream(str(tmp_path), open_index(str(tmp_path), ['train.tar'], 'train'))
    monkeypatch.setattr(loader_module, '_train_reading', lambda stream, *rest: EvalReading(stream))  # in order
    found, found_labels = epoch_of(stream, decoder, views)
    assert torch.equal(found, expected) and torch.equal(found_labels, labels)


def test_a_damaged_picture_of_a_timm_dataset_is_one_sentence(decoder):
    with pytest.raises(InputError, match='a training image of this dataset cannot be read .*no picture that Pillow'):
        epoch_of(ImageDataset('', reader=Encoded([b'nothing'])), decoder)


def test_where_it_has_no_use_it_is_refused(decoder, tmp_path):
    images = ImageSamples(['x.jpg'] * 2, [0, 1])
    with pytest.raises(InputError, match='brought to size otherwise: leave it out'):
        create_train_loader(images, torch.utils.data.SequentialSampler(images), batch_size=2, decoder=decoder,
                            defaults=DataDefaults(input_size=(3, 32, 32), train_transform='cifar'))
    with pytest.raises(InputError, match='reads image files'):
        create_train_loader(torch.utils.data.TensorDataset(torch.zeros(2)), None, batch_size=2, decoder=decoder,
                            defaults=FORMAT)


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(decoders_module, '_turbojpeg', lambda: None)
    with pytest.raises(InputError, match='--decoder turbojpeg needs turbojpeg, .*pip install turbojpeg'):
        DECODERS['turbojpeg']()


def test_the_decoder_is_part_of_the_recipe():
    """Pixels differ in the last bits, so a run tells by what it read, and Pillow is the default everywhere."""
    assert TrainSettings().decoding.decoder == 'pillow'
    assert 'decoder' in TrainSettings().values()

"""Several views of each picture in an evaluation."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from nbn_timm.attacks import Pixels
from nbn_timm.cli.train import main as train
from nbn_timm.cli.validate import main as validate
from nbn_timm.data import create_eval_loader
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.errors import InputError
from nbn_timm.evaluation.views import MeanOfViews, ViewSettings, view_transform


@pytest.fixture(scope='module')
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for size in ((50, 70, 3), (90, 45, 3))]


@pytest.mark.parametrize('name, cut', [('five_crop', transforms.FiveCrop), ('ten_crop', transforms.TenCrop)])
def test_the_crops_are_those_of_lift(name, cut, pictures):
    """LIFT resizes the shorter side to size + expand (bilinear), cuts, converts and normalises each crop by itself, and
    averages the logits. Its transform (661ead9) on 20 pictures of 60 to 500 pixels, size 64, expand 24: the pixels are
    equal, normalised they differ by at most 4.8e-7, and the mean logits of a linear network by 3.3e-7.
    """
    images = OWN_IMAGES.override((3, 32, 32), interpolation='bilinear')
    settings = ViewSettings(test_views=name, test_views_expand=8)
    loader = create_eval_loader(
        Pictures(pictures), batch_size=2, defaults=images, num_workers=0,
        transform=view_transform(settings, images), views=settings.number)
    (batch, _), = loader
    normalise = transforms.Normalize(images.mean, images.std)
    published = transforms.Compose([
        transforms.Resize(40), cut(32),
        transforms.Lambda(lambda crops: torch.stack([normalise(transforms.ToTensor()(crop)) for crop in crops]))])
    expected = torch.stack([published(picture) for picture in pictures])
    torch.testing.assert_close(batch.unflatten(1, (settings.number, 3)), expected, rtol=1e-5, atol=1e-5)

    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    each = network(expected.flatten(0, 1)).unflatten(0, (2, -1))
    torch.testing.assert_close(MeanOfViews(network, settings.number)(batch), each.mean(dim=1), rtol=1e-4, atol=1e-5)


class Pictures(torch.utils.data.Dataset):
    transform = None

    def __init__(self, pictures: list[Image.Image]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.transform(self.pictures[index]), index


def test_an_evaluation_by_views_from_the_command_line(tmp_path):
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for label in range(2):
            (tmp_path / 'own' / split / str(label)).mkdir(parents=True)
            for index in range(3):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
                    tmp_path / 'own' / split / str(label) / f'{index}.png')
    train(['--dataset', 'folder', '--data-dir', str(tmp_path / 'own'), '--model', 'test_vit', '--model-kwargs',
           'img_size=32', '--img-size', '32', '--epochs', '1', '--batch-size', '6', '--workers', '0', '--device', 'cpu',
           '--no-report', '--output', str(tmp_path), '--experiment', 'run'])
    command = ['--checkpoint', str(tmp_path / 'run' / 'last.pth.tar'), '--workers', '0', '--device', 'cpu',
               '--logits-file', str(tmp_path / 'logits.npz'), '--results-file', str(tmp_path / 'result.json')]
    validate([*command, '--test-views', 'five_crop', '--test-views-expand', '0'])
    views = np.load(tmp_path / 'logits.npz')
    assert views['logits'].shape == (6, 2)
    assert json.loads((tmp_path / 'result.json').read_text())['views'] == 'five_crop, 0 pixels more'
    command += ['--crop-pct', '1']  # a crop of an odd margin is not the mirror image of that of the mirror image
    validate([*command, '--test-views', 'flip'])
    assert json.loads((tmp_path / 'result.json').read_text())['views'] == 'flip'
    both = np.load(tmp_path / 'logits.npz')['logits']
    validate(command)
    alone = np.load(tmp_path / 'logits.npz')['logits']
    for picture in (tmp_path / 'own' / 'test').rglob('*.png'):
        with Image.open(picture) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    validate(command)
    np.testing.assert_allclose(both, (alone + np.load(tmp_path / 'logits.npz')['logits']) / 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match='--test-views-expand is for --test-views five_crop or ten_crop'):
        validate([*command, '--test-views', 'flip', '--test-views-expand', '3'])
    with pytest.raises(InputError, match='--test-views-expand has no effect without --test-views'):
        validate([*command, '--test-views-expand', '3'])


@pytest.mark.fast
def test_pictures_of_many_channels_have_no_crops():
    images = OWN_IMAGES.override((6, 32, 32), (0.5,), (0.2,))
    with pytest.raises(InputError, match='up to 4 channels, and these have 6'):
        view_transform(ViewSettings(test_views='five_crop'), images)
    bands = 255 * torch.rand(6, 32, 32)
    views = view_transform(ViewSettings(test_views='flip'), images)(bands)
    assert views.shape == (12, 32, 32) and torch.equal(views[6:], views[:6].flip(-1))
    with pytest.raises(InputError, match='pictures of 6 channels have measured values'):
        Pixels.of_format(images)

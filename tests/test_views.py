"""Several views of each image: loaders, the model that takes them, whole runs, and what is refused."""
import numpy as np
import pytest
import timm
import torch
from formats import CIFAR_LT
from test_batched import noise
from test_losses import class_counts
from test_train_run import LAST, assert_same, data_flags, images  # noqa: F401
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import SequentialSampler

import nbn_timm.cli.train as train
from nbn_timm.data import ArraySamples, AugmentSettings, MemoryImages, create_train_loader, keep_in_memory
from nbn_timm.errors import InputError
from nbn_timm.losses import LOSSES, create_loss, number_of_views
from nbn_timm.losses import loss as losses_by_name
from nbn_timm.losses.loss import register_loss
from nbn_timm.training.distributed import World
from nbn_timm.training.loop import LoopSettings, compute_loss
from nbn_timm.training.optim import AverageSettings
from nbn_timm.training.task import evaluation_model, prepare_task
from nbn_timm.training.views import WithViews

RIDE = ['--model', 'resnet32_ride_nbn', '--img-size', '8', '--device', 'cpu', '--workers', '0']


@pytest.mark.parametrize('kind', [ArraySamples, MemoryImages])
def test_other_views_have_their_own_augmentation(kind):
    """The first view is cropped, the others have a black square of up to the whole image as well."""
    samples = kind(np.full((6, 32, 32, 3), 200, np.uint8), np.arange(6))
    augment = AugmentSettings(no_aug=True, other_views={'no_aug': False, 'cutout': 32})
    loader = create_train_loader(samples, SequentialSampler(samples), batch_size=4, defaults=CIFAR_LT, num_workers=0,
                                 augment=augment, views=3, other_views=augment.of_other_views())
    loader.set_epoch(0)
    batches = list(loader)
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(3, 4, 3, 32, 32), (3, 2, 3, 32, 32)]
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(6))
    for pixels, _ in batches:
        whole = pixels == pixels[0, 0, :, 16, 16].view(3, 1, 1)
        assert whole[0].all() and not whole[1].all() and not whole[2].all() and not torch.equal(pixels[1], pixels[2])


def test_views_of_files_and_of_memory_are_the_same_where_nothing_is_drawn():
    pixels, labels = noise(5), np.arange(5)
    augment = AugmentSettings(no_aug=True)
    both = [list(create_train_loader(samples, SequentialSampler(samples), batch_size=2, defaults=CIFAR_LT,
                                     num_workers=0, augment=augment, views=2))
            for samples in (ArraySamples(pixels, labels), MemoryImages(pixels, labels))]
    assert_same([list(batch) for batch in both[0]], [list(batch) for batch in both[1]])


def test_images_stay_in_files_if_one_view_needs_them_one_at_a_time():
    samples = ArraySamples(noise(4), np.arange(4))
    single = AugmentSettings(aa='augmix-m5-w4-d2')
    assert isinstance(keep_in_memory(samples, CIFAR_LT, AugmentSettings()), MemoryImages)
    assert keep_in_memory(samples, CIFAR_LT, AugmentSettings(), other_views=single) is samples


@pytest.mark.parametrize('other_views, message', [
    ({'rotatoin': 0}, "--other-views has no setting 'rotatoin'.*did you mean 'rotation'"),
    ({'reprob': 0.5}, "--other-views has no setting 'reprob'"),
    ({'hflip': 2}, 'hflip'),
])
def test_wrong_settings_of_other_views_are_one_sentence(other_views, message):
    with pytest.raises(InputError, match=message):
        AugmentSettings(other_views=other_views)


def test_other_views_differ_from_the_first_where_they_say():
    first = AugmentSettings(rotation=15, hflip=0.1, other_views={'rotation': 0, 'aa': 'cifar10'})
    assert first.of_other_views() == AugmentSettings(rotation=0, hflip=0.1, aa='cifar10')
    assert AugmentSettings(cutout=8).of_other_views() == AugmentSettings(cutout=8)


def test_all_views_pass_the_network_at_once():
    """So that BatchNorm takes its statistics of all of them; in evaluation and in checkpoints it is the network."""
    torch.manual_seed(0)
    model = timm.create_model('resnet32_ride', num_classes=3)
    model.set_expert_logits()
    views = torch.randn(2, 4, 3, 32, 32)
    expected = model(views.flatten(0, 1))
    given = []

    def criterion(logits, target):
        given.append(logits)
        return logits.sum() * 0

    task = ClassificationTask(WithViews(model), criterion, verbose=False)
    prepare_task(task, World(torch.device('cpu')), AverageSettings(model_ema=True), None)
    task.train()
    for settings in (LoopSettings(), LoopSettings(channels_last=True)):
        compute_loss(task, views, torch.tensor([0, 1, 2, 0]), settings, torch.device('cpu'))
    for logits in given:
        assert logits.shape == (2, 4, 3, 3)
        torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    for ema in (False, True):
        state = task.get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict']
        assert state.keys() == model.state_dict().keys()
    assert evaluation_model(task).eval()(views[0]).shape == (4, 3)


def test_mdcs_takes_two_views():
    assert number_of_views('mdcs') == 2 and number_of_views('ride') == 1
    with pytest.raises(InputError, match="'mdcs' cannot be deferred"):
        create_loss('mdcs', class_counts(3, 2, 1), start_epoch=2)


def test_a_run_with_two_views_resumes_bit_for_bit(images, tmp_path):  # noqa: F811
    flags = [*data_flags(images), *RIDE, '-b', '4', '--epochs', '2', '--loss', 'mdcs', '--rotation', '15',
             '--other-views', 'rotation=0', 'cutout=4', '--channels-last', '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])
    train.main([*flags, '--experiment', 'parts', '--epochs', '1'])
    train.main([*flags, '--experiment', 'parts', '--resume', 'auto'])
    whole, parts = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ('whole', 'parts'))
    assert_same(whole['state_dict'], parts['state_dict'])
    assert whole['args']['other_views'] == {'rotation': 0, 'cutout': 4}


@pytest.fixture
def two_view_loss():
    """A stranger's loss of two views, which is in the package for one test."""
    @register_loss('agreement', views=2)
    class Agreement(nn.Module):
        """Squared distance of the two views' logits, and the usual loss of the first."""

        def __init__(self, class_counts) -> None:
            super().__init__()

        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            first, second = logits.float()
            return nn.functional.cross_entropy(first, target) + (first - second).square().mean()

    yield 'agreement'
    del LOSSES['agreement'], losses_by_name._TRAITS['agreement']


def test_a_loss_of_ones_own_needs_no_more_than_the_number_of_its_views(two_view_loss, images, tmp_path):  # noqa: F811
    train.main([*data_flags(images), '--model', 'resnet20', *RIDE[2:], '-b', '4', '--epochs', '1', '--loss',
                two_view_loss, '--output', str(tmp_path), '--experiment', 'run'])
    assert (tmp_path / 'run' / 'test.json').exists()
    with pytest.raises(InputError, match='several views of an image, which are not mixed: leave out --mixup'):
        train.main([*data_flags(images), '--model', 'resnet20', *RIDE[2:], '--loss', two_view_loss, '--mixup', '0.2',
                    '--output', str(tmp_path), '--experiment', 'mixed'])


@pytest.mark.parametrize('flags, message', [
    (['--loss', 'mdcs', '--mixup', '0.2'], "loss 'mdcs' takes labels and no mixed targets"),
    (['--loss', 'ride', '--other-views', 'cutout=4'], "has no effect on loss 'ride', which takes one view"),
    (['--loss', 'mdcs', '--kd-checkpoint', 'some.pth'], "'mdcs' takes several views of an image.*leave out --kd"),
])
def test_wrong_combinations_are_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *RIDE, *flags, '-b', '4', '--output', str(tmp_path)])

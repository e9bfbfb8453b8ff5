"""Adversarial training: losses and gradients of the authors' codes, the attack's draws, and what it does not go with.

A step in float32 on the same network, pictures and start was compared with the authors' functions (2026-11): loss and
largest difference of a gradient beside the largest gradient,
TRADES's `trades_loss` (yaodongyu/TRADES, commit 6e8e11b, ten steps): 1.2e-7, and 1.4e-7 of 0.24;
MART's `mart_loss` (YisenWang/MART, commit 2d83e17, ten steps): 0, and 1.5e-7 of 0.36;
RoBal's `add_reg_train` with `MultiMarginLoss` and `CosPlus_Classifier` (wutong16/Adversarial_Long-Tail, commit ab2f3a7,
five steps) by the margins of RoBal-N and RoBal-R for CIFAR-10 and of RoBal-R for CIFAR-100: 5.5e-8, 6.5e-8 and 0, and
at most 1.1e-6 of 2.0. BatchNorm's statistics are theirs to the bit after TRADES and MART. Loss and norms of gradients
by their code are pinned below.
"""
import pytest
import timm
import torch
from test_train_run import MODEL, data_flags, images  # noqa: F401  (a fixture)
from torch import nn

from nbn_timm.adversarial import ADVERSARIAL
from nbn_timm.adversarial.settings import AdversarialSettings
from nbn_timm.attacks import Pixels
from nbn_timm.cli import train
from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.layers.head import CosPlusLinear
from nbn_timm.losses import create_loss, takes_features
from nbn_timm.training.adversarial import AdversarialTask, BatchAttack
from nbn_timm.training.distributed import World
from nbn_timm.training.features import WithFeatures
from nbn_timm.training.task import begin_epoch

CPU = torch.device('cpu')
COUNTS = ClassCounts(counts=(100, 50, 20, 10, 4), names=tuple('abcde'), source='a test')


def network(head) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         head(32, 5))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(12, 3, 8, 8, generator=generator), torch.randint(0, 5, (12,), generator=generator)


def task_of(method: str, net: nn.Module, loss=None, temperature=1.0, rank=0, **given) -> AdversarialTask:
    settings = AdversarialSettings(
        **{'adversarial': method, 'adv_eps': 0.031, 'adv_step': 0.007, 'adv_temperature': temperature, **given})
    attack = BatchAttack(settings, ADVERSARIAL[method](settings.adv_weight, temperature), Pixels((0.0,), (1.0,)), 0,
                         World(CPU, rank))
    task = AdversarialTask(net, loss or nn.CrossEntropyLoss(), attack, CPU)
    task.train()
    return task


@pytest.mark.parametrize(('method', 'loss', 'norms'), [
    ('trades', 1.690671801567, [0.506936, 0.0, 0.076412, 0.066201, 0.811759, 0.285004]),
    ('mart', 2.152290582657, [0.679642, 0.0, 0.170251, 0.153158, 1.321557, 0.488583])])
def test_a_step_of_the_authors(method, loss, norms):
    task = task_of(method, network(nn.Linear))
    found = task(*batch())['loss']
    found.backward()
    # The attack takes signs of gradients, and of one next to zero the rounding of a processor decides.
    assert found.item() == pytest.approx(loss, rel=2e-4)
    assert [parameter.grad.norm().item() for parameter in task.trainable_module.parameters()] == pytest.approx(
        norms, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize(('margins', 'loss', 'norms'), [
    (dict(margin=0.1, tau_b=1.2, tau_m=0.0), 4.010638291949, [4.45249, 0.0, 0.90343, 1.113867, 7.886417]),
    (dict(margin=0.1, tau_b=1.5, tau_m=0.3), 4.581549102780, [4.696867, 0.0, 0.953667, 1.181356, 8.17122]),
    (dict(margin=0.3, tau_b=0.0, tau_m=0.0), 6.245248317719, [4.370737, 0.0, 0.602615, 0.772241, 9.004321])])
def test_a_step_of_robal(margins, loss, norms):
    """Attack and comparison see cosines, the loss ten times those: temperature 10 beside a head of scale 10."""
    net = network(CosPlusLinear)
    torch.manual_seed(0)
    draws = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1))  # the authors' head follows it in the same stream of numbers
    nn.init.kaiming_uniform_(net[-1].weight.data, a=5 ** 0.5)
    assert torch.equal(draws[0].weight, net[0].weight)
    task = task_of('robal', net, create_loss('robal', COUNTS, scale=10.0, **margins), 10.0, adv_steps=5)
    found = task(*batch())['loss']
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert [p.grad.norm().item() for p in net.parameters()] == pytest.approx(norms, abs=2e-4)


def test_pgd_is_the_loss_of_the_attacked_pictures_and_one_pass_of_batch_norm():
    task = task_of('pgd', network(nn.Linear), adv_start='none')
    net, (pictures, target) = task.trainable_module, batch()
    attacked = task.attack(net, pictures, target)
    assert (attacked - pictures).abs().max() <= 0.031 + 1e-6 and net[1].num_batches_tracked == 0 and net.training
    found = task(pictures, target)['loss']
    assert net[1].num_batches_tracked == 1
    torch.testing.assert_close(found, nn.functional.cross_entropy(net(attacked), target))


def test_bounds_are_of_pixels_whatever_the_normalisation():
    """The same pictures under another mean and std, in a network that undoes them, are attacked alike."""
    task, (pictures, target) = task_of('pgd', network(nn.Linear)), batch()
    plain = task.attack(task.trainable_module, pictures, target)
    task.attack.set_epoch(0)
    task.attack.pixels = Pixels((0.5,), (0.25,))

    class Undo(nn.Module):
        def forward(self, x):
            return x * 0.25 + 0.5

    normalised = task.attack(nn.Sequential(Undo(), *task.trainable_module), (pictures - 0.5) / 0.25, target)
    differs = ((normalised * 0.25 + 0.5) - plain).abs() > 1e-5  # where a gradient of nearly 0 has another sign
    assert differs.float().mean() < 0.02


@pytest.mark.parametrize(('kind', 'low', 'high'), [
    ('uniform', -0.031, 0.031), ('positive', 0.0, 0.031), ('gaussian', -0.0045, 0.0045), ('none', 0.0, 0.0)])
def test_where_an_attack_begins(kind, low, high):
    start = task_of('pgd', network(nn.Linear), adv_start=kind).attack.start(torch.zeros(64, 3, 8, 8))
    assert low <= start.min() <= 0.9 * low + 0.001 and 0.9 * high - 0.001 <= start.max() <= high


def test_draws_follow_from_seed_epoch_and_process_alone():
    """So a resumed run attacks as it would have, and augmentation and dropout draw what they would without it."""
    def starts(epoch: int, rank: int = 0) -> torch.Tensor:
        task = task_of('pgd', network(nn.Linear), rank=rank)
        task.attack.start(pictures)  # of an epoch before
        begin_epoch(task, Loader(), None, epoch)
        return task.attack.start(pictures)

    class Loader:
        def set_epoch(self, epoch: int, part: object) -> None:
            pass

    pictures, _ = batch()
    assert torch.equal(starts(3), starts(3))
    assert not torch.equal(starts(3), starts(4)) and not torch.equal(starts(3), starts(3, rank=1))
    task, before = task_of('trades', network(nn.Linear)), torch.random.get_rng_state()
    task(*batch())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize('method', sorted(ADVERSARIAL))
def test_bfloat16_keeps_pixels_in_float32(method):
    task, (pictures, target) = task_of(method, network(nn.Linear), adv_steps=2), batch()
    with torch.autocast('cpu', torch.bfloat16):
        loss = task(pictures, target)['loss']
        attacked = task.attack(task.trainable_module, pictures, target)
    loss.backward()
    assert loss.isfinite() and attacked.dtype is torch.float32
    assert 0 < (attacked - pictures).abs().max() <= 0.031 + 1e-6


@pytest.mark.parametrize(('flags', 'message'), [
    (['--mixup', '0.2'], '--adversarial trades attacks the label of a picture, and --mixup mixes labels'),
    (['--loss', 'bcl'], "loss 'bcl' takes several views of an image, and --adversarial trades attacks one"),
    (['--loss', 'ride', '--model', 'resnet32_ride'], "loss 'ride' takes those of each expert: give --adversarial pgd"),
    (['--kd-checkpoint', 'x.pth'], '--adversarial trades is a training of its own, which has no place for --kd-check'),
    (['--sam-rho', '0.1'], 'which has no place for --sam-rho'), (['--swa-epochs', '1'], 'no place for --swa-epochs'),
    (['--amp'], '--adversarial trades in float16 would lose the small gradients'),
    (['--adversarial', 'pgd', '--adv-weight', '2'], '--adv-weight has no effect on --adversarial pgd, which compares'),
])
def test_what_it_does_not_go_with(flags, message, images, tmp_path):  # noqa: F811
    with pytest.raises(InputError) as error:
        train.main([*data_flags(images), *MODEL, '-b', '4', '--epochs', '1', '--output', str(tmp_path), '--adversarial',
                    'trades', *flags])
    assert message in str(error.value)


def test_without_adversarial_its_settings_have_no_effect(images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match='--adv-eps has no effect without --adversarial'):
        train.main([*data_flags(images), *MODEL, '--output', str(tmp_path), '--adv-eps', '0.1'])


@pytest.mark.parametrize(('method', 'name', 'arch'), [
    ('robal', 'influence_balanced', 'resnet20_nbn'), ('pgd', 'ride', 'resnet32_ride_nbn')])
def test_losses_of_features_and_of_experts(method, name, arch):
    """The attack goes by the logits of evaluation, the loss takes what it takes."""
    torch.manual_seed(0)
    net = timm.create_model(arch, num_classes=5, num_blocks=1)
    if name == 'ride':
        net.set_expert_logits()
    task = task_of(method, WithFeatures(net) if takes_features(name) else net, create_loss(name, COUNTS), adv_steps=1)
    loss = task(*batch())['loss']
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in net.parameters())

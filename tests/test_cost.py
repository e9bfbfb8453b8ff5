"""benchmarks/cost.py: the operations of networks and recipes."""
import cost
import pytest

from nbn_timm.cli.train import parse_train
from nbn_timm.errors import InputError
from nbn_timm.training.settings import TrainSettings


def settings(*flags):
    return parse_train(['--dataset', 'cifar100_lt', '--model', 'resnet32', *flags])


def test_operations_are_those_of_the_networks():
    """Plain ResNet-32 has 68,868,352 multiply-adds; 200 epochs of 10,847 images are 0.90 PFLOP."""
    assert cost.size_of(settings(), 100) == (470_004, pytest.approx(68_868_352, rel=1e-3))
    whole = cost.training_flop(settings('--epochs', '200'), 100, 10_847)
    assert whole / 1e15 == pytest.approx(0.90, abs=0.005)
    small = cost.training_flop(settings('--epochs', '200', '--progressive-size', '16'), 100, 10_847)
    assert small / whole == pytest.approx(0.625, abs=0.01)
    for flags, factor in ((['--sam-rho', '0.1'], 2), (['--loss', 'bcl'], 3), (['--loss', 'paco'], 4 / 3),
                          (['--stage', 'crt', '--initial-checkpoint', 'x'], 1 / 3)):
        given = TrainSettings.of({**settings('--epochs', '200').values(), **{
            flag[2:].replace('-', '_'): float(value) if flag == '--sam-rho' else value
            for flag, value in zip(flags[::2], flags[1::2], strict=True)}})
        assert cost.training_flop(given, 100, 10_847) / whole == pytest.approx(factor, rel=1e-6)


def test_images_are_of_the_size_that_training_gives_them():
    """A network made for 224 pixels sees CIFAR's 32, and images of one's own at its own size."""
    def macs(*flags):
        return cost.size_of(parse_train(['--model', 'resnet18', *flags]), 100)[1]

    small = macs('--dataset', 'cifar100_lt')
    assert macs('--dataset', 'folder', '--data-dir', '.') == pytest.approx(49 * small, rel=0.01)
    assert macs('--dataset', 'cifar100_lt', '--img-size', '224') == macs('--dataset', 'folder', '--data-dir', '.')


def test_the_mean_of_weights_takes_a_pass_for_its_statistics():
    whole, swa = (cost.training_flop(settings('--epochs', '5', *flags), 100, 100)
                  for flags in ((), ('--swa-epochs', '2')))
    assert swa / whole == pytest.approx(1 + 1 / 15)


@pytest.mark.parametrize('given, what', [
    (dict(adversarial='pgd'), '--adversarial'), (dict(curriculum=True), '--curriculum'),
    (dict(kd_checkpoint='x'), '--kd-checkpoint'), (dict(loss='bbn'), 'two streams'),
    (dict(stage='expert_aggregation'), '--stage expert_aggregation'), (dict(stage='balms'), '--stage balms'),
    (dict(stage='h2t'), '--stage h2t'), (dict(stage='ncm'), '--stage ncm'), (dict(freeze='layer2'), '--freeze'),
    (dict(freeze_epochs=1), '--freeze-epochs'), (dict(grad_checkpointing=True), '--grad-checkpointing'),
    (dict(tune='lora'), '--tune'), (dict(head_start='class_means'), '--head-start class_means')])
def test_what_is_not_counted_is_refused(given, what):
    with pytest.raises(InputError, match=f'a recipe with {what} are not counted here'):
        cost.check_counted(settings().with_values(**given))

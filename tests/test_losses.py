"""Losses against the released code's figures, textbook formulas and torch's own cross-entropy."""
import math

import pytest
import torch
import torch.nn.functional as F

from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses import LOSSES, create_loss

LOGITS = torch.tensor([[1.5, -0.5, 0.25], [0.0, 2.0, -1.0]])
TARGET = torch.tensor([2, 0])


def class_counts(*counts: int) -> ClassCounts:
    return ClassCounts(counts, tuple(f'class {label}' for label in range(len(counts))), 'a test')


def test_balanced_softmax_gives_the_released_figures():
    """Inputs, loss and gradient norm of BalancedSoftmaxLoss in yuxiangbao/NBN, commit 7365e21."""
    logits = torch.tensor([
        [5.3658853, 1.3095295, 0.2894924, -5.5904779, -0.83216459, -1.0642769, -0.24822444, -1.8810021,
         -0.13145451, -1.4316541, -3.9415944, 2.6538672],
        [2.643954, 5.1287193, 0.15010093, -1.2140323, -1.6360798, -4.639432, 2.9471023, -3.3032029,
         -3.5551395, -0.61694968, 4.4584451, 0.71014881],
        [-3.0713553, -2.1389797, 1.8757349, -0.48154008, -2.306509, -0.69009215, 2.2351687, 5.9283323,
         -3.7323699, -1.8792508, -2.4112983, -7.2572494],
        [-2.7713761, -3.0716274, 3.3719339, -0.39574268, -4.8698564, 1.9400264, -1.0688123, -5.229423,
         -1.7899489, -1.7657832, -2.6216469, 0.089141443],
        [-6.7447734, -0.8032856, 3.0395503, 2.5583935, 3.3245625, 3.3581719, 4.4626293, -3.354902, 2.5375001,
         -5.5826688, -1.8086553, -5.7434163],
        [3.1444426, 4.0012136, -0.59224403, 5.323935, -2.0241826, 0.45185059, 0.45883712, -3.1925857,
         1.3138398, 5.8169355, -3.0747926, 2.6980155],
        [-0.46352056, 5.3088818, 1.451365, 2.0286491, 1.9294899, 0.74726009, -4.1872907, 4.1749887,
         -4.1120071, 0.7156896, 1.8422313, -2.5137367],
        [0.43518963, 3.5036469, -0.072313413, -2.6659722, -8.7472134, -2.9155216, -1.7732363, -1.5492522,
         -2.8799884, 1.1318856, -1.7241253, -0.328363],
    ], requires_grad=True)
    target = torch.tensor([3, 4, 11, 8, 11, 4, 2, 6])
    loss = create_loss('balanced_softmax', class_counts(300, 197, 129, 85, 56, 36, 24, 16, 10, 6, 4, 3))(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(9.664567947387695, rel=1e-6)
    assert logits.grad.norm().item() == pytest.approx(0.45953378081321716, rel=1e-6)

def test_balanced_softmax_is_the_softmax_weighted_by_counts():
    """eq. 3 of the paper: p_y = n_y exp(z_y) / sum_c n_c exp(z_c), written out without torch."""
    counts = (100, 10, 1)
    expected = 0.0
    for logits, label in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        weights = [count * math.exp(logit) for count, logit in zip(counts, logits, strict=True)]
        expected -= math.log(weights[label] / sum(weights)) / len(TARGET)
    loss = create_loss('balanced_softmax', class_counts(*counts))(LOGITS, TARGET)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_equal_counts_make_balanced_softmax_plain():
    plain = create_loss('cross_entropy')(LOGITS, TARGET)
    torch.testing.assert_close(create_loss('balanced_softmax', class_counts(7, 7, 7))(LOGITS, TARGET), plain)


@pytest.mark.parametrize('name', sorted(LOSSES))
def test_soft_targets_of_one_class_are_hard_targets(name):
    loss = create_loss(name, class_counts(100, 10, 1))
    torch.testing.assert_close(loss(LOGITS, F.one_hot(TARGET, 3).float()), loss(LOGITS, TARGET))


@pytest.mark.parametrize('name', sorted(LOSSES))
def test_mixed_targets_mix_the_losses(name):
    """Cross-entropy is linear in its target, so mixup's target gives mixup's loss."""
    loss = create_loss(name, class_counts(100, 10, 1))
    flipped = TARGET.flip(0)
    mixed = 0.3 * F.one_hot(TARGET, 3) + 0.7 * F.one_hot(flipped, 3)
    torch.testing.assert_close(loss(LOGITS, mixed), 0.3 * loss(LOGITS, TARGET) + 0.7 * loss(LOGITS, flipped))


@pytest.mark.parametrize('name', sorted(LOSSES))
def test_smoothing_is_the_smoothed_target(name):
    counts = class_counts(100, 10, 1)
    smoothed = 0.9 * F.one_hot(TARGET, 3) + 0.1 / 3
    torch.testing.assert_close(create_loss(name, counts, smoothing=0.1)(LOGITS, TARGET),
                               create_loss(name, counts)(LOGITS, smoothed))


@pytest.mark.parametrize('name', sorted(LOSSES))
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    loss = create_loss(name, class_counts(100_000, 10, 1))
    logits = LOGITS.to(dtype)
    result = loss(logits, TARGET)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(logits.float(), TARGET))


def test_a_class_without_images_stays_finite():
    loss = create_loss('balanced_softmax', class_counts(100, 10, 0))
    soft = torch.full((2, 3), 1 / 3)
    assert loss(LOGITS, soft).isfinite()
    torch.testing.assert_close(
        loss(LOGITS, soft), create_loss('balanced_softmax', class_counts(100, 10, 1))(LOGITS, soft))


def test_errors_name_the_remedy():
    with pytest.raises(InputError, match="unknown loss 'balanced_softmx'.*did you mean 'balanced_softmax'"):
        create_loss('balanced_softmx', class_counts(1, 1))
    with pytest.raises(InputError, match='--class-counts'):
        create_loss('balanced_softmax', None)
    with pytest.raises(InputError, match="no setting 'smothing'.*did you mean 'smoothing'"):
        create_loss('cross_entropy', None, smothing=0.1)

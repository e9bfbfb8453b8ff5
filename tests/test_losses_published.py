"""Losses against values and gradients of their authors' code on one set of logits.

The figures were computed from the formulas and by running the authors' own loss on the same logits, in float64: BalPoE
emasa/BalPoE-CalibratedLT, commit ca607ae.
"""
import pytest
import torch
import torch.nn.functional as F
from test_losses import class_counts

from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss

pytestmark = pytest.mark.fast

COUNTS = class_counts(*(int(500 * 0.01 ** (label / 9)) for label in range(10)))
LABELS = torch.tensor([3 * image % 10 for image in range(8)])


def expert_logits(phase: float = 1.0) -> torch.Tensor:
    """3 sin(phase + 7 i + 3 c + 5 e) for image i, expert e and class c, [8, 3, 10]."""
    image, expert, label = (torch.arange(n, dtype=torch.float64) for n in (8, 3, 10))
    return 3 * torch.sin(phase + 7 * image[:, None, None] + 5 * expert[:, None] + 3 * label)


def mixed(share: float = 0.3) -> torch.Tensor:
    """Targets of `share` times one label and the rest another, [8, 10]."""
    return share * F.one_hot(LABELS, 10) + (1 - share) * F.one_hot(LABELS.flip(0), 10)


def check(loss: torch.nn.Module, logits: torch.Tensor, target: torch.Tensor, value: float, norm: float, first: float):
    """Value of a loss, 2-norm of its gradient, and that of the first expert's logit of class 0 in image 0."""
    logits = logits.float().requires_grad_()
    result = loss(logits, target)
    result.backward()
    assert result.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad.norm().item() == pytest.approx(norm, rel=1e-6)
    assert logits.grad.flatten()[0].item() == pytest.approx(first, rel=2e-6)


def test_the_inputs_are_those_of_the_figures():
    assert COUNTS.counts == (500, 299, 179, 107, 64, 38, 23, 13, 8, 5)
    assert expert_logits()[0, 0, :3].tolist() == pytest.approx([2.524413, -2.270407, 1.970960], abs=1e-6)
    assert LABELS.tolist() == [0, 3, 6, 9, 2, 5, 8, 1]
    assert F.cross_entropy(expert_logits()[:, 0], LABELS).item() == pytest.approx(3.9175994, rel=1e-7)


@pytest.mark.parametrize('settings', [{}, {'tau': (0, 1, 2)}])
def test_balpoe_is_its_authors(settings):
    loss = create_loss('balpoe', COUNTS, **settings)
    check(loss, expert_logits(), LABELS, 4.5781101, 0.22456717, -0.023960422)
    check(loss, expert_logits(), mixed(), 4.7800133, 0.18293191, 0.005206245)


def test_balpoe_spreads_tau_evenly_with_mean_one():
    logits = expert_logits().float()
    for tau in ([1.0], [0.0, 2.0], [0.0, 1.0, 2.0]):
        some = logits[:, :len(tau)]
        each = [create_loss('logit_adjusted', COUNTS, tau=one)(some[:, e], LABELS) for e, one in enumerate(tau)]
        torch.testing.assert_close(create_loss('balpoe', COUNTS)(some, LABELS), torch.stack(each).mean())
    with pytest.raises(InputError, match='2 numbers for tau, and the network 3 experts'):
        create_loss('balpoe', COUNTS, tau=[0, 2])(logits, LABELS)

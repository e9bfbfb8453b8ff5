"""Losses against values and gradients of their authors' code on one set of logits.

The figures were computed from the formulas and by running the authors' own loss on the same logits, in float64: BalPoE
emasa/BalPoE-CalibratedLT, commit ca607ae; SADE Vanint/SADE-AgnosticLT, cba11b8; MDCS fistyee/MDCS, 1a1d54e; VS
orparask/VS-Loss, 7ade9c9; weight balancing ShadeAlsha/LTR-weight-balancing, e89f292; GCL
Keke921/GCLLoss, c2a6233; MiSLAS dvlab-research/MiSLAS, 0fc381e.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from test_losses import class_counts

from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss
from nbn_timm.losses.prior import log_prior
from nbn_timm.losses.sade import reversed_order
from nbn_timm.second_stages.expert_aggregation import agreement_loss
from nbn_timm.second_stages.weight_balancing import radius, shorten

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


def check(loss, logits: torch.Tensor, target: torch.Tensor, value: float, norm: float, first: float, rel: float = 2e-6):
    """Value of a loss, 2-norm of its gradient, and that of the first expert's logit of class 0 in image 0."""
    logits = logits.float().requires_grad_()
    result = loss(logits, target)
    result.backward()
    assert result.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad.norm().item() == pytest.approx(norm, rel=1e-6)
    assert logits.grad.flatten()[0].item() == pytest.approx(first, rel=rel)


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


def test_sade_is_its_authors():
    check(create_loss('sade', COUNTS), expert_logits(), LABELS, 15.5994045, 0.68870629, -0.071881265)


def test_sade_reverses_the_prior_by_rank():
    """Whatever the order of the classes: the most frequent one has the smallest share."""
    counts = (10, 1000, 1, 100)
    prior = torch.tensor(counts) / sum(counts)
    reverse = torch.tensor((100, 1, 1000, 10)) / sum(counts)
    logits, target = expert_logits()[:4, :, :4].float(), torch.tensor([0, 1, 2, 3])
    expected = (F.cross_entropy(logits[:, 0], target) + F.cross_entropy(logits[:, 1] + prior.log(), target)
                + F.cross_entropy(logits[:, 2] + prior.log() - 2 * reverse.log(), target))
    torch.testing.assert_close(create_loss('sade', class_counts(*counts))(logits, target), expected, rtol=1e-5, atol=0)
    falling = log_prior(class_counts(9, 5, 5, 5, 1, 1))
    assert torch.equal(reversed_order(falling), falling.flip(0))
    with pytest.raises(InputError, match='three experts, and the network has 2'):
        create_loss('sade', COUNTS)(expert_logits()[:, :2], LABELS)


@pytest.mark.parametrize('epoch, value, norm', [(10, 18.5649558, 0.81730333), (40, 20.5618347, 1.04540047)])
def test_mdcs_is_its_authors(epoch, value, norm):
    """Images 0 to 3 are the first view, 4 to 7 the second; epochs are counted from 1."""
    loss = create_loss('mdcs', COUNTS)
    loss.set_epoch(epoch - 1)
    views = expert_logits().unflatten(0, (2, 4))
    check(loss, views, torch.tensor([3, 0, 9, 8]), value, norm, 0.020101616)


def test_mdcs_distils_from_images_that_are_right_alone():
    views = expert_logits().unflatten(0, (2, 4)).float()
    wrong = (views[0] + create_loss('mdcs', COUNTS).shifts).argmin(dim=2)[:, 0]  # of expert 0
    logits = views[:, :1].clone().requires_grad_()
    create_loss('mdcs', COUNTS, weight=1e6)(logits, wrong[:1]).backward()
    assert logits.grad[:, :, 0].abs().max() < 1
    with pytest.raises(InputError, match='3 powers, and the network 2 experts'):
        create_loss('mdcs', COUNTS)(views[:, :, :2], wrong)


@pytest.mark.parametrize('settings, value, norm, first', [
    ({'gamma': 0.3, 'tau': 1.0}, 3.9791168, 0.26137560, -0.017974516),
    ({'gamma': 0.05, 'tau': 0.75}, 4.1354497, 0.33559216, -0.031417463),
])
def test_vs_is_its_authors(settings, value, norm, first):
    check(create_loss('vs', COUNTS, **settings), expert_logits()[:, 0], LABELS, value, norm, first)


@pytest.mark.parametrize('settings, value, norm, first', [
    ({}, 28.9497300, 4.2162080, -0.001551438),
    ({'margin': 0.1, 'loss_scale': 20, 'gamma': 1}, 21.0908449, 2.8265160, -0.005162508),
])
def test_gcl_is_its_authors(settings, value, norm, first):
    """Of both stages, with cosines z / 3, which a head of scale 30 gives as 10 z, and noise that is fixed."""
    loss = create_loss('gcl', COUNTS, **settings)
    image, label = torch.arange(8.0)[:, None], torch.arange(10.0)
    loss.clouds = lambda cosines: (1.2 * torch.sin(2 + 5 * image + 7 * label)).clamp(-1, 1).abs()
    check(lambda z, target: loss(10 * z, target), expert_logits()[:, 0], LABELS, value, norm, first, 1e-5)
    logits = 10 * expert_logits()[:, 0].float()
    torch.testing.assert_close(loss(logits, mixed().float()),
                               0.3 * loss(logits, LABELS) + 0.7 * loss(logits, LABELS.flip(0)))


def test_label_aware_smoothing_is_that_of_mislas():
    check(create_loss('label_aware_smoothing', COUNTS), expert_logits()[:, 0], LABELS, 3.9855176, 0.29801680,
          -0.026881265)


def test_gcl_takes_the_more_from_a_class_the_rarer_it_is():
    """With 0.5 |e| log(n_max / n) / log(n_max / n_min) of the cosine, where e has standard deviation 1/3 up to 1."""
    torch.manual_seed(0)
    loss = create_loss('gcl', class_counts(100, 10, 1))
    assert loss.rarity.tolist() == pytest.approx([0, 0.5, 1])
    clouds = loss.clouds(torch.zeros(100_000, 3))
    assert 0 <= clouds.min() and clouds.max() == 1
    assert clouds.mean().item() == pytest.approx((2 / torch.pi) ** 0.5 / 3, rel=0.01)
    torch.testing.assert_close(create_loss('gcl', COUNTS, noise=0, gamma=1)(expert_logits()[:, 0], LABELS),
                               create_loss('focal', gamma=1)(expert_logits()[:, 0], LABELS))


def test_class_balanced_bce_is_that_of_weight_balancing():
    check(create_loss('class_balanced_bce', COUNTS), expert_logits()[:, 0], LABELS, 0.6927866, 0.06918333, -0.000436197)


def test_max_norm_is_that_of_weight_balancing():
    """All weight vectors but the last are longer than the radius when they have grown by half."""
    label, feature = torch.arange(10, dtype=torch.float64)[:, None], torch.arange(16, dtype=torch.float64)
    weight = torch.sin(1 + 2 * label + 3 * feature) * (10 - label) / 10
    bound = radius(weight, 0.1)
    assert bound == pytest.approx(0.55003643, rel=1e-7)
    weight *= 1.5
    shorten(weight, bound)
    assert weight.norm(dim=1).tolist() == pytest.approx([bound] * 9 + [0.4419], rel=1e-4)
    assert weight.sum().item() == pytest.approx(0.10675146, rel=1e-6)


def test_aggregation_is_that_of_sade():
    """The second view has 1.2 in the place of 1 in the sine, and the experts have equal weights."""
    v = torch.full((3,), 1 / 3, requires_grad=True)
    loss = agreement_loss(expert_logits().float(), expert_logits(1.2).float(), v)
    loss.backward()
    assert loss.item() == pytest.approx(-0.98858835, rel=1e-6)
    assert v.grad.tolist() == pytest.approx([1.8998713e-4, 3.8356311e-3, -4.0256183e-3], rel=1e-4)


def test_aggregation_for_inaturalist_has_the_entropy_of_both_views():
    """Against plain arithmetic: its script subtracts 0.01 times minus the means of p log p."""
    first, second, v = expert_logits(), expert_logits(1.2), torch.zeros(3, dtype=torch.float64)
    plain, entropy = agreement_loss(first, second, v), 0.0
    for view in (first, second):
        for image in view.mean(dim=1).tolist():
            total = sum(math.exp(logit) for logit in image)
            entropy -= sum(math.exp(logit) / total * math.log(math.exp(logit) / total) for logit in image) / 80
    found = agreement_loss(first, second, v, entropy=0.01).item()
    assert found == pytest.approx(plain.item() - 0.01 * entropy, rel=1e-9)


@pytest.mark.parametrize('name, settings', [
    ('ldam', {}), ('ldam', {'max_margin': 0.1, 'scale': 3.0}), ('robal', {}), ('robal', {'tau_m': 2.0}), ('ride', {})])
@pytest.mark.parametrize('scale', [1.0, 30.0])
def test_margin_losses_of_mixed_targets_are_two_calls(name, settings, scale):
    """lambda L(y) + (1 - lambda) L(y'), as the code of CMO has it, and its gradient; with logits of 90 too."""
    loss = create_loss(name, COUNTS, **settings)
    logits = scale * (expert_logits() if name == 'ride' else expert_logits()[:, 0]).float()
    logits.requires_grad_()
    calls = 0.3 * loss(logits, LABELS) + 0.7 * loss(logits, LABELS.flip(0))
    mixture = loss(logits, mixed().float())
    torch.testing.assert_close(mixture, calls)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (mixture, calls)))


def test_class_weights_divide_by_those_of_the_mixed_targets():
    loss = create_loss('ldam', COUNTS, weighting='effective_number')
    weight, logits, plain = loss.class_weights, expert_logits()[:, 0].float(), create_loss('ldam', COUNTS)
    total = weights = 0.0
    for image, labels in enumerate(zip(LABELS.tolist(), LABELS.flip(0).tolist(), strict=True)):
        for share, label in zip((0.3, 0.7), labels, strict=True):
            own = plain(logits[image:image + 1], torch.tensor([label])).item()
            total += share * weight[label].item() * own
            weights += share * weight[label].item()
    assert loss(logits, mixed().float()).item() == pytest.approx(total / weights, rel=1e-6)


@pytest.mark.parametrize('adjusted', [False, True])
def test_the_divergence_of_ride_with_balanced_softmax_is_of_plain_or_of_adjusted_logits(adjusted):
    """Sum over experts of CE(z_e + log n) - 0.2 KL(softmax of the mean || softmax of an expert), of z or z + log n."""
    logits, log_counts = expert_logits(), COUNTS.tensor().log()
    seen = logits + log_counts if adjusted else logits
    mean = seen.mean(dim=1)
    expected = sum(
        F.cross_entropy(logits[:, e] + log_counts, LABELS)
        - 0.2 * (mean.softmax(1) * (mean.log_softmax(1) - seen[:, e].log_softmax(1))).sum(1).mean() for e in range(3))
    value = create_loss('ride_balanced_softmax', COUNTS, adjusted=adjusted)(logits, LABELS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)

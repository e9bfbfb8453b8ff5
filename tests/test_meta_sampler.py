"""BALMS's learned sampler: its rates, its state, and the bilevel update against independent computations."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.layers import RectifiedLinear
from nbn_timm.samplers import bilevel, create_sampler
from nbn_timm.samplers.bilevel import PickNoise, meta_update, pick_noise, pick_share

pytestmark = pytest.mark.fast

COUNTS = [40, 9, 3]
TARGETS = np.repeat([0, 1, 2], COUNTS)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


@pytest.mark.parametrize('init_pow', [0, 0.1, 1])
def test_rates_begin_as_a_power_of_the_counts(init_pow):
    rates = sigmoid(create_sampler('meta', TARGETS, init_pow=init_pow).rate_logits.detach())
    assert rates / rates[0] == pytest.approx([(n / 40) ** -init_pow for n in COUNTS], rel=1e-5)
    assert rates.min() + rates.max() == pytest.approx(1)


def test_draws_follow_the_rates_of_each_image():
    sampler = create_sampler('meta', TARGETS)
    logits = [-2.0, 0.5, 3.0]
    sampler.load_state_dict({'rate_logits': torch.tensor(logits)})
    drawn = np.bincount(sampler.pick(np.random.default_rng(0), 100_000), minlength=len(TARGETS))
    weights = np.array([sigmoid(logits[label]) for label in TARGETS])
    expected = 100_000 * weights / weights.sum()
    degrees = len(TARGETS) - 1
    assert abs(((drawn - expected) ** 2 / expected).sum() - degrees) < 4 * np.sqrt(2 * degrees)


def test_state_is_restored_into_the_same_parameter():
    sampler, resumed = (create_sampler('meta', TARGETS, seed=1) for _ in range(2))
    with torch.no_grad():
        sampler.rate_logits.copy_(torch.tensor([-1.0, 0.0, 4.0]))
    parameter = resumed.rate_logits
    before = list(resumed)
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.rate_logits is parameter
    sampler.set_epoch(3)
    resumed.set_epoch(3)
    assert list(resumed) == list(sampler)
    resumed.set_epoch(0)
    assert list(resumed) != before
    state = sampler.state_dict()
    with torch.no_grad():
        sampler.rate_logits.zero_()
    assert state['rate_logits'].tolist() == [-1, 0, 4]


def test_classes_without_images_have_a_rate_and_are_not_drawn():
    sampler = create_sampler('meta', np.array([1, 1, 3]), ClassCounts((0, 2, 0, 1, 0), tuple('abcde'), 'the test'))
    assert sampler.rate_logits.shape == (5,)
    with torch.no_grad():
        sampler.rate_logits[3] = 30
    drawn = sampler.pick(np.random.default_rng(0), 3000)
    assert abs((drawn == 2).mean() - 0.5) < 0.05  # 1 image of rate 1 against 2 of rate 1/2
    with pytest.raises(InputError, match='has 3 classes and these data have 5'):
        sampler.load_state_dict({'rate_logits': torch.zeros(3)})


def test_noise_given_the_pick_is_that_of_a_gumbel_softmax(monkeypatch):
    """Against torch's order: noise for all images first, and the largest is picked."""
    monkeypatch.setattr(bilevel, 'CHUNK', 50_000)  # several chunks
    counts, w = torch.tensor([5, 0, 3, 1]), torch.tensor([-1.0, 0.3, 0.5, 2.0], dtype=torch.float64)
    class_of = torch.repeat_interleave(counts)
    generator = torch.Generator().manual_seed(0)
    rows = 40_000
    uniform = torch.rand(rows, len(class_of), generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform))
    scores = F.logsigmoid(w)[class_of] + gumbel
    soft = F.softmax(scores, dim=1)
    picked = scores.argmax(dim=1)
    theirs = {
        'share': soft.gather(1, picked[:, None])[:, 0],
        'picked': gumbel.gather(1, picked[:, None])[:, 0],
        **{f'class {c}': torch.logsumexp(gumbel[:, class_of == c], dim=1) for c in (0, 2, 3)},
    }
    targets = class_of[picked]
    noise = pick_noise(w, counts, targets, generator)
    assert (noise.per_class[:, 1] == 0).all()
    ours = {
        'share': pick_share(w, targets, noise),
        'picked': noise.picked.log(),
        **{f'class {c}': noise.per_class[:, c].log() for c in (0, 2, 3)},
    }
    for label in (0, 2, 3):
        chosen = targets == label
        assert chosen.sum() > 1000
        for name in ours:
            one, other = ours[name][chosen], theirs[name][chosen]
            for power in (1, 2):
                error = ((one ** power).var() / len(one) + (other ** power).var() / len(other)).sqrt()
                assert abs((one ** power).mean() - (other ** power).mean()) < 4 * error, (label, name, power)


def cross_entropies(logits, target):
    return F.cross_entropy(logits, target, reduction='none')


def problem(dtype=torch.float64):
    """A batch, a meta batch, a classifier and rates of 4 classes."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)
    classifier = nn.Linear(6, 4, dtype=dtype)
    with torch.no_grad():
        classifier.weight.copy_(normal(4, 6))
        classifier.bias.copy_(normal(4))
    targets = torch.tensor([0, 0, 2, 1, 3, 0, 2, 3, 1, 0])
    counts, w = torch.tensor([50, 20, 6, 2]), normal(4)
    noise = pick_noise(w, counts, targets, generator)
    return dict(rate_logits=w, classifier=classifier, features=normal(10, 6), targets=targets, noise=noise,
                meta_features=normal(8, 6), meta_targets=torch.tensor([0, 1, 2, 3] * 2))


@pytest.mark.parametrize('momentum, weight_decay', [(0.0, 0.0), (0.9, 0.01)])
def test_gradient_is_that_of_finite_differences(momentum, weight_decay):
    """Everything in numpy: the relaxed weights, the classifier's step in closed form, the loss after it."""
    given = problem()
    log_prior = np.log(np.array([50, 20, 6, 2]) / 78)
    velocity = {'weight': torch.full((4, 6), 0.3, dtype=torch.float64), 'bias': torch.arange(4.0).double()}
    w, features, targets, noise = (given[key] for key in ('rate_logits', 'features', 'targets', 'noise'))
    gradient, value = meta_update(
        **given, loss=lambda logits, target: cross_entropies(logits + torch.from_numpy(log_prior), target),
        lr=0.7, momentum=momentum, weight_decay=weight_decay, velocity=velocity if momentum else None)

    x, y = features.numpy(), targets.numpy()
    weight, bias = (given['classifier'].state_dict()[name].numpy() for name in ('weight', 'bias'))
    picked, per_class = (part.numpy() for part in noise)

    def softmax(logits):
        exps = np.exp(logits - logits.max(1, keepdims=True))
        return exps / exps.sum(1, keepdims=True)

    def share(w):
        return sigmoid(w)[y] * picked / (per_class * sigmoid(w)).sum(1)

    def meta_loss(now):
        image_weights = 1 + share(now) - share(w.numpy())
        error = (softmax(x @ weight.T + bias + log_prior) - np.eye(4)[y]) * image_weights[:, None] / len(y)
        gradients = error.T @ x + weight_decay * weight, error.sum(0) + weight_decay * bias
        steps = [grad + momentum * velocity[name].numpy()
                 for grad, name in zip(gradients, ('weight', 'bias'), strict=True)]
        logits = given['meta_features'].numpy() @ (weight - 0.7 * steps[0]).T + bias - 0.7 * steps[1]
        return -np.log(softmax(logits)[np.arange(8), given['meta_targets'].numpy()]).mean()

    assert value.item() == pytest.approx(meta_loss(w.numpy()), rel=1e-12)
    step = 1e-5
    differences = [(meta_loss(w.numpy() + step * unit) - meta_loss(w.numpy() - step * unit)) / (2 * step)
                   for unit in np.eye(4)]
    assert np.abs(differences).min() > 1e-5
    assert gradient.numpy() == pytest.approx(differences, rel=1e-6, abs=1e-10)


def test_gradient_is_that_of_the_hard_gumbel_softmax_over_all_images():
    """The released order of computation, with all [B, N] weights and torch's own straight-through estimator."""
    given = problem()
    counts, w = torch.tensor([50, 20, 6, 2]), given['rate_logits'].clone().requires_grad_()
    class_of = torch.repeat_interleave(counts)
    torch.manual_seed(5)
    hard = F.gumbel_softmax(F.logsigmoid(w)[class_of].expand(10, -1), hard=True)
    torch.manual_seed(5)
    gumbel = -torch.empty(10, len(class_of), dtype=torch.float64).exponential_().log()  # as torch draws it
    picked = hard.argmax(1)
    targets = class_of[picked]
    exps = gumbel.exp()
    sums = torch.stack([exps[:, class_of == label].sum(1) for label in range(4)], dim=1)
    noise = PickNoise(exps.gather(1, picked[:, None])[:, 0], sums)

    classifier = copy.deepcopy(given['classifier'])
    losses = cross_entropies(classifier(given['features']), targets)
    loss = (losses[:, None] * hard.detach() * hard).sum(1).mean()
    weight, bias = (parameter - 0.5 * grad for parameter, grad in zip(
        classifier.parameters(), torch.autograd.grad(loss, list(classifier.parameters()), create_graph=True),
        strict=True))
    theirs, = torch.autograd.grad(
        F.cross_entropy(F.linear(given['meta_features'], weight, bias), given['meta_targets']), w)
    ours, _ = meta_update(**{**given, 'targets': targets, 'noise': noise}, loss=cross_entropies, lr=0.5)
    torch.testing.assert_close(ours, theirs)


def test_the_inner_step_is_that_of_torchs_sgd_and_nothing_changes():
    given = problem()
    head = given['classifier']
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(head(given['features']), given['targets']).backward()
        optimizer.step()
    velocity = {name: optimizer.state[parameter]['momentum_buffer'] for name, parameter in head.named_parameters()}
    kept = copy.deepcopy((given, velocity))
    _, value = meta_update(**given, loss=cross_entropies, lr=0.2, momentum=0.9, weight_decay=0.1, velocity=velocity)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, kept[0]['classifier'].state_dict()[name])
        assert torch.equal(velocity[name], kept[1][name])
    optimizer.zero_grad()
    F.cross_entropy(head(given['features']), given['targets']).backward()
    optimizer.step()
    expected = F.cross_entropy(head(given['meta_features']), given['meta_targets'])
    torch.testing.assert_close(value, expected.detach())


def test_frozen_parameters_stay_and_running_statistics_too():
    given = problem(torch.float32)
    head = RectifiedLinear(6, 4)
    head.weight.requires_grad_(False)
    kept = copy.deepcopy(head.state_dict())
    gradient, _ = meta_update(**{**given, 'classifier': head}, loss=cross_entropies, lr=1.0)
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in kept.items())
    assert gradient.abs().max() < 1e-6  # the normalisation takes the bias, which alone is trained, out again


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(dtype):
    given = problem(torch.float32)
    given['features'], given['meta_features'] = given['features'].to(dtype), given['meta_features'].to(dtype)
    with torch.autocast('cpu', dtype=dtype):
        gradient, value = meta_update(**given, loss=cross_entropies, lr=0.1)
    given['features'], given['meta_features'] = given['features'].float(), given['meta_features'].float()
    expected, expected_value = meta_update(**given, loss=cross_entropies, lr=0.1)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close((gradient, value), (expected, expected_value))


def test_rates_of_rare_classes_rise():
    """A stage in small: a linear classifier on features of which rare classes would not get their due."""
    counts = [200, 20, 4]
    targets = np.repeat([0, 1, 2], counts)
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 8))
    images = torch.from_numpy(means[targets] + rng.normal(size=(len(targets), 8))).float()
    meta_targets = torch.arange(3).repeat(20)
    meta_features = torch.from_numpy(means[meta_targets] + rng.normal(size=(60, 8))).float()
    sampler = create_sampler('meta', targets)
    torch.manual_seed(0)
    head = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    adam = torch.optim.Adam([sampler.rate_logits], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        batch = sampler.pick(rng, 32)
        features, labels = images[batch], torch.from_numpy(targets[batch])
        noise = pick_noise(sampler.rate_logits, torch.tensor(counts), labels, generator)
        sampler.rate_logits.grad, _ = meta_update(
            sampler.rate_logits, head, features, labels, noise, meta_features, meta_targets, cross_entropies, 0.1)
        adam.step()
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    rates = sampler.rate_logits.detach().sigmoid()
    assert rates[2] > 0.8 and rates[0] < 0.4

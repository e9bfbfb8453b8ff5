"""Every loss and its gradient against its definition, written out in plain Python loops in double precision.

Gradients are compared with central differences of those definitions.
"""
import math

import numpy as np
import pytest
import torch

from nbn_timm.data import ClassCounts
from nbn_timm.losses import create_loss

pytestmark = pytest.mark.fast

COUNTS = (300, 129, 129, 36, 10, 2)
BATCH = 7
CLASSES = len(COUNTS)
RNG = np.random.default_rng(7)
LOGITS = RNG.normal(size=(BATCH, CLASSES)) * 2
FEATURES = RNG.normal(size=(BATCH, 5))
LABELS = [0, 5, 3, 0, 1, 4, 3]  # class 2 has no image in this batch
SOFT = RNG.dirichlet(np.ones(CLASSES) * 0.5, size=BATCH)


def class_counts() -> ClassCounts:
    return ClassCounts(COUNTS, tuple('abcdef'), 'a test')


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def cross_entropy(row, label):
    return log_sum_exp(row) - row[label]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def mean_one(weights):
    return [weight / mean(weights) for weight in weights]


def inverse(exponent=1.0):
    return mean_one([(min(COUNTS) / count) ** exponent for count in COUNTS])


def effective(beta=0.9999, exponent=1.0):
    return mean_one([((1 - beta) / (1 - beta ** count)) ** exponent for count in COUNTS])


def weighted(weights):
    return lambda logits: (sum(weights[y] * cross_entropy(z, y) for z, y in zip(logits, LABELS, strict=True))
                           / sum(weights[y] for y in LABELS))


def softmax_focal(gamma, weights=(1,) * CLASSES):
    def value(z, y):
        p = math.exp(-cross_entropy(z, y))
        return -weights[y] * (1 - p) ** gamma * math.log(p)
    return lambda logits: mean(value(z, y) for z, y in zip(logits, LABELS, strict=True))


def sigmoid_focal(gamma, weights=(1,) * CLASSES):
    def value(z, y):
        total = 0.0
        for label in range(CLASSES):
            right = sigmoid(z[label]) if label == y else 1 - sigmoid(z[label])
            total -= (1 - right) ** gamma * math.log(right)
        return weights[y] * total
    return lambda logits: mean(value(z, y) for z, y in zip(logits, LABELS, strict=True))


def shifted(change):
    """Cross-entropy of logits changed by `change(label, class, logit)`."""
    return lambda logits: mean(
        cross_entropy([change(y, label, z[label]) for label in range(CLASSES)], y)
        for z, y in zip(logits, LABELS, strict=True))


def ldam_margin(label, max_margin=0.5):
    return max_margin * (COUNTS[label] / min(COUNTS)) ** -0.25


def weighted_ldam(logits):
    weights = effective()
    total = sum(weights[y] * cross_entropy([z[c] - (30 * ldam_margin(y) if c == y else 0) for c in range(CLASSES)], y)
                for z, y in zip(logits, LABELS, strict=True))
    return total / sum(weights[y] for y in LABELS)


def seql(logits):
    """With gamma 1 every rare class is left out."""
    def denominator(z, y):
        return log_sum_exp([z[c] for c in range(CLASSES) if c == y or COUNTS[c] / sum(COUNTS) >= 0.05])
    return mean(denominator(z, y) - z[y] for z, y in zip(logits, LABELS, strict=True))


def label_aware(head, tail, position, others=False):
    def value(z, y):
        smoothing = tail + (head - tail) * position((COUNTS[y] - min(COUNTS)) / (max(COUNTS) - min(COUNTS)))
        total = 0.0
        for label in range(CLASSES):
            if others:
                target = 1 - smoothing if label == y else smoothing / (CLASSES - 1)
            else:
                target = (1 - smoothing) * (label == y) + smoothing / CLASSES
            total += target * cross_entropy(z, label)
        return total
    return lambda logits: mean(value(z, y) for z, y in zip(logits, LABELS, strict=True))


def influence_of(z, features, target):
    p = [math.exp(-cross_entropy(z, label)) for label in range(CLASSES)]
    return sum(map(abs, features)) * sum(abs(p[c] - target[c]) for c in range(CLASSES))


def influence_balanced(weights, alpha=1000.0, targets=None):
    targets = np.eye(CLASSES)[LABELS] if targets is None else targets

    def both(logits, features):
        return mean(
            sum(t[c] * weights[c] * cross_entropy(z, c) for c in range(CLASSES)) * alpha
            / (influence_of(z, h, t) + 1e-3) for z, h, t in zip(logits, features, targets, strict=True))
    return both


def lade(logits, weight=0.1, regularisation=0.1):
    prior = [count / sum(COUNTS) for count in COUNTS]
    regulariser = 0.0
    for c in range(CLASSES):
        own = [z[c] for z, y in zip(logits, LABELS, strict=True) if y == c]
        first = mean(own) if own else 0.0
        second = math.log(mean(math.exp(z[c]) / prior[c] / CLASSES for z in logits))
        regulariser -= prior[c] * (first - second - regularisation * second ** 2)
    return shifted(lambda y, c, z: z + math.log(prior[c]))(logits) + weight * regulariser


def hcm(zeroed=False, hard_weight=1.0):
    """share 0.5 of 6 classes is the label and 2 others."""
    def value(z, y):
        adjusted = [z[c] + math.log(COUNTS[c]) for c in range(CLASSES)]
        others = sorted((c for c in range(CLASSES) if c != y), key=lambda c: -z[c])[:2]
        if zeroed:
            partial = log_sum_exp([adjusted[c] if c in (y, *others) else 0.0 for c in range(CLASSES)]) - adjusted[y]
        else:
            partial = log_sum_exp([adjusted[c] for c in (y, *others)]) - adjusted[y]
        return cross_entropy(adjusted, y) + hard_weight * partial
    return lambda logits: mean(value(z, y) for z, y in zip(logits, LABELS, strict=True))


def robal(margin, scale, tau_b, tau_m):
    """The authors' form on cosines, which the network's head has multiplied by the scale."""
    def change(y, c, z):
        cosine = z / scale
        if c == y:
            cosine -= margin + tau_m * math.log(COUNTS[y] / min(COUNTS)) / scale
        return scale * cosine + tau_b * math.log(COUNTS[c] / sum(COUNTS))
    return shifted(change)


CASES = [
    ('cross_entropy', {}, shifted(lambda y, c, z: z)),
    ('balanced_softmax', {}, shifted(lambda y, c, z: z + math.log(COUNTS[c]))),
    ('weighted_cross_entropy', {}, weighted(inverse())),
    ('weighted_cross_entropy', {'exponent': 0.5}, weighted(inverse(0.5))),
    ('weighted_cross_entropy', {'weighting': 'effective_number'}, weighted(effective())),
    ('weighted_cross_entropy', {'weighting': 'effective_number', 'beta': 0.9, 'exponent': 2.0},
     weighted(effective(0.9, 2.0))),
    ('focal', {}, softmax_focal(2.0)),
    ('focal', {'gamma': 0.5}, softmax_focal(0.5)),
    ('focal', {'form': 'sigmoid'}, sigmoid_focal(2.0)),
    ('focal', {'form': 'sigmoid', 'gamma': 0.5}, sigmoid_focal(0.5)),
    ('class_balanced_focal', {}, softmax_focal(2.0, effective())),
    ('class_balanced_focal', {'form': 'sigmoid', 'gamma': 1.0, 'beta': 0.9}, sigmoid_focal(1.0, effective(0.9))),
    ('class_balanced_focal', {'weighting': 'inverse', 'exponent': 0.5}, softmax_focal(2.0, inverse(0.5))),
    ('logit_adjusted', {}, shifted(lambda y, c, z: z + math.log(COUNTS[c] / sum(COUNTS)))),
    ('logit_adjusted', {'tau': 2.5}, shifted(lambda y, c, z: z + 2.5 * math.log(COUNTS[c] / sum(COUNTS)))),
    ('ldam', {}, shifted(lambda y, c, z: z - 30 * ldam_margin(y) * (c == y))),
    ('ldam', {'max_margin': 0.3, 'scale': 10.0}, shifted(lambda y, c, z: z - 10 * ldam_margin(y, 0.3) * (c == y))),
    ('ldam', {'weighting': 'effective_number'}, weighted_ldam),
    ('cdt', {}, shifted(lambda y, c, z: z / (max(COUNTS) / COUNTS[c]) ** 0.2)),
    ('cdt', {'gamma': 1.0}, shifted(lambda y, c, z: z * COUNTS[c] / max(COUNTS))),
    ('vs', {}, shifted(lambda y, c, z: z / (max(COUNTS) / COUNTS[c]) ** 0.3 + math.log(COUNTS[c] / sum(COUNTS)))),
    ('vs', {'gamma': 0.1, 'tau': 0.0}, shifted(lambda y, c, z: z / (max(COUNTS) / COUNTS[c]) ** 0.1)),
    ('seql', {'gamma': 1.0, 'threshold': 0.05}, seql),
    ('label_aware_smoothing', {}, label_aware(0.4, 0.1, lambda r: math.sin(math.pi * r / 2))),
    ('label_aware_smoothing', {'shape': 'linear', 'head': 0.3}, label_aware(0.3, 0.1, lambda r: r)),
    ('label_aware_smoothing', {'shape': 'convex', 'tail': 0.0},
     label_aware(0.4, 0.0, lambda r: 1 + math.sin(1.5 * math.pi + math.pi * r / 2))),
    ('label_aware_smoothing', {'shape': 'power', 'power': 3.0}, label_aware(0.4, 0.1, lambda r: r ** 3)),
    ('label_aware_smoothing', {'others': True}, label_aware(0.4, 0.1, lambda r: math.sin(math.pi * r / 2), True)),
    ('lade', {}, lade),
    ('lade', {'weight': 1.0, 'regularisation': 0.5}, lambda logits: lade(logits, 1.0, 0.5)),
    ('hcm', {'share': 0.5}, hcm()),
    ('hcm', {'share': 0.5, 'easy': 'zeroed', 'hard_weight': 0.5}, hcm(True, 0.5)),
    ('robal', {}, robal(0.1, 30.0, 1.5, 0.3)),
    ('robal', {'margin': 0.3, 'scale': 10.0, 'tau_b': 0.0, 'tau_m': 0.0}, robal(0.3, 10.0, 0.0, 0.0)),
]


def numeric_gradient(function, values: np.ndarray) -> np.ndarray:
    gradient = np.zeros_like(values)
    for index in np.ndindex(*values.shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved = values.copy()
            moved[index] += step
            ends.append(function(moved.tolist()))
        gradient[index] = (ends[0] - ends[1]) / 2e-5
    return gradient


def assert_near(actual: torch.Tensor, expected) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=2e-5, atol=2e-6 * max(1, abs(expected).max()))


@pytest.mark.parametrize('name, settings, definition', CASES)
def test_loss_and_gradient_are_the_definition(name, settings, definition):
    logits = torch.tensor(LOGITS, dtype=torch.float32, requires_grad=True)
    loss = create_loss(name, class_counts(), **settings)(logits, torch.tensor(LABELS))
    loss.backward()
    exact = logits.detach().double().numpy()
    assert_near(loss, definition(exact.tolist()))
    assert_near(logits.grad, numeric_gradient(definition, exact))


@pytest.mark.parametrize('settings, weights', [
    ({}, inverse()),
    ({'weighting': 'effective_number', 'alpha': 10.0}, effective()),
    ({'weighting': None}, (1,) * CLASSES),
])
@pytest.mark.parametrize('soft', [False, True])
def test_influence_balanced_is_its_definition(settings, weights, soft):
    """The gradient of logits and features flows through the influence, as in the authors' code."""
    logits = torch.tensor(LOGITS, dtype=torch.float32, requires_grad=True)
    features = torch.tensor(FEATURES, dtype=torch.float32, requires_grad=True)
    target = torch.tensor(SOFT, dtype=torch.float32) if soft else torch.tensor(LABELS)
    loss = create_loss('influence_balanced', class_counts(), **settings)((logits, features), target)
    loss.backward()
    definition = influence_balanced(weights, settings.get('alpha', 1000.0), target.double().numpy() if soft else None)
    exact, h = logits.detach().double().numpy(), features.detach().double().numpy()
    assert_near(loss, definition(exact.tolist(), h.tolist()))
    assert_near(logits.grad, numeric_gradient(lambda z: definition(z, h.tolist()), exact))
    assert_near(features.grad, numeric_gradient(lambda values: definition(exact.tolist(), values), h))


def test_a_detached_influence_is_a_plain_weight():
    """The gradient of w CE is w (p - y), and there is none of the features."""
    logits = torch.tensor(LOGITS, dtype=torch.float32, requires_grad=True)
    features = torch.tensor(FEATURES, dtype=torch.float32, requires_grad=True)
    loss = create_loss('influence_balanced', class_counts(), detach_factor=True)
    loss((logits, features), torch.tensor(LABELS)).backward()
    assert features.grad is None
    expected = []
    for z, h, y in zip(LOGITS.tolist(), FEATURES.tolist(), LABELS, strict=True):
        one_hot = [float(c == y) for c in range(CLASSES)]
        factor = inverse()[y] * 1000 / (influence_of(z, h, one_hot) + 1e-3) / BATCH
        expected.append([factor * (math.exp(-cross_entropy(z, c)) - one_hot[c]) for c in range(CLASSES)])
    assert_near(logits.grad, expected)


def test_the_influence_is_the_l1_norm_of_the_classifiers_gradient():
    """The property that the loss is built on, with autograd of a linear classifier."""
    weight = torch.randn(CLASSES, 5, dtype=torch.float64, requires_grad=True)
    for h, y in zip(torch.tensor(FEATURES), LABELS, strict=True):
        logits = weight @ h
        gradient, = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor(y)), weight)
        one_hot = np.eye(CLASSES)[y]
        assert influence_of(logits.tolist(), h.tolist(), one_hot) == pytest.approx(gradient.abs().sum().item())


def test_weighted_cross_entropy_is_torchs_for_labels_and_its_definition_for_soft_targets():
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    loss = create_loss('weighted_cross_entropy', class_counts())
    weights = torch.tensor(inverse(), dtype=torch.float32)
    labels = torch.tensor(LABELS)
    torch.testing.assert_close(loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels, weights))
    shares = SOFT * np.array(inverse())
    total = sum(shares[i][c] * cross_entropy(LOGITS[i].tolist(), c) for i in range(BATCH) for c in range(CLASSES))
    assert_near(loss(logits, torch.tensor(SOFT)), total / shares.sum())


def test_equalization_leaves_rare_classes_out_as_often_as_it_says():
    """Of equal logits, log 3 with the rare class and log 2 without it; its own images keep it."""
    counts = ClassCounts((600, 399, 1), ('a', 'b', 'c'), 'a test')
    loss = create_loss('seql', counts)
    torch.manual_seed(0)
    images = 40_000
    value = loss(torch.zeros(images, 3), torch.zeros(images, dtype=torch.long)).item()
    left_out = (math.log(3) - value) / (math.log(3) - math.log(2))
    assert left_out == pytest.approx(0.9, abs=4 * math.sqrt(0.9 * 0.1 / images))
    assert loss(torch.zeros(9, 3), torch.full((9,), 2)).item() == pytest.approx(math.log(3))


def test_equalization_draws_anew_for_every_image_and_class():
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    labels = torch.tensor(LABELS)
    loss = create_loss('seql', class_counts(), gamma=0.5, threshold=0.5)  # all classes are rare
    torch.manual_seed(3)
    value = loss(logits, labels)
    torch.manual_seed(3)
    drawn = torch.rand(BATCH, CLASSES) < 0.5
    assert 0 < drawn.sum() < drawn.numel()
    expected = mean(
        log_sum_exp([z[c] for c in range(CLASSES) if c == y or not drawn[i, c]]) - z[y]
        for i, (z, y) in enumerate(zip(LOGITS.tolist(), LABELS, strict=True)))
    assert_near(value, expected)


@pytest.mark.parametrize('name, settings', [('ldam', {}), ('robal', {'tau_b': 0.0, 'tau_m': 0.0, 'margin': 0.25})])
def test_where_the_scale_of_margins_stands(name, settings):
    """The papers' CE(s (cos - m)) with a cosine head of scale 30: s has multiplied the cosines before the loss."""
    from nbn_timm.layers import CosineLinear
    head = CosineLinear(5, CLASSES)
    features = torch.tensor(FEATURES, dtype=torch.float32)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], head.weight[None], dim=2)
    margins = [ldam_margin(label) if name == 'ldam' else 0.25 for label in range(CLASSES)]
    for row, label in zip(cosines, LABELS, strict=True):
        row.data[label] -= margins[label]
    expected = mean(cross_entropy((head.scale * row).tolist(), y) for row, y in zip(cosines, LABELS, strict=True))
    value = create_loss(name, class_counts(), **settings)(head(features), torch.tensor(LABELS))
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_the_released_form_of_hard_mining_lets_easy_classes_compete():
    """Excluded classes get no gradient from the second softmax; zeroed ones get none either, but take probability."""
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    labels = torch.tensor(LABELS)
    paper, released = (create_loss('hcm', class_counts(), share=0.5, easy=easy)(logits, labels)
                       for easy in ('excluded', 'zeroed'))
    assert released > paper


def test_hard_classes_are_three_tenths_of_all_as_in_ncl():
    """300 of ImageNet-LT's 1000, 30 of CIFAR-100-LT's 100, 2442 of iNaturalist's 8142."""
    for classes, hard in ((1000, 300), (100, 30), (8142, 2442), (10, 3), (2, 2)):
        counts = ClassCounts((5,) * classes, tuple(map(str, range(classes))), 'a test')
        assert create_loss('hcm', counts).num_hard == hard

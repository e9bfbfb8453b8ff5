"""What all losses have in common, the released code's figures, and errors; formulas are in test_losses_formulas.py."""
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nbn_timm import losses
from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses import (
    LOSSES,
    is_deferrable,
    number_of_views,
    takes_experts,
    takes_features,
    takes_soft_targets,
    takes_streams,
)

pytestmark = pytest.mark.fast

RELEASED = json.loads((Path(__file__).parent / 'reference' / 'losses.json').read_text())
LOGITS = torch.tensor([[1.5, -0.5, 0.25], [0.0, 2.0, -1.0]])
TARGET = torch.tensor([2, 0])
FEATURES = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 0.25, 0.0, 3.0]])
EVERY = sorted(LOSSES)
SOFT = [name for name in EVERY if takes_soft_targets(name)]
SMOOTHED = [name for name in EVERY if 'smoothing' in inspect.signature(LOSSES[name]).parameters]


def class_counts(*counts: int) -> ClassCounts:
    return ClassCounts(counts, tuple(f'class {label}' for label in range(len(counts))), 'a test')


class StandIn(torch.nn.Module):
    """What a loss with parameters of its own asks of a network: four features, or four of each of three experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.head_hidden_size = 4 * num_experts
        self.classifier = torch.nn.Linear(4, 3)

    def get_classifier(self) -> torch.nn.Module:
        return self.classifier


def create_loss(name: str, *args, **settings) -> torch.nn.Module:
    """A loss that is ready to be called; what it makes for itself is that of one seed."""
    loss = losses.create_loss(name, *args, **settings)
    if hasattr(loss, 'prepare'):
        torch.manual_seed(0)
        loss.prepare(StandIn(3 if takes_experts(name) else 1))
    return loss


def inputs(name: str, logits: torch.Tensor = LOGITS, dtype: torch.dtype = torch.float32):
    """Logits in the form in which the loss of that name takes them."""
    features, views = FEATURES, number_of_views(name)
    if takes_experts(name):
        logits, features = torch.stack([logits, logits.flip(1), 2 * logits], dim=1), FEATURES.repeat(1, 3)
    if takes_streams(name):
        logits = torch.stack([logits, logits.flip(1)], dim=1)
    if views > 1:
        logits, features = (torch.stack([part / view for view in range(1, views + 1)]) for part in (logits, features))
    return (logits.to(dtype), features.to(dtype)) if takes_features(name) else logits.to(dtype)


def drawn(loss: torch.nn.Module, *given) -> torch.Tensor:
    """The value of a loss with the draws of one seed, if it is a random one."""
    torch.manual_seed(0)
    return loss(*given)


@pytest.mark.parametrize('name', RELEASED['losses'])
def test_released_figures(name):
    """Loss and gradient norm of the released code's losses."""
    logits = torch.tensor(RELEASED['logits'], requires_grad=True)
    loss = create_loss(name, class_counts(*RELEASED['counts']))(logits, torch.tensor(RELEASED['target']))
    loss.backward()
    assert loss.item() == pytest.approx(RELEASED['losses'][name]['loss'], rel=1e-6)
    assert logits.grad.norm().item() == pytest.approx(RELEASED['losses'][name]['grad_norm'], rel=1e-6)


def test_balanced_softmax_is_the_softmax_weighted_by_counts():
    """eq. 3 of the paper: p_y = n_y exp(z_y) / sum_c n_c exp(z_c), written out without torch."""
    counts = (100, 10, 1)
    expected = 0.0
    for logits, label in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        weights = [count * math.exp(logit) for count, logit in zip(counts, logits, strict=True)]
        expected -= math.log(weights[label] / sum(weights)) / len(TARGET)
    loss = create_loss('balanced_softmax', class_counts(*counts))(LOGITS, TARGET)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('name, settings', [
    ('balanced_softmax', {}), ('logit_adjusted', {}), ('cdt', {}), ('vs', {}), ('weighted_cross_entropy', {}),
    ('label_aware_smoothing', {'tail': 0.0}), ('ldam', {'max_margin': 0.0}), ('hcm', {'hard_weight': 0.0}),
    ('lade', {'weight': 0.0}), ('robal', {'margin': 0.0}), ('gcl', {}),
])
def test_equal_counts_make_it_plain(name, settings):
    plain = create_loss('cross_entropy')(LOGITS, TARGET)
    torch.testing.assert_close(create_loss(name, class_counts(7, 7, 7), **settings)(LOGITS, TARGET), plain)


@pytest.mark.parametrize('name, settings', [
    ('weighted_cross_entropy', {'exponent': 0.0}), ('logit_adjusted', {'tau': 0.0}), ('cdt', {'gamma': 0.0}),
    ('focal', {'gamma': 0.0}), ('class_balanced_focal', {'gamma': 0.0, 'exponent': 0.0}), ('seql', {'gamma': 0.0}),
    ('seql', {'threshold': 0.0}), ('label_aware_smoothing', {'head': 0.0, 'tail': 0.0}),
    ('robal', {'margin': 0.0, 'tau_b': 0.0, 'tau_m': 0.0}), ('gcl', {'noise': 0.0}),
])
def test_settings_that_make_it_plain(name, settings):
    plain = create_loss('cross_entropy')(LOGITS, TARGET)
    torch.testing.assert_close(create_loss(name, class_counts(100, 10, 1), **settings)(LOGITS, TARGET), plain)


@pytest.mark.parametrize('name', SOFT)
def test_soft_targets_of_one_class_are_hard_targets(name):
    loss = create_loss(name, class_counts(100, 10, 1))
    torch.testing.assert_close(
        drawn(loss, inputs(name), F.one_hot(TARGET, 3).float()), drawn(loss, inputs(name), TARGET))


@pytest.mark.parametrize('name', SOFT)
def test_a_target_that_is_nearly_one_class_has_nearly_its_loss(name):
    """And an even mixture has neither the loss of one class nor that of the other."""
    loss = create_loss(name, class_counts(100, 10, 1))
    one, other = F.one_hot(TARGET, 3), F.one_hot(TARGET.flip(0), 3)
    pure = drawn(loss, inputs(name), TARGET)
    nearly = drawn(loss, inputs(name), (1 - 1e-5) * one + 1e-5 * other)
    torch.testing.assert_close(nearly, pure, rtol=1e-3, atol=1e-3)
    assert not torch.isclose(drawn(loss, inputs(name), 0.5 * one + 0.5 * other), pure)


@pytest.mark.parametrize('name', [name for name in SOFT if not takes_features(name)])
def test_mixed_targets_mix_the_losses(name):
    """A loss of logits gives mixup's loss for mixup's target; one of features may divide by a target's influence."""
    loss = create_loss(name, class_counts(100, 10, 1))
    flipped = TARGET.flip(0)
    mixed = 0.3 * F.one_hot(TARGET, 3) + 0.7 * F.one_hot(flipped, 3)
    one, other = drawn(loss, inputs(name), TARGET), drawn(loss, inputs(name), flipped)
    torch.testing.assert_close(drawn(loss, inputs(name), mixed), 0.3 * one + 0.7 * other)


@pytest.mark.parametrize('name', [name for name in EVERY if name not in SOFT])
def test_other_losses_refuse_mixed_targets_by_name(name):
    loss = create_loss(name, class_counts(100, 10, 1))
    with pytest.raises(InputError, match=f"'{name}'.*leave out --mixup, --cutmix"):
        loss(inputs(name), F.one_hot(TARGET, 3).float())


@pytest.mark.parametrize('name', SMOOTHED)
def test_smoothing_is_the_smoothed_target(name):
    counts = class_counts(100, 10, 1)
    smoothed = 0.9 * F.one_hot(TARGET, 3) + 0.1 / 3
    torch.testing.assert_close(create_loss(name, counts, smoothing=0.1)(inputs(name), TARGET),
                               create_loss(name, counts)(inputs(name), smoothed))


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    half = inputs(name, dtype=dtype)
    whole = tuple(part.float() for part in half) if isinstance(half, tuple) else half.float()
    results = []
    for values in (half, whole):
        results.append(drawn(create_loss(name, class_counts(100_000, 10, 1)), values, TARGET))
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


@pytest.mark.parametrize('name', EVERY)
def test_autocast_changes_nothing(name):
    results = []
    for enabled in (False, True):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            results.append(drawn(create_loss(name, class_counts(100_000, 10, 1)), inputs(name), TARGET))
    assert torch.equal(*results)


@pytest.mark.parametrize('name', EVERY)
def test_extreme_logits_have_finite_losses_and_gradients(name):
    """As far as float16 reaches, and so sure of a class that its probability is 1 in float32."""
    loss = create_loss(name, class_counts(100_000, 10, 1))
    for scale in (100.0, 30_000.0):
        logits = torch.tensor([[scale, -scale, 0.0], [-scale, scale, 0.0]], dtype=torch.float16, requires_grad=True)
        for target in (torch.tensor([0, 1]), torch.tensor([1, 2])):
            value = loss(inputs(name, logits, torch.float16), target)
            gradient, = torch.autograd.grad(value, logits)
            assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize('form', ['softmax', 'sigmoid'])
def test_focal_exponents_below_one_have_finite_gradients(form):
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    create_loss('focal', gamma=0.5, form=form)(logits, torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize('name', EVERY)
def test_a_class_without_images_stays_finite(name):
    loss = create_loss(name, class_counts(100, 10, 0))
    assert loss(inputs(name), torch.tensor([0, 1])).isfinite()
    assert loss(inputs(name), torch.tensor([2, 2])).isfinite()
    if name in SOFT:
        assert loss(inputs(name), torch.full((2, 3), 1 / 3)).isfinite()


def test_a_class_without_images_counts_as_having_one():
    soft = torch.full((2, 3), 1 / 3)
    for name in ('balanced_softmax', 'logit_adjusted', 'cdt', 'weighted_cross_entropy'):
        torch.testing.assert_close(create_loss(name, class_counts(100, 10, 0))(LOGITS, soft),
                                   create_loss(name, class_counts(100, 10, 1))(LOGITS, soft), rtol=0.02, atol=0.0)


@pytest.mark.parametrize('name', EVERY)
def test_losses_leave_their_input_alone_and_have_no_state_unless_they_make_it(name):
    loss = create_loss(name, class_counts(100, 10, 1))
    values = inputs(name)
    before = values[0].clone() if isinstance(values, tuple) else values.clone()
    loss(values, TARGET)
    assert torch.equal(values[0] if isinstance(values, tuple) else values, before)
    if not hasattr(loss, 'prepare'):
        assert not loss.state_dict() and not list(loss.parameters())


@pytest.mark.parametrize('name, settings, message', [
    ('weighted_cross_entropy', {'weighting': 'inverce'}, "did you mean 'inverse'"),
    ('weighted_cross_entropy', {'beta': 0.9}, 'inverse frequencies do not use'),
    ('weighted_cross_entropy', {'weighting': 'effective_number', 'beta': 1}, 'beta=1: give a number from 0 to less'),
    ('weighted_cross_entropy', {'exponent': -1}, 'exponent=-1: give a number from 0'),
    ('weighted_cross_entropy', {'smoothing': 1.5}, 'smoothing=1.5: give a number from 0 to 1'),
    ('focal', {'gamma': '2'}, "gamma='2': give a number"),
    ('focal', {'form': 'tanh'}, 'softmax or sigmoid'),
    ('class_balanced_focal', {'gamma': math.nan}, 'gamma=nan'),
    ('logit_adjusted', {'tau': math.inf}, 'tau=inf'),
    ('cdt', {'gamma': True}, 'gamma=True'),
    ('sade', {'tau': -1}, 'tau=-1'),
    ('mdcs', {'powers': 2.5}, 'powers=2.5: give several values'),
    ('mdcs', {'warmup_epochs': 0}, 'warmup_epochs=0: give a number from 1'),
    ('vs', {'gamma': -0.1}, 'gamma=-0.1'),
    ('vs', {'tau': '1'}, "tau='1'"),
    ('ldam', {'scale': 0}, 'scale=0: give a number above 0'),
    ('ldam', {'beta': 0.9}, 'no class weights'),
    ('ldam', {'exponent': 0.5}, 'no class weights'),
    ('seql', {'gamma': 2}, 'gamma=2'),
    ('gcl', {'noise': -1}, 'noise=-1: give a number from 0'),
    ('gcl', {'loss_scale': 0}, 'loss_scale=0: give a number above 0'),
    ('label_aware_smoothing', {'shape': 'power'}, 'power=None: give a number above 0'),
    ('label_aware_smoothing', {'power': 2.0}, "shape 'concave' does not use"),
    ('label_aware_smoothing', {'head': 1.1}, 'head=1.1'),
    ('influence_balanced', {'alpha': 0}, 'alpha=0'),
    ('influence_balanced', {'weighting': 'none'}, 'inverse or effective_number'),
    ('lade', {'weight': -1}, 'weight=-1'),
    ('balpoe', {'tau': 1.0}, 'tau=1.0: give several values'),
    ('balpoe', {'tau': [0, -1]}, 'tau=-1'),
    ('hcm', {'easy': 'masked'}, 'excluded or zeroed'),
    ('hcm', {'share': 0}, 'share=0'),
    ('robal', {'tau_m': -0.1}, 'tau_m=-0.1'),
    ('shike', {'suppression': -1}, 'suppression=-1: give a number from 0'),
    ('shike', {'scale': 0}, 'scale=0: give a number above 0'),
    ('cdt', {'tau': 1.0}, "no setting 'tau' .it has gamma, smoothing, start_epoch"),
])
def test_wrong_settings_are_one_sentence(name, settings, message):
    with pytest.raises(InputError, match=message) as error:
        create_loss(name, class_counts(100, 10, 1), **settings)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', EVERY)
def test_losses_that_need_class_counts_say_so_and_the_others_do_not_use_them(name):
    try:
        loss = create_loss(name, None)
    except InputError as error:
        assert name not in ('cross_entropy', 'focal', 'shike', 'bce', 'asymmetric')
        assert re.search(f"'{name}'.*--class-counts", str(error))
        return
    torch.testing.assert_close(loss(inputs(name), TARGET), create_loss(name, class_counts(100, 10, 1))(
        inputs(name), TARGET))


def test_errors_name_the_remedy():
    with pytest.raises(InputError, match="unknown loss 'balanced_softmx'.*did you mean 'balanced_softmax'"):
        create_loss('balanced_softmx', class_counts(1, 1))
    with pytest.raises(InputError, match="no setting 'smothing'.*did you mean 'smoothing'"):
        create_loss('cross_entropy', None, smothing=0.1)


def test_the_page_of_losses_has_every_setting_with_its_default():
    """One row per loss: name, formula, paper, settings, soft targets, deferred."""
    page = Path(__file__).parent.parent / 'docs' / 'losses.md'
    if not page.exists():
        pytest.skip('not a checkout')
    rows = {cells[1].strip(' `'): cells for cells in (
        line.replace(r'\|', ' ').split('|') for line in page.read_text().splitlines() if line.startswith('| `'))}
    assert set(rows) == set(EVERY)
    for name, cells in rows.items():
        _, _, _, _, settings, soft, deferred, _ = cells
        for setting, parameter in list(inspect.signature(LOSSES[name]).parameters.items())[1:]:
            assert f'`{setting}={parameter.default}`' in settings, (name, setting)
        assert soft.strip() == ('yes' if name in SOFT else 'no'), name
        assert (deferred.strip() == 'no') == (not is_deferrable(name)), name

"""MARC, DisAlign and H2T against their authors' code on one set of features, and what becomes of their parts.

The figures are values and gradients of the authors' own classes in float64 on the inputs below: MARC `MARCLinear` and
`GRWCrossEntropyLoss` of microsoft/robustlearn (marc), commit 31580cd; DisAlign `DisAlignLinear` and
`GRWCrossEntropyLoss` of cvpods, which Megvii-BaseDetection/DisAlign, commit a2fc350, imports. The values here
are the same to 1e-8, all the digits that are written.
"""
import math

import pytest
import timm
import torch
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss
from nbn_timm.second_stages import create_second_stage, restore_second_stages
from nbn_timm.second_stages.disalign import AlignedLinear, DisAlign
from nbn_timm.second_stages.h2t import fused
from nbn_timm.second_stages.marc import CalibratedClassifier

pytestmark = pytest.mark.fast

COUNTS = ClassCounts((500, 199, 79, 31, 12, 5), tuple('abcdef'), 'the test')
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 0])


def wave(*shape: int, phase: float) -> torch.Tensor:
    """sin(phase + 1.7 i) of the entries i in order, float64."""
    return torch.sin(phase + 1.7 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def classifier() -> nn.Linear:
    linear = nn.Linear(5, 6, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(wave(6, 5, phase=0.3))
    linear.bias.copy_(wave(6, phase=1.1))
    return linear


FACTOR, OFFSET = 1 + 0.3 * wave(6, phase=0.7), 0.5 * wave(6, phase=2.2)
FEATURES = 2 * wave(7, 5, phase=2.0)


def value_and_gradients(model: nn.Module, parameters: list[nn.Parameter]) -> list[list[float]]:
    loss = create_loss('weighted_cross_entropy', COUNTS, weighting='inverse', exponent=1.2).double()
    loss.class_weights.copy_(COUNTS.tensor() ** -1.2 / (COUNTS.tensor() ** -1.2).mean())  # of the digits of float64
    log_softmax = torch.log_softmax(model(FEATURES), dim=1)  # the loss computes in float32
    weights = loss.class_weights[LABELS]
    value = -(weights * log_softmax[torch.arange(7), LABELS]).sum() / weights.sum()
    assert loss(model(FEATURES), LABELS).item() == pytest.approx(value.item(), rel=1e-6)
    return [[value.item()], *(gradient.flatten().tolist() for gradient in torch.autograd.grad(value, parameters))]


def test_marc_is_its_authors():
    calibrated = CalibratedClassifier(classifier()).double()
    with torch.no_grad():
        calibrated.scale.weight.copy_(FACTOR)
        calibrated.scale.offset.copy_(OFFSET)
    value, factor, offset = value_and_gradients(calibrated, [calibrated.scale.weight, calibrated.scale.offset])
    assert value == pytest.approx([8.080081916206378], abs=1e-8)
    assert factor == pytest.approx(
        [3.472257221, 0.104532552, 0.289480976, 0.297149023, 0.16952176, 1.906690605], abs=1e-8)
    assert offset == pytest.approx(
        [0.941563385, 0.019436276, 0.045312118, -0.021066196, -0.238006185, -0.775986037], abs=1e-8)
    expected = calibrated(FEATURES)
    torch.testing.assert_close(calibrated.fold()(FEATURES), expected)


def test_disalign_is_its_authors():
    aligned = AlignedLinear(5, 6, dtype=torch.float64)
    part, linear = aligned.alignment, classifier()
    assert part.factor.eq(1).all() and part.offset.eq(0).all() and part.confidence.weight.eq(0.1).all()
    with torch.no_grad():
        for parameter, value in ((aligned.weight, linear.weight), (aligned.bias, linear.bias), (part.factor, FACTOR),
                                 (part.offset, OFFSET), (part.confidence.weight, 0.4 * wave(1, 5, phase=0.9)),
                                 (part.confidence.bias, torch.tensor([0.2]))):
            parameter.copy_(value)
    parameters = [part.factor, part.offset, part.confidence.weight, part.confidence.bias]
    value, factor, offset, weight, bias = value_and_gradients(aligned, parameters)
    assert value == pytest.approx([12.620255019192646], abs=1e-8)
    assert factor == pytest.approx(
        [3.208811974, 0.102238272, 0.111639378, 0.178691787, 0.127383251, 1.040471216], abs=1e-8)
    assert offset == pytest.approx(
        [0.571906615, 0.020501445, -0.005543719, -0.012511428, -0.001273324, -0.573079589], abs=1e-8)
    assert weight == pytest.approx([0.5077048, 0.77817012, -0.708230671, -0.595666875, 0.861727466], abs=1e-8)
    assert bias == pytest.approx([0.76843338], abs=1e-8)


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_nbn_lr', 'resnet32_ride'])
def test_what_is_trained_and_what_the_result_is(name):
    """Nothing but the new parts is trained; MARC folds into the network, DisAlign is known by its keys."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16)
    for kind, kwargs, per_classifier in (('marc', {}, 2), ('disalign', {'start': 0.0}, 4)):
        model = timm.create_model(name, num_classes=6, num_blocks=1).eval()
        before, keys = model(x), model.state_dict().keys()
        stage = create_second_stage(kind, **kwargs)
        model = stage.prepare(model)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)  # both begin with the logits as they are
        trained = list(stage.trained(model.requires_grad_(False)).requires_grad_(True).parameters())
        assert len(trained) == per_classifier * getattr(model, 'num_experts', 1)
        with torch.no_grad():
            for parameter in trained:
                parameter += 0.1 * torch.randn_like(parameter)
        finished = stage.finished(model)
        assert (finished.state_dict().keys() == keys) == (kind == 'marc')
        again = restore_second_stages(timm.create_model(name, num_classes=6, num_blocks=1), finished.state_dict())
        again.load_state_dict(finished.state_dict())
        torch.testing.assert_close(again.eval()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('share, value, norm, entry', [
    (0.25, 1.6979436808031232, 0.07456071060715881, 0.006370459562914297),
    (0.5, 1.6714797170575046, 0.07456151433305334, 0.0068561425562296205)])
def test_h2t_is_its_authors(share, value, norm, entry):
    """Value and gradient of cross-entropy on maps that `H2T` of Keke921/H2T, commit 3dafa70, has fused, in float64."""
    maps, others = wave(4, 8, 2, 2, phase=0.3), wave(4, 8, 2, 2, phase=1.9)
    weight = wave(5, 8, phase=0.6).requires_grad_()
    torch.manual_seed(0)
    together = fused(maps, others, share)
    replaced = [channel for channel in range(8) if not torch.equal(together[:, channel], maps[:, channel])]
    assert len(replaced) == int(share * 8) and torch.equal(together[:, replaced], others[:, replaced])
    logits = together.mean(dim=(2, 3)) @ weight.T + wave(5, phase=0.1)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([4, 3, 0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert weight.grad.norm().item() == pytest.approx(norm, rel=1e-12)
    assert weight.grad[0, 0].item() == pytest.approx(entry, rel=1e-12)


def test_h2t_puts_the_maps_of_the_other_images_before_the_pooling():
    torch.manual_seed(0)
    model = timm.create_model('resnet20', num_classes=6, num_blocks=1).eval()
    stage = create_second_stage('h2t', share=1.0)
    assert stage.trained(stage.prepare(model)) is model.fc
    images, others = torch.randn(3, 3, 16, 16), torch.randn(4, 3, 16, 16)
    stage.stream = iter([(others, torch.zeros(4))])
    with stage.batch(model, torch.zeros(3)):
        torch.testing.assert_close(model(images), model.fc(model.forward_features(others[:3]).mean(dim=(2, 3))))
    torch.testing.assert_close(model(images), model.fc(model.forward_features(images).mean(dim=(2, 3))))
    with pytest.raises(InputError, match='pools no maps before its classifier'):
        stage.prepare(timm.create_model('test_vit', num_classes=6))
    with pytest.raises(InputError, match='share=1.5: give a number from 0 to 1'):
        create_second_stage('h2t', share=1.5)


def test_what_they_are_not_for():
    with pytest.raises(InputError, match='is a CosineLinear, and marc is for linear'):
        create_second_stage('marc').prepare(timm.create_model('resnet20', head='cosine'))
    with pytest.raises(InputError, match='is a CosineLinear, and disalign is for linear'):
        create_second_stage('disalign').prepare(timm.create_model('resnet20', head='cosine'))
    with pytest.raises(InputError, match='is a CosineLinear, and mislas is for linear'):
        create_second_stage('mislas').prepare(timm.create_model('resnet20', head='cosine'))
    with pytest.raises(InputError, match='a convolution, and disalign is for classifiers on feature vectors'):
        create_second_stage('disalign').prepare(timm.create_model('dla46x_c', num_classes=6))
    with pytest.raises(InputError, match='the classifier has no bias'):
        CalibratedClassifier(nn.Linear(5, 6, bias=False))
    with pytest.raises(InputError, match='start=-1: give a number from 0'):
        create_second_stage('disalign', start=-1)
    assert DisAlign.keeps_classifier and create_second_stage('marc').keeps_classifier

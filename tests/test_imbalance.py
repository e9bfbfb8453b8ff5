"""Targets, what is chosen for them, and the measured strength of logit adjustment, against independent computations."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forks import run_ranks
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import train, validate
from nbn_timm.data import Classes
from nbn_timm.errors import InputError
from nbn_timm.imbalance import TAUS, StrengthCurve, choose_training, target_shares
from nbn_timm.losses import LOSSES, balances_classes, takes_experts
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.samplers import SAMPLERS
from nbn_timm.second_stages.logit_adjustment import LogitAdjustment, why_not_adjustable
from nbn_timm.training.combinations import doubtful
from nbn_timm.training.distributed import close_world, init_world
from nbn_timm.training.settings import TrainSettings

COUNTS = (400, 60, 9, 1)
CLASSES = Classes(COUNTS, ('ant', 'bee', 'cat', 'dog'), 'a test')


def picture_logits(images: int, seed: int = 0, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are better than chance and lean to the frequent classes, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(COUNTS), (images,), generator=generator)
    logits = torch.randn(images, len(COUNTS), generator=generator) * spread
    logits[torch.arange(images), labels] += 2
    return logits + torch.tensor(COUNTS).log(), labels


def accuracy_by_hand(logits: np.ndarray, labels: np.ndarray, shares: np.ndarray, tau: float, trained: float,
                     weights: np.ndarray) -> float:
    prior = np.array(COUNTS) / sum(COUNTS)
    answers = np.argmax(logits - (tau - trained) * np.log(prior) + np.log(shares), axis=1)
    by_class = np.array([np.mean(answers[labels == label] == label) for label in range(len(COUNTS))])
    return 100 * float(by_class @ weights / weights.sum())


def test_shares_of_targets(tmp_path):
    assert target_shares('balanced', CLASSES).tolist() == [0.25] * 4
    torch.testing.assert_close(target_shares('natural', CLASSES), CLASSES.prior())
    file = tmp_path / 'met.json'
    file.write_text(json.dumps({'dog': 1, 'cat': 1, 'bee': 2, 'ant': 4}))  # in another order than the classes
    assert target_shares(str(file), CLASSES).tolist() == [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize('given', [
    {'dog': 0.125, 'cat': 0.125, 'bee': 0.25, 'ant': 0.5}, [0.5, 0.25, 0.125, 0.125], [4.0, 2, 1, 1.0],
    {'names': ['bee', 'ant', 'cat', 'dog'], 'counts': [2.5e-7, 5e-7, 1.25e-7, 1.25e-7]}])
def test_shares_may_be_fractions(tmp_path, given):
    file = tmp_path / 'met.json'
    file.write_text(json.dumps(given))
    torch.testing.assert_close(target_shares(str(file), CLASSES), torch.tensor([0.5, 0.25, 0.125, 0.125]).double(),
                               rtol=1e-9, atol=0)


@pytest.mark.parametrize('headings', ['', 'class,share\n'])
def test_shares_may_be_a_table(tmp_path, headings):
    file = tmp_path / 'met.csv'
    file.write_text(f'{headings}dog,0.125\ncat, 0.125\n"bee",0.25\nant,0.5\n')
    assert target_shares(str(file), CLASSES).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], rel=1e-9)


@pytest.mark.parametrize(('given', 'said'), [
    ('ant: 1\nbee: x\n', r'or give a number per class, as JSON .* or in a table of `name,number` lines'),
    ('ant,1\nbee,1\n', "classes 'cat', 'dog' of .* are not among .*: add what is missing, with its number"),
    ('ant,1\nant,2\n', "has 'ant' twice")])
def test_a_target_file_of_another_form_or_with_too_few_classes_says_what_to_do(tmp_path, given, said):
    file = tmp_path / 'met.txt'
    file.write_text(given)
    with pytest.raises(InputError, match=said):
        target_shares(str(file), CLASSES)


@pytest.mark.parametrize('given', ['[0.5, 0.5, -0.1, 0.1]', '[0.5, NaN, 0.2, 0.3]', '[0.5, "0.2", 0.1, 0.2]',
                                   '[0.5, Infinity, 0.2, 0.3]', '[0.5, true, 0.2, 0.3]'])
def test_shares_that_are_none_are_refused(tmp_path, given):
    file = tmp_path / 'met.json'
    file.write_text(given)
    with pytest.raises(InputError, match='is no number of images'):
        target_shares(str(file), CLASSES)


def test_a_target_without_a_share_is_refused(tmp_path):
    file = tmp_path / 'met.json'
    file.write_text(json.dumps({'dog': 0, 'cat': 1, 'bee': 2, 'ant': 4}))
    with pytest.raises(InputError, match="class 'dog' has no share"):
        target_shares(str(file), CLASSES)


@pytest.mark.parametrize(('target', 'trained'), [('balanced', 0.0), ('balanced', 1.0), ('natural', 0.0)])
def test_chosen_strength_is_the_best_of_the_curve(target, trained):
    logits, labels = picture_logits(4000)
    shares = target_shares(target, CLASSES)
    curve = StrengthCurve(CLASSES, shares, trained)
    for part in torch.arange(4000).split(333):
        curve.update(logits[part], labels[part])
    chosen = curve.choose(name=target)
    by_hand = {tau: accuracy_by_hand(logits.double().numpy(), labels.numpy(), shares.numpy(), tau, trained,
                                     shares.numpy()) for tau in TAUS}
    best = max(by_hand.values())
    if chosen.tau != 1:
        assert by_hand[chosen.tau] == pytest.approx(best, abs=1e-9)
    assert chosen.accuracy == pytest.approx(by_hand[chosen.tau], abs=1e-9)
    assert chosen.consistent == pytest.approx(by_hand[1.0], abs=1e-9)
    natural = np.array(COUNTS) / sum(COUNTS)
    assert chosen.overall == pytest.approx(accuracy_by_hand(
        logits.double().numpy(), labels.numpy(), shares.numpy(), chosen.tau, trained, natural), abs=1e-9)
    # The rule for the shares of training is that of a natural target.
    assert chosen.plain == pytest.approx(accuracy_by_hand(
        logits.double().numpy(), labels.numpy(), natural, 1.0, trained, natural), abs=1e-9)
    assert chosen.images == 4000


def test_a_strength_that_is_far_off_is_found():
    """Logits that hold the prior twice want it off twice."""
    logits, labels = picture_logits(4000)
    curve = StrengthCurve(CLASSES, target_shares('balanced', CLASSES), 0.0)
    curve.update(logits + torch.tensor(COUNTS).log() * 0.8, labels)
    chosen = curve.choose()
    assert chosen.tau == pytest.approx(1.8, abs=0.3)
    assert chosen.why.startswith('the best of 21: mean class accuracy +') and 'with a standard error of' in chosen.why


def test_few_pictures_leave_the_consistent_strength():
    logits, labels = picture_logits(8)
    curve = StrengthCurve(CLASSES, target_shares('balanced', CLASSES), 0.0)
    curve.update(logits, labels)
    chosen = curve.choose()
    assert chosen.tau == 1 and 'beyond chance' in chosen.why


def test_the_allowed_drop_bounds_what_is_given_up():
    logits, labels = picture_logits(4000, spread=4)
    curve = StrengthCurve(CLASSES, target_shares('balanced', CLASSES), 0.0)
    curve.update(logits, labels)
    free, bound, none = curve.choose(), curve.choose(allowed_drop=3.0), curve.choose(allowed_drop=0.0)
    assert free.plain - free.overall > 3
    assert bound.plain - bound.overall <= 3 and free.tau > bound.tau > none.tau - 1e-9
    assert none.overall >= none.plain
    assert bound.accuracy < free.accuracy


def test_classes_without_a_validation_picture_do_not_count():
    logits, labels = picture_logits(2000)
    keep = labels != 3
    curve = StrengthCurve(CLASSES, target_shares('balanced', CLASSES), 0.0)
    curve.update(logits[keep], labels[keep])
    answers = (logits[keep] - torch.tensor(COUNTS).log()).argmax(dim=1)
    by_class = [float((answers == labels[keep])[labels[keep] == label].double().mean()) for label in range(3)]
    assert curve.choose().consistent == pytest.approx(100 * sum(by_class) / 3, abs=1e-6)


def test_strengths_that_the_validation_cannot_judge_are_not_tried(tmp_path):
    """Without a picture of the rarest class, a small strength looks good at its cost."""
    logits, labels = picture_logits(4000)
    keep = labels != 3
    file = tmp_path / 'met.json'
    file.write_text(json.dumps([1, 1, 1, 10]))
    for target in ('balanced', str(file)):
        curve = StrengthCurve(CLASSES, target_shares(target, CLASSES), 1.0)
        curve.update(logits[keep], labels[keep])  # logits with the prior, though the loss is said to have taken it off
        chosen = curve.choose(name=target)
        assert chosen.tau >= 1 and '(none of 1 class, so no strength below 1 was tried)' in chosen.why
    natural = StrengthCurve(CLASSES, target_shares('natural', CLASSES), 0.0)  # of which it is a 470th
    natural.update(logits[keep], labels[keep])
    assert 'lack' not in natural.choose(name='natural').why


def test_a_misspelt_target_is_told_the_nearest():
    with pytest.raises(InputError, match="there is no target 'ballanced'.*did you mean 'balanced'"):
        target_shares('ballanced', CLASSES)


@pytest.mark.parametrize(('target', 'loss', 'trained'), [
    ('balanced', 'balanced_softmax', 1), ('natural', 'cross_entropy', 0)])
def test_choice_by_target(target, loss, trained):
    choice = choose_training(CLASSES, target)
    assert (choice.loss, choice.sampler, choice.trained_tau) == (loss, 'instance_balanced', trained)
    assert '400' in choice.why  # the imbalance factor


def test_equal_classes_need_nothing():
    choice = choose_training(Classes((7, 7), ('a', 'b'), 'a test'), 'balanced')
    assert choice.loss == 'cross_entropy'
    # Balanced softmax would be the same there.
    logits, target = torch.randn(5, 2), torch.tensor([0, 1, 0, 0, 1])
    classes = Classes((7, 7), ('a', 'b'), 'a test')
    torch.testing.assert_close(LOSSES['balanced_softmax'](classes)(logits, target),
                               LOSSES['cross_entropy'](classes)(logits, target))


def test_choice_without_counts_is_refused():
    with pytest.raises(InputError, match='--class-counts FILE'):
        choose_training(Classes(None, ('a', 'b'), 'a test'))


@pytest.mark.parametrize('name', ['resnet20', 'resnet32_ride', 'resnet20_nbn_lr', 'test_efficientnet'])
def test_the_offset_stays_in_the_network(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(COUNTS))
    for _ in range(3):
        model.train()(torch.randn(8, 3, 32, 32))
    model.eval()
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        chosen = StrengthCurve(CLASSES, target_shares('balanced', CLASSES), 0.0).consistent()
        LogitAdjustment.write(model, chosen)
        after = model(images)
    prior = np.array(COUNTS) / sum(COUNTS)
    expected = before.softmax(dim=1).double().numpy() / prior
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(after.softmax(dim=1).double().numpy(), expected, atol=2e-5)


def test_a_classifier_without_bias_is_refused():
    model = timm.create_model('resnet20', num_classes=4)
    model.fc = nn.Linear(64, 4, bias=False)
    assert 'no bias' in (why_not_adjustable(model) or '')


def _counts_of_a_rank(folder: str) -> None:
    world = init_world('cpu')
    rank, size = world.rank, world.size
    logits, labels = picture_logits(1001)
    curve = StrengthCurve(CLASSES, target_shares('balanced', CLASSES), 0.0)
    curve.update(logits[rank::size], labels[rank::size])
    curve.reduce()
    Path(folder, f'{rank}.json').write_text(json.dumps([curve.choose().tau, curve.choose().accuracy]))
    world.barrier()
    close_world(world)


def test_processes_add_up_to_one(tmp_path):
    run_ranks(_counts_of_a_rank, str(tmp_path))
    logits, labels = picture_logits(1001)
    curve = StrengthCurve(CLASSES, target_shares('balanced', CLASSES), 0.0)
    curve.update(logits, labels)
    chosen = curve.choose()
    assert [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1)] == [
        [chosen.tau, chosen.accuracy]] * 2


def arguments(folder, *more: str) -> list[str]:
    return ['--dataset', 'digits_lt', '--img-size', '16', '--model', 'resnet20', '--workers', '0', '--batch-size', '64',
            '--warmup-epochs', '0', '--lr', '0.05', '--output', str(folder), '--experiment', 'run', *more]


@pytest.mark.slow
def test_auto_from_training_to_validation(tmp_path, capsys):
    """A target far from balance moves the offset: the adjusted file gives the accuracy that the run reports."""
    file = tmp_path / 'met.json'
    file.write_text(json.dumps([1] * 9 + [1000]))
    train.main(arguments(tmp_path, '--epochs', '2', '--imbalance', 'auto', '--target', str(file)))
    folder = tmp_path / 'run'
    printed = capsys.readouterr().out
    assert "takes loss 'balanced_softmax'" in printed and 'strength  ' in printed
    results = json.loads((folder / 'test.json').read_text())
    assert results['weights'] == {'file': 'model_adjusted.pth.tar', 'stage': 'logit_adjustment'}
    validate.main(['--checkpoint', str(folder / 'model_adjusted.pth.tar'), '--dataset', 'digits_lt',
                   '--results-file', str(tmp_path / 'again.json')])
    again = json.loads((tmp_path / 'again.json').read_text())
    assert again['top1'] == results['top1']
    record = read_checkpoint(folder / 'model_adjusted.pth.tar')['args']
    assert record['loss'] == 'balanced_softmax' and record['imbalance'] == 'auto'
    assert record['stage'] == 'logit_adjustment' and record['stage_kwargs']['tau'] in TAUS
    best, adjusted = (read_checkpoint(folder / name)['state_dict'] for name in (
        'model_best.pth.tar', 'model_adjusted.pth.tar'))
    assert [key for key in best if not torch.equal(best[key], adjusted[key])] == ['fc.bias']
    moved = (adjusted['fc.bias'] - best['fc.bias']).double()
    assert moved.argmax() == 9 and float(moved[9] - moved[8]) > math.log(1000) - 2

    # To go on from the end changes nothing: the offset is not added twice.
    train.main(arguments(tmp_path, '--epochs', '2', '--imbalance', 'auto', '--target', str(file), '--resume', 'auto'))
    once_more = read_checkpoint(folder / 'model_adjusted.pth.tar')['state_dict']
    assert all(torch.equal(adjusted[key], once_more[key]) for key in adjusted)


def test_auto_refuses_what_it_chooses(tmp_path):
    with pytest.raises(InputError, match='--loss has no effect with --imbalance'):
        train.main(arguments(tmp_path, '--imbalance', 'auto', '--loss', 'ldam'))
    with pytest.raises(InputError, match='--target has no effect without --imbalance'):
        train.main(arguments(tmp_path, '--target', 'natural'))


def test_two_corrections_are_told(tmp_path, capsys):
    train.main(arguments(tmp_path, '--epochs', '1', '--loss', 'balanced_softmax', '--sampler', 'class_balanced'))
    assert 'both make up for the sizes of classes' in capsys.readouterr().out


@pytest.mark.parametrize(('loss', 'kwargs', 'said'), [
    ('bbn', {}, "'bbn' goes from its beginning to its end in 200 epochs, and this run has 30"),
    ('glmc', {'epochs': 20}, 'in 20 epochs, and this run has 30: give --loss-kwargs epochs=30'),
    ('glmc', {'epochs': 30}, None), ('cross_entropy', {}, None)])
def test_a_loss_that_the_run_does_not_bring_to_its_end_is_told(loss, kwargs, said):
    """GLMC and BBN begin with another classifier, or branch, than the one that is evaluated."""
    told = doubtful(TrainSettings().with_values(loss=loss, loss_kwargs=kwargs, epochs=30), None)
    assert [said in sentence for sentence in told] == [True] * (said is not None)


def test_which_methods_balance():
    """By what they do on two classes of which one is a hundred times as frequent."""
    classes = Classes((1000, 10), ('a', 'b'), 'a test')
    one_output = ('weighted_cross_entropy', 'balanced_softmax', 'logit_adjusted', 'vs', 'robal', 'hcm', 'ldam',
                  'cross_entropy', 'focal')
    for name in (*one_output, 'shike', 'balpoe', 'sade'):
        loss = LOSSES[name](classes, **{'share': 1.0} if name == 'hcm' else {})
        pulls = []
        for label in (0, 1):  # of one picture of a class, weighed against one of the other
            given = torch.zeros(2, *[3] * takes_experts(name), 2).requires_grad_()
            loss(given, torch.tensor([0, 1])).backward()
            pulls.append(float(given.grad[label].abs().sum()))
        assert balances_classes(name) == (pulls[1] > 2 * pulls[0]), name
    targets = np.repeat([0, 1], [1000, 10])
    for name in ('class_balanced', 'instance_balanced', 'square_root', 'reverse'):
        sampler = SAMPLERS[name](targets, classes)
        drawn = targets[np.fromiter(sampler, dtype=np.int64)]
        assert SAMPLERS[name].balances == (np.mean(drawn) > 0.02), name

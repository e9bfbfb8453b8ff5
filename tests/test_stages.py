"""Second stages against independent computations, and whole runs of them through train.py and validate.py."""
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from forks import run_ranks
from PIL import Image
from stage_flags import FITTED, TRAINED, stage_flags, takes_network
from torch import nn

import nbn_timm  # noqa: F401  (registers the models)
import nbn_timm.training.fit as fit
import nbn_timm.training.report as reports
from nbn_timm.cli import train, validate
from nbn_timm.errors import InputError
from nbn_timm.evaluation import LongTailEvaluator
from nbn_timm.layers import CosineLinear, RectifiedLinear, merge_experts
from nbn_timm.models.weight_files import DIGEST
from nbn_timm.second_stages import SECOND_STAGES, FitData, SecondStage, create_second_stage, restore_second_stages
from nbn_timm.second_stages.expert_aggregation import padded_crop
from nbn_timm.second_stages.ncm import CentroidLinear
from nbn_timm.second_stages.tau_norm import tau_normalize
from nbn_timm.training.classifier_inputs import inputs_of
from nbn_timm.training.run_checkpoint import LAST
from nbn_timm.training.task import SecondStageTask

ROOT = Path(__file__).parent.parent
COUNTS = (10, 6, 3, 1)
CLASSES = len(COUNTS)


def network(name: str, seed: int = 0, size: int = 16, **kwargs) -> nn.Module:
    """A network whose classifier and statistics are not those of initialisation."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for _ in range(3):
            model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def features_of(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.forward_head(model.forward_features(x), pre_logits=True).double().numpy()


def logits_of(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).double().numpy()


# tau-normalisation

@pytest.mark.fast
@pytest.mark.parametrize('tau', [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize('keep_bias', [True, False])
def test_tau_normalisation_in_numpy(tau, keep_bias):
    model, x = network('resnet20'), torch.randn(5, 3, 16, 16)
    features, weight, bias = features_of(model, x), model.fc.weight.detach().double().numpy(), model.fc.bias
    bias = bias.detach().double().numpy() * keep_bias
    expected = np.array([[sum(w * f for w, f in zip(row, feature, strict=True)) / np.sqrt((row ** 2).sum()) ** tau + b
                          for row, b in zip(weight, bias, strict=True)] for feature in features])
    tau_normalize(model, tau, keep_bias)
    np.testing.assert_allclose(logits_of(model, x), expected, rtol=1e-4, atol=1e-5)


def test_a_rectified_classifier_is_normalised_as_the_linear_one_that_it_is():
    model, plain, x = network('resnet20_nbn_lr'), network('resnet20_nbn_lr'), torch.randn(5, 3, 16, 16)
    plain.fc = plain.fc.fuse()
    assert type(plain.fc) is nn.Linear and isinstance(model.fc, RectifiedLinear)
    np.testing.assert_allclose(logits_of(model, x), logits_of(plain, x), atol=1e-4)
    tau_normalize(model, 0.0)  # the bias of a rectified classifier stays
    np.testing.assert_allclose(logits_of(model, x), logits_of(plain, x), atol=1e-4)
    tau_normalize(model, 0.8)
    tau_normalize(plain, 0.8, keep_bias=True)
    np.testing.assert_allclose(logits_of(model, x), logits_of(plain, x), atol=1e-4)


def test_every_expert_is_normalised():
    model, x = network('resnet32_ride'), torch.randn(5, 3, 16, 16)
    parts = np.split(features_of(model, x), model.num_experts, axis=1)
    expected = np.zeros((5, CLASSES))
    for part, classifier in zip(parts, model.fc, strict=True):
        weight = classifier.weight.detach().double().numpy()
        expected += part @ (weight / np.linalg.norm(weight, axis=1, keepdims=True) ** 0.9).T / model.num_experts
    tau_normalize(model, 0.9)
    np.testing.assert_allclose(logits_of(model, x), expected, atol=1e-4)


def test_a_convolution_is_a_linear_classifier():
    model, x = network('dla46x_c', size=64), torch.randn(2, 3, 64, 64)
    assert isinstance(model.get_classifier(), nn.Conv2d)
    weight = model.fc.weight.detach()[:, :, 0, 0].double().numpy()
    expected = features_of(model, x).reshape(2, -1) @ (weight / np.linalg.norm(weight, axis=1, keepdims=True)).T
    tau_normalize(model, 1.0)
    np.testing.assert_allclose(logits_of(model, x), expected, rtol=1e-3, atol=1e-3)


# LWS

@pytest.mark.fast
@pytest.mark.parametrize('name, size', [
    ('resnet20', 16), ('resnet20_nbn_lr', 16), ('resnet32_ride', 16), ('resnet32_ride_nbn_lr', 16), ('dla46x_c', 64)])
def test_folded_scales_are_scaled_logits(name, size):
    model, x = network(name, size=size), torch.randn(5, 3, size, size)
    before = logits_of(model, x)
    keys = model.state_dict().keys()
    stage = create_second_stage('lws')
    model = stage.prepare(model)
    np.testing.assert_allclose(logits_of(model, x), before, atol=1e-4)  # scales start at 1
    scale = torch.tensor([0.5, -1.5, 2.0, 3.0])
    with torch.no_grad():
        for parameter in stage.trained(model).parameters():
            parameter.copy_(scale)
    np.testing.assert_allclose(logits_of(model, x), before * scale.double().numpy(), rtol=1e-3, atol=1e-3)
    folded = stage.finished(model)
    assert folded.state_dict().keys() == keys
    np.testing.assert_allclose(logits_of(folded, x), logits_of(model, x), rtol=1e-4, atol=1e-4)


def test_scales_alone_are_trained_and_rectification_stays_in_eval_mode():
    stage = create_second_stage('lws')
    task = SecondStageTask(
        stage.prepare(network('resnet20_nbn_lr')), nn.CrossEntropyLoss(), stage, freeze_statistics=False)
    task.train()
    model = task.trainable_module
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ['fc.scale.weight']
    assert model.bn1.training and not model.fc.classifier.bn.training
    assert list(stage.trained(model).parameters())[0] is model.fc.scale.weight


# NCM

def fit_data(images: torch.Tensor, target: torch.Tensor) -> FitData:
    def classifier_inputs(model, modules, dataset):
        assert dataset == 'train'
        return inputs_of(model, modules, list(zip(images.split(7), target.split(7), strict=True)))

    splits = SimpleNamespace(train='train', val=None, test=None, class_counts=None)
    return FitData(splits, classifier_inputs, lambda: LongTailEvaluator(CLASSES), torch.device('cpu'), metric='top1')


def in_form(features: np.ndarray, form: str, mean: np.ndarray) -> np.ndarray:
    if form == 'cl2n':
        features = features - mean
    return features if form == 'un' else features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize('metric', ['euclidean', 'dot'])
@pytest.mark.parametrize('form', ['un', 'l2n', 'cl2n'])
@pytest.mark.parametrize('name', ['resnet20', 'resnet20_nbn_lr', 'resnet32_ride'])
def test_nearest_class_mean(name, form, metric, tmp_path):
    """Plain numpy, and sklearn's nearest centroid for distances; images of a class differ in colour."""
    model = network(name)
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(29) % CLASSES
    images = torch.randn(29, 3, 16, 16, generator=generator) + target[:, None, None, None] * 0.2
    x = torch.randn(40, 3, 16, 16, generator=generator) + (torch.arange(40) % CLASSES)[:, None, None, None] * 0.2
    experts = getattr(model, 'num_experts', 1)
    scores, stacked = np.zeros((40, CLASSES)), []
    for known, asked in zip(np.split(features_of(model, images), experts, axis=1),
                            np.split(features_of(model, x), experts, axis=1), strict=True):
        mean = known.mean(axis=0)
        known, asked = in_form(known, form, mean), in_form(asked, form, mean)
        centroids = np.stack([known[target.numpy() == label].mean(axis=0) for label in range(CLASSES)])
        scores += asked @ centroids.T if metric == 'dot' else -((asked[:, None] - centroids) ** 2).sum(axis=2)
        stacked.append((known, asked))

    create_second_stage('ncm', features=form, metric=metric).fit(model, fit_data(images, target))
    predicted = logits_of(model, x).argmax(axis=1)
    np.testing.assert_array_equal(predicted, scores.argmax(axis=1))
    if metric == 'euclidean':
        assert len(set(predicted)) == CLASSES
        neighbors = pytest.importorskip('sklearn.neighbors')
        known, asked = (np.concatenate(parts, axis=1) for parts in zip(*stacked, strict=True))
        nearest = neighbors.NearestCentroid().fit(known, target.numpy()).predict(asked)
        np.testing.assert_array_equal(predicted, nearest)

    again = timm.create_model(name, num_classes=CLASSES)
    ordinary = form == 'un' or (metric == 'dot' and experts == 1)
    assert (model.state_dict().keys() == again.state_dict().keys()) == ordinary
    again = restore_second_stages(again, model.state_dict()).eval()
    again.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(logits_of(again, x), logits_of(model, x))


def test_normalised_features_stay_in_float32_under_autocast():
    classifier, x = CentroidLinear(8, 3), torch.randn(4, 8).bfloat16()
    expected = F.linear(F.normalize(x.float(), dim=1), classifier.weight, classifier.bias)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(classifier(x), expected)


def test_a_class_without_images_has_no_centroid():
    with pytest.raises(InputError, match="class '3' has no training image"):
        create_second_stage('ncm').fit(network('resnet20'), fit_data(torch.randn(6, 3, 16, 16), torch.arange(6) % 3))


# cRT and what all stages share

@pytest.mark.fast
def test_a_new_classifier_and_nothing_else():
    model, before = network('resnet20_nbn_lr'), network('resnet20_nbn_lr').state_dict()
    create_second_stage('crt').prepare(model)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == {
        'fc.weight', 'fc.bias', 'fc.bn.running_mean', 'fc.bn.running_var', 'fc.bn.num_batches_tracked'}
    kept = network('resnet20_nbn_lr')
    create_second_stage('crt', reinit=False).prepare(kept)
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())


@pytest.mark.parametrize('freeze', [True, False])
def test_the_frozen_part_is_in_the_mode_asked_for(freeze):
    stage = create_second_stage('crt')
    task = SecondStageTask(stage.prepare(network('resnet20_nbn_lr')), nn.CrossEntropyLoss(), stage, freeze)
    model = task.train().trainable_module
    assert model.bn1.training is not freeze and model.fc.bn.training
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {'fc.weight', 'fc.bias'}


def test_both_classifiers_of_a_distilled_transformer_are_trained():
    model = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=CLASSES, depth=1, img_size=32)
    trained = create_second_stage('crt').trained(model)
    assert sum(value.numel() for value in trained.parameters()) == 2 * (192 * CLASSES + CLASSES)
    with pytest.raises(InputError, match='is 2 classifiers, and lws is for linear classifiers'):
        create_second_stage('lws').prepare(model)


@pytest.mark.parametrize('name, kwargs', [('resnet20', {'head': 'cosine'}), ('resnet32_ride', {'head': 'cosine'})])
def test_cosines_are_refused_where_the_length_of_weights_has_no_effect(name, kwargs):
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    for use in (lambda: tau_normalize(model, 1.0), lambda: create_second_stage('lws').prepare(model)):
        with pytest.raises(InputError, match='is a CosineLinear'):
            use()
    retrained = create_second_stage('crt').prepare(model)
    heads = [module for module in retrained.modules() if isinstance(module, CosineLinear)]
    for head in heads:  # but cRT trains them
        torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(CLASSES))


@pytest.mark.parametrize('name, settings, message', [
    ('ctr', {}, "did you mean 'crt'"), ('crt', {'reinnit': 1}, "no setting 'reinnit' .it has reinit.; did you mean"),
    ('lws', {'tau': 1}, "lws has no setting 'tau' .it has none"), ('ncm', {'features': 'l2'}, "give un or l2n or cl2n"),
    ('tau_norm', {'tau': 1, 'holdout': 2}, 'nothing to choose'), ('tau_norm', {'step': 0}, 'step=0: give a number'),
    ('tau_norm', {'holdout': 0.5}, 'whole number'),
])
def test_wrong_settings_are_one_sentence(name, settings, message):
    with pytest.raises(InputError, match=message):
        create_second_stage(name, **settings)


# Whole runs

@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Training images of 10, 6, 3 and 1 per class and two per class for val and test: colours and noise."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, counts in (('train', COUNTS), ('val', (2, 2, 2, 2)), ('test', (2, 2, 2, 2))):
        lines = []
        for label, count in enumerate(counts):
            for index in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3)) + 40 * label
                name = f'{split}_{label}_{index}.png'
                Image.fromarray(pixels.astype(np.uint8)).save(root / name)
                lines.append(f'{name} {label}\n')
        (root / f'{split}.txt').write_text(''.join(lines))
    return root


def flags(root: Path, output: Path, *splits: str) -> list[str]:
    lists = [f'--{split}-list={root}/{split}.txt' for split in splits or ('train', 'val', 'test')]
    return ['--dataset', 'list', '--data-dir', str(root), *lists, '--img-size', '8', '--device', 'cpu', '--workers',
            '0', '-b', '4', '--lr', '0.02', '--output', str(output)]


@pytest.fixture(scope='module')
def first_stages(images, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of a first epoch, by model."""
    output = tmp_path_factory.mktemp('first')
    for model in ('resnet20_nbn_lr', 'resnet20', 'resnet32_ride'):
        train.main([*flags(images, output), '--epochs', '1', '--model', model, '--model-kwargs', 'num_blocks=1',
                    '--experiment', model])
    return {folder.name: folder / LAST for folder in output.iterdir()}


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / LAST, weights_only=True)


def run_stage(stage: str, first: Path, images: Path, output: Path, *more: str) -> Path:
    train.main([*flags(images, output), '--stage', stage, '--initial-checkpoint', str(first), '--experiment', stage,
                *stage_flags(stage), *more])
    return output / stage


@pytest.mark.parametrize('model', ['resnet20', 'resnet20_nbn_lr', 'resnet32_ride'])
@pytest.mark.parametrize('stage', sorted(SECOND_STAGES))
def test_a_stage_leaves_a_checkpoint_that_validates_alone(stage, model, images, first_stages, tmp_path):
    if not takes_network(stage, model):
        pytest.skip(f'{stage} is for other networks')
    folder = run_stage(stage, first_stages[model], images, tmp_path)
    assert {'args.yaml', LAST, 'test.json', 'test_per_class.csv'} <= {path.name for path in folder.iterdir()}
    best = folder / 'model_best.pth.tar'
    validate.main(['--checkpoint', str(best if best.exists() else folder / LAST), '--device', 'cpu', '--workers', '0',
                   '-b', '4', '--results-file', str(tmp_path / 'result.json')])
    reported, validated = (json.loads(path.read_text()) for path in (folder / 'test.json', tmp_path / 'result.json'))
    for key in ('loss', 'top1', 'few', 'per_class', DIGEST):
        assert reported[key] == validated[key], key

    before, after = torch.load(first_stages[model], weights_only=True)['state_dict'], checkpoint(folder)['state_dict']
    if after.keys().isdisjoint(before):  # it is wrapped
        assert all(torch.equal(after[f'network.{key}'], value) for key, value in before.items())
        return
    changed = {key for key, value in before.items() if key not in after or not torch.equal(value, after[key])}
    changed |= after.keys() - before.keys()
    assert bool(changed) != (stage == 'cam_sampling')  # which makes pictures
    assert all(key.startswith('fc.') for key in changed)  # everything else bit for bit, statistics included
    extra = after.keys() - before.keys()
    if extra:
        assert SECOND_STAGES[stage].restore.__func__ is not SecondStage.restore.__func__
    plain = timm.create_model(model, num_classes=CLASSES, num_blocks=1)
    restore_second_stages(plain, after).load_state_dict(after)


@pytest.mark.parametrize('stage', [stage for stage in TRAINED if takes_network(stage, 'resnet20')])
def test_statistics_drift_if_asked(stage, images, first_stages, tmp_path):
    folder = run_stage(stage, first_stages['resnet20'], images, tmp_path, '--no-freeze-bn')
    before, after = (torch.load(path, weights_only=True)['state_dict'] for path in (
        first_stages['resnet20'], folder / LAST))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    statistics = {key for key in before if 'running' in key or 'tracked' in key}
    assert changed - {'fc.weight', 'fc.bias'} == statistics


def assert_same(first, second) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


# Whether folding loses something, so that it is task state.
FOLDING_LOSES = {'crt': False, 'disalign': False, 'lws': True, 'marc': True, 'mislas': True}


@pytest.mark.parametrize('stage', TRAINED)
def test_a_resumed_stage_ends_where_the_uninterrupted_one_does(stage, images, first_stages, tmp_path):
    drift = [] if 'freeze_bn' in SECOND_STAGES[stage].unused else ['--no-freeze-bn']
    more = ['--model-ema', '--model-ema-decay', '0.8', *drift, '--sched', 'constant']
    first = next(path for name, path in first_stages.items() if takes_network(stage, name))
    whole = run_stage(stage, first, images, tmp_path / 'whole', *more, '--epochs', '3')
    run_stage(stage, first, images, tmp_path / 'parts', *more, '--epochs', '1')
    parts = run_stage(stage, first, images, tmp_path / 'parts', *more, '--epochs', '3', '--resume', 'auto')
    one, other = checkpoint(whole), checkpoint(parts)
    if stage in FOLDING_LOSES:
        assert ('task_state' in one) == ('task_state_ema' in one) == FOLDING_LOSES[stage]
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'task_state', 'task_state_ema'):
        assert_same(one.get(key), other.get(key))


def test_an_average_begun_at_a_resume_starts_from_the_scales(images, first_stages, tmp_path):
    run_stage('lws', first_stages['resnet20'], images, tmp_path, '--epochs', '1')
    folder = run_stage('lws', first_stages['resnet20'], images, tmp_path, '--epochs', '2', '--resume', 'auto',
                       '--model-ema', '--model-ema-decay', '1')
    scales = checkpoint(folder)['task_state_ema']['fc.scale.weight']
    assert not torch.equal(scales, torch.ones(CLASSES))


@pytest.mark.parametrize('stage', ['balms', 'crt', 'ncm'])
def test_new_classifiers_may_be_for_another_number_of_classes(stage, images, first_stages, tmp_path, capsys):
    first = first_stages['resnet20']
    lists: list[str] = []
    for split in ('train', 'val', 'test'):
        lines = (images / f'{split}.txt').read_text().splitlines()
        rest = [line for line in lines if int(line.split()[-1]) < CLASSES - 1]
        (tmp_path / f'{split}.txt').write_text('\n'.join(rest) + '\n')
        lists.append(f'--{split}-list={tmp_path}/{split}.txt')
    folder = run_stage(stage, first, images, tmp_path, *lists, '--num-classes', str(CLASSES - 1))
    before, after = (checkpoint(path)['state_dict'] for path in (first.parent, folder))
    assert after['fc.weight'].shape == (CLASSES - 1, before['fc.weight'].shape[1])
    shared = [name for name in before if 'conv' in name]
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)
    assert 'gives all but the classifier, which begins anew' in capsys.readouterr().out


def test_a_first_convolution_adapted_to_other_channels_is_told(images, first_stages, tmp_path, capsys):
    run_stage('crt', first_stages['resnet20'], images, tmp_path, '--in-chans', '1')
    assert 'the first convolution was adapted from RGB to 1 channel' in capsys.readouterr().out


def test_another_stage_cannot_go_on(images, first_stages, tmp_path):
    run_stage('crt', first_stages['resnet20'], images, tmp_path)
    with pytest.raises(InputError, match='which this --stage trains'):
        train.main([*flags(images, tmp_path), '--stage', 'lws', '--initial-checkpoint', str(first_stages['resnet20']),
                    '--epochs', '3', '--experiment', 'other', '--resume', str(tmp_path / 'crt' / LAST)])


def test_the_curve_is_what_validate_measures_and_its_best_is_taken(images, first_stages, tmp_path):
    first = first_stages['resnet20']
    folder = run_stage('tau_norm', first, images, tmp_path, '--stage-kwargs', 'max_tau=1', 'step=0.5')
    with open(folder / 'tau_curve.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['tau']) for row in rows] == [0, 0.5, 1]
    for row in rows:
        validate.main(['--checkpoint', str(first), '--tau-norm', row['tau'], '--split', 'val', '--device', 'cpu',
                       '--workers', '0', '-b', '4', '--results-file', str(tmp_path / 'result.json')])
        result = json.loads((tmp_path / 'result.json').read_text())
        assert result['tau_norm'] == float(row['tau'])
        for key in ('top1', 'mean_class', 'few'):
            assert float(row[key]) == result[key]
        assert float(row['loss']) == pytest.approx(result['loss'], abs=1e-5)
        assert row['many'] == ''  # no class has more than 100 images
    best = max(float(row['top1']) for row in rows)
    chosen = next(row for row in rows if float(row['top1']) == best)
    assert [row['tau'] for row in rows if row['chosen'] == '1'] == [chosen['tau']]
    expected = timm.create_model('resnet20', num_classes=CLASSES, num_blocks=1)
    expected.load_state_dict(torch.load(first, weights_only=True)['state_dict'])
    tau_normalize(expected, float(chosen['tau']))
    assert torch.equal(checkpoint(folder)['state_dict']['fc.weight'], expected.fc.weight)


def test_tau_without_a_validation_split(images, first_stages, tmp_path):
    state = torch.load(first_stages['resnet20'], weights_only=True)
    state['args']['val_list'] = None  # of a first stage without one; else it would be this one's too
    torch.save(state, tmp_path / 'first.pth')
    common = [*flags(images, tmp_path, 'train', 'test'), '--stage', 'tau_norm', '--initial-checkpoint',
              str(tmp_path / 'first.pth')]
    with pytest.raises(InputError, match='there is no validation split to choose tau on'):
        train.main([*common, '--experiment', 'none'])
    train.main([*common, '--experiment', 'hand', '--stage-kwargs', 'tau=0.7'])
    assert not (tmp_path / 'hand' / 'tau_curve.csv').exists()
    train.main([*common, '--experiment', 'watched', '--watch-test', '--stage-kwargs', 'tau=0.73', 'step=1.0'])
    lines = (tmp_path / 'watched' / 'tau_curve.csv').read_text().splitlines()
    assert [line.split(',')[:3] for line in lines[1:]] == [
        ['0.0', '0', 'the test split'], ['0.73', '1', 'the test split'], ['1.0', '0', 'the test split'],
        ['2.0', '0', 'the test split']]
    result = json.loads((tmp_path / 'watched' / 'test.json').read_text())
    assert lines[2].split(',')[4] == str(result['top1'])

    seen = []
    original = LongTailEvaluator.update
    def update(self, output, target):
        seen.append(target.clone())
        original(self, output, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LongTailEvaluator, 'update', update)
        train.main([*common, '--experiment', 'held', '--stage-kwargs', 'holdout=2', 'max_tau=0.1', 'step=0.1'])
    chosen_on = torch.cat(seen).bincount()  # two values of tau, and two test images per class
    assert chosen_on.tolist() == [2 * 2 + 2, 2 * 2 + 2, 2 * 2 + 2, 2 * 1 + 2]
    assert '2 training images per class' in (tmp_path / 'held' / 'tau_curve.csv').read_text()


def run_stages(stages: dict[str, list[str]], flags: list[str]) -> None:
    """A rank that runs second stages in one group after the other, and leaves each one's weights in its folder."""
    original = reports.report_on

    def report_on(plan, model, *rest):
        torch.save(model.state_dict(), plan.folder / f'rank{plan.world.rank}.pt')
        original(plan, model, *rest)

    fit.report_on = reports.report_on = report_on
    world = train.init_world('cpu')
    train.init_world, train.close_world = lambda device: world, lambda world: None  # one group for all runs
    for stage, own in stages.items():
        train.main([*flags, '--stage', stage, '--experiment', stage, *own])


@pytest.mark.slow
def test_two_processes_give_the_same_on_both_and_what_one_gives(images, first_stages, tmp_path):
    first = first_stages['resnet32_ride']
    stages = [name for name in SECOND_STAGES if takes_network(name, 'resnet32_ride')]
    run_ranks(run_stages, {stage: stage_flags(stage) for stage in stages},
              [*flags(images, tmp_path), '--initial-checkpoint', str(first)])
    before = torch.load(first, weights_only=True)['state_dict']
    for stage in stages:
        ranks = [torch.load(tmp_path / stage / f'rank{rank}.pt') for rank in (0, 1)]
        assert_same(*ranks)
        found = {key.removeprefix('network.'): value for key, value in ranks[0].items()}
        assert all(torch.equal(found[key], value) for key, value in before.items() if not key.startswith('fc.'))
    for stage in FITTED:
        alone = run_stage(stage, first, images, tmp_path / 'alone')
        for key, value in checkpoint(alone)['state_dict'].items():
            torch.testing.assert_close(value, checkpoint(tmp_path / stage)['state_dict'][key], rtol=1e-4, atol=1e-5)
        pictures = [path.relative_to(alone) for path in alone.rglob('*.png')]
        assert bool(pictures) == (stage == 'cam_sampling')
        assert all((alone / path).read_bytes() == (tmp_path / stage / path).read_bytes() for path in pictures)
        assert (alone / 'test_per_class.csv').read_text() == (tmp_path / stage / 'test_per_class.csv').read_text()
    curves = [(folder / 'tau_norm' / 'tau_curve.csv').read_text() for folder in (tmp_path, tmp_path / 'alone')]
    assert [line.split(',')[4:] for line in curves[0].splitlines()] == [
        line.split(',')[4:] for line in curves[1].splitlines()]


@pytest.mark.parametrize('more, message', [
    (['--stage', 'crt'], '--initial-checkpoint'),
    (['--config', 'cifar100_lt/resnet32_crt', '--model', 'resnet20'], '--stage crt begins with a finished network'),
    (['--freeze-bn'], '--freeze-bn has no effect without --stage'),
    (['--stage-kwargs', 'tau=1'], '--stage-kwargs has no effect without --stage'),
    (['--stage', 'crt', '--drop', '0.5', 'FIRST'], '--drop would have no effect on --stage crt'),
    (['--stage', 'routing', '--no-freeze-bn', 'FIRST'], '--no-freeze-bn would have no effect on --stage routing'),
    (['--stage', 'routing', 'FIRST'], 'no experts to choose from'),
    (['--stage', 'crt', '--clip-grad', '1', '--clip-mode', 'agc', 'FIRST'], '--clip-mode agc'),
    (['--stage', 'ncm', '--resume', 'FIRST', 'FIRST'], 'cannot go on from a checkpoint'),
])
def test_what_has_no_effect_is_refused(more, message, images, first_stages, tmp_path):
    first = str(first_stages['resnet20'])
    if more[-1] == 'FIRST':
        more = [*more[:-1], '--initial-checkpoint', first]
    more = [first if word == 'FIRST' else word for word in more]
    with pytest.raises(InputError, match=message):
        train.main([*flags(images, tmp_path), '--model', 'resnet20', '--epochs', '1', *more])


def test_a_recipe_without_its_network_says_what_is_missing():
    with pytest.raises(InputError, match='--stage ncm begins with a finished network: give its --initial-checkpoint'):
        train.main(['--config', 'cifar100_lt/resnet32_ncm'])


def test_a_fitted_stage_says_which_settings_of_a_config_it_leaves(images, first_stages, tmp_path, capsys):
    run_stage('ncm', first_stages['resnet20'], images, tmp_path, '--lr', '0.3', '--epochs', '7', '--stage-kwargs',
              'features=un')
    printed = capsys.readouterr().out
    assert 'Settings without effect here: lr, epochs (--stage ncm trains nothing).' in printed
    assert 'centroids of 20 training images (un features, euclidean similarity)' in printed


@pytest.mark.parametrize('model', ['resnet20', 'resnet32_ride'])
def test_weight_vectors_are_within_the_radius_of_the_first_stage(model, images, first_stages, tmp_path):
    """However much they grow: of the lengths that the first stage left, the radius is here the shortest one."""
    folder = run_stage('weight_balancing', first_stages[model], images, tmp_path, '--stage-kwargs', 'share=0',
                       '--weight-decay', '0', '--lr', '1')
    before, after = torch.load(first_stages[model], weights_only=True)['state_dict'], checkpoint(folder)['state_dict']
    for key in (key for key in before if key.startswith('fc.') and key.endswith('weight')):
        lengths = after[key].norm(dim=1)
        assert lengths.max() <= before[key].norm(dim=1).min() * (1 + 1e-6)
        assert not torch.equal(before[key], after[key])


def test_weight_balancing_needs_lengths_that_matter():
    for head in ('cosine', 'rectified'):
        with pytest.raises(InputError, match='use another second stage'):
            create_second_stage('weight_balancing').prepare(timm.create_model('resnet20', head=head))
    for share in (-0.1, 1.5, True, '0.1'):
        with pytest.raises(InputError, match='share=.*give a number'):
            create_second_stage('weight_balancing', share=share)


def test_experts_are_weighted_for_the_test_images(images, first_stages, tmp_path):
    """The output is the weighted sum of their logits, merged into one classifier too; a router takes no such head."""
    folder = run_stage('expert_aggregation', first_stages['resnet32_ride'], images, tmp_path, '--stage-kwargs', 'lr=10')
    state = checkpoint(folder)['state_dict']
    weights = state['fc.expert_weights']
    assert weights.sum().item() == pytest.approx(1) and weights.std() > 1e-4
    model = restore_second_stages(timm.create_model('resnet32_ride', num_classes=CLASSES, num_blocks=1), state).eval()
    model.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    expected = (model.fc.expert_logits(features) * weights[:, None]).sum(dim=1)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merge_experts(model)(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match='a router takes their mean'):
        create_second_stage('routing', top_k=3).prepare(model)


@pytest.mark.parametrize('settings, size, crop, blurred', [
    ({}, 32, 'padded', 0.2), ({}, 224, (0.2, 1.0), 0.5), ({'view': 'cifar'}, 224, 'padded', 0.2),
    ({'view': 'imagenet'}, 32, (0.2, 1.0), 0.5), ({'scale': 0.08}, 224, (0.08, 1.0), 0.5)])
def test_a_view_of_a_test_image_is_that_of_sades_script_for_the_benchmark(settings, size, crop, blurred):
    """test_training_cifar.py: RandomCrop(32, padding=4), blur at 0.2; _imagenet.py and _places.py:
    RandomResizedCrop(224, scale=(0.2, 1)), blur at 0.5; _inat.py: RandomResizedCrop(224).
    """
    steps = create_second_stage('expert_aggregation', **settings).view_steps(['resize', 'centre'], (size, size))
    if crop == 'padded':
        assert steps[:3] == ['resize', 'centre', padded_crop]
    else:
        assert steps[0].size == (size, size) and tuple(steps[0].scale) == crop
    jitter, grey, blur, flip = steps[-4:]
    assert (jitter.p, grey.p, blur.p, flip.p) == (0.8, 0.2, blurred, 0.5)
    assert jitter.transforms[0].hue == (-0.1, 0.1)
    if crop != 'padded':
        picture = Image.new('RGB', (300, 260))
        for step in steps:
            picture = step(picture)
        assert picture.size == (size, size)


def test_what_cannot_be_aggregated(images, first_stages, tmp_path):
    with pytest.raises(InputError, match='ResNetCifar has no experts to weigh'):
        run_stage('expert_aggregation', first_stages['resnet20'], images, tmp_path)
    with pytest.raises(InputError, match='has epochs=0: give a number from 1'):
        create_second_stage('expert_aggregation', epochs=0)
    with pytest.raises(InputError, match="view='imagenette': give one of cifar, imagenet; did you mean 'imagenet'"):
        create_second_stage('expert_aggregation', view='imagenette')
    with pytest.raises(InputError, match='scale=0: give a share above 0'):
        create_second_stage('expert_aggregation', scale=0)

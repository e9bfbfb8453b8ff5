"""Heads on cached features: the cache, the heads, the table, and the run that nbn-probe leaves."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli.export import main as export
from nbn_timm.cli.predict import main as predict
from nbn_timm.cli.probe import main as probe
from nbn_timm.cli.validate import main as validate
from nbn_timm.computation import PrecisionSettings
from nbn_timm.data import ArraySamples, Classes
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.errors import InputError
from nbn_timm.evaluation.predictions import order_of_split
from nbn_timm.imbalance import StrengthCurve, target_shares
from nbn_timm.imbalance.settings import ImbalanceSettings
from nbn_timm.layers import CosineLinear
from nbn_timm.losses import create_loss
from nbn_timm.models.create import create_model
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.probe import (
    METHODS,
    FeatureFolder,
    Features,
    HeadSettings,
    auto_head,
    compare_heads,
    extract_features,
    feature_key,
    head_logits,
    train_head,
)
from nbn_timm.probe.comparison import fold_indices
from nbn_timm.probe.heads import TrainedHead, adjusted, fit_head
from nbn_timm.probe.probe import put_head
from nbn_timm.training.distributed import World

MODEL = 'test_efficientnet'
FORMAT = OWN_IMAGES.override(input_size=(3, 32, 32), crop_pct=1.0)
COLOURS = {'ant': (200, 60, 60), 'bee': (60, 200, 60), 'cat': (60, 60, 200)}
ONE_PROCESS = World(torch.device('cpu'))


def picture(rng: np.random.Generator, colour: tuple[int, int, int]) -> np.ndarray:
    return np.clip(rng.normal(colour, 60, (32, 32, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Class folders of noisy colours: 16, 8 and 4 training images, 4 of each class for validation, 6 for the test."""
    root, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for split, numbers in (('train', (16, 8, 4)), ('val', (4, 4, 4)), ('test', (6, 6, 6))):
        for (name, colour), number in zip(COLOURS.items(), numbers, strict=True):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(number):
                Image.fromarray(picture(rng, colour)).save(place / f'{index}.png')
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    """Of a network for 7 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'seven.pth'
    torch.save(create_model(MODEL, 7).state_dict(), path)
    return path


@pytest.fixture(scope='module')
def run(folder, weights, tmp_path_factory) -> Path:
    """What nbn-probe leaves."""
    output = tmp_path_factory.mktemp('output')
    probe([*command(folder, weights, output), '--experiment', 'run'])
    return output / 'run'


def command(folder: Path, weights: Path, output: Path) -> list[str]:
    return ['--model', MODEL, '--pretrained-path', str(weights), '--dataset', 'folder', '--data-dir', str(folder),
            '--img-size', '32', '--workers', '0', '--output', str(output), '--device', 'cpu', '--head-epochs', '5']


def images(number: int = 11, seed: int = 0) -> ArraySamples:
    rng = np.random.default_rng(seed)
    return ArraySamples(rng.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8), np.arange(number) % 3)


def blobs(counts: tuple[int, ...], size: int = 6, seed: int = 0, spread: float = 1.0) -> tuple[Features, Classes]:
    """Features around one centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(len(counts), size, generator=torch.Generator().manual_seed(7))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    vectors = 5 + 4 * (centres[labels] + spread * torch.randn(len(labels), size, generator=generator))
    return Features(vectors[None], labels), Classes.from_targets(labels.numpy(), None, 'a test', len(counts))


# Features

def test_features_are_what_the_classifier_is_given():
    model, dataset = create_model(MODEL, 3).eval(), images()
    features = extract_features(model, dataset, FORMAT, flips=True, batch_size=4, workers=0)
    assert features.vectors.shape == (2, 11, model.num_features)
    assert features.labels.tolist() == dataset.targets.tolist()
    pixels = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(FORMAT.mean)[:, None, None]) / torch.tensor(FORMAT.std)[:, None, None]
    with torch.no_grad():
        for view, batch in zip(features.vectors, (pixels, pixels.flip(-1)), strict=True):
            expected = model.forward_head(model.forward_features(batch), pre_logits=True)
            torch.testing.assert_close(view, expected, rtol=1e-4, atol=1e-5)


def test_a_network_of_experts_is_refused():
    with pytest.raises(InputError, match='several classifiers'):
        extract_features(create_model('resnet32_ride', 3), images(), FORMAT, workers=0)


def test_shares_of_processes_come_back_in_the_order_of_the_data():
    shares = [torch.arange(rank, 7, 3) for rank in range(3)]
    order = order_of_split([len(share) for share in shares])
    assert torch.cat(shares)[order].tolist() == list(range(7))


def key_of(model=None, dataset=None, **changes) -> str | None:
    torch.manual_seed(0)
    format = FORMAT.override(**{name: changes.pop(name) for name in ('mean', 'crop_pct') if name in changes})
    return feature_key(model or create_model(MODEL, 3), dataset or images(), format, **changes)


def test_the_key_tells_weights_data_and_format_apart():
    """And not the classifier, which the features do not depend on."""
    torch.manual_seed(0)
    other = create_model(MODEL, 3)
    with torch.no_grad():
        other.classifier.weight.add_(1)
    assert key_of() == key_of(other)
    with torch.no_grad():
        other.conv_stem.weight[0, 0, 0, 0] += 1e-6
    changed = images()
    changed.images[3, 2, 1, 0] ^= 1
    relabelled = images()
    relabelled.targets[0] = 2
    keys = [key_of(), key_of(other), key_of(dataset=changed), key_of(dataset=relabelled), key_of(mean=(0.5, 0.5, 0.4)),
            key_of(crop_pct=0.9), key_of(flips=True), key_of(precision=PrecisionSettings(amp=True)),
            key_of(model=create_model(MODEL, 3, model_kwargs={'global_pool': 'max'})),
            key_of(device=torch.device('cuda'))]
    assert len({*keys}) == len(keys) and None not in keys


def test_files_are_told_apart_by_their_content_alone(folder, tmp_path):
    """Not by name, place, size or time, so that a picture that changes in place is never taken for the old one."""
    from nbn_timm.data.dataset import ImageSamples
    paths = [str(path) for path in sorted((folder / 'val').rglob('*.png'))[:3]]
    copies = [str(tmp_path / f'copy{index}.png') for index in range(3)]
    for path, copy in zip(paths, copies, strict=True):
        Path(copy).write_bytes(Path(path).read_bytes())
    before = key_of(dataset=ImageSamples(paths, [0, 1, 2]))
    assert key_of(dataset=ImageSamples(copies, [0, 1, 2])) == before
    content = bytearray(Path(copies[0]).read_bytes())
    content[-20] ^= 1
    Path(copies[0]).write_bytes(content)
    assert key_of(dataset=ImageSamples(copies, [0, 1, 2])) != before


def test_a_second_call_takes_the_file_and_a_damaged_one_is_computed_again(tmp_path):
    features, _ = blobs((3, 2))
    told: list[str] = []
    store, calls = FeatureFolder(tmp_path, ONE_PROCESS, told.append), []

    def compute() -> Features:
        calls.append(1)
        return features

    store.get('train', 'a' * 64, compute)
    again = store.get('train', 'a' * 64, compute)
    assert len(calls) == 1 and torch.equal(again.vectors, features.vectors) and 'same weights' in told[-1]
    # As torch aligns what it makes; in a mapped file it may lie otherwise, and products differ in the last bit.
    assert again.vectors.data_ptr() % 64 == 0 and again.vectors.is_contiguous()
    store.get('train', 'b' * 64, compute)
    assert len(calls) == 2
    file = next(tmp_path.glob('train-aaa*'))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store.get('train', 'a' * 64, compute)
    assert len(calls) == 3 and 'is damaged' in told[-2]
    store.get('train', None, compute)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 2
    next(tmp_path.glob('train-bbb*')).write_bytes(file.read_bytes())  # whole, and of other images
    store.get('train', 'b' * 64, compute)
    assert len(calls) == 5 and 'holds other things than these features' in told[-2]


def test_no_wrong_bit_of_a_kept_file_gets_into_features(tmp_path):
    features, _ = blobs((3, 2))
    store = FeatureFolder(tmp_path, ONE_PROCESS, lambda line: None)
    store.get('train', 'a' * 64, lambda: features)
    file, = tmp_path.iterdir()
    content, rng, computed = file.read_bytes(), np.random.default_rng(40_301), []
    for _ in range(150):
        wrong = bytearray(content)
        wrong[rng.integers(len(wrong))] ^= 1 << int(rng.integers(8))
        file.write_bytes(wrong)
        again = store.get('train', 'a' * 64, lambda: computed.append(1) or features)
        assert torch.equal(again.vectors, features.vectors) and torch.equal(again.labels, features.labels)
    assert len(computed) > 100


# Heads

@pytest.mark.parametrize('kind', ['linear', 'cosine', 'rectified'])
def test_a_folded_head_is_the_one_that_was_trained(kind):
    features, classes = blobs((30, 12, 6))
    from nbn_timm.probe.methods import HeadMethod
    trained = fit_head(features, classes, HeadMethod(kind=kind), HeadSettings(head_epochs=3))
    x = blobs((5, 5, 5), seed=1)[0].plain
    expected = trained.head((x - trained.mean) / trained.std)
    torch.testing.assert_close(trained.folded()(x), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(trained.head, CosineLinear) == (kind == 'cosine')


@pytest.mark.parametrize('method', METHODS)
def test_every_head_learns_and_the_seed_decides(method):
    train, classes = blobs((60, 20, 8), spread=0.5)
    val = blobs((20, 20, 20), seed=1, spread=0.5)[0]
    first, second = (compare_heads([method], train, val, classes, HeadSettings(head_epochs=20), seed=3).best
                     for _ in range(2))
    assert first.result.mean_class > 90
    assert torch.equal(head_logits(first.head, val.plain), head_logits(second.head, val.plain))


def test_a_head_minimises_the_loss_of_the_registry():
    """Balanced softmax gives rare classes more than cross-entropy does, by the loss that training uses."""
    train, classes = blobs((200, 10), size=2, spread=3.0)
    balanced, plain = (train_head(train, classes, loss, settings=HeadSettings(head_epochs=60, head_weight_decay=0.0))
                       for loss in ('balanced_softmax', 'cross_entropy'))
    criterion = create_loss('balanced_softmax', classes)
    losses = [criterion(head_logits(head, train.plain), train.labels).item() for head in (balanced, plain)]
    assert losses[0] < losses[1]
    shares = [F.softmax(head_logits(head, train.plain), dim=1)[:, 1].mean().item() for head in (balanced, plain)]
    assert shares[0] > 2 * shares[1]


def test_logit_adjustment_subtracts_tau_log_priors():
    train, classes = blobs((30, 12, 6))
    trained = fit_head(train, classes, METHODS['linear'], HeadSettings(head_epochs=2))
    shifted = adjusted(trained, METHODS['logit_adjustment'], classes, 1.5)
    expected = head_logits(trained.folded(), train.plain) - 1.5 * classes.prior().log().float()
    torch.testing.assert_close(head_logits(shifted, train.plain), expected)


def test_tau_normalisation_divides_by_lengths_in_the_space_of_the_training():
    """Where the features are centred, so that leaving the bias out is no loss."""
    head = torch.nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        head.bias.copy_(torch.tensor([7.0, 8.0]))
    trained = TrainedHead(head, torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
    logits = trained.normalized(1.0)(torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(logits, torch.tensor([[0.6, 0.0]]))


def test_a_loss_is_a_head_and_an_unknown_name_is_told_the_nearest():
    train, classes = blobs((20, 10))
    assert compare_heads(['focal'], train, train, classes).best.name == 'focal'
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        compare_heads(['cosin'], train, train, classes)
    with pytest.raises(InputError, match='several experts or views'):
        compare_heads(['ride'], train, train, classes)


def test_a_head_that_cannot_be_had_is_left_out_with_the_reason():
    train, _ = blobs((20, 10))
    classes = Classes((20, 10, 0), ('a', 'b', 'c'), 'a test')
    told: list[str] = []
    found = compare_heads(['linear', 'ncm', 'logit_adjustment'], train, train, classes, tell=told.append)
    assert [one.name for one in found.heads] == ['linear'] and [*found.left_out] == ['ncm', 'logit_adjustment']
    assert 'no training image' in told[0]
    with pytest.raises(InputError, match='no head .*keep.*no training image'):
        found.find('ncm')


def test_folds_hold_each_image_out_once_and_keep_all_classes():
    labels = np.repeat([0, 1, 2, 3], [23, 7, 2, 1])
    parts = list(fold_indices(labels, 5, seed=1))
    held = np.concatenate([part for _, part in parts])
    assert sorted(held.tolist()) == list(range(32))  # the one image of the last class is never held out
    for rest, part in parts:
        assert {*labels[rest]} == {0, 1, 2, 3} and not {*rest} & {*part} and len(rest) + len(part) == 33
        assert 5 <= len(part) <= 8
    with pytest.raises(InputError, match='no class has two'):
        list(fold_indices(np.arange(3), 5))


def test_without_a_validation_split_every_image_is_judged_by_a_head_that_did_not_see_it():
    """Labels by chance can be learned by heart; heads that had seen the images would reach more than chance."""
    generator = torch.Generator().manual_seed(0)
    features = Features(torch.randn(1, 120, 200, generator=generator), torch.arange(120) % 4)
    classes = Classes((30,) * 4, ('a', 'b', 'c', 'd'), 'a test')
    best = compare_heads(['linear'], features, None, classes, HeadSettings(head_weight_decay=0.0)).best
    assert best.result.num_samples == 120 and best.result.top1 < 45
    assert (head_logits(best.head, features.plain).argmax(dim=1) == features.labels).float().mean() > 0.95


# --imbalance auto

def test_auto_takes_the_loss_and_the_strength_of_the_target():
    """Balanced softmax, and the offset of the strength in the bias; with a natural target cross-entropy, unchanged."""
    train, classes = blobs((200, 20, 3), spread=3.0)
    val, _ = blobs((50, 50, 50), seed=1, spread=3.0)
    for target, loss, trained in (('balanced', 'balanced_softmax', 1.0), ('natural', 'cross_entropy', 0.0)):
        found, choice, strength = auto_head(train, val, classes, ImbalanceSettings(imbalance='auto', target=target))
        plain = train_head(train, classes, loss)
        assert (choice.loss, found.method.loss) == (loss, loss)
        curve = StrengthCurve(classes, target_shares(target, classes), trained)
        curve.update(head_logits(plain, val.plain), val.labels)
        expected = curve.choose(name=target)
        assert strength.tau == expected.tau == found.tau
        torch.testing.assert_close(found.head.bias, plain.bias + expected.offset)
        right = (head_logits(found.head, val.plain).argmax(dim=1) == val.labels).double().mean()
        assert found.result.metrics()['top1'] == pytest.approx(100 * float(right))


def test_auto_without_a_validation_measures_on_held_out_parts():
    train, classes = blobs((200, 20, 3), spread=3.0)
    found, _, strength = auto_head(train, None, classes, ImbalanceSettings(imbalance='auto'))
    assert strength.images == len(train) and found.result.num_samples == len(train)


def test_auto_is_the_head_that_the_network_gets(run, folder, weights, tmp_path, capsys):
    probe([*command(folder, weights, run.parent), '--heads', 'linear', '--imbalance', 'auto', '--experiment', 'auto'])
    shown = capsys.readouterr().out
    assert "--imbalance auto takes loss 'balanced_softmax'" in shown and 'strength  ' in shown
    kept = json.loads((run.parent / 'auto' / 'heads.json').read_text())
    assert kept['kept'] == 'auto' and kept['chosen_by'] == '--imbalance auto' and set(kept['heads']) == {
        'linear', 'auto'}
    results = tmp_path / 'test.json'
    validate(['--checkpoint', str(run.parent / 'auto' / 'last.pth.tar'), '--workers', '0',
              '--results-file', str(results)])
    told = json.loads((run.parent / 'auto' / 'test.json').read_text())
    assert json.loads(results.read_text())['per_class'] == told['per_class']
    with pytest.raises(InputError, match='--keep has no effect with --imbalance'):
        probe([*command(folder, weights, run.parent), '--keep', 'linear', '--imbalance', 'auto'])


# The command

def test_the_run_is_an_ordinary_one(run, folder, tmp_path, capsys):
    """nbn-validate, nbn-predict and nbn-export take it without a flag, and find the accuracy that it tells."""
    assert {path.name for path in run.iterdir() if not path.name.startswith('.')} == {
        'args.yaml', 'heads.json', 'model_best.pth.tar', 'last.pth.tar', 'test.json', 'test_per_class.csv',
        'test_predictions.npz', 'report.html'}
    told = json.loads((run / 'test.json').read_text())
    for split in ('test', 'val'):
        results = tmp_path / f'{split}.json'
        validate(['--checkpoint', str(run / 'model_best.pth.tar'), '--workers', '0', '--split', split,
                  '--results-file', str(results)])
        expected = told['per_class'] if split == 'test' else _kept(run)['per_class']
        assert json.loads(results.read_text())['per_class'] == expected
    capsys.readouterr()
    predict(['--model', str(run / 'model_best.pth.tar'), '--workers', '0', str(folder / 'test' / 'ant' / '0.png')])
    shown = capsys.readouterr().out
    assert '16 training images' in shown and 'bee' in shown
    export([str(run / 'model_best.pth.tar'), str(tmp_path / 'export'), '--formats', 'torchscript', '--repeats', '1'])


def test_the_page_of_a_run_has_its_command_and_its_probabilities(run):
    page = (run / 'report.html').read_text()
    with np.load(run / 'test_predictions.npz') as arrays:
        assert arrays['digest'].shape == (32,)
    assert 'nbn-probe --dataset folder' in page and 'nbn-train' not in page
    kept = read_checkpoint(run / 'model_best.pth.tar').get('calibration')
    assert kept == json.loads((run / 'test.json').read_text())['calibration']


def _kept(run: Path) -> dict:
    table = json.loads((run / 'heads.json').read_text())
    return table['heads'][table['kept']]


def test_the_best_of_the_validation_is_kept(run):
    table = json.loads((run / 'heads.json').read_text())
    values = {name: head['mean_class'] for name, head in table['heads'].items()}
    assert [*values] == [*METHODS] and values[table['kept']] == max(values.values())
    checkpoint = read_checkpoint(run / 'model_best.pth.tar')
    assert checkpoint['args']['probe_head'].split()[0] == table['kept']
    assert checkpoint['class_counts']['names'] == ['ant', 'bee', 'cat']


@pytest.mark.parametrize('head', ['cosine', 'rectified', 'tau_norm', 'ncm'])
def test_heads_of_every_form_are_saved(run, folder, weights, tmp_path, head):
    """From the features of the first run."""
    probe([*command(folder, weights, run.parent), '--heads', 'linear', '--keep', head, '--experiment', head])
    results = tmp_path / 'test.json'
    validate(['--checkpoint', str(run.parent / head / 'last.pth.tar'), '--workers', '0',
              '--results-file', str(results)])
    told = json.loads((run.parent / head / 'test.json').read_text())
    assert json.loads(results.read_text())['per_class'] == told['per_class']
    assert told['weights']['head'].split()[0] == head


def test_the_same_call_does_the_run_again_from_its_features(run, folder, weights, capsys):
    before = (run / 'heads.json').read_text()
    probe([*command(folder, weights, run.parent), '--experiment', 'run'])
    assert capsys.readouterr().out.count('made of the same weights') == 3
    assert _without_seconds(before) == _without_seconds((run / 'heads.json').read_text())
    with pytest.raises(InputError, match='other settings: give another --experiment'):
        probe([*command(folder, weights, run.parent), '--experiment', 'run', '--flips'])


def test_a_validation_split_is_drawn_and_found_again(folder, weights, tmp_path, capsys):
    """As in nbn-train: kept beside the run, recorded, and what nbn-validate takes for its split."""
    data = tmp_path / 'pictures'
    data.mkdir()
    for split in ('train', 'test'):
        (data / split).symlink_to(folder / split)
    call = [*command(data, weights, tmp_path), '--experiment', 'drawn', '--val-fraction', '0.25', '--heads', 'linear']
    probe(call)
    rows = (tmp_path / 'drawn' / 'split.csv').read_text().splitlines()[1:]
    held = [row.split(',')[1] for row in rows if row.endswith(',val')]
    assert [held.count(name) for name in COLOURS] == [4, 2, 1]
    assert 'training images, 5 folds' not in capsys.readouterr().out
    validate(['--checkpoint', str(tmp_path / 'drawn' / 'last.pth.tar'), '--split', 'val', '--workers', '0',
              '--results-file', str(tmp_path / 'val.json')])
    told = json.loads((tmp_path / 'drawn' / 'heads.json').read_text())['heads']['linear']
    assert json.loads((tmp_path / 'val.json').read_text())['per_class'] == told['per_class']
    probe(call)  # the same run again
    with pytest.raises(InputError, match='other settings: give another --experiment'):
        probe([*call, '--val-seed', '1'])


def _without_seconds(text: str) -> dict:
    table = json.loads(text)
    for head in table['heads'].values():
        del head['seconds']
    return table


def test_a_run_is_a_backbone_for_other_data(run, folder, tmp_path):
    """Model and format come from its record; two of its classes are not among the new ones."""
    rng = np.random.default_rng(1)
    for split, number in (('train', 6), ('test', 3)):
        for name, colour in (('cat', COLOURS['cat']), ('dog', (200, 200, 60))):
            (tmp_path / 'new' / split / name).mkdir(parents=True)
            for index in range(number):
                Image.fromarray(picture(rng, colour)).save(tmp_path / 'new' / split / name / f'{index}.png')
    probe(['--checkpoint', str(run / 'model_best.pth.tar'), '--dataset', 'folder', '--data-dir', str(tmp_path / 'new'),
           '--workers', '0', '--output', str(tmp_path), '--experiment', 'new', '--heads', 'linear', '--device', 'cpu',
           '--head-epochs', '2'])
    made, first = (read_checkpoint(place / 'last.pth.tar') for place in (tmp_path / 'new', run))
    assert made['class_counts']['names'] == ['cat', 'dog'] and made['args']['input_size'] == (3, 32, 32)
    assert torch.equal(made['state_dict']['conv_stem.weight'], first['state_dict']['conv_stem.weight'])


def test_a_wrong_target_is_told_before_features_are_taken(folder, weights, tmp_path, monkeypatch):
    monkeypatch.setattr('nbn_timm.probe.probe.open_backbone', lambda *_: pytest.fail('too late'))
    with pytest.raises(InputError, match="there is no target 'missing.json'"):
        probe([*command(folder, weights, tmp_path), '--imbalance', 'auto', '--target', 'missing.json'])


def test_untrained_weights_are_refused(folder):
    with pytest.raises(InputError, match='untrained weights'):
        probe(['--model', MODEL, '--dataset', 'folder', '--data-dir', str(folder)])


def test_a_head_that_normalises_needs_a_classifier_on_vectors():
    train, classes = blobs((6, 4), size=16)
    head = train_head(train, classes, kind='cosine', settings=HeadSettings(head_epochs=1))
    model = create_model('resnet20', 2)
    model.fc = torch.nn.Conv2d(16, 2, 1)
    with pytest.raises(InputError, match='not on feature vectors'):
        put_head(model, head)

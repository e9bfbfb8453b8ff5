"""BALMS's second stage: what teaches the rates, against plain autograd, and whole runs of it."""
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from forks import run_killed_at, run_ranks
from PIL import Image

import nbn_timm  # noqa: F401  (registers the models)
import nbn_timm.training.run as run
from nbn_timm.cli import train
from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss
from nbn_timm.samplers import create_sampler
from nbn_timm.samplers.bilevel import meta_update, pick_noise
from nbn_timm.second_stages import SecondStageRun, create_second_stage
from nbn_timm.second_stages.balms import BalancedMetaSoftmax, MetaBatches, step_of
from nbn_timm.training.run_checkpoint import LAST

ROOT = Path(__file__).parent.parent
COUNTS = (10, 6, 3, 1)


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Training images of 10, 6, 3 and 1 per class and two per class for val and test: overlapping colours."""
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
def first(images, tmp_path_factory) -> Path:
    """The checkpoint of a first epoch, of a rectified network."""
    output = tmp_path_factory.mktemp('first')
    train.main([*flags(images, output), '--epochs', '1', '--model', 'resnet20_nbn_lr', '--experiment', 'first'])
    return output / 'first' / LAST


def balms_flags(images: Path, output: Path, first: Path, *more: str) -> list[str]:
    return [*flags(images, output), '--stage', 'balms', '--initial-checkpoint', str(first), '--sampler', 'meta',
            '--loss', 'balanced_softmax', '--epochs', '3', *more]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / LAST, weights_only=True)


def assert_same(one, other) -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other


def small_stage(
        counts: tuple[int, ...],
        lr: float,
        loss: str = 'balanced_softmax',
        init_pow: float = 0,
        **settings,
) -> tuple[BalancedMetaSoftmax, torch.nn.Linear]:
    """The stage around a linear classifier of 8 features, as `connect` leaves it but without loaders."""
    targets = np.repeat(np.arange(len(counts)), counts)
    stage = create_second_stage('balms', **settings)
    assert isinstance(stage, BalancedMetaSoftmax)
    torch.manual_seed(0)
    classifier = torch.nn.Linear(8, len(counts))
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr)
    names = tuple(map(str, range(len(counts))))
    criterion = create_loss(loss, ClassCounts(counts, names, 'the test'), smoothing=0.1)
    stage.run = SecondStageRun(None, None, None, criterion, optimizer, torch.device('cpu'))  # type: ignore[arg-type]
    stage.sampler = create_sampler('meta', targets, init_pow=init_pow)
    stage.counts = torch.tensor(counts)
    stage.adam = torch.optim.Adam([stage.sampler.rate_logits], lr=stage.meta_lr)
    stage.generator = torch.Generator().manual_seed(0)
    stage.drawn_from = stage.sampler.rate_logits.detach().clone()
    return stage, classifier


def test_a_step_on_the_rates_is_that_of_plain_autograd():
    """The look-ahead at the present learning rate, the noise of the rates drawn from, Adam's own first step."""
    stage, classifier = small_stage((50, 20, 6, 2), lr=0.7, meta_lr=0.03)
    present = torch.tensor([-0.5, 0.1, 0.6, 1.0])
    with torch.no_grad():
        stage.sampler.rate_logits.copy_(present)
    features, target = torch.randn(10, 8), torch.tensor([0, 0, 2, 1, 3, 0, 2, 3, 1, 0])
    meta_features, meta_target = torch.randn(8, 8), torch.tensor([0, 1, 2, 3] * 2)
    noise = pick_noise(torch.zeros(4), stage.counts, target, torch.Generator().manual_seed(0))
    stage.learn(classifier, features, target, meta_features, meta_target)

    w = present.clone().requires_grad_()
    rates = w.sigmoid()
    share = rates[target] * noise.picked / (noise.per_class * rates).sum(1)
    log_prior = torch.tensor([50., 20, 6, 2]).log()
    losses = torch.stack([F.cross_entropy(classifier(x) + log_prior, y, label_smoothing=0.1)
                          for x, y in zip(features, target, strict=True)])
    loss = ((1 + share - share.detach()) * losses).mean()
    gradients = torch.autograd.grad(loss, [classifier.weight, classifier.bias], create_graph=True)
    weight, bias = classifier.weight - 0.7 * gradients[0], classifier.bias - 0.7 * gradients[1]
    expected, = torch.autograd.grad(F.cross_entropy(F.linear(meta_features, weight, bias), meta_target), w)
    torch.testing.assert_close(stage.sampler.rate_logits.grad, expected)
    torch.testing.assert_close(stage.sampler.rate_logits.detach(), present - 0.03 * expected.sign())
    assert classifier.weight.grad is None


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('steps_before', [0, 2])
def test_the_look_ahead_is_the_step_of_the_classifiers_optimizer(steps_before, nesterov):
    """With momentum and weight decay, as `higher` takes it in the authors' code: the classifier that `learn` looks at
    is the one that the optimizer then makes, but for the straight-through weights, whose value is 1."""
    stage, classifier = small_stage((50, 20, 6, 2), lr=0.7)
    groups = [dict(params=[classifier.weight], weight_decay=0.03), dict(params=[classifier.bias], weight_decay=0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.7, momentum=0.9, nesterov=nesterov)
    object.__setattr__(stage.run, 'optimizer', optimizer)
    features, target = torch.randn(10, 8), torch.tensor([0, 0, 2, 1, 3, 0, 2, 3, 1, 0])
    meta_features, meta_target = torch.randn(8, 8), torch.tensor([0, 1, 2, 3] * 2)

    def step() -> None:
        optimizer.zero_grad()
        stage.run.criterion(classifier(features), target).backward()
        optimizer.step()
    for _ in range(steps_before):
        step()
    noise = pick_noise(torch.zeros(4), stage.counts, target, torch.Generator().manual_seed(0))
    _, seen = meta_update(stage.sampler.rate_logits, classifier, features, target, noise, meta_features, meta_target,
                          stage.losses, **step_of(optimizer, classifier))
    stage.learn(classifier, features, target, meta_features, meta_target)
    step()
    torch.testing.assert_close(seen, F.cross_entropy(classifier(meta_features), meta_target))
    assert step_of(torch.optim.Adam(classifier.parameters(), lr=0.2), classifier) == {'lr': 0.2}


@pytest.mark.parametrize('loss, init_pow, rises', [('cross_entropy', 0, 2), ('balanced_softmax', 1, 0)])
def test_rates_turn_to_the_classes_that_come_off_badly(loss, init_pow, rises):
    """To rare ones if nothing else balances, and back to frequent ones if loss and draws both do (section 3.2)."""
    counts = (200, 20, 4)
    stage, classifier = small_stage(counts, lr=0.1, loss=loss, init_pow=init_pow, meta_lr=0.05)
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(3), counts)
    means = rng.normal(size=(3, 8))
    features = torch.from_numpy(means[targets] + rng.normal(size=(len(targets), 8))).float()
    meta_target = torch.arange(3).repeat(20)
    meta_features = torch.from_numpy(means[meta_target] + rng.normal(size=(60, 8))).float()
    before = stage.sampler.rate_logits.detach().clone()
    for _ in range(12):  # epochs
        stage.drawn_from = stage.sampler.rate_logits.detach().clone()
        for batch in stage.sampler.pick(rng, 320).reshape(10, 32):
            x, y = features[batch], torch.from_numpy(targets[batch])
            stage.learn(classifier, x, y, meta_features, meta_target)
            stage.run.optimizer.zero_grad()
            stage.run.criterion(classifier(x), y).backward()
            stage.run.optimizer.step()
    change = stage.sampler.rate_logits.detach() - before
    assert change[rises] > 1
    assert change[2 - rises] < -1


def test_meta_batches_are_balanced_and_as_many_as_asked_for():
    targets = np.repeat(np.arange(4), (200, 50, 9, 1))
    ranks = [MetaBatches(2000, targets, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    drawn = [list(rank) for rank in ranks]
    assert [len(part) for part in drawn] == [2000, 2000] == [len(rank) for rank in ranks]
    labels = targets[np.stack(drawn, axis=1).ravel()]
    assert (np.sort(labels.reshape(1000, 4), axis=1) == np.arange(4)).all()  # each class once in every round
    assert drawn[0] != drawn[1]


def run_watched(images, output, first, *more: str) -> tuple[Path, list]:
    """A run, and what each step was taught by: features, targets, and the rates that its epoch was drawn from."""
    steps = []
    original = BalancedMetaSoftmax.learn

    def learn(self, classifier, features, target, meta_features, meta_target):
        steps.append((features, target, meta_features, meta_target, self.drawn_from,
                      self.sampler.rate_logits.detach().clone()))
        assert classifier.training
        original(self, classifier, features, target, meta_features, meta_target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BalancedMetaSoftmax, 'learn', learn)
        train.main([*balms_flags(images, output, first), '--experiment', 'watched', *more])
    return output / 'watched', steps


@pytest.mark.parametrize('split', ['train', 'val'])
def test_the_rates_learn_from_the_features_of_both_batches(split, images, first, tmp_path):
    folder, steps = run_watched(images, tmp_path, first, '--no-aug', '--stage-kwargs', f'meta_split={split}',
                                'meta_lr=0.1', 'meta_batch_size=6')
    assert len(steps) == 15  # 3 epochs of 20 images by 4
    recorded = checkpoint(folder)['args']
    model = timm.create_model('resnet20_nbn_lr', num_classes=4)
    before = torch.load(first, weights_only=True)['state_dict']
    model.load_state_dict(before)
    model.eval()
    known = {}
    for part, counts in (('train', COUNTS), ('val', (2, 2, 2, 2))):
        pixels = np.stack([np.asarray(Image.open(images / line.split()[0]))
                           for line in (images / f'{part}.txt').read_text().splitlines()])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(recorded['mean'])[:, None, None]) / torch.tensor(recorded['std'])[:, None, None]
        with torch.no_grad():
            features = model.forward_head(model.forward_features(x), pre_logits=True)
        known[part] = features, torch.repeat_interleave(torch.tensor(counts))
    for features, target, meta_features, meta_target, *_ in steps:
        assert len(target) == 4 and len(meta_target) == 6
        for rows, labels, part in ((features, target, 'train'), (meta_features, meta_target, split)):
            distance, nearest = torch.cdist(rows, known[part][0]).min(1)
            assert distance.max() < 1e-3 * known[part][0].norm(dim=1).mean()
            assert torch.equal(known[part][1][nearest], labels)

    for epoch in range(3):  # drawn from the rates at the epoch's beginning
        assert all(torch.equal(step[4], steps[5 * epoch][5]) for step in steps[5 * epoch:5 * epoch + 5])
    assert not torch.equal(steps[5][4], steps[0][4])
    state = checkpoint(folder)
    changed = {key for key, value in before.items() if not torch.equal(value, state['state_dict'][key])}
    assert changed == {'fc.weight', 'fc.bias', 'fc.bn.running_mean', 'fc.bn.running_var', 'fc.bn.num_batches_tracked'}
    assert state['state_dict']['fc.bn.num_batches_tracked'] == 15  # meta batches leave no trace in statistics
    assert state['task_state'].keys() == {'stage'}
    assert state['task_state']['stage']['adam']['state'][0]['step'] == 15


def test_meta_batches_are_balanced_twice_as_large_and_new_in_every_epoch(images, first, tmp_path):
    """By default. Classes are equally frequent in them, so that of 120 images 30 are of the class that has one."""
    _, steps = run_watched(images, tmp_path, first, '--no-aug')
    assert [len(step[3]) for step in steps] == [8] * 15
    drawn = torch.stack([step[3] for step in steps])
    counts = drawn.flatten().bincount(minlength=4)
    assert ((counts - 30) ** 2 / 30).sum() < 3 + 4 * np.sqrt(2 * 3)
    epochs = drawn.reshape(3, -1)
    assert len(torch.unique(epochs, dim=0)) == 3
    trained = torch.cat([step[0] for step in steps])
    assert len(torch.unique(torch.cat([step[2] for step in steps]).round(decimals=4), dim=0)) > 10  # not one image each
    assert all(not torch.equal(step[2][:4], step[0]) for step in steps) and len(trained) == 60


def test_a_killed_stage_that_resumes_ends_where_the_uninterrupted_one_does(images, first, tmp_path):
    common = balms_flags(images, tmp_path, first, '--epochs', '4', '--model-ema', '--model-ema-decay', '0.8',
                         '--reprob', '0.3', '--log-interval', '1', '--stage-kwargs', 'meta_lr=0.1', '--sampler-kwargs',
                         'init_pow=0.3')
    train.main([*common, '--experiment', 'whole'])
    run_killed_at('epoch 3/4  step 2/5', train.main, [*common, '--experiment', 'killed'])
    assert checkpoint(tmp_path / 'killed')['epoch'] == 1
    train.main([*common, '--experiment', 'killed', '--resume', 'auto'])
    whole, killed = checkpoint(tmp_path / 'whole'), checkpoint(tmp_path / 'killed')
    assert 'task_state_ema' not in whole
    for key in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'task_state', 'best'):
        assert_same(whole[key], killed[key])
    rates = whole['task_state']['stage']['sampler']['rate_logits']
    assert not torch.equal(rates, create_sampler('meta', np.repeat(np.arange(4), COUNTS), init_pow=0.3).rate_logits)


def test_statistics_drift_if_asked_and_half_precision_trains(images, first, tmp_path):
    folder, steps = run_watched(images, tmp_path, first, '--no-freeze-bn', '--amp', '--amp-dtype', 'bfloat16')
    before, after = torch.load(first, weights_only=True)['state_dict'], checkpoint(folder)['state_dict']
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {'fc.weight', 'fc.bias', *(key for key in before if 'running' in key or 'tracked' in key)}
    assert all(step[5].isfinite().all() for step in steps)


def watched_rank(flags: list[str]) -> None:
    """A rank that leaves what it learned from, and what it ends with, beside the checkpoints."""
    original, report, steps = BalancedMetaSoftmax.learn, run.report_run, []

    def learn(self, classifier, *batch):
        steps.append([*(part.clone() for part in batch), self.generator.get_state()])
        original(self, classifier, *batch)
        steps[-1].append(self.sampler.rate_logits.detach().clone())

    def keep(plan, task, *rest):
        torch.save((steps, task.get_checkpoint_state()), plan.folder / f'rank{plan.world.rank}.pt')
        report(plan, task, *rest)

    BalancedMetaSoftmax.learn, run.report_run = learn, keep
    train.main(flags)


def test_two_processes_learn_the_same_rates_from_the_batches_of_both(images, first, tmp_path):
    run_ranks(watched_rank, [*balms_flags(images, tmp_path, first), '--experiment', 'two'])
    one, other = (torch.load(tmp_path / 'two' / f'rank{rank}.pt') for rank in (0, 1))
    assert_same(one[0], other[0])
    assert_same(one[1], other[1])
    assert [len(step[1]) for step in one[0]] == [8, 8, 4] * 3  # 10 images per process, by 4
    assert all(len(step[3]) == 16 for step in one[0])
    assert not torch.equal(one[0][0][-1], one[0][-1][-1])


@pytest.mark.parametrize('more, message', [
    (['--sampler', 'class_balanced'], 'is not for --sampler class_balanced: give --sampler meta'),
    (['--loss', 'cross_entropy'], 'is not for --loss cross_entropy: give --loss balanced_softmax'),
    (['--mixup', '0.2'], '--mixup would have no effect on --stage balms: leave it out'),
    (['--stage', 'crt'], "learns in the second stage 'balms'"),
    (['--stage-kwargs', 'meta_split=test'], 'give train or val'),
    (['--stage-kwargs', 'meta_batch_size=0'], 'whole number from 1'),
    (['--stage-kwargs', 'meta_lr=-1'], 'a number from 0'),
    (['--stage-kwargs', 'lr=1'], "no setting 'lr'"),
])
def test_what_cannot_be_is_one_sentence(more, message, images, first, tmp_path):
    with pytest.raises(InputError, match=message):
        train.main([*balms_flags(images, tmp_path, first), *more])


def test_the_sampler_alone_is_refused(images, tmp_path):
    with pytest.raises(InputError, match="sampler 'meta' learns in the second stage 'balms'"):
        train.main([*flags(images, tmp_path), '--model', 'resnet20', '--sampler', 'meta'])


def test_a_meta_split_that_is_not_there_is_refused(images, first, tmp_path):
    state = torch.load(first, weights_only=True)
    state['args']['val_list'] = None  # of a first stage without one; else it would be this one's too
    torch.save(state, tmp_path / 'first.pth')
    with pytest.raises(InputError, match='there is no validation split'):
        train.main([*flags(images, tmp_path, 'train', 'test'), '--stage', 'balms', '--initial-checkpoint',
                    str(tmp_path / 'first.pth'), '--sampler', 'meta', '--loss', 'balanced_softmax', '--stage-kwargs',
                    'meta_split=val'])


def test_experts_and_other_stages_checkpoints_are_refused(images, first, tmp_path):
    with pytest.raises(InputError, match='is a ExpertHead, and balms is for a single one'):
        create_second_stage('balms').prepare(timm.create_model('resnet32_ride', num_classes=4))
    train.main([*flags(images, tmp_path), '--stage', 'crt', '--initial-checkpoint', str(first), '--epochs', '1',
                '--experiment', 'crt'])
    with pytest.raises(InputError, match='no sampling rates, which --stage balms learns'):
        train.main([*balms_flags(images, tmp_path, first), '--resume', str(tmp_path / 'crt' / LAST)])

"""Mixing: images and labels against a computation image by image, and CMO's second stream."""
import copy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from formats import CIFAR_LT

from nbn_timm.cli.train import parse_train
from nbn_timm.data import ArraySamples, ClassCounts, Splits
from nbn_timm.errors import InputError
from nbn_timm.losses import create_loss, number_of_views, takes_experts
from nbn_timm.mixing import CMO, MIXINGS, PatchSampler, Remix, TimmMixup, patch_seed, remix_label_share
from nbn_timm.mixing.manifold_mixup import ManifoldMixup
from nbn_timm.samplers import create_sampler
from nbn_timm.settings import flag
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.build import build_loss, build_mixing
from nbn_timm.training.combinations import check_combinations
from nbn_timm.training.distributed import World, seed_everything
from nbn_timm.training.plan import Plan

pytestmark = pytest.mark.fast

COUNTS = ClassCounts((90, 30, 29, 10, 1), tuple('abcde'), 'a test')


@pytest.fixture(autouse=True)
def seeds():
    seed_everything(0)


# Remix


def share_by_definition(lam, own, partner, kappa, tau) -> Fraction:
    """Eq. 10 in exact numbers, one image at a time."""
    if Fraction(own, partner) >= kappa and lam < tau:
        return Fraction(0)
    if Fraction(own, partner) <= 1 / Fraction(kappa) and 1 - lam < tau:
        return Fraction(1)
    return lam


@pytest.mark.parametrize('kappa, tau', [(3, Fraction(1, 2)), (1, 1), (2, 0), (3, Fraction(1, 4)), (3, Fraction(3, 4))])
def test_label_share_is_the_definition_image_by_image(kappa, tau):
    pairs = [(own, partner) for own in COUNTS.counts for partner in COUNTS.counts]
    own, partner = torch.tensor(pairs, dtype=torch.float32).unbind(1)
    for eighths in range(9):
        lam = Fraction(eighths, 8)
        share = remix_label_share(float(lam), own, partner, float(kappa), float(tau))
        expected = [float(share_by_definition(lam, *pair, kappa, tau)) for pair in pairs]
        assert share.tolist() == expected, lam


@pytest.mark.parametrize('lam, own, partner, expected', [
    (0.4, 90, 30, 0.0),   # three times as frequent is enough
    (0.4, 89, 30, 0.4),
    (0.5, 90, 30, 0.5),   # tau of the image is too much
    (0.6, 30, 90, 1.0),
    (0.6, 31, 90, 0.6),
    (0.5, 30, 90, 0.5),
    (0.4, 30, 90, 0.4),   # the frequent class has more than tau: mixup
    (0.6, 90, 30, 0.6),
])
def test_label_share_at_kappa_and_tau(lam, own, partner, expected):
    share = remix_label_share(lam, torch.tensor([float(own)]), torch.tensor([float(partner)]))
    assert share.item() == pytest.approx(expected, abs=1e-7)


def traceable(size: int) -> torch.Tensor:
    """Images whose channel i is 1 in image i and 0 in the others: a mixture tells its ingredients."""
    return torch.eye(size)[:, :, None, None].expand(-1, -1, 4, 4).clone()


@pytest.mark.parametrize('size', [2, 5, 8])
def test_remix_mixes_pairs_and_gives_each_image_its_own_label_share(size):
    smoothing = 0.2
    remix = Remix(COUNTS, 5, alpha=1.0, smoothing=smoothing)
    shares = set()
    for _ in range(30):
        images, target = traceable(size), torch.randint(5, (size,))
        mixed, soft = remix(images, target)
        assert mixed.shape == images.shape and soft.shape == (size, 5)
        parts = mixed[:, :, 0, 0]
        assert (mixed == parts[:, :, None, None]).all()
        torch.testing.assert_close(parts.sum(1), torch.ones(size))
        torch.testing.assert_close(parts.sum(0), torch.ones(size))  # each image is partner once
        own = parts.diagonal()
        paired = own < 1
        assert len(own[paired].unique()) <= 2  # one lambda; two roundings of it
        for index in range(size):
            partner = index if not paired[index] else int(parts[index].clone().index_fill_(
                0, torch.tensor(index), 0.0).argmax())
            lam = own[index].item()
            label, other = int(target[index]), int(target[partner])
            share = float(share_by_definition(
                Fraction(lam), COUNTS.counts[label], COUNTS.counts[other], 3, Fraction(1, 2)))
            expected = [smoothing / 5 + (1 - smoothing) * (share * (label == c) + (1 - share) * (other == c))
                        for c in range(5)]
            torch.testing.assert_close(soft[index], torch.tensor(expected))
            shares.add((label != other, share in (0.0, 1.0)))
    assert {(True, True), (True, False)} <= shares  # both kinds occurred, within batches of one lambda


@pytest.mark.parametrize('alpha', [0.2, 1.0, 4.0])
def test_lambdas_are_beta_distributed(alpha):
    remix = Remix(COUNTS, 5, alpha=alpha)
    cmo = cmo_of(alpha, size=64, batches=2000)
    images, target = traceable(2), torch.tensor([0, 0])
    lams = []
    while len(lams) < 2000:
        own = remix(images, target)[0][0, 0, 0, 0].item()
        if own < 1:  # else the permutation left the image with itself
            lams.append(own)
    lams = np.array(lams)
    kept = np.array([1 - cmo(torch.zeros(1, 3, 64, 64), target[:1])[0].mean().item() for _ in range(2000)])
    deviation = np.sqrt(1 / (4 * (2 * alpha + 1)))
    assert abs(lams.mean() - 0.5) < 5 * deviation / np.sqrt(2000)
    assert lams.std() == pytest.approx(deviation, rel=0.08)
    assert kept.mean() > 0.5  # boxes lose what lies beyond the border
    assert kept.min() >= 0 and kept.max() <= 1


# CMO


class Patches:
    """A second stream of white images of class 2."""

    def __init__(self, size: int, batch: int, batches: int) -> None:
        self.size, self.batch, self.batches, self.epochs = size, batch, batches, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for _ in range(self.batches):
            yield torch.ones(self.batch, 3, self.size, self.size), torch.full((self.batch,), 2)


def cmo_of(alpha=1.0, size=16, batch=1, batches=100, **kwargs) -> CMO:
    cmo = CMO(Patches(size, batch, batches), 5, alpha, **{'prob': 1.0, **kwargs})
    cmo.set_epoch(0)
    return cmo


@pytest.mark.parametrize('size, batch', [(16, 1), (16, 7), (33, 4)])
def test_the_patch_is_a_box_and_its_area_is_the_label(size, batch):
    cmo = cmo_of(size=size, batch=8, smoothing=0.1)
    areas = set()
    for _ in range(100):
        black = torch.zeros(batch, 3, size, size)
        mixed, soft = cmo(black, torch.zeros(batch, dtype=torch.int64))
        assert not black.any()  # the batch itself is left alone
        mask = mixed[0, 0].bool()
        assert (mixed == mask.float()).all()  # the same box in all images and channels
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        assert (rows.diff() != 0).sum() <= 2 and (columns.diff() != 0).sum() <= 2
        area = mask.sum().item() / size ** 2
        expected = torch.tensor([1 - area, 0, area, 0, 0]) * 0.9 + 0.1 / 5
        torch.testing.assert_close(soft, expected.expand(batch, -1))
        areas.add(area)
    assert len(areas) > 30


@pytest.mark.parametrize('power', [0.0, 0.5, 1.0, 2.0])
def test_the_second_stream_draws_classes_by_a_power_of_their_size(power):
    sizes = np.array([400, 0, 100, 40, 10])
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(5), sizes))
    sampler = PatchSampler(targets, seed=3, per_rank=40_000, power=power)
    drawn = np.array(list(sampler))
    assert len(drawn) == len(sampler) == 40_000
    share = np.array([float(size) ** -power if size else 0.0 for size in sizes])
    share /= share.sum()
    counts = np.bincount(targets[drawn], minlength=5)
    assert np.abs(counts - share * 40_000).max() < 5 * np.sqrt(40_000 * share * (1 - share)).max()
    images = np.bincount(drawn, minlength=len(targets))[targets == 4]  # uniform within a class
    assert np.abs(images - counts[4] / 10).max() < 5 * np.sqrt(counts[4] / 10)


@pytest.mark.parametrize('world_size', [2, 3])
def test_ranks_share_one_second_stream_which_is_not_the_first(world_size):
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [50, 20, 10]))
    length = -(-len(targets) // world_size)
    ranks = [PatchSampler(targets, 5, rank, world_size, per_rank=length) for rank in range(world_size)]
    whole = list(PatchSampler(targets, 5, per_rank=length * world_size))
    assert [index for group in zip(*ranks, strict=True) for index in group] == whole
    epochs = []
    for epoch in (0, 1, 0):
        ranks[0].set_epoch(epoch)
        epochs.append(list(ranks[0]))
    assert epochs[0] == epochs[2] != epochs[1]
    seeds = {patch_seed(seed) for seed in range(200)}
    assert len(seeds) == 200 and not seeds & set(range(200))


def test_cmo_mixes_in_its_epochs_with_its_probability_and_loads_only_what_it_mixes():
    cmo = cmo_of(prob=0.3, batches=1000, epochs=range(2, 4))
    images, target = torch.zeros(1, 3, 16, 16), torch.tensor([1])
    loaded = []
    for epoch in range(5):
        cmo.set_epoch(epoch)
        targets = torch.cat([cmo(images, target)[1] for _ in range(1000)])
        assert torch.equal(targets.sum(1), torch.ones(1000))
        loaded.append(1000 - sum(1 for _ in cmo.stream) if cmo.enabled else 0)
        assert (targets[:, 2] > 0).sum() <= loaded[-1]  # a box may come out empty
        cmo.end_epoch()
        assert not list(cmo.stream)
    assert loaded[:2] == [0, 0] and loaded[4] == 0
    assert all(abs(count - 300) < 5 * np.sqrt(210) for count in loaded[2:4])
    assert cmo.others.epochs == [2, 3]


@pytest.mark.parametrize('make', [
    lambda epochs: TimmMixup(5, 0.1, mixup_alpha=1.0, epochs=epochs),
    lambda epochs: Remix(COUNTS, 5, smoothing=0.1, epochs=epochs),
    lambda epochs: cmo_of(smoothing=0.1, batch=3, epochs=epochs),
])
def test_outside_its_epochs_a_method_leaves_images_and_smoothed_labels(make):
    mixing = make(range(1, 2))
    images, target = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 4])
    plain = torch.full((3, 5), 0.02).index_put((torch.arange(3), target), torch.tensor(0.92))
    for epoch, changes in ((0, False), (1, True), (2, False)):
        mixing.set_epoch(epoch)
        mixed, soft = mixing(images.clone(), target)
        assert torch.equal(mixed, images[:len(mixed)]) != changes
        if not changes:
            torch.testing.assert_close(soft, plain)


# Manifold mixup


def test_manifold_mixup_mixes_what_the_layer_gives_batch_by_batch():
    """As `manifold_mix_up` of BagofTricks-LT (commit ce7859a) does behind the pooling, with two batches in line."""
    network = timm.create_model('resnet20', num_classes=5, num_blocks=1).train()
    mixing = ManifoldMixup(5, smoothing=0.1)
    mixing.connect(network)
    copied = copy.deepcopy(network)  # as averaged weights are
    first, second = (torch.randn(6, 3, 16, 16) for _ in range(2))
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    seed_everything(3)
    pairs = [mixing(images, target) for images in (first, second)]
    assert pairs[0][0] is first and pairs[1][0] is second
    seed_everything(3)
    for images, (_, soft) in zip((first, second), pairs, strict=True):
        np.random.rand()  # whether the batch is mixed
        lam, partner = np.random.beta(1.0, 1.0), torch.randperm(6)
        plain = network.forward_features(images).mean(dim=(2, 3))
        copied.eval()(images)  # the hook is shared, but only training takes from the line
        mixed = lam * plain + (1 - lam) * plain[partner]
        torch.testing.assert_close(network(images), network.fc(mixed), rtol=1e-4, atol=1e-5)
        smooth = F.one_hot(target, 5) * 0.9 + 0.02
        torch.testing.assert_close(soft, (lam * smooth + (1 - lam) * smooth[partner]).float())
    mixing.end_epoch()
    plain = network.forward_features(first).mean(dim=(2, 3))
    torch.testing.assert_close(network(first), network.fc(plain), rtol=1e-4, atol=1e-5)  # nothing is in line


def test_a_batch_that_is_not_mixed_has_its_place_in_the_line():
    network = timm.create_model('resnet20', num_classes=5, num_blocks=1).train()
    mixing = ManifoldMixup(5, layer='layer2', prob=0.0)
    mixing.connect(network)
    images, target = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    _, soft = mixing(images, target)
    assert torch.equal(soft, F.one_hot(target, 5).float()) and list(mixing.waiting) == [None]
    with pytest.raises(InputError, match="does not call the layer 'layer2' once for every batch"):
        mixing.end_epoch()
    network(images)
    mixing.end_epoch()
    with pytest.raises(InputError, match="ResNetCifar has no layer 'layr2': give the name.*did you mean 'layer2'"):
        ManifoldMixup(5, layer='layr2').connect(network)


@pytest.mark.parametrize('more', ['--sam-rho=0.05', '--torchcompile=eager', '--grad-checkpointing'])
def test_what_manifold_mixup_does_not_go_with(more):
    settings = parse_train(['--dataset', 'list', '--model', 'resnet20', '--manifold-mixup', '1', more])
    with pytest.raises(InputError, match='mixes within the network, once for a batch'):
        check_combinations(settings, None)


# As train.py builds them


def splits(count: int = 40) -> Splits:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    targets = np.repeat([0, 1, 2], [count - 14, 10, 4])
    return Splits(ArraySamples(images, targets), None, None, ClassCounts.from_targets(targets, None, 'a test'),
                  CIFAR_LT, 3, targets, [])


def built(*flags: str, data: Splits | None = None, world: World | None = None, batch_size: int = 8):
    """The first stream and what mixes it."""
    settings = parse_train(['--dataset', 'list', '--model', 'resnet20', '--workers', '0', '--epochs', '20', *flags])
    data, world = data or splits(), world or World(torch.device('cpu'))
    plan = Plan(settings, world, Path(), BatchPlan(batch_size, 1, batch_size * world.size), data, CIFAR_LT, 3)
    sampler = create_sampler(settings.sampler.sampler, data.train_targets, None, settings.run.seed, world.rank,
                             world.size)
    loader = plan.train_loader(data.train, sampler, batch_size, settings.run.seed, number_of_views(settings.loss.loss))
    return loader, build_mixing(plan, loader)


def run_epoch(loader, mixing, epoch):
    seed_everything(42, epoch)
    loader.set_epoch(epoch)
    mixing.set_epoch(epoch)
    batches = [mixing(*batch) for batch in loader]
    return torch.cat([images for images, _ in batches], dim=-4), torch.cat([target for _, target in batches])


@pytest.mark.parametrize('flags', [
    *((*(f'{flag(switch)}=1' for switch in method.switches), *['--loss', name] * (method.views > 1))
      for name, method in MIXINGS.items() if method.soft),
    ('--cmo', '1', '--cmo-prob', '1')])
@pytest.mark.parametrize('sampler', ['instance_balanced', 'class_balanced'])
def test_an_epoch_can_be_run_again(flags, sampler):
    flags = (*flags, '--sampler', sampler)
    whole = built(*flags)
    epochs = [run_epoch(*whole, epoch) for epoch in range(4, 7)]
    images, target = run_epoch(*built(*flags), 6)
    assert torch.equal(images, epochs[2][0]) and torch.equal(target, epochs[2][1])
    assert not torch.equal(epochs[1][1], epochs[2][1])


def test_the_second_stream_is_as_long_as_the_first_and_not_the_same():
    """43 images leave a last batch of 3; over two ranks 22 each."""
    for world in (World(torch.device('cpu')), World(torch.device('cpu'), 1, 1, 2)):
        loader, cmo = built('--cmo', '1', '--cmo-power', '0', '--sampler', 'class_balanced', data=splits(43),
                            world=world)
        assert len(cmo.others) == len(loader)
        patches = cmo.others.loader.sampler
        assert len(patches) == len(loader.loader.sampler)
        assert (patches.rank, patches.world_size, patches.power) == (world.rank, world.size, 0.0)
        assert list(patches) != list(loader.loader.sampler)
        loader.set_epoch(5)
        cmo.others.set_epoch(5)
        sizes = [[len(target) for _, target in stream] for stream in (loader, cmo.others)]
        assert sizes[0] == sizes[1]
        assert cmo.others.loader.generator.initial_seed() != loader.loader.generator.initial_seed()


@pytest.mark.parametrize('flags, epochs', [
    ((), range(4, 17)),
    (('--cmo-skip-first', '0', '--cmo-skip-last', '0'), range(0, 20)),
    (('--mixup-off-epoch', '10'), range(4, 10)),
    (('--mixup-off-epoch', '19'), range(4, 17)),
])
def test_epochs_with_cmo(flags, epochs):
    _, cmo = built('--cmo', '0.5', *flags)
    assert (cmo.epochs, cmo.alpha, cmo.prob, cmo.others.loader.sampler.power) == (epochs, 0.5, 0.5, 1.0)


@pytest.mark.parametrize('name', [name for name, method in MIXINGS.items() if method.soft and method.views == 1])
def test_labels_are_smoothed_once(name):
    """By the loss where nothing is mixed, and else by the method, whether or not it mixes a batch."""
    torch.manual_seed(0)
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.3)
    settings = parse_train(['--dataset', 'list', '--model', 'resnet20', '--smoothing', '0.3'])
    assert build_loss(settings, splits(), None)(logits, target) == expected
    _, mixing = built(*(f'{flag(switch)}=1' for switch in MIXINGS[name].switches), '--smoothing', '0.3')
    mixing.enabled = False
    images, soft = mixing(torch.zeros(6, 3, 32, 32), target)
    torch.testing.assert_close(build_loss(settings, splits(), mixing)(logits, soft), expected)
    mixing.enabled, mixing.prob = True, 1.0
    if isinstance(mixing, CMO):
        mixing.set_epoch(5)
    for soft in (mixing(torch.randn(6, 3, 32, 32), target)[1] for _ in range(5)):
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        assert soft.min() == pytest.approx(0.3 / 3)  # a class that is not in the mixture


def test_settings_of_remix_arrive():
    _, remix = built('--remix', '0.3', '--remix-kappa', '4', '--remix-tau', '0.2', '--mixup-prob', '0.7',
                     '--smoothing', '0.1', '--mixup-off-epoch', '6')
    assert (remix.alpha, remix.kappa, remix.tau, remix.prob, remix.smoothing) == (0.3, 4.0, 0.2, 0.7, 0.1)
    assert remix.epochs == range(6)
    assert remix.counts.tolist() == [26, 10, 4]
    _, remix = built('--remix', '1')
    assert (remix.kappa, remix.tau, remix.prob) == (3.0, 0.5, 1.0)
    assert built()[1] is None


@pytest.mark.parametrize('flags, message', [
    (('--remix', '1', '--cmo', '1'), '(--remix and --cmo|--cmo and --remix) cannot mix the same batch'),
    (('--mixup', '1', '--cutmix', '1', '--remix', '1'), '(--mixup and --remix|--remix and --mixup) cannot mix'),
    (('--cutmix', '1', '--cmo', '1'), '(--cutmix and --cmo|--cmo and --cutmix) cannot mix'),
    (('--remix-tau', '0.3'), '--remix-tau has no effect without --remix: leave it out'),
    (('--remix', '1', '--cmo-skip-first', '2'), '--cmo-skip-first has no effect without --cmo: leave it out'),
    (('--cmo', '1', '--cmo-skip-first', '17'), 'in none of the 20 epochs'),
    (('--cmo', '1', '--mixup-off-epoch', '4'), 'in none of the 20 epochs'),
    (('--cmo', '1', '--mixup-prob', '0.5'), '--mixup-prob'),
    (('--remix', '1', '--mixup-mode', 'elem'), '--mixup-mode'),
])
def test_wrong_combinations_are_one_sentence(flags, message):
    with pytest.raises(InputError, match=message) as caught:
        built(*flags)
    assert '\n' not in str(caught.value)


def test_what_the_data_does_not_tell_is_one_sentence():
    data = splits()
    data.classes = None
    with pytest.raises(InputError, match='--remix needs .*--class-counts'):
        built('--remix', '1', data=data)
    with pytest.raises(InputError, match='--remix mixes .*--batch-size of at least 2'):
        built('--remix', '1', batch_size=1)
    loader, _ = built()
    settings = parse_train(['--dataset', 'hfds/x', '--model', 'resnet20', '--epochs', '20', '--cmo', '1'])
    data.train_targets = None
    with pytest.raises(InputError, match='--cmo needs the labels of all .*, which this dataset does not tell'):
        build_mixing(Plan(settings, World(torch.device('cpu')), Path(), BatchPlan(8, 1, 8), data, CIFAR_LT, 3), loader)


@pytest.mark.parametrize('name, kwargs', [
    ('ldam', dict(weighting='effective_number')), ('weighted_cross_entropy', {}), ('ride', dict(reweight_epoch=0)),
    ('ldam', {}), ('weighted_cross_entropy', dict(start_epoch=1))])
@pytest.mark.parametrize('lam', [0.0, 0.3, 1.0])
def test_weights_of_either_label_divide_its_own_loss(name, kwargs, lam):
    """As code does that calls a loss once for each label: lam L(y) + (1 - lam) L(y')."""
    counts = ClassCounts((60, 20, 5, 1), tuple('abcd'), 'a test')
    loss = create_loss(name, counts, **kwargs)
    if hasattr(loss, 'set_epoch'):
        loss.set_epoch(0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, *[3] * takes_experts(name), 4, generator=generator)
    labels, others = torch.tensor([0, 0, 0, 1, 0, 1]), torch.tensor([3, 2, 3, 0, 3, 1])
    shares = torch.stack([lam * F.one_hot(labels, 4).float(), (1 - lam) * F.one_hot(others, 4).float()], dim=1)
    expected = lam * loss(logits, labels) + (1 - lam) * loss(logits, others)
    torch.testing.assert_close(loss(logits, shares), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('loss, both', [('ldam', True), ('balanced_softmax', False)])
def test_cmo_hands_both_labels_to_losses_that_ask_for_them(loss, both):
    loader, cmo = built('--cmo', '1', '--cmo-prob', '0.5', '--cmo-skip-first', '0', '--loss', loss)
    _, targets = run_epoch(loader, cmo, 5)
    assert targets.shape[1:] == ((2, 3) if both else (3,))
    torch.testing.assert_close(targets.flatten(1).sum(1), torch.ones(len(targets)))
    plain = built('--cmo', '1', '--cmo-prob', '0.5', '--cmo-skip-first', '0', '--loss', 'cross_entropy')
    assert torch.equal(targets.sum(1) if both else targets, run_epoch(*plain, 5)[1])

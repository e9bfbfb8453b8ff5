"""Samplers: what they draw, how ranks share it, and that an epoch can be drawn again."""
import tracemalloc
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from nbn_timm.cli.train import parse_train
from nbn_timm.data import ClassCounts, DataDefaults, Splits
from nbn_timm.errors import InputError
from nbn_timm.samplers import SAMPLERS, EpochSampler, create_sampler
from nbn_timm.samplers.groups import ClassGroups
from nbn_timm.samplers.sampler import with_length
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.build import build_train_loader
from nbn_timm.training.distributed import World
from nbn_timm.training.plan import Plan

pytestmark = pytest.mark.fast

TARGETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [70, 25, 6]))  # no image of class 2
NAMES = sorted(SAMPLERS)
IMAGES = [3000, 500, 40, 7]  # per class 0, 1, 2 and 4
LONG_TAIL = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 4], IMAGES))


def epoch_of(sampler: EpochSampler, epoch: int = 0) -> np.ndarray:
    sampler.set_epoch(epoch)
    return np.array(list(sampler))


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    degrees = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float((statistic - degrees) / np.sqrt(2 * degrees))


# What every sampler promises

@pytest.mark.parametrize('name', NAMES)
def test_an_epoch_depends_on_seed_and_epoch_alone(name):
    sampler = create_sampler(name, TARGETS, seed=3, epochs=10)
    sampler.set_epoch(5)
    first = list(sampler)
    torch.manual_seed(1)
    np.random.seed(1)
    assert list(sampler) == first
    again = create_sampler(name, TARGETS, seed=3, epochs=10)
    again.set_epoch(5)
    assert list(again) == first
    for seed, epoch in ((3, 6), (4, 5)):
        other = create_sampler(name, TARGETS, seed=seed, epochs=10)
        other.set_epoch(epoch)
        assert list(other) != first


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('world_size', [2, 3, 4, 8, 150])
def test_ranks_deal_out_the_stream_of_one_process(name, world_size):
    whole = list(create_sampler(name, TARGETS, seed=1, epochs=10))
    shards = [create_sampler(name, TARGETS, seed=1, rank=rank, world_size=world_size, epochs=10)
              for rank in range(world_size)]
    assert {len(list(shard)) for shard in shards} == {len(shards[0])}
    dealt = [index for group in zip(*shards, strict=True) for index in group]
    assert dealt[:len(whole)] == whole
    assert dealt[len(whole):] == (whole * 2)[:len(dealt) - len(whole)]  # padded from the beginning


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
def test_ranks_share_no_image_but_the_padding(world_size):
    shards = [list(create_sampler('instance_balanced', TARGETS, rank=rank, world_size=world_size))
              for rank in range(world_size)]
    seen = Counter(index for shard in shards for index in shard)
    padding = -len(TARGETS) % world_size
    assert set(seen) == set(range(len(TARGETS)))
    assert sorted(seen.values()) == [1] * (len(TARGETS) - padding) + [2] * padding


def test_length_and_padding_are_those_of_torch():
    for world_size in (1, 2, 3, 7):
        theirs = DistributedSampler(TARGETS, num_replicas=world_size, rank=0)
        assert len(create_sampler('instance_balanced', TARGETS, world_size=world_size)) == len(theirs)


def test_a_sampler_that_draws_another_number_is_caught():
    class Short(EpochSampler):
        def draw(self, rng):
            return np.arange(5)
    with pytest.raises(ValueError, match='Short.draw gave 5 indices instead of 101'):
        list(Short(TARGETS))


def test_images_are_grouped_by_class():
    groups = ClassGroups.from_targets(TARGETS)
    assert groups.labels.tolist() == [0, 1, 3] and groups.counts.tolist() == [70, 25, 6]
    for label, first, count in zip(groups.labels, groups.first, groups.counts, strict=True):
        assert groups.images[first:first + count].tolist() == np.flatnonzero(TARGETS == label).tolist()


@pytest.mark.parametrize('name', NAMES)
def test_one_class_and_one_image_are_enough(name):
    assert set(create_sampler(name, np.array([2]), epochs=1)) == {0}
    assert set(create_sampler(name, np.array([1] * 5), epochs=1)) <= set(range(5))


# What each draws

def test_instance_balanced_is_a_permutation():
    indices = list(create_sampler('instance_balanced', TARGETS))
    assert sorted(indices) == list(range(len(TARGETS)))
    assert indices != sorted(indices)


def test_class_balanced_keeps_its_stream():
    """Runs of earlier versions can be drawn again."""
    rng = np.random.default_rng((3, 5))
    by_class = [np.flatnonzero(TARGETS == label) for label in (0, 1, 3)]
    chosen = rng.integers(3, size=len(TARGETS))
    places = rng.integers(np.array([70, 25, 6])[chosen])
    expected = [by_class[group][place] for group, place in zip(chosen, places, strict=True)]
    assert epoch_of(create_sampler('class_balanced', TARGETS, seed=3), 5).tolist() == expected


def effective(count: int, beta: float) -> float:
    """1 + beta + beta^2 + ..., with as many terms as images."""
    return sum(beta ** power for power in range(count))


DEFINITIONS = {  # weight of a class by its images
    'class_balanced': ({}, 0, lambda n: 1),
    'square_root': ({}, 0, lambda n: n ** 0.5),
    'reverse': ({}, 0, lambda n: 3000 / n),
    'effective_number': ({'beta': 0.99}, 0, lambda n: n / effective(n, 0.99)),
    'effective_number, default': ({}, 0, lambda n: n / effective(n, 0.9999)),
    'effective_number, beta 0': ({'beta': 0}, 0, lambda n: n),
    'progressively_balanced, first': ({}, 0, lambda n: n),
    'progressively_balanced, third': ({}, 3, lambda n: 2 / 3 * n / 3547 + 1 / 3 / 4),
    'progressively_balanced, last': ({}, 9, lambda n: 1),
    'progressively_balanced, longer than planned': ({}, 12, lambda n: 1),
    'meta': ({}, 0, lambda n: n),
    'meta, class-balanced': ({'init_pow': 1}, 0, lambda n: 1),
    'meta, 0.3': ({'init_pow': 0.3}, 0, lambda n: n ** 0.7),
    'deferred, late': ({'start_epoch': 3, 'sampler': 'square_root'}, 3, lambda n: n ** 0.5),
}


@pytest.mark.parametrize('case', DEFINITIONS)
def test_classes_are_drawn_by_their_definition_and_images_uniformly(case):
    kwargs, epoch, weight = DEFINITIONS[case]
    classes = ClassCounts((3000, 500, 40, 0, 7), tuple('abcde'), 'the test')
    sampler = create_sampler(case.partition(',')[0], LONG_TAIL, classes, epochs=10, **kwargs)
    seeds = range(20)
    drawn = []
    for sampler.seed in seeds:
        drawn.append(epoch_of(sampler, epoch))
        assert len(drawn[-1]) == len(LONG_TAIL)
    per_image = np.bincount(np.concatenate(drawn), minlength=len(LONG_TAIL))

    weights = np.array([weight(n) for n in IMAGES])
    expected = len(seeds) * len(LONG_TAIL) * weights / weights.sum()
    per_class = np.array([per_image[LONG_TAIL == label].sum() for label in (0, 1, 2, 4)])
    assert per_class.sum() == per_image.sum()
    assert abs(chi_square(per_class, expected)) < 4
    for label, images in zip((0, 1, 2, 4), IMAGES, strict=True):
        inside = per_image[LONG_TAIL == label]
        assert abs(chi_square(inside, np.full(images, inside.mean()))) < 4


def visits_of(indices: np.ndarray, targets: np.ndarray, k: int) -> list[tuple[int, list[int]]]:
    """Cut a class-aware stream into (class, images), each visit of one class."""
    visits = [indices[start:start + k].tolist() for start in range(0, len(indices), k)]
    assert all(len({targets[index] for index in visit}) == 1 for visit in visits)
    return [(int(targets[visit[0]]), visit) for visit in visits]


@pytest.mark.parametrize('targets, k', [
    (TARGETS, 4), (TARGETS, 1), (TARGETS, 3), (TARGETS, 7), (TARGETS, 1000), (LONG_TAIL, 4),
    (np.arange(50), 4), (np.repeat([5, 2], [1, 99]), 2)])
def test_class_aware_visits_all_classes_in_turn_and_goes_through_their_images_in_turn(targets, k):
    indices = epoch_of(create_sampler('class_aware', targets, k=k), 3)
    assert len(indices) == len(targets)
    visits = visits_of(indices, targets, k)
    classes = sorted(set(targets.tolist()))
    visited = [label for label, _ in visits]
    for start in range(0, len(visited), len(classes)):
        turn = visited[start:start + len(classes)]
        assert sorted(turn) == classes or (len(turn) < len(classes) and len(set(turn)) == len(turn))
    for label in classes:
        images = set(np.flatnonzero(targets == label).tolist())
        given = [index for other, visit in visits if other == label for index in visit]
        for start in range(0, len(given), len(images)):
            cycle = given[start:start + len(images)]
            assert set(cycle) == images or (len(cycle) < len(images) and len(set(cycle)) == len(cycle) and
                                            set(cycle) <= images)


def test_class_aware_repeats_an_image_of_a_class_of_three_within_a_visit():
    targets = np.repeat([0, 1], [29, 3])
    visits = visits_of(epoch_of(create_sampler('class_aware', targets)), targets, 4)
    small = [visit for label, visit in visits if label == 1]
    assert len(small) == 4
    assert all(len(visit) == 4 and set(visit) <= {29, 30, 31} for visit in small)
    assert len(set(small[0])) == 3  # a whole order, and the first of the next


def test_class_aware_orders_are_drawn_anew_and_uniformly():
    targets = np.repeat([0, 1, 2], [40, 3, 17])
    turns, cycles = Counter(), Counter()
    sampler = create_sampler('class_aware', targets, k=3)
    for epoch in range(400):
        visits = visits_of(epoch_of(sampler, epoch), targets, 3)
        for start in range(0, 18, 3):
            turns[tuple(label for label, _ in visits[start:start + 3])] += 1
        cycles.update(tuple(visit) for label, visit in visits if label == 1)
    for counted, members in ((turns, (0, 1, 2)), (cycles, (40, 41, 42))):
        counts = np.array([counted[order] for order in permutations(members)])
        assert counts.sum() == sum(counted.values()) >= 2400
        assert abs(chi_square(counts, np.full(6, counts.mean()))) < 4


def test_class_aware_draws_every_image_of_a_large_class_equally_often():
    sampler = create_sampler('class_aware', LONG_TAIL, k=4)
    drawn = np.bincount(np.concatenate([epoch_of(sampler, epoch) for epoch in range(60)]), minlength=len(LONG_TAIL))
    for label in (0, 1, 2, 4):
        assert abs(drawn[LONG_TAIL == label].sum() - 60 * len(LONG_TAIL) / 4) <= 60 * 4
    inside = drawn[LONG_TAIL == 0]
    share = inside.mean() / 60  # without replacement, so that draws are more even by this share
    statistic = ((inside - inside.mean()) ** 2 / inside.mean()).sum() / (1 - share)
    assert abs(statistic - 2999) < 4 * np.sqrt(2 * 2999)


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
def test_ranks_see_in_each_step_of_a_class_aware_epoch_what_one_process_would(world_size):
    """A visit's images go to different ranks, and each rank's batch has every class that the step has."""
    batch = 24
    whole = list(create_sampler('class_aware', LONG_TAIL))
    shards = [list(create_sampler('class_aware', LONG_TAIL, rank=rank, world_size=world_size))
              for rank in range(world_size)]
    local = batch // world_size
    for step in range(len(whole) // batch):
        parts = [shard[step * local:(step + 1) * local] for shard in shards]
        assert Counter(sum(parts, [])) == Counter(whole[step * batch:(step + 1) * batch])
        if world_size in (2, 4):
            assert all(set(LONG_TAIL[part]) == set(LONG_TAIL[sum(parts, [])]) for part in parts)


@pytest.mark.parametrize('threshold', [0.001, 0.05, 0.3, 1.0])
def test_repeat_factor_repeats_images_by_the_share_of_their_class(threshold):
    factors = {label: max(1, (threshold / (images / 3547)) ** 0.5)
               for label, images in zip((0, 1, 2, 4), IMAGES, strict=True)}
    sampler = create_sampler('repeat_factor', LONG_TAIL, threshold=threshold)
    total = sum(factors[label] * images for label, images in zip((0, 1, 2, 4), IMAGES, strict=True))
    assert len(sampler) == int(np.ceil(total))
    epochs = 200
    sums = np.zeros(len(LONG_TAIL))
    for epoch in range(epochs):
        indices = epoch_of(sampler, epoch)
        assert len(indices) == len(sampler)
        counts = np.bincount(indices, minlength=len(LONG_TAIL))
        counts[indices[-1]] -= counts[indices[-1]] > 1 and indices[-1] == indices[0]  # it may fill up the length
        for label, factor in factors.items():
            assert set(counts[LONG_TAIL == label]) <= {int(factor), int(np.ceil(factor))}
        sums += counts
    for label, factor in factors.items():
        mean = sums[LONG_TAIL == label] / epochs
        spread = np.sqrt(max(factor % 1 * (1 - factor % 1), 1e-9) / epochs)  # of one image's mean
        assert np.abs(mean - factor).max() < 5 * spread
        assert abs(mean.mean() - factor) < 5 * spread / np.sqrt(len(mean))


def test_an_epoch_is_filled_up_from_its_beginning():
    indices = np.arange(5)
    for length in (3, 5, 6, 17):
        np.testing.assert_array_equal(with_length(indices, length), np.resize(indices, length))


def test_drawing_many_repetitions_takes_little_more_memory_than_the_epoch():
    sampler = create_sampler('repeat_factor', np.repeat(np.arange(1000), 50), threshold=0.01, rank=3, world_size=64)
    assert sampler.epoch_length > 3 * 50_000
    tracemalloc.start()
    try:
        iter(sampler)
        assert tracemalloc.get_traced_memory()[1] < 2.2 * 8 * sampler.epoch_length  # a copy for the filling up
    finally:
        tracemalloc.stop()


def test_repeat_factor_without_rare_classes_is_a_permutation():
    assert sorted(create_sampler('repeat_factor', LONG_TAIL, threshold=1e-6)) == list(range(len(LONG_TAIL)))


def test_repeat_factor_rounds_another_set_of_images_up_in_each_epoch():
    sampler = create_sampler('repeat_factor', LONG_TAIL, threshold=0.3)
    twice = [frozenset(np.flatnonzero(np.bincount(epoch_of(sampler, epoch)) == 2)) for epoch in range(50)]
    assert len(set(twice)) == 50


def test_deferred_is_one_sampler_and_then_another():
    sampler = create_sampler('deferred', TARGETS, seed=2, rank=1, world_size=3, epochs=8, start_epoch=4,
                             sampler='progressively_balanced')
    before, after = (create_sampler(name, TARGETS, seed=2, rank=1, world_size=3, epochs=8)
                     for name in ('instance_balanced', 'progressively_balanced'))
    for epoch in range(8):
        assert epoch_of(sampler, epoch).tolist() == epoch_of(before if epoch < 4 else after, epoch).tolist()


def test_deferred_passes_settings_on():
    sampler = create_sampler('deferred', TARGETS, start_epoch=0, sampler='class_aware', settings={'k': 2})
    assert list(sampler) == list(create_sampler('class_aware', TARGETS, k=2))


def test_errors_name_the_remedy():
    with pytest.raises(InputError, match="unknown sampler 'class_balance'.*did you mean 'class_balanced'"):
        create_sampler('class_balance', TARGETS)
    with pytest.raises(InputError, match='empty'):
        create_sampler('instance_balanced', np.array([], dtype=np.int64))
    with pytest.raises(InputError, match="no setting 'power'"):
        create_sampler('class_balanced', TARGETS, power=2)


@pytest.mark.parametrize('name, kwargs, message', [
    ('class_aware', {'n': 4}, r"has no setting 'n' \(it has k, reduce\)"),
    ('class_aware', {'k': 0}, 'cannot take --sampler-kwargs k=0: give a whole number from 1'),
    ('class_aware', {'k': 2.5}, 'give a whole number'),
    ('effective_number', {'bta': 0.9}, "did you mean 'beta'"),
    ('effective_number', {'beta': 1}, 'beta=1: give a number from 0 to less than 1'),
    ('effective_number', {'beta': 'x'}, '--sampler-kwargs beta=x: give a number'),
    ('repeat_factor', {'threshold': 0}, 'threshold=0: give a number above 0 to 1'),
    ('progressively_balanced', {}, 'needs the number of epochs'),
    ('meta', {'init_pow': -1}, 'give a number from 0'),
    ('deferred', {'sampler': 'class_awre'}, "did you mean 'class_aware'"),
    ('deferred', {'sampler': 'class_aware', 'settings': {'kk': 1}}, "sampler 'class_aware' has no setting 'kk'"),
    ('deferred', {'sampler': 'repeat_factor', 'settings': {'threshold': 0.5}}, 'cannot be deferred'),
    ('deferred', {'start_epoch': -1}, 'give a whole number from 0'),
])
def test_impossible_settings_are_one_sentence(name, kwargs, message):
    with pytest.raises(InputError, match=message) as caught:
        create_sampler(name, TARGETS, **kwargs)
    assert '\n' not in str(caught.value)


# In train.py

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return len(TARGETS)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


def loader_of(*flags: str, dataset=None):
    settings = parse_train(['--dataset', 'list', '--model', 'resnet20', '--workers', '0', *flags])
    splits = Splits(train=dataset or Images(), val=None, test=None, classes=None, num_classes=4,
                    defaults=DataDefaults(), train_targets=None if dataset else TARGETS)
    plan = Plan(settings, World(torch.device('cpu')), Path(), BatchPlan(8, 1, 8), splits, DataDefaults(), 4)
    return build_train_loader(plan, torch.nn.Identity())


def test_settings_come_from_flags_and_configs(tmp_path):
    config = tmp_path / 'c.yaml'
    config.write_text('sampler: deferred\nsampler_kwargs: {start_epoch: 3, sampler: class_aware, settings: {k: 2}}\n')
    sampler = loader_of('--config', str(config)).loader.sampler
    assert (sampler.start_epoch, sampler.then.k) == (3, 2)
    sampler = loader_of('--config', str(config), '--sampler-kwargs', 'start_epoch=5').loader.sampler
    assert (sampler.start_epoch, sampler.then.k) == (5, 2)
    assert loader_of('--sampler', 'class_aware', '--sampler-kwargs', 'k=7').loader.sampler.k == 7


def test_samplers_learn_the_number_of_epochs_from_the_run():
    loader = loader_of('--sampler', 'progressively_balanced', '--epochs', '5')
    loader.set_epoch(1)
    assert loader.loader.sampler.progress() == 0.25


@pytest.mark.parametrize('flags, dataset, message', [
    (['--sampler', 'class_aware', '--sampler-kwargs', 'kk=7'], None, "has no setting 'kk'"),
    (['--sampler-kwargs', 'k=7'], None, "'instance_balanced' has no setting 'k'"),
    (['--sampler-kwargs', 'k=7'], Stream(), '--sampler-kwargs would have no effect'),
    (['--sampler', 'meta'], None, "learns in the second stage 'balms'"),
    (['--sampler', 'deferred', '--sampler-kwargs', 'sampler=meta'], None, "learns in the second stage 'balms'"),
])
def test_flags_without_effect_are_refused(flags, dataset, message):
    with pytest.raises(InputError, match=message):
        loader_of(*flags, dataset=dataset)


@pytest.mark.parametrize('targets', [[2, 0, 2, 5, 0], [70_000, 3, 70_000, 9]])
def test_groups_of_few_and_of_many_classes(targets):
    from nbn_timm.samplers.groups import ClassGroups
    groups = ClassGroups.from_targets(np.array(targets))
    expected = sorted(set(targets))
    assert groups.labels.tolist() == expected and groups.counts.tolist() == [targets.count(label) for label in expected]
    for label, first, count in zip(groups.labels, groups.first, groups.counts, strict=True):
        members = groups.images[first:first + count].tolist()
        assert members == [place for place, target in enumerate(targets) if target == label]

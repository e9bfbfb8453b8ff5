"""Samplers: what they draw, how ranks share it, and that an epoch can be drawn again."""
import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from nbn_timm.errors import InputError
from nbn_timm.samplers import SAMPLERS, create_sampler

TARGETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [70, 25, 6]))  # no image of class 2
NAMES = sorted(SAMPLERS)


def test_instance_balanced_is_a_permutation():
    indices = list(create_sampler('instance_balanced', TARGETS))
    assert sorted(indices) == list(range(len(TARGETS)))
    assert indices != sorted(indices)


def test_class_balanced_draws_classes_and_then_images_uniformly():
    targets = np.repeat([0, 1, 3], [30_000, 300, 3])
    drawn = np.array(list(create_sampler('class_balanced', targets)))
    assert len(drawn) == len(targets)
    per_class = np.bincount(targets[drawn], minlength=4)
    expected = len(drawn) / 3
    deviation = np.sqrt(expected * 2 / 3)  # of a binomial count
    assert np.abs(per_class[[0, 1, 3]] - expected).max() < 5 * deviation
    assert per_class[2] == 0
    rarest = np.bincount(drawn)[-3:]  # each image of class 3
    assert np.abs(rarest - per_class[3] / 3).max() < 5 * np.sqrt(per_class[3] * 2 / 9)


@pytest.mark.parametrize('name', NAMES)
def test_an_epoch_depends_on_seed_and_epoch_alone(name):
    sampler = create_sampler(name, TARGETS, seed=3)
    sampler.set_epoch(5)
    first = list(sampler)
    torch.manual_seed(1)
    np.random.seed(1)
    assert list(sampler) == first
    again = create_sampler(name, TARGETS, seed=3)
    again.set_epoch(5)
    assert list(again) == first
    for seed, epoch in ((3, 6), (4, 5)):
        other = create_sampler(name, TARGETS, seed=seed)
        other.set_epoch(epoch)
        assert list(other) != first


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('world_size', [2, 3, 4, 150])
def test_ranks_deal_out_the_stream_of_one_process(name, world_size):
    whole = list(create_sampler(name, TARGETS, seed=1))
    shards = [create_sampler(name, TARGETS, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(list(shard)) for shard in shards} == {len(shards[0])}
    dealt = [index for group in zip(*shards, strict=True) for index in group]
    assert dealt[:len(whole)] == whole
    assert dealt[len(whole):] == whole[:len(dealt) - len(whole)]  # padded from the beginning


def test_length_and_padding_are_those_of_torch():
    for world_size in (1, 2, 3, 7):
        theirs = DistributedSampler(TARGETS, num_replicas=world_size, rank=0)
        assert len(create_sampler('instance_balanced', TARGETS, world_size=world_size)) == len(theirs)


def test_errors_name_the_remedy():
    with pytest.raises(InputError, match="unknown sampler 'class_balance'.*did you mean 'class_balanced'"):
        create_sampler('class_balance', TARGETS)
    with pytest.raises(InputError, match='empty'):
        create_sampler('instance_balanced', np.array([], dtype=np.int64))
    with pytest.raises(InputError, match="no setting 'power'"):
        create_sampler('class_balanced', TARGETS, power=2)

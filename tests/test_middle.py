"""Checkpoints in the middle of an epoch: a run that goes on from one ends as the run that went through."""
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forks import run_killed_at, run_ranks
from test_shards import LABELS, SHARDS, opened, write_shards
from test_train_run import assert_same, data_flags, images, rows  # noqa: F401

import nbn_timm.cli.train as train
from nbn_timm.data.part import WHOLE, Part
from nbn_timm.data.shard_stream import TrainReading
from nbn_timm.errors import InputError
from nbn_timm.models.run_folder import LAST, RECOVERY
from nbn_timm.samplers import create_sampler
from nbn_timm.second_stages import SECOND_STAGES
from nbn_timm.training import keeper
from nbn_timm.training.build import build_parts
from nbn_timm.training.distributed import World
from nbn_timm.training.middle import BEGINNING, EpochParts, Middle, find_middle, restore_statistics
from nbn_timm.training.optim import OptimizerSettings, create_optimizer
from nbn_timm.training.run_checkpoint import _load_optimizer, find_resume
from nbn_timm.training.settings import KeepingSettings, TrainSettings

MODEL = ['--model', 'resnet20_nbn', '--img-size', '8', '--device', 'cpu', '--epochs', '1', '-b', '4', '--no-report',
         '--recovery-interval', '2', '--log-interval', '1']


def state(folder: Path, name: str = LAST) -> dict:
    return torch.load(folder / name, weights_only=True)


def train_and_copy(at: int, flags: list[str]) -> None:
    """Train; what a kill right after so many checkpoints in the middle would have left is in the folder 'killed'."""
    keep, written = keeper.Keeper.keep_middle, []

    def keep_and_copy(self, *place):
        keep(self, *place)
        written.append(place)
        if len(written) == at and self.plan.world.is_primary:
            shutil.copytree(self.plan.folder, self.plan.folder.parent / 'killed')

    keeper.Keeper.keep_middle = keep_and_copy
    try:
        train.main([*flags, '--experiment', 'whole'])
    finally:
        keeper.Keeper.keep_middle = keep


def assert_ends_alike(output: Path) -> None:
    """Weights, average, optimizer, state of the loss, levels, and the mean loss of the log."""
    whole, killed = (state(output / name) for name in ('whole', 'killed'))
    assert whole.keys() == killed.keys()
    for key in whole.keys() - {'args'}:
        assert_same(whole[key], killed[key])
    losses = [[row['train_loss'] for row in rows(output / name)] for name in ('whole', 'killed')]
    assert losses[0] == losses[1] and len(losses[0]) == whole['epoch'] + 1
    assert not (output / 'killed' / RECOVERY).exists()


def test_a_run_killed_by_a_signal_goes_on_within_its_epoch(images, tmp_path, capfd):  # noqa: F811
    """Files and workers, and much that draws or counts."""
    flags = [*data_flags(images, 'train'), *MODEL, '--workers', '1', '--no-in-memory', '--model-ema',
             '--model-ema-decay', '0.9', '--mixup', '0.5', '--smoothing', '0.1', '--drop', '0.2', '--reprob', '0.3',
             '--sampler', 'class_balanced', '--warmup-epochs', '1', '--sched-on-updates', '--opt', 'lookahead_sgd',
             '--recovery-interval', '3', '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])
    run_killed_at('epoch 1/1  step 4/5', train.main, [*flags, '--experiment', 'killed'])
    assert not (tmp_path / 'killed' / LAST).exists()
    assert state(tmp_path / 'killed', RECOVERY)['middle']['updates'] == 3
    capfd.readouterr()
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    assert 'goes on after update 3 of 5 of epoch 1.' in capfd.readouterr().out
    assert_ends_alike(tmp_path)


@pytest.mark.parametrize('given', [
    ['--cmo', '1', '--cmo-skip-first', '0', '--cmo-skip-last', '0', '--global-batch-size', '4', '-b', '2'],
    ['--loss', 'proco', '--loss-kwargs', 'dim=16', 'hidden=16'],
    ['--curriculum'],
    ['--adversarial', 'pgd', '--adv-steps', '1'],
])
def test_what_a_run_is_made_of_goes_on_within_its_epoch(images, tmp_path, given):  # noqa: F811
    """A second stream and accumulation; several views and a loss that an epoch begins anew; levels; an attack."""
    flags = [*data_flags(images, 'train'), *MODEL, '--workers', '0', *given, '--output', str(tmp_path)]
    train_and_copy(1, flags)
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    assert_ends_alike(tmp_path)


def test_two_processes_go_on_within_an_epoch_of_shards(tmp_path, monkeypatch):
    """Each with the statistics of BatchNorm that it had, which are shared at the end of an epoch alone."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    write_shards(tmp_path / 'shards', LABELS, SHARDS)
    flags = ['--dataset', 'wds/', '--data-dir', str(tmp_path / 'shards'), '--val-split', '', '--test-split', '', *MODEL,
             '--workers', '0', '--sampler', 'class_balanced', '--model-ema', '--output', str(tmp_path)]
    run_ranks(train_and_copy, 2, flags)
    assert state(tmp_path / 'killed', RECOVERY)['middle']['updates'] == 4
    run_ranks(train.main, [*flags, '--experiment', 'killed', '--resume', 'auto'])
    assert_ends_alike(tmp_path)


def read(part: Part, world_size: int, workers: int, folder: Path) -> list[int]:
    """The numbers of the pictures of a part of an epoch of shards, over all processes, in order."""
    splits, found = opened(folder, test_split=''), []
    for rank in range(world_size):
        sampler = create_sampler('class_balanced', splits.train_targets, splits.class_counts, 7, rank, world_size, 10)
        reading = TrainReading(splits.train, sampler, 8 // world_size, False, workers)
        reading.part = part.images(8 // world_size)
        reading.set_epoch(3)
        for pieces in reading.pieces:
            for shard, copies in pieces:
                found += np.repeat(splits.train.first[shard] + np.arange(len(copies)), copies).tolist()
    return sorted(found)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_parts_of_an_epoch_of_shards_make_it_up_whatever_the_number_of_processes(workers, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    write_shards(tmp_path, LABELS[:36], [10, 1, 16, 0, 9])
    parts = [read(part, 2, workers, tmp_path) for part in (Part(0, 2), Part(2, 3), Part(3))]
    assert [len(part) for part in parts] == [16, 8, 12]
    assert sorted(sum(parts, [])) == read(WHOLE, 2, 0, tmp_path)
    assert read(Part(0, 2), 1, workers, tmp_path) == parts[0] and read(Part(2, 3), 4, workers, tmp_path) == parts[1]


def test_a_part_of_a_sampler_is_a_part_of_its_epoch():
    for rank in range(2):
        sampler = create_sampler('instance_balanced', np.zeros(11, dtype=int), None, 0, rank, 2)
        whole = list(sampler)
        sampler.part = Part(1, 2).images(2)
        assert list(sampler) == whole[2:4] and len(sampler) == 6


def parts_of(interval: int = 3, updates: int = 8, size: int = 16) -> EpochParts:
    return EpochParts(interval, updates, 2, size)


def test_parts_end_at_multiples_of_the_interval():
    assert [parts_of().part(begin) for begin in (0, 3, 4, 6)] == [(0, 6), (6, 12), (8, 12), (12, None)]
    assert parts_of(0).part(0) == WHOLE and parts_of(0).part(3) == (6, None) and parts_of(8).part(0) == WHOLE


def checkpoint(**changed) -> dict:
    ranks = [{'loss': 2.5, 'images': 40}, {'loss': 1.5, 'images': 40}]
    return {'middle': {'updates': 5, 'updates_per_epoch': 8, 'images_per_update': 16, 'seconds': 4.0, 'ranks': ranks}
            | changed}


@pytest.mark.parametrize(('rank', 'size', 'expected'), [
    (0, 2, Middle(5, 2.5, 40, 4.0)), (1, 2, Middle(5, 1.5, 40, 4.0)), (0, 1, Middle(5, 4.0, 80, 4.0)),
    (0, 3, Middle(5, 4.0, 80, 4.0)), (2, 3, Middle(5, 0.0, 0, 4.0))])
def test_another_number_of_processes_goes_on_with_the_sums_of_all(rank, size, expected):
    world = World(torch.device('cpu'), rank, rank, size)
    assert find_middle(Path('x'), checkpoint(), parts_of(), world) == expected
    assert find_middle(Path('x'), {}, parts_of(), world) is BEGINNING
    if size != 2:  # a last update of too few images may be there or not
        assert find_middle(Path('x'), checkpoint(), parts_of(updates=7), world) == expected


@pytest.mark.parametrize(('changed', 'parts', 'message'), [
    ({}, parts_of(updates=9), 'an epoch of 8 updates of 16 images, and here an epoch has 9 of 16: give the batch size'),
    ({}, parts_of(size=32), 'here an epoch has 8 of 32'),
    ({'updates': 8}, parts_of(), "its 'middle' is not what a training writes there"),
    ({'ranks': []}, parts_of(), "its 'middle' is not what a training writes there"),
    *(({changed: value}, parts_of(), "its 'middle' is not what a training writes there") for changed, value in [
        ('seconds', None), ('seconds', float('nan')), ('seconds', -1.0), ('updates', True),
        ('updates_per_epoch', 2 ** 99),
        ('ranks', 5), ('ranks', [[1.0, 2]]), ('ranks', [torch.zeros(2)]), ('ranks', [{'loss': 1.0}]),
        ('ranks', [{'loss': '1.0', 'images': 40}]), ('ranks', [{'loss': float('nan'), 'images': 40}]),
        ('ranks', [{'loss': 10 ** 400, 'images': 40}]), ('ranks', [{'loss': 1.0, 'images': 0}]),
        ('ranks', [{'loss': 1.0, 'images': 40.5}]), ('ranks', [{'loss': torch.zeros(2), 'images': 40}])]),
])
def test_a_place_in_other_epochs_is_refused(changed, parts, message):
    with pytest.raises(InputError, match=message):
        find_middle(Path('x'), checkpoint(**changed), parts, World(torch.device('cpu'), size=2))


@pytest.mark.parametrize('saved', [
    5, {}, {'bn.running_mean': torch.zeros(2)}, {'running_mean': torch.zeros(2)},
    {'running_mean': torch.zeros(3), 'running_var': torch.zeros(2), 'num_batches_tracked': torch.tensor(1)},
    {'running_mean': [0.0, 0.0], 'running_var': torch.zeros(2), 'num_batches_tracked': torch.tensor(1)}])
def test_statistics_of_another_model_are_refused(saved):
    task = SimpleNamespace(get_trainable_module=lambda ema: None if ema else norm)
    norm, world = torch.nn.BatchNorm1d(2), World(torch.device('cpu'))
    good = {'running_mean': torch.ones(2), 'running_var': torch.ones(2), 'num_batches_tracked': torch.tensor(7)}
    restore_statistics(Path('x'), checkpoint(ranks=[{'buffers': good}]), task, world)
    assert norm.running_mean.tolist() == [1, 1] and norm.num_batches_tracked == 7
    with pytest.raises(InputError, match="from 'x', since its 'middle' is not what"):
        restore_statistics(Path('x'), checkpoint(ranks=[{'buffers': saved}]), task, world)


def write(folder: Path, name: str, epoch: int, updates: int | None = None) -> None:
    middle = {} if updates is None else {'middle': {'updates': updates}}
    torch.save({'epoch': epoch, 'state_dict': {}, **middle}, folder / name)


def test_the_newest_checkpoint_is_gone_on_from(tmp_path, caplog):
    write(tmp_path, RECOVERY, 0, 7)
    assert find_resume('auto', tmp_path).name == RECOVERY
    with pytest.raises(InputError, match='already holds a run'):
        find_resume(None, tmp_path)
    write(tmp_path, LAST, 0)  # killed before the other one was removed
    assert find_resume('auto', tmp_path).name == LAST
    write(tmp_path, RECOVERY, 1, 7)
    assert find_resume('auto', tmp_path).name == RECOVERY and not caplog.records
    (tmp_path / RECOVERY).write_bytes(b'cut off')
    assert find_resume('auto', tmp_path).name == LAST
    assert caplog.records[-1].getMessage().endswith("The run goes on from 'last.pth.tar' instead, after epoch 1.")


@pytest.mark.parametrize('before', ['momentum', 'lookahead_momentum'])
def test_a_lookahead_before_its_first_slow_step_is_no_other_optimizer(before):
    network = torch.nn.Linear(2, 1)

    def stepped(name: str) -> torch.optim.Optimizer:
        optimizer = create_optimizer(network, OptimizerSettings(opt=name))
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer

    state, fresh = {'optimizer': stepped(before).state_dict()}, stepped('lookahead_momentum')
    if before == 'momentum':
        with pytest.raises(InputError, match='momentum_buffer of a parameter, where .*lookahead_slow_buff'):
            _load_optimizer(Path('x'), state, fresh)
    else:
        _load_optimizer(Path('x'), state, fresh)


@pytest.mark.parametrize('name', ['balms', 'h2t', 'crt'])
def test_what_cannot_go_on_within_an_epoch_is_refused(name):
    def build(interval: int, has_parts: bool, stage: Any = None) -> EpochParts:
        plan: Any = SimpleNamespace(settings=TrainSettings(keeping=KeepingSettings(recovery_interval=interval)),
                                    batch=SimpleNamespace(accum_steps=2, global_size=16))
        loader = type('Loader', (), {'has_parts': has_parts, '__len__': lambda self: 15})()
        return build_parts(plan, loader, stage)

    assert build(0, False) == parts_of(0) and build(3, True) == parts_of()
    with pytest.raises(InputError, match='comes in an order of its own.*--dataset wds/'):
        build(3, False)
    stage = SECOND_STAGES[name]()
    if stage.goes_on:
        assert build(3, True, stage) == parts_of()
        return
    with pytest.raises(InputError, match='reads images of its own in an epoch.*leave out --recovery-interval'):
        build(3, True, stage)

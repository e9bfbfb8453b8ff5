"""Checkpoints in the middle of an epoch: a run that goes on from one ends as the run that went through."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_killed_at, run_ranks
from test_shards import LABELS, SHARDS, write_shards
from test_train_run import assert_same, data_flags, images, rows  # noqa: F401

import nbn_timm.cli.train as train
from nbn_timm.errors import InputError
from nbn_timm.models.run_folder import LAST, RECOVERY
from nbn_timm.training import keeper, run

COMMON = ['--img-size', '8', '--device', 'cpu', '--epochs', '2', '-b', '4', '--no-report', '--recovery-interval', '2',
          '--log-interval', '1']
MODEL = [*COMMON, '--model', 'resnet20_nbn']


class Killed(Exception):
    """In the place of a signal."""


def train_until(at: int, flags: list[str]) -> None:
    """Train, and end all at once after so many checkpoints in the middle of epochs."""
    keep, written = keeper.Keeper.keep_middle, []

    def keep_and_die(self, *place):
        keep(self, *place)
        written.append(place)
        if len(written) == at:
            raise Killed

    keeper.Keeper.keep_middle = keep_and_die
    try:
        train.main(flags)
    except Killed:
        return
    finally:
        keeper.Keeper.keep_middle = keep
    raise AssertionError('there were not so many checkpoints')


def state(folder: Path, name: str = LAST) -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_ends_alike(output: Path) -> None:
    whole, killed = (state(output / name) for name in ('whole', 'killed'))
    for key in whole.keys() - {'args', 'version'}:
        assert_same(whole[key], killed[key])
    logs = [rows(output / name) for name in ('whole', 'killed')]
    assert [row['train_loss'] for row in logs[0]] == [row['train_loss'] for row in logs[1]] and len(logs[0]) == 2
    assert not (output / 'killed' / RECOVERY).exists()


def check(flags: list[str], output: Path, at: int = 3) -> None:
    """Of five updates an epoch, two, then two, then one are a part: the third checkpoint is in the second epoch."""
    flags = [*flags, '--output', str(output)]
    train.main([*flags, '--experiment', 'whole'])
    train_until(at, [*flags, '--experiment', 'killed'])
    assert state(output / 'killed', RECOVERY)['middle']['updates'] == 2 + 2 * (at == 4)
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    assert_ends_alike(output)


def test_a_run_killed_by_a_signal_goes_on_within_its_epoch(images, tmp_path, capfd):  # noqa: F811
    """Files and two workers, and nearly all that draws or counts."""
    flags = [*data_flags(images, 'train'), *MODEL, '--workers', '2', '--no-in-memory', '--model-ema',
             '--model-ema-decay', '0.9', '--mixup', '0.5', '--smoothing', '0.1', '--drop', '0.2', '--reprob', '0.3',
             '--sampler', 'class_balanced', '--warmup-epochs', '1', '--sched-on-updates', '--opt', 'lookahead_sgd',
             '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])
    run_killed_at('epoch 2/2  step 4/5', train.main, [*flags, '--experiment', 'killed'])
    assert state(tmp_path / 'killed')['epoch'] == 0
    assert state(tmp_path / 'killed', RECOVERY)['middle']['updates'] in (2, 4)
    capfd.readouterr()
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    assert 'of 5 of epoch 2.' in capfd.readouterr().out
    assert_ends_alike(tmp_path)

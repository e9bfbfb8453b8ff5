"""Train a model for long-tailed recognition: parse, build, run.

    nbn-train                                                  # the quick start
    torchrun --nproc-per-node 8 train.py --config configs/resnext50_nbn.yaml --data-dir /data/imagenet
"""
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nbn_timm.config import Given, build_parser, read_given
from nbn_timm.datasets import HOW_TO_GIVE_ONE
from nbn_timm.errors import InputError, run_cli
from nbn_timm.models.run_folder import new_run_folder, source_file
from nbn_timm.settings import flag
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.training.distributed import close_world, init_world
from nbn_timm.training.log import setup_logging
from nbn_timm.training.run import train
from nbn_timm.training.run_checkpoint import exclusive_run
from nbn_timm.training.settings import TrainSettings

DESCRIPTION = 'Train a timm model for long-tailed recognition. Without any argument: the quick start.'


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; see `--help`.

    Raises:
        InputError: Something given is wrong.
    """
    given = read_command_line(argv)
    settings = run_settings(given)
    folder = new_run_folder(settings.run.output, settings.run.experiment, settings.default_experiment())
    world = init_world(settings.precision.device)
    setup_logging(world.is_primary)
    given.check_effects(settings, world_size=world.size)
    with exclusive_run(folder, world):
        with settings.precision.compiling():
            train(settings, world, folder)
        world.barrier()  # torch 2.7's gloo can hang when the group is closed right after a reduction
    close_world(world)


def console() -> int:
    """Entry point of the command `nbn-train`."""
    return run_cli(main, 'nbn-train')


def read_command_line(argv: Sequence[str] | None = None) -> Given[TrainSettings]:
    """Read flags and config; with neither a config nor anything to train (on), take the quick start."""
    parser = build_parser(TrainSettings, 'nbn-train', DESCRIPTION)
    argv = sys.argv[1:] if argv is None else argv
    given = read_given(TrainSettings, parser, argv)
    names_something = {'config', 'dataset', 'data_dir', 'train_list', 'train_csv', 'model', 'initial_checkpoint'}
    if not given.flags.keys() & names_something:
        return read_given(TrainSettings, parser, ['--config', 'quickstart', *argv])
    return given


def run_settings(given: Given[TrainSettings]) -> TrainSettings:
    """The settings of a run: what is given, what a finished network brings along, and defaults.

    Raises:
        InputError: There is no model or no data set.
    """
    values = given.values()
    if file := values.get('initial_checkpoint'):
        values['initial_checkpoint'] = str(source_file(file))
    settings = TrainSettings.of({**_inherited(values), **values})
    stage = settings.second_stage.stage
    for name, value in (('dataset', settings.data.dataset), ('model', settings.model.model)):
        if not value:
            if stage and name == 'model':
                raise InputError(f'--stage {stage} begins with a finished network: give its --initial-checkpoint')
            how = HOW_TO_GIVE_ONE if name == 'dataset' else 'give one'
            raise InputError(f'there is no {flag(name)}: {how}, or a --config that has it')
    return settings


def parse_train(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings that a command line amounts to, its effects checked.

    Raises:
        InputError: Something given is wrong.
    """
    given = read_command_line(argv)
    settings = run_settings(given)
    given.check_effects(settings)
    return settings


def _inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the network of --initial-checkpoint brings along.

    A second stage reads the images as the first one did. A new training does so too where no benchmark prescribes
    another format.
    """
    checkpoint = values.get('initial_checkpoint')
    if not checkpoint:
        return {}
    return checkpoint_record(checkpoint).inherited_by_training(TrainSettings, values, bool(values.get('stage')))


if __name__ == '__main__':
    sys.exit(console())

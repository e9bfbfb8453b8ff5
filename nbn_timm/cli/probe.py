"""Heads on the cached features of a network: `nbn-probe --help`; with `torchrun`, features on several processes."""
import sys
from collections.abc import Sequence

from nbn_timm.config import build_parser, read_given
from nbn_timm.errors import run_cli
from nbn_timm.models.run_folder import new_run_folder
from nbn_timm.probe.probe import probe, probe_settings
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.training.distributed import close_world, init_world
from nbn_timm.training.log import setup_logging
from nbn_timm.training.run_checkpoint import exclusive_run

DESCRIPTION = ('Run a pretrained network once over the images, keep its features, and train heads on them in seconds: '
               'a table of the validation, and the best one as a run.')


def main(argv: Sequence[str] | None = None) -> None:
    """Compare heads as the command line says; see `--help`.

    Raises:
        InputError: Something given is wrong.
    """
    given = read_given(ProbeSettings, build_parser(ProbeSettings, 'nbn-probe', DESCRIPTION), argv)
    settings = probe_settings(given.settings(), given.values())
    folder = new_run_folder(settings.run.output, settings.run.experiment, settings.default_experiment())
    world = init_world(settings.precision.device)
    setup_logging(world.is_primary)
    given.check_effects(settings)
    try:
        with exclusive_run(folder, world), settings.precision.compiling():
            probe(settings, world, folder)
        world.barrier()  # see train.py
    finally:
        close_world(world)


def console() -> int:
    """Entry point of the command `nbn-probe`."""
    return run_cli(main, 'nbn-probe')


if __name__ == '__main__':
    sys.exit(console())

"""Evaluate a model on a long-tailed benchmark: `nbn-validate --help`; with `torchrun`, on several processes."""
import sys
from collections.abc import Sequence

from nbn_timm.config import build_parser, read_given
from nbn_timm.errors import run_cli
from nbn_timm.files import prints_beside
from nbn_timm.training.distributed import close_world, init_world
from nbn_timm.validation import ValidateSettings, validate, validation_settings

DESCRIPTION = "Evaluate a model on a long-tailed benchmark. What is not given is as the checkpoint's training had it."


def main(argv: Sequence[str] | None = None) -> None:
    """Validate as the command line says; see `--help`.

    Raises:
        InputError: Something given is wrong.
    """
    given = read_given(ValidateSettings, build_parser(ValidateSettings, 'nbn-validate', DESCRIPTION), argv)
    settings = validation_settings(given.settings(), given.values())
    world, asked = init_world(settings.precision.device), settings.evaluation
    files = (asked.results_file, asked.per_class_file, asked.save_predictions, asked.logits_file)
    try:
        with prints_beside(*files), settings.precision.compiling():
            given.check_effects(settings, print if world.is_primary else _nothing)
            validate(settings, world)
        world.barrier()  # see train.py
    finally:
        close_world(world)


def _nothing(line: str) -> None:
    """For processes other than the first."""


def console() -> int:
    """Entry point of the command `nbn-validate`."""
    return run_cli(main, 'nbn-validate')


if __name__ == '__main__':
    sys.exit(console())

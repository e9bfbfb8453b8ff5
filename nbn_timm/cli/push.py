"""nbn-push: a trained model to the Hugging Face Hub, or into a folder, with a model card."""
import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from nbn_timm.config import build_parser, read_given
from nbn_timm.errors import InputError, run_cli
from nbn_timm.hub import (
    FOLDER_FILES,
    check_destination,
    model_card,
    portable,
    push_files,
    write_model_folder,
)
from nbn_timm.models.weight_files import digest_of_source
from nbn_timm.settings import SettingGroups, Settings, not_with, only_with, setting
from nbn_timm.trained.opening import (
    FOLDER,
    HUB,
    CheckpointSettings,
    SourceSettings,
    TrainedModel,
    open_trained,
    opened_source,
)
from nbn_timm.trained.results import ResultsFile, results_beside, results_of


@dataclass(frozen=True)
class PushSettings(Settings):
    """What is pushed, and where to."""

    title = 'push'

    output: str | None = setting(None, "write the folder for 'local-dir:DIR' and push nothing", metavar='DIR',
                                 kind='place')
    overwrite: bool = setting(False, 'replace an earlier folder in DIR', effect=only_with('output'))
    private: bool = setting(False, 'create a private repository', effect=not_with('output'))
    revision: str | None = setting(None, 'branch, created if need be', metavar='BRANCH', effect=not_with('output'),
                                   unset='the main one')
    commit_message: str = setting('Add model', 'of the commit', metavar='TEXT', effect=not_with('output'))


@dataclass(frozen=True)
class CardSettings(Settings):
    """What the model card says beside what is recorded."""

    title = 'model card'

    results_file: str | None = setting(
        None, 'accuracies, of validate.py --results-file', metavar='FILE',
        unset="those that are recorded, else the checkpoint's test.json")
    license: str | None = setting(
        None, "of the weights, in the Hub's spelling", metavar='NAME',
        unset="that of the architecture's own weights, else apache-2.0")


@dataclass(frozen=True)
class PushCommand(SettingGroups):
    """All settings of a push."""

    source: SourceSettings = SourceSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    push: PushSettings = PushSettings()
    card: CardSettings = CardSettings()


def create_parser() -> argparse.ArgumentParser:
    """The flags, the model and the repository."""
    parser = build_parser(
        PushCommand, 'nbn-push', 'Push a trained model to the Hugging Face Hub: config.json and model.safetensors, '
        "which timm loads by 'hf-hub:USER/NAME', and a model card. The token is that of HF_TOKEN or of a login; "
        'HF_ENDPOINT names a mirror.')
    parser.add_argument('source', metavar='SOURCE', help='folder of a run, checkpoint file of train.py, folder with '
                        "config.json, name with pretrained weights, or 'hf-hub:user/name'")
    parser.add_argument('repo_id', nargs='?', metavar='USER/NAME', help='repository, created if need be')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or the Hub refuses.
    """
    given = read_given(PushCommand, create_parser(), argv)
    settings, repo_id = given.settings(), given.positional.get('repo_id')
    source = opened_source(given.positional['source'])
    push = settings.push
    if push.output is None and repo_id is None:
        raise InputError('give USER/NAME to push to, or --output DIR to write the folder only')
    given.check_effects(settings, print)
    if push.output is None:
        check_destination(str(repo_id), HfApi())
    trained = open_trained(
        source, use_ema=settings.checkpoint.use_ema, model=settings.source.arch,
        class_counts_file=settings.source.class_counts, class_names_file=settings.source.class_names,
        all_experts=settings.checkpoint.all_experts)
    if trained.classes is not None and trained.classes.label_sets:
        raise InputError(f"the card of a repository tells accuracies, and '{source}' gives a set of classes for an "
                         'image, which has none: share the checkpoint, or what nbn-export makes of it')
    for note in trained.notes:
        print(note)
    trained = portable(_with_results(trained, source, settings))
    license = settings.card.license or trained.model.pretrained_cfg.get('license') or 'apache-2.0'
    location = _location(repo_id, push)
    card = model_card(trained, location, license)
    if push.output is not None:
        write_model_folder(trained, push.output, card, push.overwrite)
        print(f"wrote {', '.join(FOLDER_FILES)} to '{push.output}'")
        print(f"load it with {_call(f'{FOLDER}{push.output}')}")
        return
    with TemporaryDirectory() as folder:
        write_model_folder(trained, folder, card)
        size = sum(Path(folder, name).stat().st_size for name in FOLDER_FILES)
        url = push_files(folder, FOLDER_FILES, str(repo_id), private=push.private, revision=push.revision,
                         message=push.commit_message)
    print(f'pushed {trained.name} ({size / 1e6:.1f} MB, license {license}): {url}')
    print(f'load it with {_call(location)}')


def _with_results(trained: TrainedModel, source: str, settings: PushCommand) -> TrainedModel:
    """The accuracies of the file that was asked for, else the recorded ones, else those beside the checkpoint."""
    found: ResultsFile | None
    file, use_ema = settings.card.results_file, settings.checkpoint.use_ema
    if file:
        found = results_of(file, use_ema, trained.architecture, digest_of_source(source, trained.model, use_ema))
    elif trained.record.test or settings.checkpoint.all_experts:
        return trained
    else:
        found = results_beside(source, use_ema, trained.record.epoch, digest_of_source(source, trained.model, use_ema))
    if found is None:
        return trained
    known = trained.model.num_classes
    if found.num_classes != known:
        raise InputError(f"'{file or 'test.json'}' is of {found.num_classes} classes and the model has {known}: give "
                         'the results of this model')
    return replace(trained, record=replace(trained.record, test=found.results))


def _location(repo_id: str | None, push: PushSettings) -> str:
    """The name that the model will be loaded by."""
    if repo_id is None:
        return f'{FOLDER}{Path(str(push.output)).resolve().name}'
    return f'{HUB}{repo_id}' + (f'@{push.revision}' if push.revision else '')


def _call(location: str) -> str:
    return f"timm.create_model('{location}', pretrained=True)"


def console() -> int:
    """Entry point of `nbn-push`."""
    return run_cli(main, 'nbn-push')


if __name__ == '__main__':
    raise SystemExit(console())

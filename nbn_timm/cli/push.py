"""nbn-push: a trained model to the Hugging Face Hub, or into a folder, with a model card."""
import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from nbn_timm.config import parse_flags
from nbn_timm.errors import InputError, run_cli
from nbn_timm.hub import (
    FILES,
    check_destination,
    model_card,
    portable,
    push_files,
    results_beside,
    results_of,
    write_model_folder,
)
from nbn_timm.trained.opening import FOLDER, HUB, TrainedModel, open_trained


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='nbn-push', allow_abbrev=False, description='Push a trained model to the Hugging Face Hub: config.json '
        "and model.safetensors, which timm loads by 'hf-hub:USER/NAME', and a model card. The token is that of "
        'HF_TOKEN or of a login; HF_ENDPOINT names a mirror.')
    parser.add_argument('source', help='checkpoint file of train.py, folder with config.json, name with pretrained '
                        "weights, or 'hf-hub:user/name'")
    parser.add_argument('repo_id', nargs='?', metavar='USER/NAME', help='repository, created if need be')
    parser.add_argument('--output', type=Path, metavar='DIR', help="write the folder for 'local-dir:DIR' and push "
                        'nothing')
    parser.add_argument('--overwrite', action='store_true', help='replace an earlier folder in DIR')

    group = parser.add_argument_group('model')
    group.add_argument('--use-ema', action='store_true', help="the checkpoint's averaged weights")
    group.add_argument('--arch', metavar='NAME', help='of a file of bare weights: the timm model that they are for')
    group.add_argument('--all-experts', action='store_true', help='of a checkpoint with routing, the network without '
                       'its router')
    group.add_argument('--class-counts', metavar='FILE', help='training images per class, instead of those recorded')

    group = parser.add_argument_group('model card')
    group.add_argument('--results-file', metavar='FILE', help='accuracies, of validate.py --results-file; default: '
                       "those that are recorded, else the checkpoint's test.json")
    group.add_argument('--license', metavar='NAME', help="of the weights, in the Hub's spelling; default: that of the "
                       "architecture's own, else apache-2.0")

    group = parser.add_argument_group('repository')
    group.add_argument('--private', action='store_true', help='create a private repository')
    group.add_argument('--revision', metavar='BRANCH', help='branch, created if need be')
    group.add_argument('--commit-message', default='Add model', metavar='TEXT')
    return parse_flags(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command; see `parse_args`.

    Raises:
        InputError: Something given is wrong, or the Hub refuses.
    """
    args = parse_args(argv)
    if args.output is None and args.repo_id is None:
        raise InputError('give USER/NAME to push to, or --output DIR to write the folder only')
    if args.output is not None and (args.private or args.revision):
        raise InputError('--private and --revision are of a push, and --output pushes nothing: leave one out')
    if args.output is None and args.overwrite:
        raise InputError('--overwrite is of --output DIR, and a push is a new commit anyway: leave it out')
    if args.output is None:
        check_destination(args.repo_id, HfApi())
    trained = open_trained(args.source, use_ema=args.use_ema, model=args.arch, class_counts_file=args.class_counts,
                           all_experts=args.all_experts)
    trained = portable(_with_results(trained, args))
    license = args.license or trained.model.pretrained_cfg.get('license') or 'apache-2.0'
    card = model_card(trained, _location(args), license)
    if args.output is not None:
        write_model_folder(trained, args.output, card, args.overwrite)
        print(f"wrote {', '.join(FILES)} to '{args.output}'")
        print(f"load it with {_call(f'{FOLDER}{args.output}')}")
        return
    with TemporaryDirectory() as folder:
        write_model_folder(trained, folder, card)
        size = sum(Path(folder, name).stat().st_size for name in FILES)
        url = push_files(folder, FILES, args.repo_id, private=args.private, revision=args.revision,
                         message=args.commit_message)
    print(f'pushed {trained.name} ({size / 1e6:.1f} MB, license {license}): {url}')
    print(f'load it with {_call(_location(args))}')


def _with_results(trained: TrainedModel, args: argparse.Namespace) -> TrainedModel:
    """The accuracies of the file that was asked for, else the recorded ones, else those beside the checkpoint."""
    test: dict[str, Any] | None
    if args.results_file:
        test = results_of(args.results_file, args.use_ema, trained.model.pretrained_cfg['architecture'])
    elif trained.record.get('test') or args.all_experts:
        return trained
    else:
        test = results_beside(args.source, args.use_ema, trained.record.get('settings') or {},
                              trained.record.get('epoch'))
    if test is None:
        return trained
    classes, known = test.pop('classes'), trained.model.num_classes
    if classes != known:
        raise InputError(f"'{args.results_file or 'test.json'}' is of {classes} classes and the model has {known}: "
                         'give the results of this model')
    return replace(trained, record={**trained.record, 'test': test})


def _location(args: argparse.Namespace) -> str:
    """The name that the model will be loaded by."""
    if args.repo_id is None:
        return f'{FOLDER}{args.output.resolve().name}'
    return f'{HUB}{args.repo_id}' + (f'@{args.revision}' if args.revision else '')


def _call(location: str) -> str:
    return f"timm.create_model('{location}', pretrained=True)"


def console() -> int:
    """Entry point of `nbn-push`."""
    return run_cli(main, 'nbn-push')


if __name__ == '__main__':
    raise SystemExit(console())

"""nbn-convert: turn a released checkpoint into a file of the zoo, and say what it was recognised as."""
import argparse
from pathlib import Path

import timm

from nbn_timm.errors import run_cli
from nbn_timm.files import file_sha256, prints_beside
from nbn_timm.models._pretrained import write_zoo_file
from nbn_timm.models._released import Recognized


def create_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog='nbn-convert', description='Convert a checkpoint of the released NBN or RIDE code (.pth.tar, keys with or '
        "without module.), of timm or of this package into safetensors with this package's keys.")
    parser.add_argument('checkpoint', type=Path, help='the file to convert')
    parser.add_argument('target', type=Path, nargs='?', help='file to write; default: <arch>.<tag>.safetensors in the '
                        'weights cache, where pretrained=True finds it')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return create_parser().parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert as the command line says, and tell.

    Raises:
        InputError: The checkpoint cannot be read, is of no known kind, or the file cannot be written.
    """
    args = parse_args(argv)
    with prints_beside(args.target):
        recognized, target = write_zoo_file(args.checkpoint, args.target)
        tell(recognized, target, args)


def tell(recognized: Recognized, target: Path, args: argparse.Namespace) -> None:
    """Print what was written, and how to load it."""
    print(f"recognised '{args.checkpoint}' as {recognized}")
    size = f'{target.stat().st_size / 1e6:.1f} MB, SHA-256 {file_sha256(target)}' if target.is_file() else 'not kept'
    print(f"wrote '{target}' ({size})")
    print(f"load it after `import nbn_timm` with timm.create_model('{recognized.arch}', "
          f"num_classes={recognized.num_classes}{recognized.arguments}, checkpoint_path='{target}')")
    if recognized.has_router:
        print("left out the assignment module, which is no part of the network: validate.py evaluates "
              'the checkpoint with it')
    if args.target is None and recognized.name in timm.list_models(recognized.arch, include_tags=True):
        print(f"or with timm.create_model('{recognized.name}', pretrained=True)")


def console() -> int:
    return run_cli(main, 'nbn-convert')


if __name__ == '__main__':
    raise SystemExit(console())

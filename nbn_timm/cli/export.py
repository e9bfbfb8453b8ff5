"""nbn-export: a trained network as files that other programs run, each compared with the original and timed."""
import argparse
from dataclasses import replace
from pathlib import Path

import torch

from nbn_timm.config import COUNT, NOT_NEGATIVE, POSITIVE_INT, parse_flags
from nbn_timm.deploy import (
    FORMATS,
    CheckImages,
    ExportSettings,
    checkpoint_images,
    export_model,
    folder_images,
    generated_images,
)
from nbn_timm.errors import InputError, run_cli
from nbn_timm.trained.opening import TrainedModel, open_trained


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='nbn-export', allow_abbrev=False, description='Write a network, with NBN folded and experts averaged in '
        'one, as a folder for timm (model.safetensors), TorchScript (.pt), torch.export (.pt2) and ONNX. Each file is '
        'read back, compared with the original network on images, and timed on the CPU.')
    parser.add_argument('source', metavar='SOURCE', help="a name with pretrained weights, a checkpoint file, "
                        "'hf-hub:USER/REPO' or 'local-dir:DIR'")
    parser.add_argument('folder', type=Path, metavar='OUT', help='folder to write')
    parser.add_argument('--arch', metavar='NAME', help='of a file of bare weights: the timm model that they are for')
    parser.add_argument('--use-ema', action='store_true', help="the checkpoint's averaged weights")
    parser.add_argument('--all-experts', action='store_true', help='of a network with routing, ask every expert')
    parser.add_argument('--class-counts', metavar='FILE', help='class names and training images, in '
                        'place of those that the model records')
    parser.add_argument('--img-size', type=POSITIVE_INT, metavar='N', help="pixels; default: the network's own")
    parser.add_argument('--formats', nargs='+', choices=FORMATS, metavar='NAME',
                        help=f"of {', '.join(FORMATS)}; default: all that can be written")
    parser.add_argument('--with-preprocessing', action='store_true',
                        help='TorchScript, torch.export and ONNX take uint8 pixels and normalise them')
    parser.add_argument('--overwrite', action='store_true', help='replace an earlier export in OUT')

    group = parser.add_argument_group('comparison and timing')
    group.add_argument('--images', type=Path, metavar='DIR', help='folder of images, with subfolders or not; default: '
                       "the test images that the checkpoint's record names, else generated ones")
    group.add_argument('--num-images', type=POSITIVE_INT, default=32, metavar='N')
    group.add_argument('--tolerance', type=NOT_NEGATIVE, default=1e-4, metavar='F',
                       help="greatest difference from the original's logits")
    group.add_argument('-b', '--batch-size', type=POSITIVE_INT, default=1, metavar='N', help='of the timing')
    group.add_argument('--repeats', type=POSITIVE_INT, default=20, metavar='N', help='rounds of the timing')
    group.add_argument('--threads', type=COUNT, default=0, metavar='N', help="default: torch's own number")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or a file differs from the original.
    """
    args = parse_flags(create_parser(), argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    trained = open_trained(args.source, use_ema=args.use_ema, model=args.arch, class_counts_file=args.class_counts,
                           all_experts=args.all_experts)
    if args.img_size:
        size = (trained.input.input_size[0], args.img_size, args.img_size)
        trained = replace(trained, input=trained.input.override(input_size=size))
    images, reason = check_images(trained, args.images, args.num_images)
    settings = ExportSettings(
        args.formats, args.with_preprocessing, args.tolerance, args.batch_size, args.repeats, args.overwrite)
    print(f"{trained.name}: comparing on {len(images.pixels)} images, {images.source}{reason}", flush=True)
    report = export_model(trained, args.folder, images, settings)
    print('\n'.join([*report.notes, '', report.table(), '', f"wrote '{args.folder}'"]))


def check_images(trained: TrainedModel, folder: Path | None, count: int) -> tuple[CheckImages, str]:
    """The images to compare with, and why they are not those of the training data if they are not."""
    if folder is not None:
        return folder_images(folder, count, trained.input), ''
    try:
        return checkpoint_images(trained.record.get('settings', {}), count, trained.input), ''
    except InputError as error:
        return generated_images(count, trained.input), f' ({error})'


def console() -> int:
    """Entry point of `nbn-export`."""
    return run_cli(main, 'nbn-export')


if __name__ == '__main__':
    raise SystemExit(console())

"""Say what is in pictures: the likeliest classes of each, and how often training has seen them.

    nbn-predict --model resnet32_nbn.cifar100_lt pictures/
    nbn-predict --model output/run/last.pth.tar --json --output found.jsonl a.jpg b.png
"""
import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from nbn_timm.cli.validate import prepare_model
from nbn_timm.config import COUNT, NOT_NEGATIVE, POSITIVE_INT, parse_flags
from nbn_timm.data import FEW_BELOW, MANY_ABOVE, create_eval_loader
from nbn_timm.data.dataset import UnlabelledImages
from nbn_timm.data.pictures import FoundImages, find_images
from nbn_timm.errors import InputError, run_cli
from nbn_timm.evaluation.posthoc import logit_offset
from nbn_timm.evaluation.prediction import PredictedClass, TopClasses, predict
from nbn_timm.files import atomic_write
from nbn_timm.models._pretrained import shipped_names
from nbn_timm.trained.opening import TrainedModel, open_trained
from nbn_timm.training.distributed import close_world, init_world

Classes = tuple[PredictedClass, ...]


def create_parser() -> argparse.ArgumentParser:
    """Flags carry the names that they have in nbn-validate."""
    parser = argparse.ArgumentParser(
        prog='nbn-predict', allow_abbrev=False,
        description='Say what is in pictures: the likeliest classes of each, their probabilities, and how many '
                    f'training images each class had (many: more than {MANY_ABOVE}, few: less than {FEW_BELOW}).')
    parser.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER',
                        help='image files, and folders, which are searched for images in and below them')

    group = parser.add_argument_group('model')
    group.add_argument('-m', '--model', metavar='SOURCE',
                       help="a name with pretrained weights, a checkpoint file, 'hf-hub:USER/REPO' or 'local-dir:DIR'; "
                            f'shipped with this package: {shipped()}')
    group.add_argument('--arch', metavar='NAME', help='of a file of bare weights: the timm model that they are for')
    group.add_argument('--use-ema', action='store_true', help="the checkpoint's averaged weights")
    group.add_argument('--fuse', '--reparam', action='store_true',
                       help='fold NBN into plain BatchNorm, and the heads of experts into one, first (exact)')
    group.add_argument('--all-experts', action='store_true', help='of a network with routing, ask every expert')
    group.add_argument('--class-counts', metavar='FILE',
                       help='training images per class, in place of those that the model records')
    group.add_argument('--logit-adjustment', type=NOT_NEGATIVE, default=0.0, metavar='TAU',
                       help='subtract TAU times the logarithm of the training prior from the logits')

    group = parser.add_argument_group('computation')
    group.add_argument('-b', '--batch-size', type=POSITIVE_INT, default=256, metavar='N')
    group.add_argument('-j', '--workers', type=COUNT, default=4, metavar='N',
                       help='loading processes; none is started for a single batch')
    group.add_argument('--device', metavar='NAME', help='default: cuda if there is one, else cpu')
    group.add_argument('--amp', action='store_true', help='autocast')
    group.add_argument('--amp-dtype', choices=['float16', 'bfloat16'], default='float16')
    group.add_argument('--channels-last', action='store_true')

    group = parser.add_argument_group('output')
    group.add_argument('-k', '--topk', type=POSITIVE_INT, default=5, metavar='K', help='classes per image (default: 5)')
    group.add_argument('--json', action='store_true', help='one JSON object per image, each on a line')
    group.add_argument('-o', '--output', metavar='FILE',
                       help='write to this file, whole or not at all; default: the standard output')
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or images could not be read; the others have been predicted all the same.
    """
    args = parse_flags(create_parser(), argv)
    if not args.model:
        raise InputError('there is no --model: give a name with pretrained weights (shipped with this package: '
                         f'{shipped()}), a checkpoint file, hf-hub:USER/REPO or local-dir:DIR')
    found = find_images(args.images)
    if not found.files:
        searched = "', '".join(args.images)
        raise InputError(f"there is no image in '{searched}': give image files, or folders that hold some")
    if not any(map(os.path.exists, found.files)):
        raise InputError(f"there is no file or folder '{found.files[0]}': check the path")
    world = init_world(args.device)
    try:
        if world.distributed:
            raise InputError('nbn-predict is one process: leave out torchrun')
        unreadable = run(args, found, world.device)
    finally:
        close_world(world)
    if unreadable:
        raise InputError(f'{unreadable} of {len(found.files)} images could not be read, as said above: leave them out '
                         'or replace them by intact copies')


def run(args: argparse.Namespace, found: FoundImages, device: torch.device) -> int:
    """Open the model, predict, write; returns how many images could not be read."""
    trained = open_trained(args.model, use_ema=args.use_ema, model=args.arch, class_counts_file=args.class_counts,
                           all_experts=args.all_experts)
    counts = trained.class_counts
    if args.logit_adjustment and counts is None:
        raise InputError(f"--logit-adjustment needs the training images per class, which '{args.model}' does not "
                         'record: give --class-counts FILE')
    top_classes = TopClasses(
        class_names(trained), counts, args.topk, logit_offset(counts, args.logit_adjustment) if counts else None)
    model = prepare_model(trained.model, device, args.fuse, args.channels_last, None)
    dataset = UnlabelledImages(found.files)
    loader = create_eval_loader(
        dataset, batch_size=args.batch_size, defaults=trained.input, device=device,
        num_workers=args.workers if len(dataset) > args.batch_size else 0, pin_memory=device.type == 'cuda')
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp else None
    entry = json_entry if args.json else text_entry

    def write(file: TextIO) -> int:
        unreadable = 0
        for index, classes in predict(model, loader, top_classes, device, amp_dtype, args.channels_last):
            fault = None
            if classes is None:
                fault = dataset.fault(index)
                unreadable += 1
                tell(fault)
            file.write(entry(found.files[index], classes, fault))
            file.flush()
        return unreadable

    height, width = trained.input.input_size[1:]
    tell(f'{trained.name}: {len(top_classes.names)} classes, images of {height}x{width}, training images per class '
         + (f'from {counts.source}' if counts else 'not known'))
    for note in found.notes:
        tell(note)
    begun = time.perf_counter()
    unreadable = write_whole(args.output, write) if args.output else write(forgiving(sys.stdout))
    seconds = time.perf_counter() - begun
    tell(f'{number(len(dataset) - unreadable, "image")} in {seconds:.1f} s on {device.type}'
         + (f", written to '{args.output}'" if args.output else ''))
    return unreadable


def class_names(trained: TrainedModel) -> tuple[str, ...]:
    """Names of all classes, from what the model records, for ImageNet's from timm; else their numbers."""
    counts, model = trained.class_counts, trained.model
    num_classes: int = model.num_classes
    if counts is not None and any(not name.isdecimal() for name in counts.names):
        return counts.names
    label_names = tuple(model.pretrained_cfg.get('label_names') or ())
    if len(label_names) == num_classes:
        return label_names
    tag, settings = trained.name.partition('.')[2], trained.record.get('settings') or {}
    timms_own = counts is None and not settings and re.search(r'(^|_)in\d+k(_|$)', tag)
    subset = infer_imagenet_subset({'num_classes': num_classes})
    if subset and (timms_own or 'imagenet_lt' in (tag, settings.get('dataset'))):
        return tuple(ImageNetInfo(subset).label_descriptions())
    return counts.names if counts is not None else tuple(map(str, range(num_classes)))


def text_entry(file: str, classes: Classes | None, fault: str | None) -> str:
    """For people; a file that could not be read is left to the standard error."""
    return '' if classes is None else '\n'.join([file, *(f'  {found}' for found in classes)]) + '\n'


def json_entry(file: str, classes: Classes | None, fault: str | None) -> str:
    """For machines: the predictions, or the error."""
    found = {'error': fault} if classes is None else {'predictions': [found.to_dict() for found in classes]}
    return json.dumps({'file': file, **found}) + '\n'


def write_whole(path: str, write: Callable[[TextIO], int]) -> int:
    """Let `write` fill a file, which is there whole or not at all."""
    results = []

    def fill(temporary: Path) -> None:
        with open(temporary, 'w', encoding='utf-8', errors='backslashreplace') as file:
            results.append(write(file))

    atomic_write(path, fill)
    return results[0]


def forgiving(stream: TextIO) -> TextIO:
    """The stream, writing as \\xNN what it cannot encode: file names may hold any bytes, class names any letters."""
    stream.reconfigure(errors='backslashreplace')  # type: ignore[attr-defined]
    return stream


def number(amount: int, thing: str) -> str:
    return f'{amount} {thing}' + ('' if amount == 1 else 's')


def tell(message: str) -> None:
    """Print beside the predictions, so that those can be piped on."""
    print(f'nbn-predict: {message}', file=forgiving(sys.stderr), flush=True)


def shipped() -> str:
    """Names of the weights that come with this package."""
    return ', '.join(shipped_names()) or 'none'


def console() -> int:
    """Entry point of `nbn-predict`."""
    return run_cli(main, 'nbn-predict')


if __name__ == '__main__':
    raise SystemExit(console())

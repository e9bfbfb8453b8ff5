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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from nbn_timm.computation import PrecisionSettings
from nbn_timm.config import build_parser, read_given
from nbn_timm.data import create_eval_loader
from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, label_names
from nbn_timm.data.dataset import UnlabelledImages
from nbn_timm.data.pictures import FoundImages, find_images
from nbn_timm.data.settings import LoaderSettings
from nbn_timm.datasets import find_benchmark
from nbn_timm.deploy import NOTHING_TO_FOLD, FoldSettings, foldable
from nbn_timm.errors import InputError, run_cli
from nbn_timm.evaluation.posthoc import logit_offset
from nbn_timm.evaluation.prediction import TOP_K, PredictedClass, TopClasses, predict
from nbn_timm.evaluation.settings import AdjustmentSettings, EvalBatchSettings
from nbn_timm.files import atomic_write
from nbn_timm.models._pretrained import shipped_names
from nbn_timm.models.create import check_input_size
from nbn_timm.settings import AT_LEAST_1, SettingGroups, Settings, setting
from nbn_timm.trained.opening import CheckpointSettings, SourceSettings, TrainedModel, open_trained
from nbn_timm.training.distributed import close_world, init_world
from nbn_timm.validation import prepare_model

Answer = tuple[PredictedClass, ...]


@dataclass(frozen=True)
class AnswerSettings(Settings):
    """What is said of each image, and where."""

    title = 'output'

    topk: int = setting(TOP_K, 'classes per image', limits=AT_LEAST_1, short='-k', metavar='K')
    json: bool = setting(False, 'one JSON object per image, each on a line')
    output: str | None = setting(None, 'write to this file, whole or not at all', short='-o', metavar='FILE',
                                 kind='place', unset='the standard output')


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """Which network answers."""

    title = 'network'

    model: str = setting('', "a name with pretrained weights, a checkpoint file, 'hf-hub:USER/REPO' or "
                         "'local-dir:DIR'; shipped with this package: " + (', '.join(shipped_names()) or 'none'),
                         short='-m', metavar='SOURCE', unset='none, it must be given')


@dataclass(frozen=True)
class PredictSettings(SettingGroups):
    """All settings of a prediction."""

    network: NetworkSettings = NetworkSettings()
    source: SourceSettings = SourceSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    form: FoldSettings = FoldSettings()
    adjustment: AdjustmentSettings = AdjustmentSettings()
    batch: EvalBatchSettings = EvalBatchSettings()
    precision: PrecisionSettings = PrecisionSettings()
    loader: LoaderSettings = LoaderSettings()
    answer: AnswerSettings = AnswerSettings()


def create_parser() -> argparse.ArgumentParser:
    """Flags carry the names that they have in nbn-validate."""
    parser = build_parser(
        PredictSettings, 'nbn-predict',
        'Say what is in pictures: the likeliest classes of each, their probabilities, and how many training images '
        f'each class had (many: more than {MANY_ABOVE}, few: less than {FEW_BELOW}).')
    parser.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER',
                        help='image files, and folders, which are searched for images in and below them')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or images could not be read; the others have been predicted all the same.
    """
    given = read_given(PredictSettings, create_parser(), argv)
    settings, images = given.settings(), given.positional['images']
    given.check_effects(settings, tell)
    if not settings.network.model:
        shipped = ', '.join(shipped_names()) or 'none'
        raise InputError('there is no --model: give a name with pretrained weights (shipped with this package: '
                         f'{shipped}), a checkpoint file, hf-hub:USER/REPO or local-dir:DIR')
    found = find_images(images)
    if not found.files:
        searched = "', '".join(images)
        raise InputError(f"there is no image in '{searched}': give image files, or folders that hold some")
    if not any(map(os.path.exists, found.files)):
        raise InputError(f"there is no file or folder '{found.files[0]}': check the path")
    world = init_world(settings.precision.device)
    try:
        if world.distributed:
            raise InputError('nbn-predict is one process: leave out torchrun')
        with settings.precision.compiling():
            unreadable = run(settings, found, world.device)
    finally:
        close_world(world)
    if unreadable:
        raise InputError(f'{unreadable} of {len(found.files)} images could not be read, as said above: leave them out '
                         'or replace them by intact copies')


def run(settings: PredictSettings, found: FoundImages, device: torch.device) -> int:
    """Open the model, predict, write; returns how many images could not be read."""
    tau, precision, answer = settings.adjustment.logit_adjustment, settings.precision, settings.answer
    trained = open_trained(
        settings.network.model, use_ema=settings.checkpoint.use_ema, model=settings.source.arch,
        class_counts_file=settings.source.class_counts, all_experts=settings.checkpoint.all_experts)
    counts = trained.class_counts
    if tau and counts is None:
        raise InputError(f"--logit-adjustment needs the training images per class, which '{settings.network.model}' "
                         'does not record: give --class-counts FILE')
    check_input_size(trained.model, trained.name, trained.input.input_size)
    top_classes = TopClasses(class_names(trained), counts, answer.topk, logit_offset(counts, tau) if counts else None)
    model = prepare_model(trained.model, device, settings.form.fuse, precision)
    dataset = UnlabelledImages(found.files)
    loader = create_eval_loader(
        dataset, batch_size=settings.batch.batch_size, defaults=trained.input, device=device,
        num_workers=settings.loader.workers if len(dataset) > settings.batch.batch_size else 0,
        pin_memory=settings.loader.pin_mem or device.type == 'cuda', dtype=precision.dtype)
    entry = json_entry if answer.json else text_entry

    def write(file: TextIO) -> int:
        unreadable = 0
        for index, classes in predict(model, loader, top_classes, device, precision.autocast, precision.channels_last):
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
    unfolded = [NOTHING_TO_FOLD] * (settings.form.fuse and not foldable(trained.model))
    for note in (*trained.notes, *unfolded, *found.notes):
        tell(note)
    begun = time.perf_counter()
    unreadable = write_whole(answer.output, write) if answer.output else write(forgiving(sys.stdout))
    seconds = time.perf_counter() - begun
    tell(f'{counted(len(dataset) - unreadable, "image")} in {seconds:.1f} s on {device.type}'
         + (f", written to '{answer.output}'" if answer.output else ''))
    return unreadable


def class_names(trained: TrainedModel) -> tuple[str, ...]:
    """Names of all classes, from what the model records, its benchmark or, for ImageNet, timm; else their numbers."""
    classes, num_classes = trained.classes, trained.model.num_classes
    if classes is not None and classes.named:
        return classes.names
    if len(trained.label_names) == num_classes:
        return trained.label_names
    tag, record = trained.name.partition('.')[2], trained.record
    benchmark = find_benchmark(record.dataset) or find_benchmark(tag)
    known = benchmark.class_names() if benchmark else None
    if known and len(known) == num_classes:
        return known
    timms_own = classes is None and not record.arguments and re.search(r'(^|_)in\d+k(_|$)', tag)
    subset = infer_imagenet_subset({'num_classes': num_classes})
    if subset and timms_own:
        return tuple(ImageNetInfo(subset).label_descriptions())
    return classes.names if classes is not None else label_names(num_classes)


def text_entry(file: str, classes: Answer | None, fault: str | None) -> str:
    """For people; a file that could not be read is left to the standard error."""
    return '' if classes is None else '\n'.join([file, *(f'  {found}' for found in classes)]) + '\n'


def json_entry(file: str, classes: Answer | None, fault: str | None) -> str:
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


def counted(amount: int, thing: str) -> str:
    return f'{amount} {thing}' + ('' if amount == 1 else 's')


def tell(message: str) -> None:
    """Print beside the predictions, so that those can be piped on."""
    print(f'nbn-predict: {message}', file=forgiving(sys.stderr), flush=True)


def console() -> int:
    """Entry point of `nbn-predict`."""
    return run_cli(main, 'nbn-predict')


if __name__ == '__main__':
    raise SystemExit(console())

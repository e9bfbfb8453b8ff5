"""Say what is in pictures: the likeliest classes of each, and how often training has seen them.

    nbn-predict --model resnet32_nbn.cifar100_lt pictures/
    nbn-predict --model output/run/last.pth.tar --json --output found.jsonl a.jpg b.png
"""
import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from nbn_timm import timm_flags
from nbn_timm.cli.answer_forms import Answer, Form, form_of
from nbn_timm.cli.set_forms import set_form_of
from nbn_timm.computation import PrecisionSettings
from nbn_timm.config import build_parser, read_given
from nbn_timm.data import DataDefaults, create_eval_loader
from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, label_names
from nbn_timm.data.dataset import UnlabelledImages
from nbn_timm.data.pictures import FoundImages, find_images
from nbn_timm.data.settings import LoaderSettings
from nbn_timm.data.watching import FolderWatch
from nbn_timm.datasets import find_benchmark
from nbn_timm.deploy import NOTHING_TO_FOLD, FoldSettings, foldable
from nbn_timm.errors import InputError, run_cli
from nbn_timm.evaluation.posthoc import logit_offset
from nbn_timm.evaluation.prediction import TOP_K, TopClasses, predict
from nbn_timm.evaluation.settings import AdjustmentSettings, EvalBatchSettings
from nbn_timm.evaluation.temperature import temperature_of
from nbn_timm.evaluation.thresholds import Thresholds
from nbn_timm.evaluation.told_classes import ToldClasses
from nbn_timm.files import atomic_write
from nbn_timm.models._pretrained import shipped_names
from nbn_timm.models.create import check_input_size
from nbn_timm.settings import AT_LEAST_1, POSITIVE, PROBABILITY, SettingGroups, Settings, not_with, setting
from nbn_timm.trained.opening import CheckpointSettings, SourceSettings, TrainedModel, open_trained
from nbn_timm.training.distributed import close_world, init_world
from nbn_timm.validation import prepare_model

WATCH_SECONDS = 1.0  # between looks at a folder


@dataclass(frozen=True)
class AnswerSettings(Settings):
    """What is said of each image."""

    title = 'answers'

    topk: int = setting(TOP_K, 'classes per image', limits=AT_LEAST_1, short='-k', metavar='K')
    threshold: float | None = setting(
        None, "an image whose likeliest class has a lower probability is 'not sure'; where an image can be of several "
        'classes, tell each from this probability on', limits=PROBABILITY, metavar='P',
        unset='every image has an answer; of several classes, the thresholds that the model records, else 0.5')
    temperature: float | None = setting(None, 'divides the logits before the softmax', limits=POSITIVE, metavar='T',
                                        unset='as fitted on the validation split, if the model records it, else 1')


@dataclass(frozen=True)
class OutputSettings(Settings):
    """How the answers are written, and where."""

    title = 'output'

    json: bool = setting(False, 'one JSON object per image, each on a line')
    csv: bool = setting(False, 'a table, one row per image', effect=not_with('json'))
    output: str | None = setting(None, 'write to this file, whole or not at all; with --watch, add to it', short='-o',
                                 metavar='FILE', kind='place', unset='the standard output')
    watch: str | None = setting(None, 'answer new pictures of this folder as they appear, until Ctrl-C', metavar='DIR',
                                kind='place')


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """Which network answers."""

    title = 'network'

    model: str = setting('', "the folder of a run, a checkpoint file, a name with pretrained weights, "
                         "'hf-hub:USER/REPO' or 'local-dir:DIR'; shipped with this package: "
                         + (', '.join(shipped_names()) or 'none'),
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
    output: OutputSettings = OutputSettings()

    elsewhere = timm_flags.INFERENCE


def create_parser() -> argparse.ArgumentParser:
    """Flags carry the names that they have in nbn-validate."""
    parser = build_parser(
        PredictSettings, 'nbn-predict',
        'Say what is in pictures: the likeliest classes of each, their probabilities, and how many training images '
        f'each class had (many: more than {MANY_ABOVE}, few: less than {FEW_BELOW}).')
    parser.add_argument('images', nargs='*', metavar='IMAGE_OR_FOLDER',
                        help='image files, and folders, which are searched for images in and below them')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or images could not be read; the others have been predicted all the same.
    """
    given = read_given(PredictSettings, create_parser(), argv)
    settings, images = given.settings(), given.positional.get('images', [])
    given.check_effects(settings, tell)
    if not settings.network.model:
        shipped = ', '.join(shipped_names()) or 'none'
        raise InputError('there is no --model: give the folder of a run, a name with pretrained weights (shipped with '
                         f'this package: {shipped}), a checkpoint file, hf-hub:USER/REPO or local-dir:DIR')
    watched = settings.output.watch
    if watched and images:
        raise InputError(f"--watch looks at one folder, and '{images[0]}' is beside it: leave it out, or copy it there")
    if watched and not os.path.isdir(watched):
        raise InputError(f"there is no folder '{watched}' to --watch: make it, or correct the path")
    found = FoundImages((), ()) if watched else find_images(images)
    if not images and not watched:
        raise InputError('there are no images: give files or folders, or a folder to --watch')
    if not found.files and not watched:
        searched = "', '".join(images)
        raise InputError(f"there is no image in '{searched}': give image files, or folders that hold some")
    if found.files and not any(map(os.path.exists, found.files)):
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
    """Open the model, predict, write; returns how many images could not be read, of a watched folder none."""
    network = Network.open(settings, device)
    for note in (*network.notes, *found.notes):
        tell(note)
    output = settings.output
    form = set_form_of(output.json, output.csv) if network.label_sets else form_of(
        output.json, output.csv, network.top_classes.topk, settings.answer.threshold)
    if output.watch:
        return watch(network, form, output)
    begun = time.perf_counter()

    def write(file: TextIO) -> int:
        file.write(form.head)
        unreadable = 0
        for answer in network.answers(found.files):
            if answer.fault:
                unreadable += 1
                tell(answer.fault)
            file.write(form.entry(*answer))
            file.flush()
        return unreadable

    unreadable = write_whole(output.output, write) if output.output else write(forgiving(sys.stdout))
    seconds = time.perf_counter() - begun
    tell(f'{counted(len(found.files) - unreadable, "image")} in {seconds:.1f} s on {device.type}'
         + (f", written to '{output.output}'" if output.output else ''))
    return unreadable


def watch(network: 'Network', form: Form, output: OutputSettings) -> int:
    """Answer the pictures of a folder, each once, until somebody interrupts.

    Raises:
        InputError: The answers cannot be added to the file.
    """
    try:
        return _watch(network, form, output)
    except BrokenPipeError:
        raise
    except OSError as error:
        if not output.output or error.filename is not None:
            raise
        raise InputError(f"'{output.output}' cannot be written ({error.strerror}): free some space or give another "
                         '--output') from error


def _watch(network: 'Network', form: Form, output: OutputSettings) -> int:
    assert output.watch is not None
    known = form.go_on(output.output) if output.output else frozenset()
    folder, answered = FolderWatch(output.watch, known, form.name), 0
    with open_to_add(output.output) if output.output else nullcontext(forgiving(sys.stdout)) as file:
        if not output.output or os.path.getsize(output.output) == 0:
            file.write(form.head)
        tell(f"watching '{output.watch}'"
             + (f', of which {counted(len(known), "picture")} are answered already' if known else '')
             + '; Ctrl-C ends it')
        try:
            while True:
                for answer in network.answers(folder.ready()):
                    if answer.fault is None or folder.gives_up(answer.file):
                        file.write(form.entry(*answer))
                        file.flush()
                        answered += answer.fault is None
                        if answer.fault:
                            tell(answer.fault)
                    folder.done(answer.file, answer.fault is None)
                time.sleep(WATCH_SECONDS)
        except KeyboardInterrupt:
            tell(f'{counted(answered, "image")} answered')
    return 0


class FileAnswer(NamedTuple):
    """The classes of a picture, or why it could not be read."""

    file: str
    classes: Answer | None
    fault: str | None


@dataclass(frozen=True)
class Network:
    """A network that is ready to answer.

    Attributes:
        settings: Of the command.
        name: Of the network.
        model: On the device.
        input: Format of its images.
        top_classes: Chooses from the logits.
        device: Where the model is.
        notes: What a person should know.
    """

    settings: PredictSettings
    name: str
    model: torch.nn.Module
    input: DataDefaults
    top_classes: TopClasses
    device: torch.device
    notes: tuple[str, ...]

    @property
    def label_sets(self) -> bool:
        """Whether an answer is a set of classes."""
        return isinstance(self.top_classes, ToldClasses)

    @classmethod
    def open(cls, settings: PredictSettings, device: torch.device) -> 'Network':
        """The network that the settings name."""
        trained, top_classes, notes = open_network(settings)
        model = prepare_model(trained.model, device, settings.form.fuse, settings.precision)
        return cls(settings, trained.name, model, trained.input, top_classes, device, notes)

    def answers(self, files: Sequence[str]) -> Iterator[FileAnswer]:
        """The answers to some files, in their order, as they come."""
        if not files:
            return
        settings, precision = self.settings, self.settings.precision
        dataset = UnlabelledImages(files)
        loader = create_eval_loader(
            dataset, batch_size=settings.batch.batch_size, defaults=self.input, device=self.device,
            num_workers=settings.loader.workers if len(files) > settings.batch.batch_size else 0,
            pin_memory=settings.loader.pin_mem or self.device.type == 'cuda', dtype=precision.dtype)
        for index, classes in predict(self.model, loader, self.top_classes, self.device, precision.autocast,
                                      precision.channels_last):
            yield FileAnswer(files[index], classes, dataset.fault(index) if classes is None else None)


def open_network(settings: PredictSettings) -> tuple[TrainedModel, TopClasses, tuple[str, ...]]:
    """The network, what chooses from its logits, and what a person should know."""
    tau = settings.adjustment.logit_adjustment
    trained = open_trained(
        settings.network.model, use_ema=settings.checkpoint.use_ema, model=settings.source.arch,
        class_counts_file=settings.source.class_counts, class_names_file=settings.source.class_names,
        all_experts=settings.checkpoint.all_experts)
    counts = trained.class_counts
    if tau and counts is None:
        raise InputError(f"--logit-adjustment needs the training images per class, which '{settings.network.model}' "
                         'does not record: give --class-counts FILE')
    check_input_size(trained.model, trained.name, trained.input.input_size)
    if trained.classes is not None and trained.classes.label_sets:
        top_classes, about = told_classes(settings, trained)
    else:
        temperature, about = temperature_of(trained.record.calibration, settings.answer.temperature,
                                            '--logit-adjustment' if tau else None)
        top_classes = TopClasses(class_names(trained), counts, settings.answer.topk,
                                 logit_offset(counts, tau) if counts else None, temperature)
    height, width = trained.input.input_size[1:]
    first = (f'{trained.name}: {len(top_classes.names)} classes, images of {height}x{width}, training images per class '
             + (f'from {counts.source}' if counts else 'not known'))
    unfolded = [NOTHING_TO_FOLD] * (settings.form.fuse and not foldable(trained.model))
    return trained, top_classes, (first, about, *trained.notes, *unfolded)


def told_classes(settings: PredictSettings, trained: TrainedModel) -> tuple[TopClasses, str]:
    """What chooses from the logits of a network whose images can be of several classes, and a sentence on it.

    Raises:
        InputError: A setting is for images of one class.
    """
    answer = settings.answer
    for given, name in ((answer.topk != TOP_K, '--topk'), (answer.temperature is not None, '--temperature'),
                        (settings.adjustment.logit_adjustment, '--logit-adjustment')):
        if given:
            raise InputError(f"{name} is for networks that give one class for an image, and '{settings.network.model}' "
                             'gives a set of classes: leave it out')
    recorded = trained.record.thresholds
    thresholds = recorded or Thresholds.fixed()
    if answer.threshold is not None:
        thresholds = Thresholds.fixed(answer.threshold)
    elif len(thresholds.values) not in (1, trained.model.num_classes):
        raise InputError(f"the thresholds that '{settings.network.model}' records are for {len(thresholds.values)} "
                         f'classes and it has {trained.model.num_classes}: give --threshold')
    return ToldClasses(class_names(trained), thresholds, trained.class_counts), thresholds.in_words()


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


def write_whole(path: str, write: Callable[[TextIO], int]) -> int:
    """Let `write` fill a file, which is there whole or not at all."""
    results = []

    def fill(temporary: Path) -> None:
        with open(temporary, 'w', encoding='utf-8', errors='backslashreplace') as file:
            results.append(write(file))

    atomic_write(path, fill)
    return results[0]


def open_to_add(path: str) -> TextIO:
    """A file to which answers are added as they come.

    Raises:
        InputError: It cannot be written.
    """
    try:
        return open(path, 'a', encoding='utf-8', errors='backslashreplace')
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror}): give another --output") from error


def forgiving(stream: TextIO) -> TextIO:
    """The stream, writing as \\xNN what it cannot encode: file names may hold any bytes, class names any letters.

    Streams of other kinds, as a notebook's and `io.StringIO`, encode nothing themselves and stay as they are.
    """
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors='backslashreplace')
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

"""Train Faster or Mask R-CNN on a frozen-norm NBN, RIDE or any other timm backbone, and measure AP by class frequency.

    python examples/detection/make_digits.py detection_digits
    python examples/detection/train_detection.py --config examples/detection/digits.yaml
    torchrun --standalone --nproc-per-node 2 examples/detection/train_detection.py \\
        --config examples/detection/digits.yaml

docs/detection.md has more, and what the recipe for LVIS takes.
"""
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from average_precision import as_results, average_precision, known, table
from detection_data import Annotations, DetectionImages, as_lists, class_frequencies, count_frequencies
from detector import BackboneSettings, DetectorSettings, create_detector
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection import FasterRCNN

from nbn_timm.config import Given, build_parser, read_given
from nbn_timm.errors import InputError, quoted, run_cli
from nbn_timm.files import atomic_write, make_folder, write_text_atomic
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.samplers import create_sampler
from nbn_timm.settings import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SettingGroups,
    Settings,
    flag,
    setting,
)
from nbn_timm.training.distributed import World, close_world, init_world, seed_everything
from nbn_timm.training.log import setup_logging

CHECKPOINT, RESULTS = 'last.pth', 'results.json'
WARMUP_START = 0.001  # of the learning rate
DECAY = 0.1  # of the learning rate at each of --decay-epochs
FREE = ('epochs',)  # recipe settings that a resumed run may change: the rate of an epoch does not depend on them

_logger = logging.getLogger('train_detection')


@dataclass(frozen=True)
class DataSettings(Settings):
    """Annotations and images."""

    title = 'data'

    config: str | None = setting(None, 'YAML file with settings; flags win', short='-c', metavar='YAML', kind='place')
    train_json: str = setting('', 'annotations to learn from, in the form of LVIS or COCO', metavar='FILE',
                              is_file=True)
    val_json: str = setting('', 'annotations to measure by', metavar='FILE', is_file=True)
    image_dir: str = setting('', 'the folder that file names in the annotations begin from; for LVIS, that with '
                             'train2017 and val2017', metavar='DIR', kind='place')
    hflip: float = setting(0.5, 'probability of a mirror image', limits=PROBABILITY)
    repeat_threshold: float = setting(0.001, 'repeat-factor sampling: classes that fewer of the images have, as a '
                                      'share, come more often; 0 for none', limits=PROBABILITY)


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Epochs, SGD and its rate."""

    title = 'training'

    epochs: int = setting(24, 'epochs of the sampler', limits=AT_LEAST_1)
    batch_size: int = setting(2, 'images per process', limits=AT_LEAST_1)
    lr: float = setting(0.02, 'learning rate, for all processes together', limits=POSITIVE)
    momentum: float = setting(0.9, 'of SGD', limits=PROBABILITY)
    clip_grad: float | None = setting(None, 'largest norm of the gradient', limits=POSITIVE)
    weight_decay: float = setting(1e-4, 'of SGD', limits=NOT_NEGATIVE)
    warmup_steps: int = setting(1000, f'in which the rate rises from {WARMUP_START:g} of itself', limits=NOT_NEGATIVE)
    decay_epochs: tuple[int, ...] = setting((16, 22), 'epochs after which the rate falls to a tenth',
                                            limits=NOT_NEGATIVE, nargs=0)
    seed: int = setting(0, 'of all that is random', limits=NOT_NEGATIVE)


@dataclass(frozen=True)
class RunSettings(Settings):
    """Where it runs, and where its files go."""

    title = 'run'

    output: str = setting('output/detection', 'folder of the run', metavar='DIR', kind='place')
    resume: bool = setting(False, 'go on from the checkpoint in that folder', kind='place')
    device: str | None = setting(None, 'cpu, cuda, cuda:1, ...', metavar='NAME', kind='machine',
                                 unset='a GPU if there is one')
    workers: int = setting(0, 'processes that read images, for each process that trains', limits=NOT_NEGATIVE,
                           kind='machine')
    log_interval: int = setting(50, 'steps between two lines', limits=AT_LEAST_1, kind='machine')


@dataclass(frozen=True)
class DetectionSettings(SettingGroups):
    """All settings."""

    command = 'train_detection.py'

    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    detector: DetectorSettings = DetectorSettings()
    training: TrainingSettings = TrainingSettings()
    run: RunSettings = RunSettings()


class Rate:
    """The learning rate of each step: a linear warm-up, then steps down.

    Args:
        settings: Of the training.
        steps: Of an epoch.
    """

    def __init__(self, settings: TrainingSettings, steps: int) -> None:
        self.settings = settings
        self.steps = steps

    def __call__(self, epoch: int, step: int) -> float:
        """The rate of a step of an epoch, both from 0 on."""
        settings, done = self.settings, epoch * self.steps + step
        share = done / settings.warmup_steps if done < settings.warmup_steps else 1.0
        decays = sum(epoch >= border for border in settings.decay_epochs)
        return settings.lr * (WARMUP_START + (1 - WARMUP_START) * share) * DECAY ** decays


class Training:
    """A detector, what it learns from, and the state of its training.

    Args:
        settings: Of the run.
        world: The processes.

    Raises:
        InputError: Something given is wrong.
    """

    def __init__(self, settings: DetectionSettings, world: World) -> None:
        self.settings, self.world = settings, world
        data, run = settings.data, settings.run
        for name in ('train_json', 'val_json', 'image_dir'):
            if not getattr(data, name):
                raise InputError(f'{flag(name)} is missing: give it')
        self.folder = Path(run.output)
        self.train, self.val = (Annotations.read(path, settings.detector.masks)
                                for path in (data.train_json, data.val_json))
        self.frequencies = class_frequencies(self.train, self.val)
        for annotations in (self.train, self.val):
            annotations.check_files(Path(data.image_dir))
        if not any(self.train.objects):
            raise InputError(f'{quoted(data.train_json)} has no box to learn from, as crowds and boxes of less than a '
                             'pixel are left out: add annotations')
        seed_everything(settings.training.seed)
        counts = torch.from_numpy(self.train.image_counts)
        self.detector = create_detector(settings.backbone, settings.detector, counts, len(self.train.objects))
        self.detector.to(world.device)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.detector.parameters() if parameter.requires_grad],
            settings.training.lr, settings.training.momentum, weight_decay=settings.training.weight_decay)
        name, options = ('repeat_factor', {'threshold': data.repeat_threshold}) if data.repeat_threshold else (
            'instance_balanced', {})
        self.sampler = create_sampler(name, self.train.label_sets, seed=settings.training.seed, rank=world.rank,
                                      world_size=world.size, **options)
        images = DetectionImages(self.train, Path(data.image_dir), settings.detector.masks, data.hflip)
        self.loader = DataLoader(images, settings.training.batch_size, sampler=self.sampler, num_workers=run.workers,
                                 collate_fn=as_lists)
        self.rate = Rate(settings.training, len(self.loader))
        self.epoch = 0  # the next one

    def describe(self) -> None:
        """Say what will be trained on what."""
        learning = sum(one.numel() for one in self.detector.parameters() if one.requires_grad)
        count = sum(one.numel() for one in self.detector.parameters())
        _logger.info(f'{len(self.train.objects)} training images with {sum(map(len, self.train.objects))} objects of '
                     f'{len(self.frequencies)} classes ({count_frequencies(self.frequencies)}); an epoch has '
                     f'{self.sampler.epoch_length} images, {len(self.loader)} steps of {self.world.size} process(es)')
        if left_out := len(self.train.content['annotations']) - sum(map(len, self.train.objects)):
            _logger.info(f'{left_out} annotations are not learned from: crowds, and boxes of less than a pixel')
        _logger.info(f'{type(self.detector).__name__} on {self.settings.backbone.model}, {count / 1e6:.2f} M '
                     f'parameters, {learning / 1e6:.2f} M of which learn')

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        content = {'epoch': self.epoch, 'model': self.detector.state_dict(), 'optimizer': self.optimizer.state_dict(),
                   'settings': self.settings.values()}
        atomic_write(self.folder / CHECKPOINT, lambda path: torch.save(content, path))

    def resume(self) -> None:
        """Go on from the checkpoint of the folder.

        Raises:
            InputError: There is none, or it is of a training with other settings.
        """
        content = read_checkpoint(self.folder / CHECKPOINT)
        if not content.keys() >= {'epoch', 'model', 'optimizer', 'settings'}:
            raise InputError(f"'{self.folder / CHECKPOINT}' is no checkpoint of this script: give another --output")
        changed = self.settings.changed(content['settings'], self.settings.values())
        for name, (before, now) in changed.items():
            if name not in FREE:
                raise InputError(f'{flag(name)} is {now} and was {before} in the run to resume: leave it as it was, or '
                                 'give another --output')
        self.detector.load_state_dict(content['model'])
        self.optimizer.load_state_dict(content['optimizer'])
        self.epoch = content['epoch']
        _logger.info(f'Resumed after epoch {self.epoch}')

    def fit(self) -> None:
        """Train the epochs that are left, and write a checkpoint after each."""
        wrapped: nn.Module = self.detector
        if self.world.distributed:
            wrapped = DistributedDataParallel(self.detector, broadcast_buffers=False)
        for epoch in range(self.epoch, self.settings.training.epochs):
            self._train_epoch(wrapped, epoch)
            self.epoch = epoch + 1
            if self.world.is_primary:
                self.save()
            self.world.barrier()

    def _train_epoch(self, wrapped: nn.Module, epoch: int) -> None:
        # By (seed, epoch, rank) alone, so that a resumed run draws what it would have drawn.
        seed_everything(self.settings.training.seed, epoch, self.world.rank)
        self.sampler.set_epoch(epoch)
        wrapped.train()
        begun, shown = time.monotonic(), 0
        for step, (images, targets) in enumerate(self.loader):
            for group in self.optimizer.param_groups:
                group['lr'] = self.rate(epoch, step)
            losses = wrapped(*_moved(images, targets, self.world.device))
            loss = torch.stack(list(losses.values())).sum()
            if not math.isfinite(loss.item()):
                raise InputError(f'the loss is {loss.item()} in step {step} of epoch {epoch + 1}: give a lower --lr')
            self.optimizer.zero_grad()
            loss.backward()
            if self.settings.training.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.detector.parameters(), self.settings.training.clip_grad)
            self.optimizer.step()
            shown += len(images)
            if (step + 1) % self.settings.run.log_interval == 0 or step + 1 == len(self.loader):
                speed = shown * self.world.size / (time.monotonic() - begun)
                parts = ', '.join(f'{name.removeprefix("loss_")} {value.item():.3f}' for name, value in losses.items())
                _logger.info(f'epoch {epoch + 1} of {self.settings.training.epochs}, step {step + 1} of '
                             f'{len(self.loader)}: loss {loss.item():.3f} ({parts}), {speed:.1f} images/s')

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """AP of boxes, and of masks if there are any, in percent; None on all processes but the first."""
        detector = self.detector.eval()
        mine = range(self.world.rank, len(self.val.objects), self.world.size)
        results = self.world.gather_to_primary(list(self._detect(detector, mine)))
        if results is None:
            return None
        every = [one for part in results for one in part]
        kinds = ('bbox', 'segm') if self.settings.detector.masks else ('bbox',)
        return {kind: average_precision(self.val, self.frequencies, every, kind, self.settings.detector.detections)
                for kind in kinds}

    def _detect(self, detector: FasterRCNN, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        images = DetectionImages(self.val, Path(self.settings.data.image_dir), masks=False)
        loader = DataLoader(Subset(images, indices), batch_size=None, num_workers=self.settings.run.workers)
        ids = [category['id'] for category in self.val.categories]
        for index, (image, _) in zip(indices, loader, strict=True):
            found, = detector([image.to(self.world.device)])
            yield from as_results(found, self.val.content['images'][index]['id'], ids)


def _moved(images: Sequence[torch.Tensor], targets: Sequence[Mapping[str, torch.Tensor]], device: torch.device
           ) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    return ([image.to(device) for image in images],
            [{key: value.to(device) for key, value in target.items()} for target in targets])


def run(settings: DetectionSettings, world: World) -> dict[str, dict[str, float]] | None:
    """Train, write the files, and return what `Training.evaluate` does.

    Raises:
        InputError: Something given is wrong.
    """
    training = Training(settings, world)
    if settings.run.resume:
        training.resume()
    elif (training.folder / CHECKPOINT).exists():
        raise InputError(f"'{training.folder}' has a run already: add --resume, or give another --output")
    world.barrier()  # all have looked before the first writes
    make_folder(training.folder)
    training.describe()
    training.fit()
    figures = training.evaluate()
    if figures is not None:
        record = {'epochs': training.epoch, 'frequencies': training.frequencies, 'ap': known(figures),
                  'settings': settings.values()}
        write_text_atomic(training.folder / RESULTS, json.dumps(record, indent=2, allow_nan=False))
        _logger.info(f'AP over overlaps of .5 to .95 on {len(training.val.objects)} images '
                     f'({count_frequencies(training.frequencies)} classes)\n{table(figures)}')
    return figures


def read_command(argv: Sequence[str] | None = None) -> Given[DetectionSettings]:
    """Read a command line and its config, whose settings of a loss are left out where a flag names another loss.

    Raises:
        InputError: Something given is wrong.
    """
    parser = build_parser(DetectionSettings, DetectionSettings.command,
                          'Train a detector on a timm backbone with frozen norms, and measure AP by class frequency.')
    given = read_given(DetectionSettings, parser, argv)
    if given.values().get('class_loss') == given.config.get('class_loss'):
        return given
    return replace(given, config={name: value for name, value in given.config.items() if name != 'class_loss_kwargs'})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`.

    Raises:
        InputError: Something given is wrong.
    """
    given = read_command(argv)
    settings = given.settings()
    world = init_world(settings.run.device)
    try:
        setup_logging(world.is_primary)
        given.check_effects(settings, _logger.info)
        run(settings, world)
        world.barrier()
    finally:
        close_world(world)


if __name__ == '__main__':
    sys.exit(run_cli(main, DetectionSettings.command))

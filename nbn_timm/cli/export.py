"""nbn-export: a trained network as files that other programs run, each compared with the original and timed."""
import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nbn_timm.config import build_parser, read_given
from nbn_timm.data import DataSettings
from nbn_timm.data.settings import SIDE
from nbn_timm.deploy import (
    CheckImages,
    ExportSettings,
    Int8Settings,
    export_model,
    folder_images,
    generated_images,
    int8_data,
    training_data_images,
)
from nbn_timm.errors import InputError, run_cli
from nbn_timm.settings import Limits, SettingGroups, Settings, setting
from nbn_timm.trained.opening import CheckpointSettings, SourceSettings, TrainedModel, open_trained


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """With which images the files are compared."""

    title = 'comparison'

    img_size: int | None = setting(None, 'pixels of a side', limits=SIDE, unset="the network's own")
    images: str | None = setting(
        None, 'folder of images, with subfolders or not', metavar='DIR',
        unset="the test images that the checkpoint's record names, else generated ones")
    num_images: int = setting(32, 'images to compare with', limits=Limits(1, 10_000))
    threads: int = setting(0, "of torch; 0 is torch's own number", limits=Limits(0, 1024), kind='machine')


@dataclass(frozen=True)
class ExportCommand(SettingGroups):
    """All settings of an export."""

    source: SourceSettings = SourceSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    int8: Int8Settings = Int8Settings()
    comparison: ComparisonSettings = ComparisonSettings()


def create_parser() -> argparse.ArgumentParser:
    """The flags, the network and the folder."""
    parser = build_parser(
        ExportCommand, 'nbn-export',
        'Write a network, with NBN folded and experts averaged in one, as a folder for timm (model.safetensors), '
        'TorchScript (.pt), torch.export (.pt2) and ONNX. Each file is read back, compared with the original network '
        'on images, and timed on the CPU.')
    parser.add_argument('source', metavar='SOURCE', help='the folder of a run, a checkpoint file, a name with '
                        "pretrained weights, 'hf-hub:USER/REPO' or 'local-dir:DIR'")
    parser.add_argument('folder', type=Path, metavar='OUT', help='folder to write')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or a file differs from the original.
    """
    given = read_given(ExportCommand, create_parser(), argv)
    settings, folder = given.settings(), given.positional['folder']
    given.check_effects(settings, print)
    comparison = settings.comparison
    if comparison.threads:
        torch.set_num_threads(comparison.threads)
    trained = open_trained(
        given.positional['source'], use_ema=settings.checkpoint.use_ema, model=settings.source.arch,
        class_counts_file=settings.source.class_counts, class_names_file=settings.source.class_names,
        all_experts=settings.checkpoint.all_experts)
    for note in trained.notes:
        print(note)
    if comparison.img_size:
        size = (trained.input.input_size[0], comparison.img_size, comparison.img_size)
        trained = replace(trained, input=trained.input.override(input_size=size))
    images, reason = check_images(trained, comparison)
    print(f"{trained.name}: comparing on {len(images.pixels)} images, {images.source}{reason}", flush=True)
    int8 = int8_data(trained, settings.int8) if settings.int8.int8 else None
    report = export_model(trained, folder, images, settings.export, int8)
    print('\n'.join([*report.notes, '', report.table(), '', f"wrote '{folder}'"]))


def check_images(trained: TrainedModel, settings: ComparisonSettings) -> tuple[CheckImages, str]:
    """The images to compare with, and why they are not those of the training data if they are not."""
    count = settings.num_images
    if settings.images is not None:
        return folder_images(settings.images, count, trained.input), ''
    try:
        return training_data_images(trained.record.told(DataSettings), count, trained.input), ''
    except InputError as error:
        return generated_images(count, trained.input), f' ({error})'


def console() -> int:
    """Entry point of `nbn-export`."""
    return run_cli(main, 'nbn-export')


if __name__ == '__main__':
    raise SystemExit(console())

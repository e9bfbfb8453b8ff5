"""A trained network into a folder of files, each read back, compared with the original and timed."""
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch

from nbn_timm.errors import InputError
from nbn_timm.files import write_folder
from nbn_timm.models import RoutedExperts
from nbn_timm.models.create import check_input_size
from nbn_timm.settings import AT_LEAST_1, NOT_NEGATIVE, Limits, Settings, Values, setting
from nbn_timm.trained.opening import RECORD_KEY, TrainedModel
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training.settings import public_record

from .artefact import Artefact, FormatUnavailable
from .check_images import CheckImages
from .fold import Preprocessed, deployed
from .formats import FORMATS
from .timing import Timing, interleaved
from .timm_folder import fresh_model, needs_package, plain_architecture

__all__ = ['ExportReport', 'ExportSettings', 'ExportedFile', 'export_model']

REPORT_FILE, LABELS_FILE = 'report.json', 'labels.json'
EXAMPLE_BATCH = 2  # of tracing; torch.export would take 1 for a constant
CHECKED_BATCHES = (1, EXAMPLE_BATCH, 7)

Runner = Callable[[torch.Tensor], torch.Tensor]


def _graphs(name: str, others: Values) -> str | None:
    formats = others.formats or FORMATS
    return None if any(FORMATS[kind].is_graph for kind in formats) else 'is for graphs, and --formats names none'


@dataclass(frozen=True)
class ExportSettings(Settings):
    """How to export."""

    title = 'export'

    formats: tuple[str, ...] | None = setting(None, 'of the file formats', choices=lambda: FORMATS, nargs=0,
                                              metavar='NAME', unset='all that can be written')
    with_preprocessing: bool = setting(
        False, 'TorchScript, torch.export and ONNX take uint8 pixels and normalise them', effect=_graphs)
    overwrite: bool = setting(False, 'replace an earlier export of the same folder')
    tolerance: float = setting(1e-4, "greatest difference from the original's logits", limits=NOT_NEGATIVE)
    batch_size: int = setting(1, 'of the timing', limits=Limits(1, 10_000), short='-b')
    repeats: int = setting(20, 'rounds of the timing', limits=AT_LEAST_1)


@dataclass(frozen=True)
class ExportedFile:
    """One format, as it was written and read back.

    Attributes:
        format: Key of `FORMATS`.
        files: Names in the folder.
        size: Of the files together, in bytes.
        max_abs_diff: Greatest difference of a logit from the original's, over all images and batch sizes.
        timing: Of a batch.
    """

    format: str
    files: tuple[str, ...]
    size: int
    max_abs_diff: float
    timing: Timing


@dataclass(frozen=True)
class ExportReport:
    """What an export amounts to.

    Attributes:
        about: Names and settings, as plain data.
        exported: The formats written.
        original: Time of the unfolded network.
        plain: Time of timm's own model of the same architecture, freshly made; None where timm has none.
        notes: What a person should know, one sentence each.
    """

    about: Mapping[str, Any]
    exported: tuple[ExportedFile, ...]
    original: Timing
    plain: Timing | None
    notes: tuple[str, ...]

    def table(self) -> str:
        """Files, differences and times, for people."""
        rows = [('original', '', '', '', self.original)]
        if self.plain is not None:
            rows.append((f"timm's own {self.about['architecture']}", '', '', '', self.plain))
        rows += [(item.format, item.files[0], f'{item.size / 1e6:.1f} MB', f'{item.max_abs_diff:.1e}', item.timing)
                 for item in self.exported]
        width = max(len(row[0]) for row in rows)
        lines = [f"{'':<{width}}  {'file':<17}  {'size':>8}  {'max diff':>8}  {'ms':>8}  of the original"]
        lines += [f'{name:<{width}}  {file:<17}  {size:>8}  {diff:>8}  {timing.median:8.2f}  '
                  f'{timing.ratio(self.original)[1]:.2f}' for name, file, size, diff, timing in rows]
        return '\n'.join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **self.about,
            'original': self._time(self.original),
            'timm': None if self.plain is None else self._time(self.plain),
            'formats': {item.format: {
                'files': list(item.files), 'bytes': item.size, 'max_abs_diff': item.max_abs_diff,
                **self._time(item.timing)} for item in self.exported},
            'notes': list(self.notes),
        }

    def _time(self, timing: Timing) -> dict[str, Any]:
        low, middle, high = timing.ratio(self.original)
        return {'ms': round(timing.median, 4), 'of_the_original': round(middle, 4),
                'quartiles': [round(low, 4), round(high, 4)]}


def export_model(
        trained: TrainedModel,
        folder: str | Path,
        images: CheckImages,
        settings: ExportSettings | None = None,
) -> ExportReport:
    """Write a network in every format asked for, read each back, compare and time it.

    The folder appears when all of that has succeeded; before, and if it fails, there is none.

    Args:
        trained: The network.
        folder: To write; it must not exist, be empty, or with `overwrite` hold nothing but an earlier export.
        images: To compare with, of the network's input size.
        settings: How to export.

    Raises:
        InputError: The network routes its experts, a format that was named cannot be written, an output differs, or
            the folder is in the way.
    """
    settings = settings or ExportSettings()
    if isinstance(trained.model, RoutedExperts):
        raise InputError(f"'{trained.name}' asks a number of experts that depends on the image, which no fixed graph "
                         'does: add --all-experts to export the network that asks all of them')
    check_input_size(trained.model, trained.name, trained.input.input_size)
    artefact = _artefact(trained, images, settings)
    reports: list[ExportReport] = []

    def fill(temporary: Path) -> None:
        report = _write_and_check(artefact, temporary, images, settings)
        counts = trained.classes
        if counts is not None:
            images_of = counts.counts or (None,) * counts.num_classes
            (temporary / LABELS_FILE).write_text(_json([
                {'label': label, 'name': name, 'training_images': count}
                for label, (name, count) in enumerate(zip(counts.names, images_of, strict=True))]), 'utf-8')
        (temporary / REPORT_FILE).write_text(_json(report.to_dict()), 'utf-8')
        reports.append(report)

    own = {REPORT_FILE, LABELS_FILE, *(name for kind in FORMATS.values() for name in kind.files)}
    write_folder(folder, fill, replaceable=own if settings.overwrite else ())
    return reports[0]


def metadata(trained: TrainedModel, record: NetworkRecord) -> dict[str, Any]:
    """What goes into the files beside the weights: names, input format and training, as plain data."""
    about: dict[str, Any] = {'model': _public_name(trained), 'input': trained.input.input_format()}
    classes = record.classes
    if classes is not None:
        if classes.counts is not None:
            about['training_images'] = list(classes.counts)
        if classes.named:
            about['label_names'] = list(classes.names)
    return about | {RECORD_KEY: record.to_dict()}


def _public_name(trained: TrainedModel) -> str:
    """The name, unless that is a place."""
    return trained.architecture if ':' in trained.name else trained.name


def _artefact(trained: TrainedModel, images: CheckImages, settings: ExportSettings) -> Artefact:
    network: Any = deployed(trained.model).eval().requires_grad_(False)
    normalized = Preprocessed(network, trained.input.mean, trained.input.std)
    takes = 'uint8 pixels' if settings.with_preprocessing else 'normalised float32 pixels'
    record = replace(public_record(trained.record), folded=True, digest=None)
    about = metadata(trained, record) | {'takes': takes}
    example = images.pixels[:1].repeat(EXAMPLE_BATCH, 1, 1, 1)
    if settings.with_preprocessing:
        return Artefact(trained, record, normalized, example, about)
    return Artefact(trained, record, network, normalized.normalize(example), about)


def _write_and_check(
        artefact: Artefact,
        folder: Path,
        images: CheckImages,
        settings: ExportSettings,
) -> ExportReport:
    trained = artefact.trained
    original = Preprocessed(trained.model, trained.input.mean, trained.input.std).eval()
    normalized = original.normalize(images.pixels)
    with torch.inference_mode():
        reference = _in_batches(trained.model, normalized, CHECKED_BATCHES[-1])
    notes: list[str] = []
    runners: dict[str, tuple[Runner, torch.Tensor]] = {'original': (trained.model, normalized)}
    differences: dict[str, float] = {}
    for name in settings.formats or FORMATS:
        kind = FORMATS[name]
        try:
            kind.write(artefact, folder)
        except FormatUnavailable as error:
            if settings.formats:
                raise
            notes.append(f'without {name}: {error}')
            continue
        takes = images.pixels if settings.with_preprocessing and kind.is_graph else normalized
        runners[name] = kind.load(folder), takes
        differences[name] = _difference(runners[name][0], takes, reference)
        if not differences[name] <= settings.tolerance:  # nor NaN
            raise InputError(
                f"the {name} file of '{trained.name}' differs from the original by {differences[name]:.1e} on "
                f'{images.source}, where logits reach {reference.abs().max():.3g}, and nothing was written: leave the '
                f'format out with --formats, or accept that with --tolerance')
    architecture, arguments = plain_architecture(trained)
    plain = None if needs_package(architecture) else fresh_model(trained)
    if plain is not None:
        runners["timm's own"] = plain, normalized
    if 'timm' in differences:
        notes.append(
            f"timm has no architecture like '{architecture}', so it loads the folder after `import nbn_timm` only; the "
            'other files need no package' if plain is None else
            f"folded to timm's own '{architecture}', which loads without this package")
    if not images.real:
        notes.append('compared on generated images: give --images DIR to compare on real ones')
    timings = _time(runners, settings)
    exported = tuple(ExportedFile(
        name, FORMATS[name].files, sum((folder / file).stat().st_size for file in FORMATS[name].files), difference,
        timings[name]) for name, difference in differences.items())
    about = {
        **{key: artefact.metadata[key] for key in ('model', 'input', 'takes')}, 'architecture': architecture,
        'model_args': arguments, 'images': images.source, 'num_images': len(images.pixels),
        'batch_sizes_checked': list(CHECKED_BATCHES), 'tolerance': settings.tolerance,
        'batch_size_timed': settings.batch_size, 'repeats': settings.repeats, 'threads': torch.get_num_threads(),
        'machine': platform.machine(), 'torch': torch.__version__, 'timm': timm.__version__,
    }
    return ExportReport(about, exported, timings['original'], timings.get("timm's own"), tuple(notes))


def _in_batches(run: Runner, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([run(batch) for batch in images.split(batch_size)])


def _difference(run: Runner, images: torch.Tensor, reference: torch.Tensor) -> float:
    """Greatest difference from logits [N, num_classes], over all batch sizes that are checked; NaN if there is one."""
    with torch.no_grad():
        found = [(_in_batches(run, images, size) - reference).abs().max() for size in CHECKED_BATCHES]
    return float(torch.stack(found).max())


def _time(runners: Mapping[str, tuple[Runner, torch.Tensor]], settings: ExportSettings) -> dict[str, Timing]:
    def call(run: Runner, images: torch.Tensor) -> Callable[[], torch.Tensor]:
        repeats = -(-settings.batch_size // len(images))
        batch = images.repeat(repeats, 1, 1, 1)[:settings.batch_size]
        return lambda: run(batch)

    with torch.inference_mode():
        return interleaved({name: call(*runner) for name, runner in runners.items()}, settings.repeats)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + '\n'

"""A trained network into a folder of files, each read back, compared with the original and timed."""
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch

from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult
from nbn_timm.files import write_folder
from nbn_timm.models import RoutedExperts
from nbn_timm.models.create import check_input_size
from nbn_timm.models.ownership import needs_package
from nbn_timm.settings import AT_LEAST_1, NOT_NEGATIVE, Limits, Settings, Values, setting
from nbn_timm.trained.opening import RECORD_KEY, TrainedModel
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training.settings import public_record

from .artefact import Artefact, FormatUnavailable
from .check_images import CheckImages
from .fold import Preprocessed, deployed
from .formats import FORMATS, INT8_FORMATS
from .int8_data import Int8Data
from .timing import Timing, interleaved
from .timm_folder import fresh_model, plain_architecture

__all__ = ['ExportReport', 'ExportSettings', 'ExportedFile', 'export_model']

REPORT_FILE, LABELS_FILE = 'report.json', 'labels.json'
EXAMPLE_BATCH = 2  # of tracing; torch.export would take 1 for a constant
CHECKED_BATCHES = (1, EXAMPLE_BATCH, 7)
_TOLD = ('top1', 'mean_class', 'many', 'medium', 'few')  # accuracies of 8-bit integers

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
    tolerance: float = setting(1e-4, "greatest difference from the original's logits, a share of the greatest one if "
                               'that is above 1', limits=NOT_NEGATIVE)
    batch_size: int = setting(1, 'of the timing', limits=Limits(1, 10_000), short='-b')
    repeats: int = setting(20, 'rounds of the timing', limits=AT_LEAST_1)
    time: tuple[int, ...] | None = setting(
        None, 'time all with so many threads too, a table for each number', limits=Limits(1, 1024), nargs=0,
        metavar='THREADS', unset='with the threads of --threads alone')


@dataclass(frozen=True)
class Rounded:
    """What 8-bit integers change.

    Attributes:
        same_class: Share of the compared images for which the first class stays, in percent.
        before, after: Accuracies on test images of the original and of the file; None if there were none.
    """

    same_class: float
    before: EvalResult | None
    after: EvalResult | None

    def losses(self) -> dict[str, tuple[float, float]]:
        """Accuracies before and after, by name, as far as they are known."""
        if self.before is None or self.after is None:
            return {}
        pairs = {name: (getattr(self.before, name), getattr(self.after, name)) for name in _TOLD}
        return {name: pair for name, pair in pairs.items() if None not in pair}

    def loss(self) -> tuple[str, float] | None:
        """The accuracy that is judged, few-shot's if there is such a class, and what is lost of it, in points."""
        losses = self.losses()
        name = next((name for name in ('few', 'mean_class') if name in losses), None)
        return None if name is None else (name, losses[name][0] - losses[name][1])

    def in_words(self) -> str:
        """For people."""
        pairs = [f'{name} {before:.2f} to {after:.2f}' for name, (before, after) in self.losses().items()]
        number = 0 if self.after is None else self.after.num_samples
        accuracy = f'; accuracy on {number:,} test images: {", ".join(pairs)}' if pairs else (
            '; no test images were at hand to measure the accuracy on')
        return f'the same class for {self.same_class:.1f} % of the images compared{accuracy}'

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {'same_class': round(self.same_class, 4), 'test_images': self.after and self.after.num_samples,
                'accuracy': {name: {'original': before, 'int8': after}
                             for name, (before, after) in self.losses().items()} or None}


@dataclass(frozen=True)
class ExportedFile:
    """One format, as it was written and read back.

    Attributes:
        format: Key of `FORMATS`.
        files: Names in the folder.
        size: Of the files together, in bytes.
        max_abs_diff: Greatest difference of a logit from the original's, over all images and batch sizes.
        timing: Of a batch.
        rounded: Of 8-bit integers, whose logits are not those of the original.
    """

    format: str
    files: tuple[str, ...]
    size: int
    max_abs_diff: float
    timing: Timing
    rounded: Rounded | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export amounts to.

    Attributes:
        about: Names and settings, as plain data.
        exported: The formats written.
        original: Time of the unfolded network.
        plain: Time of timm's own model of the same architecture, freshly made; None where timm has none.
        notes: What a person should know, one sentence each.
        latencies: Times of all by the number of threads, where these were asked for.
    """

    about: Mapping[str, Any]
    exported: tuple[ExportedFile, ...]
    original: Timing
    plain: Timing | None
    notes: tuple[str, ...]
    latencies: Mapping[int, Mapping[str, Timing]] = field(default_factory=dict)

    def table(self) -> str:
        """Files, differences and times, for people."""
        rows = [('original', '', '', '', self.original)]
        if self.plain is not None:
            rows.append((f"timm's own {self.about['architecture']}", '', '', '', self.plain))
        rows += [(item.format, item.files[0], f'{item.size / 1e6:.1f} MB', f'{item.max_abs_diff:.1e}', item.timing)
                 for item in self.exported]
        width = max(len(row[0]) for row in rows)
        lines = [f"batch of {self.about['batch_size_timed']}, threads: {self.about['threads']}",
                 f"{'':<{width}}  {'file':<17}  {'size':>8}  {'max diff':>8}  {'ms':>8}  of the original"]
        lines += [f'{name:<{width}}  {file:<17}  {size:>8}  {diff:>8}  {timing.median:8.2f}  '
                  f'{timing.ratio(self.original)[1]:.2f}' for name, file, size, diff, timing in rows]
        for item in self.exported:
            if item.rounded is not None:
                lines.append(f'{item.format}: {item.rounded.in_words()}')
        return '\n'.join([*lines, *self._latency_lines()])

    def _latency_lines(self) -> list[str]:
        batch = self.about['batch_size_timed']
        lines = []
        for threads, timings in self.latencies.items():
            width = max(map(len, timings))
            lines += ['', f'batch of {batch}, threads: {threads}', f"{'':<{width}}  {'ms':>8}  {'images/s':>9}"]
            lines += [f'{name:<{width}}  {timing.median:8.2f}  {1000 * batch / timing.median:9,.1f}'
                      for name, timing in timings.items()]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **self.about,
            'original': self._time(self.original),
            'timm': None if self.plain is None else self._time(self.plain),
            'formats': {item.format: {
                'files': list(item.files), 'bytes': item.size, 'max_abs_diff': item.max_abs_diff,
                **self._time(item.timing), **({'int8': item.rounded.to_dict()} if item.rounded else {})}
                for item in self.exported},
            'latency': {str(threads): {name: {'ms': round(timing.median, 4)} for name, timing in timings.items()}
                        for threads, timings in self.latencies.items()},
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
        int8: Int8Data | None = None,
) -> ExportReport:
    """Write a network in every format asked for, read each back, compare and time it.

    The folder appears when all of that has succeeded; before, and if it fails, there is none.

    Args:
        trained: The network.
        folder: To write; it must not exist, be empty, or with `overwrite` hold nothing but an earlier export.
        images: To compare with, of the network's input size.
        settings: How to export.
        int8: Write 8-bit integers too, calibrated and judged by these.

    Raises:
        InputError: The network routes its experts, a format that was named cannot be written, an output differs,
            8-bit integers cost too much of the accuracy, or the folder is in the way.
    """
    settings = settings or ExportSettings()
    if isinstance(trained.model, RoutedExperts):
        raise InputError(f"'{trained.name}' asks a number of experts that depends on the image, which no fixed graph "
                         'does: add --all-experts to export the network that asks all of them')
    check_input_size(trained.model, trained.name, trained.input.input_size)
    artefact = _artefact(trained, images, settings, int8)
    reports: list[ExportReport] = []

    def fill(temporary: Path) -> None:
        report = _write_and_check(artefact, temporary, images, settings, int8)
        counts = trained.classes
        if counts is not None:
            images_of = counts.counts or (None,) * counts.num_classes
            (temporary / LABELS_FILE).write_text(_json([
                {'label': label, 'name': name, 'training_images': count}
                for label, (name, count) in enumerate(zip(counts.names, images_of, strict=True))]), 'utf-8')
        (temporary / REPORT_FILE).write_text(_json(report.to_dict()), 'utf-8')
        reports.append(report)

    kinds = {**FORMATS, **INT8_FORMATS}
    own = {REPORT_FILE, LABELS_FILE, *(name for kind in kinds.values() for name in kind.files)}
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


def _artefact(
        trained: TrainedModel,
        images: CheckImages,
        settings: ExportSettings,
        int8: Int8Data | None = None,
) -> Artefact:
    network: Any = deployed(trained.model).eval().requires_grad_(False)
    normalized = Preprocessed(network, trained.input.mean, trained.input.std)
    takes = 'uint8 pixels' if settings.with_preprocessing else 'normalised float32 pixels'
    record = replace(public_record(trained.record), folded=True, digest=None)
    about = metadata(trained, record) | {'takes': takes}
    example = images.pixels[:1].repeat(EXAMPLE_BATCH, 1, 1, 1)
    calibration = None if int8 is None else int8.calibration.pixels
    if settings.with_preprocessing:
        return Artefact(trained, record, normalized, example, about, calibration)
    if calibration is not None:
        calibration = normalized.normalize(calibration)
    return Artefact(trained, record, network, normalized.normalize(example), about, calibration)


def _write_and_check(
        artefact: Artefact,
        folder: Path,
        images: CheckImages,
        settings: ExportSettings,
        int8: Int8Data | None = None,
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
        if not differences[name] <= settings.tolerance * max(1.0, float(reference.abs().max())):  # nor NaN
            raise InputError(
                f"the {name} file of '{trained.name}' differs from the original by {differences[name]:.1e} on "
                f'{images.source}, where logits reach {reference.abs().max():.3g}, and nothing was written: leave the '
                f'format out with --formats, or accept that with --tolerance')
    rounded = {} if int8 is None else _write_int8(artefact, folder, images, settings, int8, runners, reference, notes)
    differences |= {name: _difference(*runners[name], reference) for name in rounded}
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
    kinds = {**FORMATS, **INT8_FORMATS}
    exported = tuple(ExportedFile(
        name, kinds[name].files, sum((folder / file).stat().st_size for file in kinds[name].files), difference,
        timings[name], rounded.get(name)) for name, difference in differences.items())
    about = {
        **{key: artefact.metadata[key] for key in ('model', 'input', 'takes')}, 'architecture': architecture,
        'model_args': arguments, 'images': images.source, 'num_images': len(images.pixels),
        'batch_sizes_checked': list(CHECKED_BATCHES), 'tolerance': settings.tolerance,
        'batch_size_timed': settings.batch_size, 'repeats': settings.repeats, 'threads': torch.get_num_threads(),
        'machine': platform.machine(), 'torch': torch.__version__, 'timm': timm.__version__,
        **({} if int8 is None else {'calibration': int8.calibration.source}),
    }
    latencies = {threads: _time_with(threads, runners, folder, settings) for threads in settings.time or ()}
    return ExportReport(about, exported, timings['original'], timings.get("timm's own"), tuple(notes), latencies)


def _write_int8(
        artefact: Artefact,
        folder: Path,
        images: CheckImages,
        settings: ExportSettings,
        int8: Int8Data,
        runners: dict[str, tuple[Runner, torch.Tensor]],
        reference: torch.Tensor,
        notes: list[str],
) -> dict[str, Rounded]:
    """Write what can be written, add it to `runners`, and say what it changes.

    Raises:
        InputError: It costs too much of the accuracy.
    """
    trained = artefact.trained
    original = Preprocessed(trained.model, trained.input.mean, trained.input.std).eval()
    takes = images.pixels if settings.with_preprocessing else original.normalize(images.pixels)
    prepare = (lambda pixels: pixels) if settings.with_preprocessing else original.normalize
    classes = reference.shape[1]
    before = int8.accuracy(original, lambda pixels: pixels, classes)
    notes.append(f'8-bit integers are calibrated by {int8.calibration.source}')
    found = {}
    for name, kind in INT8_FORMATS.items():
        try:
            kind.write(artefact, folder)
        except FormatUnavailable as error:
            notes.append(f'without {name}: {error}')
            continue
        run = kind.load(folder)
        same = (_in_batches(run, takes, CHECKED_BATCHES[-1]).argmax(1) == reference.argmax(1)).double().mean()
        found[name] = Rounded(100 * float(same), before, int8.accuracy(run, prepare, classes))
        runners[name] = run, takes
        judged = found[name].loss()
        if judged is not None and judged[1] > int8.greatest_loss:
            what = 'few-shot accuracy' if judged[0] == 'few' else 'mean accuracy of the classes'
            raise InputError(
                f"8-bit integers cost '{trained.name}' {judged[1]:.2f} points of {what} ({name}), more than "
                f'--int8-loss {int8.greatest_loss:g}, and nothing was written: calibrate by more '
                '--calibration-images, allow more with --int8-loss, or leave out --int8')
    return found


def _time_with(
        threads: int,
        runners: Mapping[str, tuple[Runner, torch.Tensor]],
        folder: Path,
        settings: ExportSettings,
) -> dict[str, Timing]:
    """Times with another number of threads, which runtimes are told when they load a file."""
    kinds = {**FORMATS, **INT8_FORMATS}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loaded = {name: (kinds[name].load(folder) if name in kinds else run, takes)
                  for name, (run, takes) in runners.items()}
        return _time(loaded, settings)
    finally:
        torch.set_num_threads(before)


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

"""What an auditor needs of a run and of a row: predictions of every test image, digests of the data, and the numbers.

A row is the runs of one method. Its JSON is made from the folders of its runs and from nothing else.
"""
import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cost import UncountedError, size_of, training_flop
from results_runs import DATA, PREDICTIONS, SHOTS, Method, Part, Run
from scipy import stats

from nbn_timm.cli import validate
from nbn_timm.data.lists import read_image_list
from nbn_timm.datasets import find_benchmark
from nbn_timm.datasets.cifar import CifarLT
from nbn_timm.datasets.cifar_draw import Files, find_files, judge
from nbn_timm.errors import InputError
from nbn_timm.evaluation.predictions import write_arrays
from nbn_timm.files import file_sha256, make_folder, write_text_atomic
from nbn_timm.training.settings import TrainSettings

SCHEMA = 2  # of the rows, see results/row.schema.json
CHECKPOINT, OWN_PREDICTIONS = 'last.pth.tar', 'test_predictions.npz'  # in the folder of a run


# What collecting leaves in a run's folder -----------------------------------------------------------------------------

def keep_predictions(run: Path, target: Path, data_dir: str, logits: Path | None = None) -> None:
    """Evaluate the run's last checkpoint in float32 on the CPU and write predictions.npz.

    Where only the run's small files are left, its own predictions are taken, which it made as it trained.

    Args:
        run: Folder of the run.
        target: Folder to write to.
        data_dir: Of images and lists.
        logits: Folder for the logits of all test images, float16, as `<run>.npz`; None keeps none.
    """
    if not (run / CHECKPOINT).is_file() and (run / OWN_PREDICTIONS).is_file():
        shutil.copyfile(run / OWN_PREDICTIONS, target / PREDICTIONS)
        return
    if logits:
        make_folder(logits)
    keep = ['--logits-file', str(logits / f'{target.name}.npz')] if logits else []
    validate.main(['--checkpoint', str(run / CHECKPOINT), '--data-dir', data_dir, '--device', 'cpu',
                   '--workers', '0', '--save-predictions', str(target / PREDICTIONS), *keep])
    if logits:
        with np.load(logits / f'{target.name}.npz') as arrays:
            kept = {'logits': arrays['logits'].astype(np.float16), 'labels': arrays['labels'].astype(np.int16)}
        write_arrays(logits / f'{target.name}.npz', **kept)


def keep_data_digests(run: Path, target: Path, data_dir: str, logits: Path | None = None) -> None:
    """Write data.json: SHA-256 of the lists, of the labels in their order and of the logits, and which draw it is."""
    settings = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    found: dict[str, Any] = {}
    for split in ('train', 'test'):
        name = settings[f'{split}_list']
        if not name:
            continue
        path = Path(data_dir, os.path.relpath(name, settings['data_dir']) if os.path.isabs(name) else name)
        if not path.is_file():
            raise InputError(f"the {split} list '{path}' of '{run}' is not there: correct --images")
        lines = path.read_bytes().splitlines()
        labels = b'\n'.join(line.rsplit(b' ', 1)[1] for line in lines)
        found[split] = {'list': Path(name).name, 'images': len(lines), 'list_sha256': file_sha256(path),
                        'labels_sha256': hashlib.sha256(labels).hexdigest()}
        if split == 'train':
            found[split] |= draw_of(settings['dataset'], path, Path(data_dir))
    if logits and (logits / f'{target.name}.npz').is_file():
        found['logits'] = {'file': f'{target.name}.npz', 'sha256': file_sha256(logits / f'{target.name}.npz')}
    elif (target / DATA).is_file():
        found |= {key: value for key, value in json.loads((target / DATA).read_text()).items() if key == 'logits'}
    write_text_atomic(target / DATA, json.dumps(found, indent=2) + '\n')


def draw_of(dataset: str, path: Path, data_dir: Path) -> dict[str, Any]:
    """Which draw a training list is, as nbn-prepare says it, and whether it is LDAM's published one."""
    benchmark = find_benchmark(dataset)
    if not isinstance(benchmark, CifarLT):
        return {}
    rows = read_image_list(path, benchmark.num_classes)
    verdict = judge(Files(data_dir, rows.paths, rows.targets), benchmark.order,
                    find_files(data_dir, benchmark.num_classes))
    return {'draw': verdict.text, 'published_draw': verdict.published}


# The row ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Spread:
    """A number over the seeds."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def half_width(self) -> float | None:
        """Half of the 95% interval of the mean, by Student's t; None for a single value."""
        if len(self.values) < 2:
            return None
        return float(stats.t.ppf(0.975, len(self.values) - 1)) * statistics.stdev(self.values) / len(self.values) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        half = self.half_width
        deviation = None if half is None else round(statistics.stdev(self.values), 4)
        return {'mean': round(self.mean, 4), 'std': deviation,
                'interval95': None if half is None else [round(self.mean - half, 4), round(self.mean + half, 4)],
                'values': [round(value, 4) for value in self.values]}


def differences(base: Method, other: Method) -> dict[str, Spread]:
    """Accuracy of `other` less that of `base` in points, over the seeds that both have, by shot ('all' for all)."""
    before, after = ({run.seed: run for run in method.runs} for method in (base, other))
    seeds = sorted(before.keys() & after.keys())
    return {shot or 'all': Spread([after[seed].accuracy(shot) - before[seed].accuracy(shot) for seed in seeds])
            for shot in (None, *SHOTS)}


def training_pflops(run: Run) -> float | None:
    """Arithmetic of training, with that of its first stage; None if there are passes that cost.py does not count."""
    images, first = sum(row.train_images for row in run.classes), 0.0
    if run.first_stage is not None:
        before = training_pflops(run.first_stage)
        if before is None:
            return None
        first = before
    try:
        return first + training_flop(TrainSettings.from_record(run.settings), len(run.classes), images) / 1e15
    except UncountedError:
        return None


def epochs_in_words(run: Run) -> str:
    """Epochs of a run, '180 + 20' with those of its first stage."""
    own = str(run.settings['epochs'])
    return own if run.first_stage is None else f'{epochs_in_words(run.first_stage)} + {own}'


def calibration_error(run: Run) -> float | None:
    """Expected calibration error in points over 15 bins of equal width (Guo et al., ICML 2017), of the top class."""
    return None if run.predictions is None else run.predictions.calibration().error


def row_of(method: Method, published: Mapping[str, Any] | None, recipe: str, commands: Sequence[str]) -> dict[str, Any]:
    """Everything of a row, as plain data, by results/row.schema.json.

    Args:
        method: Its runs.
        published: The entry of published.yaml that it stands beside.
        recipe: In words.
        commands: That repeat the runs.
    """
    runs = method.runs
    parameters, multiply_adds = size_of(TrainSettings.from_record(method.settings), len(runs[0].classes))
    pflops = training_pflops(runs[0])
    errors = [error for run in runs if (error := calibration_error(run)) is not None]
    return {
        'schema': SCHEMA, 'method': method.name, 'label': method.label, 'recipe': recipe,
        'settings': [f'{run.name}/args.yaml' for run in runs], 'commands': list(commands),
        'n': len(runs), 'seeds': [run.seed for run in runs], 'epochs': method.settings['epochs'],
        'reported': 'last epoch',
        'accuracy': {shot or 'all': Spread(method.accuracies(shot)).to_dict() for shot in (None, *SHOTS)},
        'calibration_error': Spread(errors).to_dict() if errors else None,
        'parameters': parameters, 'multiply_adds': multiply_adds,
        'training_pflops': None if pflops is None else round(pflops, 4),
        'training_hours': [round(run.train_seconds / 3600, 4) for run in runs],
        'gpu_hours': [machine_hours(run, gpu=True) for run in runs],
        'core_hours': [machine_hours(run, gpu=False) for run in runs],
        'machines': _distinct([_part(part) for part in run.parts] for run in runs),
        'data': {split: runs[0].data[split] for split in ('train', 'test') if split in runs[0].data},
        'predictions_sha256': [run.predictions_sha256 for run in runs],
        'logits_sha256': [run.data.get('logits', {}).get('sha256') for run in runs],
        'published': None if published is None else {
            key: value for key, value in published.items() if key != 'beside'},
    }


def machine_hours(run: Run, gpu: bool) -> float:
    """Hours of GPUs or of CPU cores that a run took."""
    return round(sum(part.machine_hours for part in run.parts if part.gpu == gpu), 6)


def _part(part: Part) -> dict[str, Any]:
    return {'hardware': part.hardware, 'epochs': part.epochs, 'precision': part.precision, **part.versions}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value): value for value in values}.values())

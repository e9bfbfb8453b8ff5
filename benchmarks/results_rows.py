"""What an auditor needs of a run and of a row: predictions of every test image, digests of the data, and the numbers.

A row is the runs of one method. Its JSON is made from the folders of its runs and from nothing else.
"""
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from results_runs import DATA, PREDICTIONS, SHOTS, Method, Run
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from nbn_timm.cli import validate
from nbn_timm.files import write_text_atomic
from nbn_timm.models.create import create_model

SCHEMA = 1


# What collecting leaves in a run's folder -----------------------------------------------------------------------------

def keep_predictions(run: Path, target: Path, data_dir: str) -> None:
    """Evaluate the run's last checkpoint in float32 on the CPU and write predictions.npz."""
    validate.main(['--checkpoint', str(run / 'last.pth.tar'), '--data-dir', data_dir, '--device', 'cpu',
                   '--workers', '0', '--save-predictions', str(target / PREDICTIONS)])


def keep_data_digests(run: Path, target: Path, data_dir: str) -> None:
    """Write data.json: SHA-256 of the lists, and of the labels in their order."""
    settings = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    found: dict[str, Any] = {}
    for split in ('train', 'test'):
        name = settings[f'{split}_list']
        path = Path(data_dir, name) if name else None
        if path is None or not path.is_file():
            continue
        lines = path.read_bytes().splitlines()
        labels = b'\n'.join(line.rsplit(b' ', 1)[1] for line in lines)
        found[split] = {'list': Path(name).name, 'images': len(lines),
                        'list_sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
                        'labels_sha256': hashlib.sha256(labels).hexdigest()}
    write_text_atomic(target / DATA, json.dumps(found, indent=2) + '\n')


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


def size_of(settings: Mapping[str, Any], num_classes: int) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image in evaluation (convolutions and linear layers)."""
    model: Any = create_model(settings['model'], num_classes, nbn=bool(settings.get('add_nbn')),
                              model_kwargs=settings.get('model_kwargs')).eval()
    channels, height, width = model.pretrained_cfg['input_size']
    side = settings.get('img_size')
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, channels, side or height, side or width))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def training_pflops(run: Run, multiply_adds: int) -> float:
    """Arithmetic of the training steps: a backward pass counts as two forward passes, a multiply-add as two."""
    images = sum(row.train_images for row in run.classes)
    return 6 * multiply_adds * images * run.settings['epochs'] / 1e15


def calibration_error(run: Run) -> float | None:
    """Expected calibration error in points over 15 bins of equal width (Guo et al., ICML 2017), of the top class."""
    return None if run.predictions is None else run.predictions.calibration().error


def row_of(method: Method, published: str, commands: Sequence[str]) -> dict[str, Any]:
    """Everything of a row, as plain data."""
    runs = method.runs
    parameters, multiply_adds = size_of(method.settings, len(runs[0].classes))
    errors = [error for run in runs if (error := calibration_error(run)) is not None]
    return {
        'schema': SCHEMA, 'method': method.name, 'label': method.label, 'commands': list(commands),
        'n': len(runs), 'seeds': [run.seed for run in runs], 'epochs': method.settings['epochs'],
        'reported': 'last epoch',
        'accuracy': {shot or 'all': Spread(method.accuracies(shot)).to_dict() for shot in (None, *SHOTS)},
        'calibration_error': Spread(errors).to_dict() if errors else None,
        'parameters': parameters, 'multiply_adds': multiply_adds,
        'training_pflops': round(training_pflops(runs[0], multiply_adds), 4),
        'training_hours': [round(run.train_seconds / 3600, 4) for run in runs],
        'hardware': list(dict.fromkeys(run.hardware for run in runs)),
        'versions': list({json.dumps(_versions(run)): _versions(run) for run in runs}.values()),
        'data': runs[0].data, 'published': published or None,
    }


def _versions(run: Run) -> dict[str, str]:
    return {key: run.done_with[key] for key in ('torch', 'timm', 'commit') if key in run.done_with}

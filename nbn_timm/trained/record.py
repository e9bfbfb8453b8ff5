"""What is told of a training beside its weights: its settings and class counts, and nothing about the machine."""
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nbn_timm.data import ClassCounts

# Settings about the machine, not about what was computed, of train.py and of timm's script.
_MACHINE = {'data_dir', 'data', 'output', 'experiment', 'resume', 'device', 'workers', 'pin_mem', 'local_rank',
            'no_prefetcher', 'log_interval', 'log_tensorboard', 'log_wandb', 'wandb_project', 'download'}
_FILES = {'train_list', 'val_list', 'test_list', 'class_counts', 'initial_checkpoint', 'kd_checkpoint'}


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, see `TrainedModel.record`, as plain data in which paths are reduced to the names of their files."""
    public = {key: _plain(value) for key, value in record.items()}
    if 'settings' in public:
        public['settings'] = {
            name: PurePosixPath(setting).name if name in _FILES and isinstance(setting, str) else setting
            for name, setting in public['settings'].items() if name not in _MACHINE}
    return public


def public_counts(counts: ClassCounts) -> ClassCounts:
    """Class counts whose source, in words, names files without their folders."""
    return replace(counts, source=re.sub(r"'[^']*[/\\]([^'/\\]+)'", r"'\1'", counts.source))


def has_names(counts: ClassCounts) -> bool:
    """Whether the classes have names beyond their numbers."""
    return counts.names != tuple(map(str, range(counts.num_classes)))


def _plain(value: Any) -> Any:
    """JSON-able data without absolute paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if isinstance(value, str | Path):
        text = str(value)
        for flavour in (PurePosixPath, PureWindowsPath):
            if flavour(text).is_absolute():
                return flavour(text).name
        return text
    return value if value is None or isinstance(value, bool | int | float) else str(value)

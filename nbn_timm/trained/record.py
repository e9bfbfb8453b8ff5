"""What is recorded of a training beside its weights, and what who goes on from there takes from it."""
import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nbn_timm.data import ClassCounts, Classes
from nbn_timm.data.settings import DataSettings, InputSettings
from nbn_timm.errors import InputError
from nbn_timm.settings import SettingGroups, fields_of


def public_counts(counts: ClassCounts) -> ClassCounts:
    """Class counts whose source, in words, names files without their folders."""
    return replace(counts, source=re.sub(r"'[^']*[/\\]([^'/\\]+)'", r"'\1'", counts.source))


def without_paths(value: Any) -> Any:
    """JSON-able data without absolute paths."""
    if isinstance(value, Mapping):
        return {str(key): without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str | Path):
        text = str(value)
        for flavour in (PurePosixPath, PureWindowsPath):
            if flavour(text).is_absolute():
                return flavour(text).name
        return text
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def training_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint of this package, or of timm, was trained with.

    timm keeps a Namespace, in which a flag that was not given may be None, '' or {}; these are left out.
    """
    recorded = checkpoint.get('args')
    if isinstance(recorded, argparse.Namespace):
        return {name: value for name, value in vars(recorded).items() if value is not None and value not in ('', {})}
    return recorded if isinstance(recorded, dict) else {}


def recorded_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments of a checkpoint, or of a record of weights, by name, with the model that it says it is of."""
    arguments = training_arguments(checkpoint) or checkpoint.get('settings') or {}
    model = arguments.get('model') or checkpoint.get('arch')
    return {**arguments, 'model': model} if model else arguments


def recorded_classes(record: Mapping[str, Any]) -> Classes | None:
    """The classes that a checkpoint or the record of weights tells, None if it tells none."""
    data = record.get('class_counts')
    return Classes.from_dict(data) if isinstance(data, dict) else None


def model_settings(
        name: str | None,
        nbn: bool | None,
        kwargs: dict[str, Any] | None,
        checkpoint: Mapping[str, Any],
        flag: str = '--model',
) -> tuple[str, bool, dict[str, Any]]:
    """Model name, added NBN and constructor arguments; a checkpoint's settings hold for its own model only.

    Args:
        name: As asked for; None takes the checkpoint's.
        nbn: As asked for; None takes the checkpoint's.
        kwargs: Constructor arguments, added to the checkpoint's.
        checkpoint: As read from a file.
        flag: That names the model, for the message.

    Raises:
        InputError: Neither the caller nor the checkpoint names a model.
    """
    trained_with = training_arguments(checkpoint)
    recorded = trained_with.get('model') or checkpoint.get('arch')
    name = name or recorded
    if not name:
        raise InputError(f'give {flag}: the checkpoint does not record its architecture')
    inherited = trained_with if name == recorded else {}
    return (name, bool(inherited.get('add_nbn')) if nbn is None else nbn,
            (inherited.get('model_kwargs') or {}) | (kwargs or {}))


def inherited_settings(
        groups: type[SettingGroups],
        recorded: Mapping[str, Any],
        given: Mapping[str, Any],
        same_format: bool = True,
) -> dict[str, Any]:
    """What a command takes from the record of a finished network, because it is told nothing else.

    What a model is made with holds for the recorded model only, and where data lie for the recorded data set only; the
    format of the images is that of the weights.

    Args:
        groups: The command's settings.
        recorded: Training arguments by name, and the input format.
        given: Values that the command was given, by name.
        same_format: The images are read in the format of the weights.

    Returns:
        Values by name, for settings that are declared as inherited and not given.
    """
    of_model, of_format = {'add_nbn', 'model_kwargs'}, {declared.name for declared in fields_of(InputSettings)}
    of_data = {declared.name for declared in fields_of(DataSettings)}
    left_out: set[str] = set()
    if given.get('dataset') not in (None, recorded.get('dataset')):
        left_out |= of_data
    if given.get('model') not in (None, recorded.get('model')):
        left_out |= of_model
    if not same_format:
        left_out |= of_format
    if given.get('img_size') or given.get('input_size') or recorded.get('input_size'):
        left_out.add('img_size')  # the recorded size in full says the same
    if given.get('img_size'):
        left_out.add('input_size')
    return {name: recorded[name] for name, declared in groups.declared().items()
            if declared.declaration.inherited and name not in given and name not in left_out
            and recorded.get(name) not in (None, '', declared.default)}

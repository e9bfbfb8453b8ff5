"""What is recorded of a finished network beside its weights, and what who goes on from there takes from it."""
import argparse
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, TypeVar

import torch

from nbn_timm.data import ClassCounts, Classes, DataDefaults
from nbn_timm.data.settings import OF_THE_SPLIT, DataSettings, InputSettings
from nbn_timm.data.val_split import SplitFile
from nbn_timm.datasets import CSVS, LISTS, prescribes_format
from nbn_timm.errors import InputError, quoted
from nbn_timm.evaluation.temperature import CALIBRATION, FittedTemperature
from nbn_timm.evaluation.thresholds import THRESHOLDS, Thresholds
from nbn_timm.models.ownership import needs_package
from nbn_timm.models.settings import ModelSettings
from nbn_timm.models.tuning import TuneSettings
from nbn_timm.models.weight_files import DIGEST
from nbn_timm.settings import SettingGroups, fields_of
from nbn_timm.trained.results import Results

ToldT = TypeVar('ToldT', bound='_FromRecord')

_logger = logging.getLogger(__name__)

# What a training writes among its settings: what they came to.
_PROCESSES, _TRANSFORM = 'world_size', 'train_transform'

# Facts about a training that are told as they are written.
_FACTS = ('command', 'hardware', 'torch', 'date')


def _elsewhere(given: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a folder of data is given that is not the recorded one."""
    folder, recorded = given.get('data_dir'), before.get('data_dir')
    return bool(folder) and (not recorded or os.path.realpath(str(folder)) != os.path.realpath(str(recorded)))


def _divides(split_file: str, folder: str) -> bool:
    """Whether all pictures of a split file lie below a folder, as after a move."""
    try:
        keys = SplitFile.read(split_file, folder).part_of
    except InputError:
        return False
    return not any(os.path.isabs(key) for key in keys) and all(
        os.path.isfile(os.path.join(folder, key)) for key in keys)


def training_arguments(settings: SettingGroups, processes: int, images: DataDefaults) -> dict[str, Any]:
    """What a training records: all its settings, and what they came to."""
    return {**settings.values(), _PROCESSES: processes, **images.input_format(), _TRANSFORM: images.train_transform}


class _FromRecord(Protocol):
    """A group of settings, or all of a command."""

    @classmethod
    def from_record(cls: type[ToldT], record: Mapping[str, Any]) -> ToldT: ...


@dataclass(frozen=True)
class NetworkRecord:
    """What is known of the training of a network; the one reader of checkpoints and of the JSON beside weights.

    Attributes:
        arguments: Settings of the training by flat name, as its version, or timm, wrote them; `told` gives them typed.
        arch: The model that a checkpoint says it is of.
        name: `arch.tag` of published weights.
        classes: Names and training images per class, where they are known.
        epoch: Of the weights, from 1.
        test: Accuracies.
        digest: Of the weights that the record belongs to; None in a checkpoint, which holds them.
        folded: NBN was folded after the training.
        calibration: Temperature that makes probabilities of the logits.
        thresholds: Of the answers, where an image can be of several classes.
        facts: In words: 'command', 'hardware', 'torch', 'date', as far as they are known.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    arch: str | None = None
    name: str | None = None
    classes: Classes | None = None
    epoch: int | None = None
    test: Results | None = None
    digest: str | None = None
    folded: bool = False
    calibration: FittedTemperature | None = None
    thresholds: Thresholds | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> 'NetworkRecord':
        """The record in a checkpoint of this package or of timm, as `read_checkpoint` gives it.

        timm keeps a Namespace, in which a flag that was not given may be None, '' or {}; these are left out.

        Raises:
            InputError: A setting is a tensor or the like, or what is said of the classes is malformed.
        """
        arguments, classes, epoch = (checkpoint.get(key) for key in ('args', 'class_counts', 'epoch'))
        if isinstance(arguments, argparse.Namespace):
            arguments = {name: value for name, value in vars(arguments).items()
                         if value is not None and (isinstance(value, torch.Tensor) or value not in ('', {}))}
        arguments = arguments if isinstance(arguments, dict) else {}
        for name, value in {**arguments, 'arch': checkpoint.get('arch')}.items():
            strange = _no_data(value) if isinstance(name, str) else name
            if strange is not None:
                raise InputError(f"the checkpoint's record is malformed, as its {quoted(str(name))} is or holds a "
                                 f'{type(strange).__name__}: take an earlier checkpoint')
        if classes is not None and not isinstance(classes, dict):
            raise InputError(f"the checkpoint's record is malformed, as its 'class_counts' is a "
                             f'{type(classes).__name__}: take an earlier checkpoint')
        return cls(
            arguments, checkpoint.get('arch'), classes=None if classes is None else Classes.from_dict(classes),
            epoch=epoch + 1 if isinstance(epoch, int) else None,
            calibration=FittedTemperature.from_dict(checkpoint.get(CALIBRATION)),
            thresholds=Thresholds.from_dict(checkpoint.get(THRESHOLDS)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> 'NetworkRecord':
        """Read what `to_dict` wrote.

        Args:
            data: Of a JSON file.
            where: The file, in words for people.

        Raises:
            InputError: `data` is not of that form.
        """
        for key in ('settings', 'class_counts', 'test', 'epoch'):
            kind, what = (int, 'number') if key == 'epoch' else (dict, 'object')
            if data.get(key) is not None and not isinstance(data[key], kind):
                raise InputError(f"'{key}' in {where} is no {what}: correct it, or take the record out")
        classes, test = data.get('class_counts'), data.get('test')
        return cls(
            data.get('settings') or {}, name=data.get('model'), classes=Classes.from_dict(classes) if classes else None,
            epoch=data.get('epoch'), test=Results.from_dict(test, where) if test else None, digest=data.get(DIGEST),
            folded=bool(data.get('folded')), calibration=FittedTemperature.from_dict(data.get(CALIBRATION)),
            thresholds=Thresholds.from_dict(data.get(THRESHOLDS)),
            facts={key: str(data[key]) for key in _FACTS if data.get(key) is not None})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what is known."""
        entries = {
            'model': self.name, DIGEST: self.digest,
            'class_counts': None if self.classes is None else self.classes.to_dict(),
            'settings': dict(self.arguments) or None, 'epoch': self.epoch, **self.facts,
            'test': None if self.test is None else self.test.to_dict(), 'folded': self.folded or None,
            CALIBRATION: None if self.calibration is None else self.calibration.to_dict(),
            THRESHOLDS: None if self.thresholds is None else self.thresholds.to_dict()}
        return {key: value for key, value in entries.items() if value is not None}

    def told(self, settings: type[ToldT]) -> ToldT:
        """A group, or all settings of a command, as the training had them; defaults for what is not recorded."""
        return settings.from_record(self.arguments)

    @property
    def model(self) -> str | None:
        """The architecture."""
        return self.told(ModelSettings).model or self.arch

    @property
    def dataset(self) -> str | None:
        """What `--dataset` named."""
        return self.told(DataSettings).dataset or None

    @property
    def input(self) -> InputSettings:
        """Format of the images, as far as it is recorded."""
        return self.told(InputSettings)

    @property
    def processes(self) -> int:
        """That trained together."""
        return self.arguments.get(_PROCESSES) or 1

    @property
    def train_transform(self) -> str | None:
        """How a training image was cut out, a name in `TRAIN_TRANSFORMS`."""
        return self.arguments.get(_TRANSFORM)

    def model_settings(
            self,
            name: str | None,
            nbn: bool | None,
            kwargs: Mapping[str, Any] | None,
            flag: str = '--model',
            shown: Mapping[str, Any] | None = None,
    ) -> tuple[str, bool, dict[str, Any]]:
        """Model name, added NBN and constructor arguments; what is recorded holds for the recorded model only.

        A network of the package is made with the head that --head gave it; for others see `as_tuned`.

        Args:
            name: As asked for; None takes the recorded one.
            nbn: As asked for; None takes what is recorded.
            kwargs: Constructor arguments, added to the recorded ones.
            flag: That names the model, for the message.
            shown: Constructor arguments that the weights show, where nothing is recorded: they tell the kind of a head,
                but neither its settings nor cosplus from cosine.

        Raises:
            InputError: Neither the caller nor the record names a model.
        """
        name = name or self.model
        if not name:
            raise InputError(f'give {flag}: the checkpoint does not record its architecture')
        recorded = self.told(ModelSettings)
        if name != self.model:
            return name, bool(nbn), {**(shown or {}), **(kwargs or {})}
        head = self.told(TuneSettings).as_model_kwargs() if needs_package(name) else {}
        arguments = {**(shown or {}), **self.input.as_model_kwargs(), **recorded.model_kwargs, **head, **(kwargs or {})}
        return name, bool(recorded.add_nbn) if nbn is None else nbn, arguments

    def inherited(
            self,
            groups: type[SettingGroups],
            given: Mapping[str, Any],
            same_format: bool = True,
    ) -> dict[str, Any]:
        """What a command takes from the record, because it is told nothing else.

        What a model is made with holds for the recorded model only, and where data lie for the recorded data set only;
        the format of the images is that of the weights.

        Args:
            groups: The command's settings.
            given: Values that the command was given, by name.
            same_format: The images are read in the format of the weights.

        Returns:
            Values by name, for settings that are declared as inherited and not given.
        """
        of_model, of_format, of_data = (
            {declared.name for declared in fields_of(group)} for group in (ModelSettings, InputSettings, DataSettings))
        recorded = {**self.arguments, 'model': self.model}
        left_out: set[str] = set()
        if given.get('dataset') not in (None, self.dataset):
            left_out |= of_data
        if given.get('model') not in (None, self.model):
            left_out |= of_model | {declared.name for declared in fields_of(TuneSettings)}
        if not same_format:
            left_out |= of_format
        size = self.input.input_size
        if given.get('img_size') or given.get('in_chans'):  # of the recorded size, what is not given
            left_out.add('input_size')
            if size:
                recorded |= {'in_chans': size[0], 'img_size': size[1]}
        elif given.get('input_size') or size:
            left_out |= {'img_size', 'in_chans'}  # the recorded size in full says the same
        channels = given.get('in_chans') or (given.get('input_size') or [None])[0]
        if channels:  # of other channels the mean over them, as `DataDefaults.as_trained` has it
            recorded |= {name: [sum(values) / len(values)] * channels for name in ('mean', 'std')
                         if (values := recorded.get(name)) and len(values) not in (1, channels)}
        return {name: recorded[name] for name, declared in groups.declared().items()
                if declared.declaration.inherited and name not in given and name not in left_out
                and recorded.get(name) not in (None, '', declared.default)}

    def inherited_by_training(
            self,
            groups: type[SettingGroups],
            given: Mapping[str, Any],
            same_task: bool = False,
    ) -> dict[str, Any]:
        """What a new training takes from the record of the network that it begins with, see `inherited`.

        The images are read as the network had them, unless a benchmark prescribes another format. Where lists are
        given, the recorded ones would be strangers among them, and so would be a recorded validation split of the
        training images where these are others or are divided otherwise. Images in another folder are the same if it has
        all that the split is of. A warning tells of a split that is left out because of other images.

        Args:
            groups: The command's settings.
            given: Values that the command was given, by name.
            same_task: It goes on with the task of the network, whose format then holds in any case.
        """
        dataset = str(given.get('dataset') or self.dataset)
        same_format = same_task or dataset == self.dataset or not prescribes_format(dataset)
        found = self.inherited(groups, given, same_format)
        lists = LISTS | CSVS
        elsewhere = not same_task and _elsewhere(given, self.arguments)
        other_draw = any(name in given and given[name] != self.arguments.get(name) for name in OF_THE_SPLIT)
        split, other_images = found.get('split_file'), bool(lists & given.keys())
        other_split = other_images or elsewhere and not (split and _divides(str(split), str(given['data_dir'])))
        left_out = {*(lists if other_images or elsewhere else ()), *(OF_THE_SPLIT if other_split or other_draw else ())}
        if split and other_split and not other_draw:
            _logger.warning("The training images are not those of the network's own run, so its validation split is "
                            'left out: give --val-fraction for one of these images, or --split-file %s if they are the '
                            'same.', quoted(str(split)))
        return {name: value for name, value in found.items() if name not in left_out}

    def public(self, groups: type[SettingGroups], private: tuple[str, ...] = ()) -> 'NetworkRecord':
        """The record without paths and without what is the machine's.

        Args:
            groups: Whose declarations say of a setting what it is.
            private: Further arguments that are the machine's.
        """
        told = groups.public(self.arguments)
        return replace(
            self, arguments={name: without_paths(value) for name, value in told.items() if name not in private},
            classes=None if self.classes is None else public_counts(self.classes), facts=without_paths(self.facts))


def _no_data(value: Any) -> Any:
    """What in a value no setting can be; None where there is nothing of the kind."""
    if isinstance(value, Mapping):
        keys = (key for key in value if not isinstance(key, str | int | float | None))
        return next(keys, None) or _no_data(list(value.values()))
    if isinstance(value, list | tuple):
        return next((strange for part in value if (strange := _no_data(part)) is not None), None)
    return value if isinstance(value, torch.Tensor | complex | bytes | bytearray | set | frozenset) else None


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

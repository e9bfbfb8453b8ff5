"""A trained model from wherever it lies, with what is known of its classes, its input and its training."""
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from nbn_timm.data import Classes, DataDefaults, read_counts
from nbn_timm.data.class_names import ClassNames, renamed
from nbn_timm.data.classes import label_names
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.data.val_split import SPLIT_FILE
from nbn_timm.errors import InputError, in_words
from nbn_timm.files import refuse_no_file
from nbn_timm.layers.head import COSINE_SCALE
from nbn_timm.models import RoutedExperts
from nbn_timm.models._pretrained import weights_record
from nbn_timm.models._released import recognize, rename_experts
from nbn_timm.models.create import create_model
from nbn_timm.models.model_folder import FOLDER, HUB, is_model_folder, read_folder_config, read_weights
from nbn_timm.models.ownership import needs_package
from nbn_timm.models.run_folder import finished_file
from nbn_timm.models.settings import ModelSettings
from nbn_timm.models.tuning import AdapterFile, TuneSettings, apply_tuning, load_adapter, read_adapter, with_head
from nbn_timm.models.weight_files import DIGEST, load_weights, read_checkpoint, read_state_dict, weights_digest
from nbn_timm.second_stages import restore_second_stages
from nbn_timm.settings import Settings, plain, setting
from nbn_timm.trained.record import NetworkRecord

__all__ = ['FOLDER', 'HUB', 'RECORD_KEY', 'TrainedModel', 'checkpoint_record', 'open_trained', 'published_record',
           'read_folder_config']

RECORD_KEY = 'nbn_timm'  # in timm's config.json

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """What of a checkpoint is taken."""

    title = 'checkpoint'

    use_ema: bool = setting(False, "the checkpoint's averaged weights")
    all_experts: bool = setting(False, 'of a network with routing, ask every expert')


@dataclass(frozen=True)
class SourceSettings(Settings):
    """What the source of a model does not record."""

    title = 'model'

    arch: str | None = setting(None, 'of a file of bare weights: the timm model that they are for', metavar='NAME',
                               unset='as recorded')
    class_counts: str | None = setting(None, 'class names and training images, in place of those that the model '
                                       'records', metavar='FILE', unset='as recorded')
    class_names: str | None = setting(
        None, 'what classes are called: a file of a code (what the model records), a tab and a name per line, or of a '
        'name per line in the order of the classes', metavar='FILE', unset='as recorded')


@dataclass(frozen=True)
class TrainedModel:
    """A model in eval mode on the CPU, and what goes with it.

    Attributes:
        model: With its weights.
        name: For `timm.create_model`: an architecture, or what was asked for.
        model_args: Constructor arguments beyond the number of classes.
        nbn: NBN was put into a model of timm's with `add_nbn`.
        input: Format of its images.
        record: What is known of its training, its classes among it.
        notes: What a person should be told, one sentence each.
    """

    model: Any  # an nn.Module with the attributes that timm's models have
    name: str
    model_args: Mapping[str, Any]
    nbn: bool
    input: DataDefaults
    record: NetworkRecord = NetworkRecord()
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """Its name without a tag or a place."""
        return self.model.pretrained_cfg['architecture']

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names that timm's cfg of the weights has."""
        return tuple(self.model.pretrained_cfg.get('label_names') or ())

    @property
    def classes(self) -> Classes | None:
        """Names and training images per class, where they are known."""
        return self.record.classes

    @property
    def class_counts(self) -> Classes | None:
        """The classes, if their training images are known."""
        return self.classes if self.classes is not None and self.classes.counts is not None else None


def open_trained(
        source: str,
        *,
        use_ema: bool = False,
        model: str | None = None,
        add_nbn: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        class_counts_file: str | None = None,
        class_names_file: str | None = None,
        all_experts: bool = False,
) -> TrainedModel:
    """Open a trained model.

    Args:
        source: A checkpoint file of this package, of timm or of the released code; an adapter file of this package,
            which goes onto the published weights of its model; the folder of a run; a folder with timm's config.json,
            also as 'local-dir:FOLDER'; 'hf-hub:user/repo'; or a name with pretrained weights, of this package's or of
            timm's.
        use_ema: Take the averaged weights of a checkpoint.
        model: Architecture of a checkpoint that does not record it.
        add_nbn: Of such a checkpoint: NBN was put into a model of timm's.
        model_kwargs: Constructor arguments, beside those that are recorded.
        num_classes: Of the network; None takes what is recorded, or what the weights show.
        class_counts_file: Training images per class, instead of those that are recorded.
        class_names_file: Other names of the classes, see `ClassNames.read`.
        all_experts: Leave out the router, which there must be.

    Raises:
        InputError: It is not there, or its parts do not fit.
    """
    asked = _Asked(model or None, add_nbn, dict(model_kwargs or {}), num_classes)
    source = opened_source(source)
    adapter = read_adapter(source) if Path(source).is_file() else None
    if adapter is not None and not (use_ema or all_experts):
        opened = _from_adapter(source, adapter, asked)
    elif adapter is None and Path(source).is_file():
        opened = _from_checkpoint(source, use_ema, asked, all_experts)
    elif use_ema or model or all_experts:
        raise InputError(f"'{source}' is no checkpoint file, so there are no averaged weights, no router and no "
                         'architecture to give: leave out --use-ema, --all-experts and the architecture, or correct '
                         'the path')
    elif Path(source, 'config.json').is_file():
        opened = _from_name(f'{FOLDER}{source}', asked)
    elif os.sep in source and ':' not in source and not source.startswith('timm/'):
        raise InputError(f"there is no file '{source}' and no folder of that name with a run or a config.json: correct "
                         'the path')
    else:
        opened = _from_name(source, asked)
    if class_counts_file is None and class_names_file is None:
        return opened
    classes = opened.classes or Classes(None, label_names(opened.model.num_classes), f"'{source}'")
    notes: list[str] = []
    if class_counts_file is not None:
        classes, notes = read_counts(class_counts_file).of(classes)
    if class_names_file is not None:
        names = ClassNames.read(class_names_file)
        called = names.required(classes.names)
        classes, notes = renamed(classes, called), [*notes, names.note(called)]
    return replace(opened, record=replace(opened.record, classes=classes), notes=(*opened.notes, *notes))


def opened_source(source: str) -> str:
    """What `open_trained` takes a source for: of the folder of a run its checkpoint, anything else as it is.

    Raises:
        InputError: It is a folder without weights, or neither a file nor a folder.
    """
    refuse_no_file(source, or_folder=True)
    return source if Path(source, 'config.json').is_file() else finished_file(source)


@dataclass(frozen=True)
class _Asked:
    """What the caller says of the network, beside its source."""

    model: str | None
    add_nbn: bool | None
    model_kwargs: dict[str, Any]
    num_classes: int | None


def checkpoint_record(path: str) -> NetworkRecord:
    """What a checkpoint says of its training; a split file is found beside it where the run folder has been moved.

    Raises:
        InputError: It cannot be read.
    """
    adapter = read_adapter(path)
    if adapter is not None:
        return _adapter_record(path, adapter)
    record = NetworkRecord.of_checkpoint(read_checkpoint(path))
    recorded, beside = record.arguments.get('split_file'), Path(path).parent / SPLIT_FILE
    if recorded and not os.path.isfile(str(recorded)) and beside.is_file():
        return replace(record, arguments={**record.arguments, 'split_file': str(beside)})
    return record


def published_record(name: str | None) -> NetworkRecord:
    """What is known of the training of pretrained weights: of the package's, or of a folder or repository.

    A record says by a digest which weights it is of; of others it is not told.

    Raises:
        InputError: The weights are damaged, or the record is malformed.
    """
    if name is None:
        return NetworkRecord()
    if not is_model_folder(name):
        return NetworkRecord.from_dict(weights_record(name) or {}, f"the record of '{name}'")
    data = read_folder_config(name).get(RECORD_KEY)
    if not data:
        return NetworkRecord()
    weights = read_weights(name)
    if isinstance(data, dict) and weights is not None and data.get(DIGEST) == weights_digest(weights):
        return NetworkRecord.from_dict(data, f"the record ('{RECORD_KEY}') in the config.json of '{name}'")
    _logger.warning("The config.json of '%s' records the training of other weights than these, as before a "
                    'fine-tuning, so nothing is told of it.', name)
    return NetworkRecord()


def _from_checkpoint(path: str, use_ema: bool, asked: _Asked, all_experts: bool) -> TrainedModel:
    checkpoint = read_checkpoint(path)
    if use_ema and 'state_dict_ema' not in checkpoint:
        raise InputError(f"'{path}' has no averaged weights: give a checkpoint of a run with --model-ema, or leave out "
                         '--use-ema')
    weights = rename_experts(read_state_dict(path, use_ema))
    found = recognize(weights)
    record = NetworkRecord.of_checkpoint(checkpoint)
    known = asked.model or record.model
    shown = found if found is not None and known in (None, found.arch) else None
    name, nbn, kwargs = record.model_settings(
        known or (found.arch if found else None), asked.add_nbn, asked.model_kwargs, 'the architecture with it',
        shown.model_args if shown else {})
    num_classes = (asked.num_classes or (record.classes.num_classes if record.classes else None)
                   or (found.num_classes if found else classes_of_weights(name, weights)))
    network: Any = create_model(name, num_classes, nbn=nbn, model_kwargs=kwargs)
    if shown is not None and shown.added_head and record.told(TuneSettings).head is None:
        network = with_head(network, shown.added_head, {})
    network = as_tuned(network, name, record)
    network = restore_second_stages(network, weights)
    load_weights(network, path, use_ema)
    if all_experts:
        if not isinstance(network, RoutedExperts):
            raise InputError(f"--all-experts is for a network with routing, and '{path}' has none: leave it out")
        network = network.network
    if record.calibration is not None and (all_experts or record.calibration.use_ema != use_ema):
        record = replace(record, calibration=None)  # it is of other logits
    if record.thresholds is not None and (all_experts or record.thresholds.use_ema != use_ema):
        record = replace(record, thresholds=None)
    averaged = 'state_dict_ema' in checkpoint and not use_ema
    notes = []
    if averaged:
        notes.append('the checkpoint has averaged weights as well: --use-ema takes them')
    if shown is not None and shown.has_bare_cosine and record.model is None and 'head_kwargs' not in asked.model_kwargs:
        notes.append(f'the weights show a cosine classifier but not its scale, so {COSINE_SCALE:g} is taken: a '
                     'checkpoint of nbn-train says it')
    return TrainedModel(network.eval(), name, kwargs, nbn, _input(network, record), record, tuple(notes))


def as_tuned(network: nn.Module, name: str, record: NetworkRecord) -> nn.Module:
    """A new network with the classifier and the parts that a record's training with --head and --tune had put in.

    A network of the package has that classifier already, see `NetworkRecord.model_settings`.
    """
    if record.model != name:
        return network
    tuning = record.told(TuneSettings)
    if not needs_package(name):
        network = with_head(network, tuning.head, tuning.head_kwargs)
    return apply_tuning(network, tuning.tune, tuning.tune_kwargs)


def _from_adapter(path: str, about: AdapterFile, asked: _Asked) -> TrainedModel:
    other = {key for key, value in asked.model_kwargs.items() if about.model_kwargs.get(key) != plain(value)}
    if (asked.add_nbn or other or asked.model not in (None, about.model)
            or asked.num_classes not in (None, about.num_classes)):
        raise InputError(f"the adapter '{path}' says itself what its network is, {about.model} with "
                         f'{about.num_classes} classes: leave out --model, --model-kwargs, --add-nbn and --num-classes')
    network: Any = create_model(about.model, about.num_classes, pretrained=True, model_kwargs=about.model_kwargs)
    load_adapter(network, path)
    record = _adapter_record(path, about)
    return TrainedModel(network.eval(), about.model, dict(about.model_kwargs), False, _input(network, record), record)


def _adapter_record(path: str, about: AdapterFile) -> NetworkRecord:
    return NetworkRecord.from_dict(dict(about.record), f"the record in the adapter '{path}'") if about.record else (
        NetworkRecord(arguments={'model': about.model, 'model_kwargs': dict(about.model_kwargs)}))


def classes_of_weights(name: str, weights: Mapping[str, torch.Tensor]) -> int | None:
    """Number of classes by the weight of the classifier that timm's cfg of a model names; None if that has none."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    classifier = getattr(cfg, 'classifier', None)
    weight = weights.get(f'{classifier}.weight') if isinstance(classifier, str) else None
    return None if weight is None or weight.ndim not in (2, 4) else int(weight.shape[0])


def _from_name(name: str, asked: _Asked) -> TrainedModel:
    network: Any = create_model(name, asked.num_classes, pretrained=True, nbn=bool(asked.add_nbn),
                                model_kwargs=asked.model_kwargs)
    record = published_record(name)
    if len(network.pretrained_cfg.get('label_names') or ()) != network.num_classes:
        network.pretrained_cfg.pop('label_names', None)  # of other weights, or there are none
    args = (read_folder_config(name).get('model_args') or {} if is_model_folder(name)
            else record.told(ModelSettings).model_kwargs)
    args = {key: value for key, value in {**args, **asked.model_kwargs}.items() if key != 'num_classes'}
    return TrainedModel(network.eval(), name, args, bool(asked.add_nbn), _input(network, record), record)


def _input(model: Any, record: NetworkRecord) -> DataDefaults:
    """The format that the model was trained with, else the one it is configured for."""
    try:
        return OWN_IMAGES.for_model(model.pretrained_cfg).as_trained(record.input)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f'what is recorded of the format of the images is malformed ({in_words(error)}): correct '
                         'input_size, mean and std in the config.json, or get the model again') from error

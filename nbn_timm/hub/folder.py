"""A trained model as a folder in timm's format: config.json, model.safetensors and README.md."""
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from nbn_timm.datasets import find_benchmark
from nbn_timm.errors import InputError
from nbn_timm.files import write_folder
from nbn_timm.layers import fold_nbn
from nbn_timm.models import RoutedExperts
from nbn_timm.models.weight_files import save_weights, weights_digest
from nbn_timm.seals import seal_file
from nbn_timm.trained.opening import FOLDER, RECORD_KEY, TrainedModel
from nbn_timm.training.settings import public_record

FOLDER_FILES = ('config.json', 'model.safetensors', 'README.md')


def portable(trained: TrainedModel) -> TrainedModel:
    """The model in a form that timm can make from a name and arguments, and that tells nothing about the machine.

    A model of timm's with NBN added is folded into a plain one; paths in what is known are reduced to file names.

    Raises:
        InputError: The model has a router.
    """
    if isinstance(trained.model, RoutedExperts):
        raise InputError(f"the checkpoint of '{trained.name}' has a router, which a model of timm's format cannot "
                         'carry: add --all-experts to push the network that asks every expert')
    return replace(trained, model=fold_nbn(trained.model) if trained.nbn else trained.model, nbn=False,
                   record=public_record(trained.record))


def write_model_folder(trained: TrainedModel, folder: str | Path, card: str, overwrite: bool = False) -> None:
    """Write a model that `timm.create_model('local-dir:FOLDER', pretrained=True)` gives back bit for bit.

    Before the folder appears, the model is loaded back and compared, weights and outputs.

    Args:
        trained: As `portable` gives it.
        folder: To write; it must not exist, be empty, or with `overwrite` hold nothing but such files.
        card: Text of README.md.
        overwrite: Replace an older folder.

    Raises:
        InputError: timm would make another model from what it records, or the folder cannot be written.
    """
    def fill(temporary: Path) -> None:
        _save(trained, temporary)
        _compare(trained, temporary)
        (temporary / FOLDER_FILES[2]).write_text(card, encoding='utf-8', errors='backslashreplace')

    write_folder(folder, fill, replaceable=FOLDER_FILES if overwrite else ())


def _save(trained: TrainedModel, folder: Path) -> None:
    weights, record = trained.model.state_dict(), trained.record
    config: dict[str, Any] = {RECORD_KEY: replace(record, digest=weights_digest(weights)).to_dict()}
    if record.classes is not None and record.classes.named:
        config['label_names'] = list(record.classes.names)
    dataset = record.dataset
    if dataset:  # else the architecture's default tag would name published weights that these are not
        config['pretrained_cfg'] = {'tag': dataset if find_benchmark(dataset) else None}
    try:
        save_for_hf(
            trained.model, str(folder), model_config=config, model_args=dict(trained.model_args),
            data_config=trained.input.input_format(), safe_serialization=True)
        seal_file(folder / FOLDER_FILES[0])
        save_weights(weights, folder / FOLDER_FILES[1])  # which adds a digest of them
    except (ValueError, RuntimeError) as error:  # an argument that is no plain data, tensors that share memory
        raise InputError(f"'{trained.name}' cannot be written in timm's format ({error}): create it with plain "
                         'arguments') from error


def _compare(trained: TrainedModel, folder: Path) -> None:
    """Refuse a folder from which timm makes another model, as of a classifier that a second stage put in."""
    remedy = ("so timm's format cannot carry it: push a model whose layers are those of its architecture, or fold it "
              'into one first')
    try:
        rebuilt = timm.create_model(f'{FOLDER}{folder}', pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise InputError(f"timm cannot make '{trained.name}' again from its name and arguments ({reason}), "
                         f'{remedy}') from error
    images = torch.rand(2, *trained.input.input_size, generator=torch.Generator().manual_seed(0))
    here, there = trained.model.state_dict(), rebuilt.state_dict()
    with torch.inference_mode():
        same = here.keys() == there.keys() and all(_equal(here[key], there[key]) for key in here) and _equal(
            trained.model(images), rebuilt(images))
    if not same:
        raise InputError(f"timm makes another model than this one from the name '{trained.name}' and its arguments, "
                         f'{remedy}')


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.shape == second.shape and first.dtype == second.dtype
            and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True))

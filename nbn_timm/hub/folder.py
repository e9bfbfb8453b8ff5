"""A trained model as a folder in timm's format: config.json, model.safetensors and README.md."""
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from nbn_timm.engine.trained import FOLDER, RECORD_KEY, TrainedModel
from nbn_timm.errors import InputError
from nbn_timm.files import atomic_write, write_text_atomic
from nbn_timm.hub.record import public_record
from nbn_timm.layers import fold_nbn
from nbn_timm.models import RoutedExperts

FILES = ('config.json', 'model.safetensors', 'README.md')

_FORMAT = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')


def portable(trained: TrainedModel) -> TrainedModel:
    """The model in a form that timm can make from a name and arguments.

    A model of timm's with NBN added is folded into a plain one, with 'folded' in its record.

    Raises:
        InputError: The model has a router.
    """
    if isinstance(trained.model, RoutedExperts):
        raise InputError(f"the checkpoint of '{trained.name}' has a router, which a model of timm's format cannot "
                         'carry: add --all-experts to push the network that asks every expert')
    if not trained.nbn:
        return trained
    return replace(trained, model=fold_nbn(trained.model), nbn=False, record={**trained.record, 'folded': True})


def write_folder(trained: TrainedModel, folder: str | Path, card: str) -> None:
    """Write a model that `timm.create_model('local-dir:FOLDER', pretrained=True)` gives back bit for bit.

    Before anything appears in the folder, the model is loaded back and compared, weights and outputs.

    Args:
        trained: As `portable` gives it.
        folder: Created if need be; other files in it stay.
        card: Text of README.md.

    Raises:
        InputError: timm would make another model from what it records, or the folder cannot be written.
    """
    model, counts = trained.model, trained.class_counts
    config: dict[str, Any] = {RECORD_KEY: public_record(trained.record, counts)}
    if counts is not None and counts.names != tuple(map(str, range(counts.num_classes))):
        config['label_names'] = list(counts.names)
    with TemporaryDirectory() as temporary:
        try:
            save_for_hf(model, temporary, model_config=config, safe_serialization=True, data_config={
                key: value for key, value in asdict(trained.input).items() if key in _FORMAT})
        except (ValueError, RuntimeError) as error:  # an argument that is no plain data, tensors that share memory
            raise InputError(f"'{trained.name}' cannot be written in timm's format ({error}): create it with plain "
                             'arguments') from error
        _compare(model, Path(temporary), trained)
        for name in FILES[:2]:
            atomic_write(Path(folder, name), partial(shutil.copyfile, Path(temporary, name)))
    write_text_atomic(Path(folder, FILES[2]), card)


def _compare(model: nn.Module, folder: Path, trained: TrainedModel) -> None:
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
    here, there = model.state_dict(), rebuilt.state_dict()
    with torch.inference_mode():
        same = here.keys() == there.keys() and all(_equal(here[key], there[key]) for key in here) and _equal(
            model(images), rebuilt(images))
    if not same:
        raise InputError(f"timm makes another model than this one from the name '{trained.name}' and its arguments, "
                         f'{remedy}')


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.shape == second.shape and first.dtype == second.dtype
            and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True))

"""TorchScript, for C++ and for older programs; torch itself now prefers `torch.export`."""
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from .artefact import METADATA_FILE, Artefact

FILE = 'model.pt'


def write(artefact: Artefact, folder: Path) -> None:
    """Trace the network; its metadata go into the archive as an extra file."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='`torch.jit', category=Warning)  # of its deprecation
        warnings.simplefilter('ignore', torch.jit.TracerWarning)  # what it warns of, the comparison would find
        traced = torch.jit.trace(artefact.network, (artefact.example,), check_trace=False)
        extra = {METADATA_FILE: json.dumps(artefact.metadata)}
        torch.jit.save(traced, str(folder / FILE), _extra_files=extra)


def load(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function on the CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='`torch.jit', category=Warning)
        return torch.jit.load(str(folder / FILE), map_location='cpu').eval()

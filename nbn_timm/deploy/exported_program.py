"""`torch.export`: torch's own ahead-of-time graph, for `torch.compile`, AOTInductor and ExecuTorch."""
import json
from collections.abc import Callable
from pathlib import Path

import torch

from .artefact import METADATA_FILE, Artefact

FILE = 'model.pt2'
LARGEST_BATCH = 2 ** 20  # without a limit, torch 2.7 stumbles over guards against the largest integer


def trace(artefact: Artefact) -> torch.export.ExportedProgram:
    """The network as a program with a dynamic batch size from 1 on."""
    batch = torch.export.Dim('batch', min=1, max=LARGEST_BATCH)
    program = torch.export.export(artefact.network, (artefact.example,), dynamic_shapes=({0: batch},), strict=False)
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # it names source files by their place on this machine
    return program


def write(artefact: Artefact, folder: Path) -> None:
    """Export the network; its metadata go into the archive as an extra file."""
    torch.export.save(trace(artefact), folder / FILE, extra_files={METADATA_FILE: json.dumps(artefact.metadata)})


def load(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function on the CPU."""
    return torch.export.load(folder / FILE).module()

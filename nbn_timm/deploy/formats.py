"""The table of file formats; each has a file of its own in this package."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import exported_program, int8, onnx_file, timm_folder, torchscript
from .artefact import Artefact, FormatUnavailable

__all__ = ['FORMATS', 'INT8_FORMATS', 'Artefact', 'Format', 'FormatUnavailable']


@dataclass(frozen=True)
class Format:
    """A way to write a network.

    Attributes:
        files: What `write` writes into a folder; the first is named in reports.
        write: Writes them, given what there is to write and the folder; raises `FormatUnavailable`.
        load: Reads them back from the folder as a function, images [B, C, H, W] to logits [B, num_classes].
        is_graph: A file of operations, into which normalisation can go.
    """

    files: tuple[str, ...]
    write: Callable[[Artefact, Path], None]
    load: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]
    is_graph: bool = True


FORMATS: dict[str, Format] = {
    'timm': Format(timm_folder.FILES, timm_folder.write, timm_folder.load, is_graph=False),
    'torchscript': Format((torchscript.FILE,), torchscript.write, torchscript.load),
    'export': Format((exported_program.FILE,), exported_program.write, exported_program.load),
    'onnx': Format((onnx_file.FILE,), onnx_file.write, onnx_file.load),
}

# Of --int8, for which the artefact has calibration images; OpenVINO reads the same file.
INT8_FORMATS: dict[str, Format] = {
    'onnx_int8': Format((int8.FILE,), int8.write, int8.load),
    'openvino_int8': Format((int8.FILE,), int8.check_openvino, int8.load_openvino),
}

"""ONNX, for ONNX Runtime, TensorRT, OpenVINO and browsers."""
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import exported_program
from .artefact import Artefact, FormatUnavailable

FILE = 'model.onnx'
INPUT, OUTPUT = 'images', 'logits'
OPSET = 18  # what torch's exporter writes itself; a newer one would shut out older runtimes
_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')


def write(artefact: Artefact, folder: Path) -> None:
    """Convert the exported program; its metadata become entries of the file's `metadata_props`, as JSON texts.

    Raises:
        FormatUnavailable: A package is not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise FormatUnavailable(f"ONNX needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}")
    import onnx

    program: Any = torch.onnx.export(
        exported_program.trace(artefact), (artefact.example,), dynamo=True, external_data=False, opset_version=OPSET,
        input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    program.save(folder / FILE)
    model = onnx.load(folder / FILE)
    onnx.helper.set_model_props(model, {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in artefact.metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / FILE)


def load(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function on the CPU, by ONNX Runtime with as many threads as torch has."""
    return session(folder / FILE)


def session(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A file of ONNX Runtime as a function."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
    return run

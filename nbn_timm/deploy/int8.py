"""ONNX with 8-bit integers: written and run by ONNX Runtime, and run by OpenVINO.

Convolutions, sums and what stands between them are in integers, with one scale per channel of the weights. The
classifier stays in float32: it is a small part of the work, and the logits of rare classes hang on it. Weights have no
sign, because processors without VNNI add pairs of products in 16 bits, where signed weights of 8 bits overflow without
a word (nine points of the digits' ResNet-20) and of 7 bits are half as exact.
"""
import importlib.util
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import onnx_file
from .artefact import Artefact, FormatUnavailable

FILE = 'model.int8.onnx'
_QUANTIZED = ['Conv', 'Add', 'Relu', 'MaxPool']
_BATCH = 32  # of calibration


def write(artefact: Artefact, folder: Path) -> None:
    """Quantise the ONNX file statically (QDQ), by the ranges that the artefact's calibration images give.

    Raises:
        FormatUnavailable: A package is not installed.
    """
    assert artefact.calibration is not None
    with tempfile.TemporaryDirectory() as temporary:
        onnx_file.write(artefact, Path(temporary))  # says what is missing
        _quantize(Path(temporary), folder / FILE, artefact.calibration)
    import onnx

    model = onnx.load(folder / FILE)
    onnx.helper.set_model_props(model, {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in artefact.metadata.items()})
    onnx.save(model, folder / FILE)


def load(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function on the CPU, by ONNX Runtime with as many threads as torch has."""
    return onnx_file.session(folder / FILE)


def check_openvino(artefact: Artefact, folder: Path) -> None:
    """Nothing is written: OpenVINO reads the file of ONNX Runtime.

    Raises:
        FormatUnavailable: OpenVINO is not installed.
    """
    if importlib.util.find_spec('openvino') is None:
        raise FormatUnavailable(f'OpenVINO reads {FILE} too, and is not installed here to try: pip install openvino')


def load_openvino(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function on the CPU, by OpenVINO with as many threads as torch has."""
    import openvino

    compiled = openvino.Core().compile_model(
        folder / FILE, 'CPU', {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'PERFORMANCE_HINT': 'LATENCY'})

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compiled([images.numpy()])[0].copy())
    return run


def _quantize(folder: Path, file: Path, images: torch.Tensor) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(_BATCH))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {onnx_file.INPUT: batch.numpy()}

    prepared = folder / 'prepared.onnx'
    with _quiet():
        quant_pre_process(str(folder / onnx_file.FILE), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(file), Images(), quant_format=QuantFormat.QDQ, op_types_to_quantize=_QUANTIZED,
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8)


@contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime advises to do what has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

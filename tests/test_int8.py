"""8-bit files of nbn-export: calibrated by every class, run by two runtimes, refused where they lose too much."""
import importlib.util
import json

import numpy as np
import onnx
import pytest
import torch

from nbn_timm.cli import export as command
from nbn_timm.deploy import Int8Settings, int8_data
from nbn_timm.deploy.int8_data import balanced
from nbn_timm.errors import InputError
from nbn_timm.trained.opening import open_trained

DIGITS = 'resnet20_nbn.digits_lt'
QUICK = ('--formats', 'onnx', '--repeats', '1', '--num-images', '9', '--threads', '1')
HAS_OPENVINO = importlib.util.find_spec('openvino') is not None


@pytest.mark.fast
def test_calibration_has_equally_many_of_each_class_and_the_rarest_too():
    targets = np.repeat(np.arange(5), [500, 100, 20, 3, 1])
    np.random.default_rng(1).shuffle(targets)
    chosen = balanced(targets, 50)
    assert np.bincount(targets[chosen]).tolist() == [10, 10, 10, 3, 1]
    assert len(set(chosen.tolist())) == len(chosen)
    assert np.bincount(targets[balanced(targets, 2)]).tolist() == [1] * 5  # one of each, whatever was asked for
    assert np.array_equal(chosen, balanced(targets, 50))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('int8') / 'exported'
    command.main([DIGITS, str(folder), *QUICK, '--int8', '--calibration-images', '120', '--int8-loss', '5',
                  '--time', '1', '2'])
    return folder


def test_the_file_holds_integers_and_the_record(exported):
    model = onnx.load(exported / 'model.int8.onnx')
    operations = [node.op_type for node in model.graph.node]
    assert operations.count('QuantizeLinear') > 30 and operations.count('DequantizeLinear') > 60
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert weights and all(tensor.data_type == onnx.TensorProto.UINT8 for tensor in weights)
    assert (exported / 'model.int8.onnx').stat().st_size < 0.5 * (exported / 'model.onnx').stat().st_size
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata['model'] == DIGITS and 'nbn_timm' in metadata


def test_the_report_tells_what_is_lost(exported):
    report = json.loads((exported / 'report.json').read_text())
    assert report['calibration'] == '117 training images of 10 classes of digits_lt'  # of 12 each, and of one class 9
    written = report['formats']['onnx_int8']
    assert written['max_abs_diff'] > 1e-4  # it is no copy of the other
    told = written['int8']
    assert told['test_images'] == 200 and told['same_class'] > 80
    assert told['accuracy']['few']['original'] == pytest.approx(88.333333)
    for before, after in (pair.values() for pair in told['accuracy'].values()):
        assert abs(before - after) <= 5
    assert ('openvino_int8' in report['formats']) == HAS_OPENVINO
    if not HAS_OPENVINO:
        assert any('pip install openvino' in note for note in report['notes'])


def test_times_are_told_by_the_number_of_threads(exported):
    report = json.loads((exported / 'report.json').read_text())
    assert report['threads'] == 1 and set(report['latency']) == {'1', '2'}
    assert {'original', 'onnx', 'onnx_int8'} <= set(report['latency']['2'])
    assert torch.get_num_threads() == 1  # as before


@pytest.mark.slow
def test_too_great_a_loss_is_refused_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    from nbn_timm.deploy import exporter
    run = exporter.INT8_FORMATS['onnx_int8'].load

    def worse(folder):
        return lambda images: run(folder)(images).roll(1, 1)
    monkeypatch.setitem(exporter.INT8_FORMATS, 'onnx_int8', exporter.INT8_FORMATS['onnx_int8'].__class__(
        exporter.INT8_FORMATS['onnx_int8'].files, exporter.INT8_FORMATS['onnx_int8'].write, worse))
    with pytest.raises(InputError, match='points of few-shot accuracy .*--int8-loss 1, and nothing was written'):
        command.main([DIGITS, str(tmp_path / 'x'), *QUICK, '--int8'])
    assert not (tmp_path / 'x').exists()


@pytest.mark.slow
def test_pixels_as_input(tmp_path):
    command.main([DIGITS, str(tmp_path / 'x'), *QUICK, '--int8', '--with-preprocessing', '--int8-loss', '5'])
    report = json.loads((tmp_path / 'x' / 'report.json').read_text())
    assert report['takes'] == 'uint8 pixels' and report['formats']['onnx_int8']['int8']['same_class'] > 80
    assert 'latency' in report and report['latency'] == {}


@pytest.mark.fast
def test_without_training_images_it_is_said_what_to_give():
    trained = open_trained('resnet32_nbn.cifar100_lt')
    with pytest.raises(InputError, match='--data-dir DIR|are not at hand|cifar'):
        int8_data(trained, Int8Settings(int8=True))

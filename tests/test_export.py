"""nbn-export: every format against the original network, read back by programs that do not know this package."""
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from pictures import write_test_list
from PIL import Image
from safetensors.torch import load_file

import nbn_timm
from nbn_timm.cli import export as command
from nbn_timm.data import ClassCounts, DataDefaults
from nbn_timm.deploy import FORMATS, ExportSettings, Timing, deployed, export_model, generated_images, interleaved
from nbn_timm.deploy.timm_folder import plain_architecture
from nbn_timm.errors import InputError
from nbn_timm.layers import ClassVectors
from nbn_timm.models import RoutedExperts
from nbn_timm.trained.opening import TrainedModel
from nbn_timm.trained.record import NetworkRecord

COUNTS = ClassCounts((400, 150, 100, 20, 19, 3), ('ant', 'bee', 'cat', 'dog', 'eel', 'fox'), 'the training of a test')
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
QUICK = ('--repeats', '1', '--num-images', '9')


def trained_like(name: str, size: int, nbn: bool = False, **kwargs) -> nn.Module:
    """A network whose NBN vectors, statistics and logits are not those of initialisation."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=6, **kwargs)
    if nbn:
        nbn_timm.add_nbn(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    with torch.no_grad():
        for _ in range(10):
            model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def opened(model: nn.Module, name: str, size: int, nbn: bool = False, **model_args) -> TrainedModel:
    input_format = DataDefaults(input_size=(3, size, size), mean=MEAN, std=STD, crop_pct=1.0)
    return TrainedModel(model, name, model_args, nbn, input_format, NetworkRecord(classes=COUNTS, epoch=3))


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    """Images, a test list, and a checkpoint as the training writes it."""
    folder = tmp_path_factory.mktemp('export')
    write_test_list(folder, 12)
    torch.save(
        {'arch': 'resnet20_nbn', 'epoch': 3, 'state_dict': trained_like('resnet20_nbn', 16).state_dict(), 'version': 2,
         'class_counts': COUNTS.to_dict(),
         'args': {'model': 'resnet20_nbn', 'dataset': 'list', 'data_dir': str(folder), 'img_size': 16,
                  'test_list': str(folder / 'test.txt'), 'train_list': 'gone.txt', 'model_kwargs': {}, 'lr': 0.1,
                  'input_size': (3, 16, 16), 'mean': MEAN, 'std': STD, 'crop_pct': 1.0}},
        folder / 'last.pth.tar')
    return folder


@pytest.fixture(scope='module')
def exported(work) -> Path:
    """What the command writes of that checkpoint."""
    folder = work / 'exported'
    command.main([str(work / 'last.pth.tar'), str(folder), *QUICK])
    return folder


@pytest.fixture(scope='module')
def reference(work) -> tuple[np.ndarray, np.ndarray]:
    """The test images as uint8 [N, 3, 16, 16] and the logits of the unfolded network, by an own preprocessing."""
    pictures = [Image.open(work / f'images/{index}.png').crop((0, 2, 16, 18)) for index in range(12)]
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    pixels = pixels.transpose(0, 3, 1, 2)
    model = timm.create_model('resnet20_nbn', num_classes=6)
    model.load_state_dict(torch.load(work / 'last.pth.tar', weights_only=True)['state_dict'])
    with torch.no_grad():
        return pixels, model.eval()(torch.from_numpy(normalized(pixels))).numpy()


def normalized(pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    return (pixels.astype(np.float32) / 255 - mean) / std


def without_package(code: str, *arguments) -> str:
    """Run Python code in a process that must not import this package; its output."""
    code = f'import sys\n{code}\nassert "nbn_timm" not in sys.modules\n'
    done = subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)], capture_output=True, text=True, cwd='/', timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(arguments, monkeypatch, capsys) -> str:
    """Run the console command, which must fail, and return its one sentence."""
    monkeypatch.setattr(sys, 'argv', ['nbn-export', *map(str, arguments)])
    assert command.console() == 1
    error = capsys.readouterr().err
    assert error.startswith('nbn-export: error: ')
    assert error.count('\n') == 1 and 'Traceback' not in error
    return error


def test_graphs_give_the_original_logits(exported, reference, tmp_path):
    """TorchScript and torch.export in a process with torch alone, at batch sizes that were not traced."""
    pixels, logits = reference
    np.save(tmp_path / 'images.npy', normalized(pixels))
    without_package('''
import json, numpy, torch
folder, out = sys.argv[1:]
images = torch.from_numpy(numpy.load(out + '/images.npy'))
extra = {'nbn_timm.json': ''}
script = torch.jit.load(folder + '/model.pt', _extra_files=extra)
assert json.loads(extra['nbn_timm.json'])['label_names'][3] == 'dog'
extra = {'nbn_timm.json': ''}
program = torch.export.load(folder + '/model.pt2', extra_files=extra).module()
assert json.loads(extra['nbn_timm.json'])['training_images'][0] == 400
with torch.no_grad():
    for name, run in (('script', script), ('program', program)):
        numpy.save(f'{out}/{name}.npy', torch.cat([run(images[:1]), run(images[1:6]), run(images[6:])]).numpy())
''', exported, tmp_path)
    for name in ('script', 'program'):
        assert np.abs(np.load(tmp_path / f'{name}.npy') - logits).max() < 1e-4
    assert np.abs(logits).max() > 0.5


def test_onnx_gives_the_original_logits(exported, reference):
    pixels, logits = reference
    session = onnxruntime.InferenceSession(str(exported / 'model.onnx'), providers=['CPUExecutionProvider'])
    images = normalized(pixels)
    for batch in (images[:1], images[:5], images):
        found, = session.run(None, {'images': batch})
        assert np.abs(found - logits[:len(batch)]).max() < 1e-4
    properties = {entry.key: entry.value for entry in onnx.load(exported / 'model.onnx').metadata_props}
    assert json.loads(properties['label_names']) == list(COUNTS.names)
    assert json.loads(properties['input'])['mean'] == list(MEAN)
    assert properties['model'].startswith('resnet20_nbn')


def test_folder_of_a_cifar_network_is_its_plain_form(exported, reference):
    """timm has no such network, so the folder takes this package, but no NBN is left in it."""
    pixels, logits = reference
    model = timm.create_model(f'local-dir:{exported}', pretrained=True).eval()
    assert model.pretrained_cfg['architecture'] == 'resnet20' and not nbn_timm.layers.nbn_layers(model)
    with torch.no_grad():
        assert np.abs(model(torch.from_numpy(normalized(pixels))).numpy() - logits).max() < 1e-4
    data = timm.data.resolve_data_config(model.pretrained_cfg)
    assert data['input_size'] == (3, 16, 16) and tuple(data['mean']) == MEAN and data['crop_pct'] == 1.0
    config = json.loads((exported / 'config.json').read_text())
    assert config['label_names'] == list(COUNTS.names)
    assert config['nbn_timm']['class_counts']['counts'] == list(COUNTS.counts)


def test_report_and_labels(exported):
    report = json.loads((exported / 'report.json').read_text())
    assert set(report['formats']) == set(FORMATS)
    assert report['num_images'] == 9 and report['images'] == 'the test split of list'
    assert set(report['batch_sizes_checked']) > {1, 2}
    for entry in report['formats'].values():
        assert 0 <= entry['max_abs_diff'] <= report['tolerance'] == 1e-4
        assert entry['ms'] > 0 and entry['of_the_original'] > 0
        assert entry['bytes'] == sum((exported / name).stat().st_size for name in entry['files'])
    assert report['original']['of_the_original'] == 1 and report['timm'] is None
    labels = json.loads((exported / 'labels.json').read_text())
    assert labels[5] == {'label': 5, 'name': 'fox', 'training_images': 3}
    assert {path.name for path in exported.iterdir()} == {
        'config.json', 'model.safetensors', 'model.pt', 'model.pt2', 'model.onnx', 'labels.json', 'report.json'}


FOLDED = [
    ('resnet10_nbn', False, {}, 'resnet18'),
    ('resnext50_nbn_lr', False, {}, 'resnext50_32x4d'),
    ('regnety_002', True, {}, 'regnety_002'),
    ('resnet18', True, {'stem_type': 'deep', 'stem_width': 32}, 'resnet18'),
]


@pytest.mark.slow
def test_timm_loads_the_folders_alone(tmp_path):
    """In a process without this package, and to the original's logits."""
    for name, nbn, kwargs, architecture in FOLDED:
        model = trained_like(name, 32, nbn, **kwargs)
        trained = opened(model, name, 32, nbn, **kwargs)
        settings = ExportSettings(('timm',), repeats=1)
        report = export_model(trained, tmp_path / name, generated_images(4, trained.input), settings)
        assert report.about['architecture'] == architecture and report.plain is not None
        images = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            np.savez(tmp_path / f'{name}.npz', images=images.numpy(), logits=model(images).numpy())
    without_package('''
import numpy, timm, torch
place, *names = sys.argv[1:]
for name in names:
    expected = numpy.load(f'{place}/{name}.npz')
    model = timm.create_model(f'local-dir:{place}/{name}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'][1] == 'bee', model.pretrained_cfg
    with torch.no_grad():
        found = model(torch.from_numpy(expected['images'])).numpy()
    assert abs(expected['logits']).max() > 0.01
    assert abs(found - expected['logits']).max() < 1e-4 * abs(expected['logits']).max(), name
''', tmp_path, *(name for name, *_ in FOLDED))


@pytest.mark.parametrize('name', [
    f'{base}{form}' for base in ('resnet10', 'resnet50', 'resnet101', 'resnet152', 'resnext50', 'resnext101')
    for form in ('_nbn', '_nbn_lr')])
def test_every_224_pixel_network_folds_to_one_of_timms(name):
    """Same parameter names and shapes; without weights, for speed."""
    model = timm.create_model(name, num_classes=6, device='meta')
    architecture, arguments = plain_architecture(opened(model, name, 224))
    plain = timm.create_model(architecture, device='meta', **arguments)
    folded = {key: value.shape for key, value in model.state_dict().items()
              if not key.endswith('scale.alpha') and not key.startswith('fc.bn.')}
    assert {key: value.shape for key, value in plain.state_dict().items()} == folded
    assert type(plain).__module__ == 'timm.models.resnet'


@pytest.mark.parametrize(('name', 'kwargs'), [
    pytest.param('resnet10_ride_nbn_lr', {'num_experts': 2}, marks=pytest.mark.slow),
    ('resnet32_ride_nbn', {'num_experts': 2, 'num_blocks': 1}),
    ('resnet32_ride', {'head': 'cosine', 'num_blocks': 1})])
def test_experts_become_one_network(name, kwargs, tmp_path):
    model = trained_like(name, 32, **kwargs)
    trained = opened(model, name, 32, **kwargs)
    report = export_model(trained, tmp_path / 'out', generated_images(3, trained.input), ExportSettings(repeats=1))
    assert [item.format for item in report.exported] == list(FORMATS)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        for kind in FORMATS.values():
            assert (kind.load(tmp_path / 'out')(images) - expected).abs().max() < 1e-4
    assert expected.shape == (5, 6)
    linear = [module for module in deployed(model).modules() if isinstance(module, nn.Linear | ClassVectors)]
    assert len(linear) == (3 if 'head' in kwargs else 1)


@pytest.mark.slow
def test_networks_without_a_plain_form_have_no_timm_folder(tmp_path):
    """By default the other formats are written, with a note; asked for by name, it is an error."""
    trained = opened(trained_like('resnet10_nbn', 32, head='cosine'), 'resnet10_nbn', 32, head='cosine')
    images = generated_images(2, trained.input)
    report = export_model(trained, tmp_path / 'out', images, ExportSettings(repeats=1))
    assert [item.format for item in report.exported] == ['torchscript', 'export', 'onnx']
    assert any('CosineLinear' in note for note in report.notes)
    assert not (tmp_path / 'out' / 'config.json').exists()
    with pytest.raises(InputError, match='CosineLinear'):
        export_model(trained, tmp_path / 'other', images, ExportSettings(('timm',), repeats=1))
    assert not (tmp_path / 'other').exists()


@pytest.mark.slow
def test_preprocessing_inside_the_graphs(work, reference, tmp_path):
    """The files take the pixels of an image file; the folder for timm stays as it was."""
    pixels, logits = reference
    command.main([str(work / 'last.pth.tar'), str(tmp_path / 'out'), *QUICK, '--with-preprocessing'])
    assert torch.from_numpy(pixels).dtype == torch.uint8
    for name in ('torchscript', 'export', 'onnx'):
        found = FORMATS[name].load(tmp_path / 'out')(torch.from_numpy(pixels))
        assert np.abs(found.detach().numpy() - logits).max() < 1e-4
    found = FORMATS['timm'].load(tmp_path / 'out')(torch.from_numpy(normalized(pixels)))
    assert np.abs(found.detach().numpy() - logits).max() < 1e-4


@pytest.mark.fast
def test_images_of_a_folder(work, tmp_path, capsys):
    arguments = [str(work / 'last.pth.tar'), str(tmp_path / 'out'), *QUICK, '--formats', 'timm']
    command.main([*arguments, '--images', str(work)])
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert report['images'] == f"folder '{work.name}'" and list(report['formats']) == ['timm']
    assert 'max diff' in capsys.readouterr().out


def test_generated_images_are_named_as_such(work, tmp_path, capsys):
    """A checkpoint whose data are gone."""
    content = torch.load(work / 'last.pth.tar', weights_only=True)
    content['args']['data_dir'] = str(tmp_path / 'gone')
    torch.save(content, tmp_path / 'moved.pth.tar')
    command.main([str(tmp_path / 'moved.pth.tar'), str(tmp_path / 'out'), *QUICK, '--formats', 'torchscript'])
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert report['images'] == 'generated from seed 0'
    assert any('--images' in note for note in report['notes'])
    assert 'gone' in capsys.readouterr().out


def test_large_logits_differ_by_their_share(work, tmp_path):
    """float32 has seven digits, so logits of 1e5 cannot agree to 1e-4."""
    checkpoint = torch.load(work / 'last.pth.tar', weights_only=True)
    for name in ('fc.weight', 'fc.bias'):
        checkpoint['state_dict'][name] *= 1e6
    torch.save(checkpoint, tmp_path / 'large.pth.tar')
    command.main([str(tmp_path / 'large.pth.tar'), str(tmp_path / 'out'), *QUICK, '--formats', 'timm', 'torchscript'])
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert any(entry['max_abs_diff'] > 1e-4 for entry in report['formats'].values())


def test_a_file_that_differs_is_refused(work, tmp_path, monkeypatch, capsys):
    """A format that loses something on the way leaves nothing behind, and what was there before stays."""
    out = tmp_path / 'out'
    arguments = [work / 'last.pth.tar', out, *QUICK, '--formats', 'timm', 'torchscript']
    command.main([*map(str, arguments)])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def lossy(artefact, folder, write=FORMATS['torchscript'].write):
        artefact.network.fc.weight.data[0, 0] += 0.1
        write(artefact, folder)

    monkeypatch.setitem(FORMATS, 'torchscript', replace(FORMATS['torchscript'], write=lossy))
    error = fails([*arguments, '--overwrite'], monkeypatch, capsys)
    assert 'torchscript' in error and 'differs' in error and '--tolerance' in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    command.main([*map(str, arguments), '--overwrite', '--tolerance', '10'])


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    trained = opened(trained_like('resnet20_nbn', 16), 'resnet20_nbn', 16)
    trained.model.fc.weight.data[0] = 3e38  # finite, and the logits are not
    with pytest.raises(InputError, match='differs'):
        export_model(
            trained, tmp_path / 'out', generated_images(2, trained.input), ExportSettings(('timm',), repeats=1))
    assert not (tmp_path / 'out').exists()


def test_overwriting_replaces_an_export_and_nothing_else(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    command.main([str(work / 'last.pth.tar'), str(out), *QUICK, '--formats', 'timm', 'torchscript'])
    again = [work / 'last.pth.tar', out, *QUICK, '--formats', 'timm']
    assert '--overwrite' in fails(again, monkeypatch, capsys)
    command.main([*map(str, again), '--overwrite'])
    assert not (out / 'model.pt').exists()
    (out / 'mine.txt').write_text('precious')
    assert 'mine.txt' in fails([*again, '--overwrite'], monkeypatch, capsys)
    assert (out / 'mine.txt').read_text() == 'precious'


def test_routing_is_exported_with_all_experts_only(tmp_path):
    network = trained_like('resnet32_ride', 32, num_experts=2)
    trained = opened(RoutedExperts(network, top_k=3).eval(), 'resnet32_ride', 32, num_experts=2)
    images, settings = generated_images(2, trained.input), ExportSettings(('torchscript', 'timm'), repeats=1)
    with pytest.raises(InputError, match='--all-experts'):
        export_model(trained, tmp_path / 'out', images, settings)
    assert not (tmp_path / 'out').exists()


def test_routed_checkpoint_with_all_experts(tmp_path, monkeypatch, capsys):
    """The command refuses the router's checkpoint, and takes it as the network that asks every expert."""
    network = trained_like('resnet32_ride', 16, num_experts=2)
    torch.save({'arch': 'resnet32_ride', 'class_counts': COUNTS.to_dict(), 'version': 2,
                'state_dict': RoutedExperts(network, top_k=3).state_dict(),
                'args': {'model': 'resnet32_ride', 'img_size': 16, 'model_kwargs': {'num_experts': 2}}},
               tmp_path / 'routed.pth.tar')
    arguments = [tmp_path / 'routed.pth.tar', tmp_path / 'out', *QUICK, '--formats', 'torchscript']
    assert '--all-experts' in fails(arguments, monkeypatch, capsys)
    command.main([*map(str, arguments), '--all-experts'])
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert (FORMATS['torchscript'].load(tmp_path / 'out')(images) - network(images)).abs().max() < 1e-4


def test_an_exported_folder_is_a_source(exported, tmp_path):
    """Class names, training images and record come along, and no place."""
    command.main([f'local-dir:{exported}', str(tmp_path / 'again'), *QUICK, '--formats', 'timm', 'export'])
    first, again = (json.loads((folder / 'config.json').read_text()) for folder in (exported, tmp_path / 'again'))
    assert first == again
    assert (exported / 'labels.json').read_bytes() == (tmp_path / 'again' / 'labels.json').read_bytes()
    first, second = (load_file(folder / 'model.safetensors') for folder in (exported, tmp_path / 'again'))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    extra = {'nbn_timm.json': ''}
    torch.export.load(tmp_path / 'again' / 'model.pt2', extra_files=extra)
    assert json.loads(extra['nbn_timm.json'])['model'] == 'resnet20' and str(exported) not in extra['nbn_timm.json']


def test_nothing_of_the_machine_travels(exported, work):
    """Neither the record in the folder nor the metadata in the files name a place on this machine."""
    properties = {entry.key: entry.value for entry in onnx.load(exported / 'model.onnx').metadata_props}
    extra = {'nbn_timm.json': ''}
    torch.export.load(exported / 'model.pt2', extra_files=extra)
    for text in ((exported / 'config.json').read_text(), (exported / 'report.json').read_text(),
                 json.dumps(properties), extra['nbn_timm.json']):
        assert str(work) not in text
    config = json.loads((exported / 'config.json').read_text())
    assert config['nbn_timm']['settings']['lr'] == 0.1 and config['nbn_timm']['epoch'] == 4
    assert config['nbn_timm']['folded'] is True


def test_graphs_do_not_name_the_source_files_of_this_machine(exported):
    """torch records where the code of each operation stood; TorchScript's own debugging files are left to torch."""
    sources = str(Path(timm.__file__).parent).encode()
    assert sources not in (exported / 'model.onnx').read_bytes()
    with zipfile.ZipFile(exported / 'model.pt2') as archive:
        assert not any(sources in archive.read(name) for name in archive.namelist())


def test_missing_packages_are_named(work, tmp_path, monkeypatch, capsys):
    real = FORMATS['onnx'].write.__globals__['importlib'].util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'onnxscript' else real(name))
    arguments = [work / 'last.pth.tar', tmp_path / 'out', *QUICK, '--formats', 'onnx']
    error = fails(arguments, monkeypatch, capsys)
    assert 'pip install onnxscript' in error


@pytest.mark.parametrize(('extra', 'said'), [
    (['--images', '/no/such/folder'], '/no/such/folder'),
    (['--arch', 'resnet32_nbn'], 'resnet32_nbn'),
])
def test_sentences_for_bad_input(work, extra, said, tmp_path, monkeypatch, capsys):
    assert said in fails([work / 'last.pth.tar', tmp_path / 'out', *QUICK, *extra], monkeypatch, capsys)
    assert not (tmp_path / 'out').exists()


def test_times_are_taken_in_turns():
    order: list[str] = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in 'ab'}, repeats=3, warmup=1)
    assert ''.join(order) == 'ab' + 'ba' + 'ab' + 'ba'
    assert all(len(timing.milliseconds) == 3 for timing in timings.values())
    assert Timing((2.0, 4.0, 9.0)).ratio(Timing((1.0, 1.0, 3.0))) == (2.5, 3.0, 3.5)

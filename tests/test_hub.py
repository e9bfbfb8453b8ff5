"""Pushing to the Hub and pulling from it, against a server on loopback; the clients are processes of their own, because
huggingface_hub reads its environment when it is imported."""
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from forks import run_python
from hub_server import READ_ONLY_TOKEN, TOKEN, hub_server
from safetensors.torch import load

from nbn_timm.cli.push import main as push
from nbn_timm.data import ClassCounts
from nbn_timm.errors import InputError
from nbn_timm.models import RoutedExperts
from nbn_timm.models._pretrained import shipped_file, shipped_names
from nbn_timm.models.weight_files import DIGEST, weights_digest
from nbn_timm.second_stages.classifier import replace_module
from nbn_timm.second_stages.ncm import CentroidLinear

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ClassCounts((90, 30, 4), ('ant', 'bee', 'cat'), "train split of '/home/somebody/pictures'")
PULL = '''
import sys, timm, torch, nbn_timm
from nbn_timm.trained.opening import open_trained
model = timm.create_model(sys.argv[1], pretrained=True)
torch.save(model.state_dict(), sys.argv[2])
opened = open_trained(sys.argv[1])
print(type(model).__name__, opened.class_counts and opened.class_counts.counts, opened.record.epoch)
'''


@pytest.fixture
def hub(tmp_path):
    """(run a client: arguments of Python -> finished process, the hub)."""
    with hub_server() as (address, content):
        def client(*arguments, token=TOKEN, endpoint=address, **environment):
            known = {'HF_ENDPOINT': endpoint, 'HF_HOME': str(tmp_path / 'hf'),
                     'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **environment}
            known |= {'HF_TOKEN': token} if token else {}
            kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'NBN_'))}
            return run_python(*arguments, cwd=tmp_path, environment={**kept, **known})
        yield client, content


def checkpoint(folder, name='resnet20_nbn', **kwargs):
    """A checkpoint as training writes it, and its weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs)
    torch.save({'arch': name, 'epoch': 4, 'state_dict': model.state_dict(), 'class_counts': COUNTS.to_dict(),
                'args': {'model': name, 'model_kwargs': kwargs, 'dataset': 'list',
                         'data_dir': '/home/somebody/pictures', 'train_list': '/home/somebody/lists/tail.txt',
                         'initial_checkpoint': '../somebody/first.pth.tar',
                         'input_size': (3, 32, 32), 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'lr': 0.1,
                         'epochs': 5, 'loss': 'balanced_softmax', 'sampler': 'class_aware', 'seed': 1}},
               folder / 'last.pth.tar')
    (folder / 'test.json').write_text(json.dumps({
        'checkpoint': 'epoch 5 (last.pth.tar)', 'split': 'test', 'num_samples': 30, 'num_classes': 3, 'top1': 61.25,
        'top5': 99.0, 'mean_class': 61.25, 'many': None, 'medium': 70.0, 'few': 43.75}))
    return model.state_dict()


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('resnet20_nbn', {}), ('resnet32_ride_nbn_lr', {'num_experts': 2, 'reduced': True}),
    ('resnet20_nbn', {'head': 'cosine'})])
def test_a_checkpoint_comes_back_bit_for_bit(hub, tmp_path, name, kwargs):
    client, content = hub
    weights = checkpoint(tmp_path, name, **kwargs)
    pushed = client('-m', 'nbn_timm.cli.push', 'last.pth.tar', 'someone/tail')
    assert pushed.returncode == 0, pushed.stderr
    _, files = content.find('someone/tail', 'main')
    assert set(files) == {'config.json', 'model.safetensors', 'README.md'}
    sent = load(files['model.safetensors'])
    assert sent.keys() == weights.keys() and all(torch.equal(sent[key], weights[key]) for key in weights)
    assert b'somebody' not in files['config.json'] + files['README.md']
    pulled = client('-c', PULL, 'hf-hub:someone/tail', 'pulled.pt', token=None)
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.strip().endswith('(90, 30, 4) 5')
    assert any(path.startswith('/storage/') for _, path in content.seen)
    back = torch.load(tmp_path / 'pulled.pt', weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.fast
def test_the_card_and_the_config_say_what_it_is(hub, tmp_path):
    client, content = hub
    checkpoint(tmp_path)
    assert client('-m', 'nbn_timm.cli.push', 'last.pth.tar', 'someone/tail').returncode == 0
    _, files = content.find('someone/tail', 'main')
    config = json.loads(files['config.json'])
    assert config['architecture'] == 'resnet20_nbn' and config['label_names'] == ['ant', 'bee', 'cat']
    assert config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3] and config['nbn_timm']['test']['few'] == 43.75
    assert config['pretrained_cfg']['tag'] is None  # none of the weights that are published for the architecture
    card = files['README.md'].decode()
    assert card.startswith('---\n') and 'library_name: timm' in card
    for said in ('tail.txt', 'first.pth.tar', '61.25', '70.00', '43.75', '124', 'balanced_softmax',
                 'class_aware', '2501.03122', 'import nbn_timm',
                 'hf-hub:someone/tail'):
        assert said in card, said


def test_shipped_weights_go_to_a_private_repository_and_a_branch(hub, tmp_path):
    client, content = hub
    name = 'resnet20_nbn.digits_lt'
    pushed = client('-m', 'nbn_timm.cli.push', name, 'someone/secret', '--private', '--revision', 'v2')
    assert pushed.returncode == 0, pushed.stderr
    assert content.repos['someone/secret']['private'] and not content.find('someone/secret', 'main')[1]
    assert client('-c', PULL, 'hf-hub:someone/secret@v2', 'x.pt', token=None).returncode != 0
    pulled = client('-c', PULL, 'hf-hub:someone/secret@v2', 'x.pt')
    assert pulled.returncode == 0, pulled.stderr
    back, weights = torch.load(tmp_path / 'x.pt', weights_only=True), load(Path(shipped_file(name)).read_bytes())
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_validation_of_a_pushed_model_finds_its_data_and_its_counts(hub, tmp_path):
    client, _ = hub
    assert client('-m', 'nbn_timm.cli.push', 'resnet20_nbn.digits_lt', 'someone/digits').returncode == 0
    done = client(ROOT / 'validate.py', '--model', 'hf-hub:someone/digits', '--pretrained', '--workers', '0',
                  '--device', 'cpu', '--results-file', 'found.json')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'found.json').read_text())['top1'] == 93.5


def test_a_mirror_of_the_zoo_is_one_variable(hub, tmp_path):
    """NBN_TIMM_WEIGHTS may be an http address: of a repository with the files by their names, for instance."""
    client, content = hub
    name = 'resnet20_nbn.digits_lt'
    content.repos['someone/mirror'] = {'private': False, 'revisions': {}}
    content.commit('someone/mirror', 'main', {f'{name}.safetensors': Path(shipped_file(name)).read_bytes()})
    fetch = f'import timm, nbn_timm; timm.create_model({name!r}, pretrained=True)'
    mirror = client('-c', 'import os; print(os.environ["HF_ENDPOINT"])').stdout.strip() + '/someone/mirror/resolve/main'
    done = client('-c', fetch, NBN_TIMM_WEIGHTS=mirror, TORCH_HOME=str(tmp_path / 'torch'))
    assert done.returncode == 0, done.stderr
    assert ('GET', f'/someone/mirror/resolve/main/{name}.safetensors') in content.seen
    record = f'from nbn_timm.models._pretrained import weights_record; print(weights_record({name!r}))'
    described = json.dumps({'epoch': 7, DIGEST: weights_digest(load(Path(shipped_file(name)).read_bytes()))}).encode()
    for commit, known in (None, 'None'), ({f'{name}.json': described}, str(json.loads(described))):
        content.commit('someone/mirror', 'main', {**content.find('someone/mirror', 'main')[1], **(commit or {})})
        done = client('-c', record, NBN_TIMM_WEIGHTS=mirror, TORCH_HOME=str(tmp_path / 'torch'))
        assert done.stdout.strip() == known, done.stderr


@pytest.mark.parametrize(('arguments', 'settings', 'said'), [
    (['someone/tail'], {'token': None}, 'there is no token'),
    (['someone/tail'], {'token': 'hf_wrong'}, 'does not accept the token'),
    (['someone/tail'], {'token': READ_ONLY_TOKEN}, 'may not write'),
    (['another/tail'], {}, "may not write to 'another/tail'"),
    (['some one/tail'], {}, 'no name of a repository'),
    (['someone/tail'], {'endpoint': 'http://127.0.0.1:9'}, 'cannot be reached'),
])
def test_what_the_hub_refuses_is_said_in_one_sentence(hub, tmp_path, arguments, settings, said):
    client, content = hub
    checkpoint(tmp_path)
    done = client('-m', 'nbn_timm.cli.push', 'last.pth.tar', *arguments, **settings)
    assert done.returncode == 1 and not content.repos
    assert said in done.stderr and 'Traceback' not in done.stderr


def test_a_public_repository_is_not_taken_for_a_private_one_nor_any_license_accepted(hub, tmp_path):
    client, content = hub
    checkpoint(tmp_path)
    assert client('-m', 'nbn_timm.cli.push', 'last.pth.tar', 'someone/tail').returncode == 0
    before = content.find('someone/tail', 'main')
    for flags, said in (['--private'], 'exists and is public'), (['--license', 'gpl-9'], '"license" must be one of'):
        done = client('-m', 'nbn_timm.cli.push', 'last.pth.tar', 'someone/tail', *flags)
        assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr
        assert content.find('someone/tail', 'main') == before


@pytest.mark.parametrize('name', shipped_names())
def test_all_shipped_weights_come_back_from_a_folder(tmp_path, name):
    push([name, '--output', str(tmp_path / 'out'), 'someone/shipped'])
    model, weights = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), load(
        Path(shipped_file(name)).read_bytes())
    here = model.state_dict()
    assert here.keys() == weights.keys() and all(torch.equal(here[key], weights[key]) for key in weights)
    assert 'hf-hub:someone/shipped' in (tmp_path / 'out' / 'README.md').read_text()


def test_a_folder_is_replaced_on_demand_only(tmp_path):
    checkpoint(tmp_path)
    arguments = [str(tmp_path / 'last.pth.tar'), '--output', str(tmp_path / 'out')]
    push(arguments)
    (tmp_path / 'out' / 'README.md').write_text('mine')
    with pytest.raises(InputError, match='add --overwrite'):
        push(arguments)
    assert (tmp_path / 'out' / 'README.md').read_text() == 'mine'
    push([*arguments, '--overwrite', '--license', 'mit'])
    assert 'license: mit' in (tmp_path / 'out' / 'README.md').read_text()
    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    with pytest.raises(InputError, match='notes.txt'):
        push([*arguments, '--overwrite'])


def with_centroids(model):
    replace_module(model, 'fc', CentroidLinear(64, 3))
    return model


def test_what_timm_cannot_make_again_is_refused(tmp_path):
    """A router, and a classifier that a second stage has put in: no folder is left behind."""
    for name, change, said in (
            ('resnet32_ride', lambda model: RoutedExperts(model, top_k=2), 'has a router'),
            ('resnet20', with_centroids, 'timm cannot make')):
        model = change(timm.create_model(name, num_classes=3))
        torch.save({'arch': name, 'state_dict': model.state_dict(), 'class_counts': COUNTS.to_dict(),
                    'args': {'model': name}}, tmp_path / 'last.pth.tar')
        with pytest.raises(InputError, match=said):
            push([str(tmp_path / 'last.pth.tar'), '--output', str(tmp_path / 'out')])
        assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))


@pytest.mark.parametrize(('change', 'said'), [
    ({'tau_norm': 1.0}, '--tau-norm'), ({'logit_adjustment': 1.0}, '--logit-adjustment'), ({'routed': True}, 'router'),
    ({'use_ema': True}, 'add --use-ema'), ({'num_classes': 7}, 'of 7 classes'),
    ({'model': 'resnet20_nbn_lr'}, "of the model 'resnet20_nbn_lr'"),
    ({'top1': None}, 'no results file')])
def test_results_of_something_else_do_not_get_into_the_card(tmp_path, change, said):
    checkpoint(tmp_path)
    results = {'split': 'val', 'num_samples': 8, 'num_classes': 3, 'top1': 12.5, 'top5': 100.0, 'mean_class': 12.5}
    (tmp_path / 'found.json').write_text(json.dumps(results | change))
    arguments = [str(tmp_path / 'last.pth.tar'), '--output', str(tmp_path / 'out'), '--results-file',
                 str(tmp_path / 'found.json')]
    with pytest.raises(InputError, match=said):
        push(arguments)
    (tmp_path / 'found.json').write_text(json.dumps(results | {'model': 'resnet20_nbn_cifar10_lt'}))
    push(arguments)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '12.50' in card and 'on the val split, 8 images' in card and '61.25' not in card


@pytest.mark.parametrize(('epoch', 'which', 'known'), [
    (4, 'epoch 5 (last.pth.tar), the last one', True), (4, 'epoch 5 of 9 (last.pth.tar), chosen', True),
    (6, 'epoch 5 (last.pth.tar), the last one', False), (4, 'epoch 5 of 9 (model_best.pth.tar), chosen', False),
    (None, 'last.pth.tar, --stage tau_norm', True)])
def test_a_result_beside_a_checkpoint_counts_if_it_is_of_that_checkpoint(tmp_path, epoch, which, known):
    """A run that goes on after its end leaves the result of an earlier epoch beside the newer checkpoint."""
    checkpoint(tmp_path)
    saved = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    del saved['epoch']
    torch.save(saved if epoch is None else {**saved, 'epoch': epoch}, tmp_path / 'last.pth.tar')
    result = json.loads((tmp_path / 'test.json').read_text())
    (tmp_path / 'test.json').write_text(json.dumps({**result, 'checkpoint': which}))
    push([str(tmp_path / 'last.pth.tar'), '--output', str(tmp_path / 'out')])
    assert ('61.25' in (tmp_path / 'out' / 'README.md').read_text()) == known


def test_a_result_counts_if_it_is_of_these_weights(tmp_path, caplog):
    weights = checkpoint(tmp_path)
    source, result = str(tmp_path / 'last.pth.tar'), json.loads((tmp_path / 'test.json').read_text())
    arguments = [source, '--output', str(tmp_path / 'out'), '--overwrite']
    others = {name: value + 1 for name, value in weights.items()}
    for digest, told, said in ((weights_digest(weights), True, ''), (weights_digest(others), False, 'are not told'),
                               (None, True, 'of an earlier version')):
        caplog.clear()
        (tmp_path / 'test.json').write_text(json.dumps(result | ({DIGEST: digest} if digest else {})))
        push(arguments)
        assert ('61.25' in (tmp_path / 'out' / 'README.md').read_text()) == told
        assert said in caplog.text and bool(caplog.text) == bool(said)
    (tmp_path / 'found.json').write_text(json.dumps(result | {DIGEST: weights_digest(others)}))
    with pytest.raises(InputError, match="found.json' is of other weights"):
        push([*arguments, '--results-file', str(tmp_path / 'found.json')])


@pytest.mark.fast
def test_a_folder_is_written_without_any_hub(tmp_path, capsys):
    weights = checkpoint(tmp_path)
    push([str(tmp_path / 'last.pth.tar'), '--output', str(tmp_path / 'out')])
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for arguments, said in ((['x', '--output', 'o', '--private'], '--private'), (['x'], 'USER/NAME')):
        with pytest.raises(InputError, match=said):
            push(arguments)


def test_added_nbn_is_folded(tmp_path):
    import nbn_timm
    model = timm.create_model('resnet18', num_classes=3)
    nbn_timm.add_nbn(model)
    torch.save({'arch': 'resnet18', 'state_dict': model.state_dict(), 'class_counts': COUNTS.to_dict(),
                'args': {'model': 'resnet18', 'add_nbn': True}}, tmp_path / 'last.pth.tar')
    push([str(tmp_path / 'last.pth.tar'), '--output', str(tmp_path / 'out')])
    assert 'folded here into plain BatchNorm' in (tmp_path / 'out' / 'README.md').read_text()
    plain = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(plain(images), model.eval()(images), atol=1e-5)

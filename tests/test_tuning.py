"""Fine-tuning of a part: what learns, what is computed, adapter files, and runs of it from the command line."""
import copy
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from nbn_timm.cli.train import main as train
from nbn_timm.cli.train import parse_train
from nbn_timm.deploy import deployed
from nbn_timm.deploy.timm_folder import plain_model
from nbn_timm.errors import InputError
from nbn_timm.layers import HEADS, CosineLinear, CosPlusLinear, RectifiedLinear, add_nbn
from nbn_timm.models.tuning import (
    AdapterFile,
    apply_tuning,
    create_tuning,
    has_adapters,
    learn_only_tuned,
    load_adapter,
    read_adapter,
    save_adapter,
    start_from_vectors,
    with_head,
)
from nbn_timm.models.tuning.adaptformer import AdaptFormer, default_width
from nbn_timm.models.tuning.prompts import without_prompts
from nbn_timm.models.weight_files import read_checkpoint, read_state_dict, save_weights
from nbn_timm.trained import opening

WAYS = [('bias', {}), ('norm', {}), ('adaptformer', {'width': 4}), ('vpt', {'length': 3}),
        ('vpt', {'length': 3, 'deep': False}), ('lora', {'r': 2})]


def vit(num_classes: int = 6, **kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=num_classes,
                             **kwargs).eval()


def tuned(name: str, kwargs: dict, **of_model) -> nn.Module:
    """A network whose new parameters are not zero."""
    model = apply_tuning(with_head(vit(**of_model), 'cosine', {'scale': 25.0}), name, kwargs)
    learn_only_tuned(model, name, kwargs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize('name, kwargs', WAYS)
def test_only_the_classifier_and_what_is_tuned_learn(name, kwargs):
    model = apply_tuning(vit(), name, kwargs)
    learn_only_tuned(model, name, kwargs)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):  # what begins at zero hides a gradient from its neighbour in the first step
        optimizer.zero_grad()
        model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == learning and {'head.weight', 'head.bias'} < learning
    blocks = learning - {'head.weight', 'head.bias'}
    assert all(key.startswith('blocks.') for key in blocks)
    assert has_adapters(model.state_dict()) == (name not in ('bias', 'norm'))
    if name == 'norm':
        assert blocks == {f'blocks.{block}.norm{norm}.{part}' for block in range(3) for norm in (1, 2)
                          for part in ('weight', 'bias')}
    if name == 'bias':
        assert blocks == {key for key in before if key.startswith('blocks.') and key.endswith('bias')}


def test_norm_tuning_takes_nbn_with_its_alpha_and_frozen_batch_norm_keeps_its_statistics():
    model = add_nbn(timm.create_model('test_vit', num_classes=3))
    assert 'blocks.5.norm1.scale.alpha' in create_tuning('norm', {}).learns(model)
    net = timm.create_model('test_efficientnet', num_classes=3)
    apply_tuning(net, 'lora', {'target_modules': ['conv_pw'], 'r': 2})
    learn_only_tuned(net, 'lora', {'target_modules': ['conv_pw'], 'r': 2})
    before = {key: value.clone() for key, value in net.state_dict().items() if 'running' in key}
    net.train()(torch.randn(2, 3, 64, 64))
    assert before and all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


@torch.no_grad()
def test_adaptformer_is_a_bottleneck_beside_the_mlp():
    """Beside LIFT's `Peft_ViT` (661ead9) in float64, with random parameters, class token, with and without a norm in
    front: logits differ by at most 4.9e-15 of 14.4, gradients of all parameters of the adapters by 5.3e-15 and of the
    cosine head by 2.7e-15; the start of `down` is bit-identical under one seed.
    """
    model, x = tuned('adaptformer', {'width': 4}), torch.randn(5, 17, 24)
    block = model.blocks[1]
    adapter: AdaptFormer = block.adaptformer
    after_attention = x + block.attn(block.norm1(x))
    normed = F.layer_norm(after_attention, (24,), adapter.norm.weight, adapter.norm.bias)
    added = adapter.scale * adapter.up(torch.relu(adapter.down(normed)))
    expected = after_attention + block.mlp(block.norm2(after_attention)) + added
    torch.testing.assert_close(block(x), expected)
    fresh = apply_tuning(vit(), 'adaptformer', {})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(images), vit()(images))  # it begins as the network


def test_the_width_of_an_adapter_follows_the_classes_as_in_lift():
    """For ImageNet-LT, Places-LT, iNaturalist 2018 and CIFAR-100 on twelve blocks, from LIFT's formula."""
    assert [default_width(classes, 12) for classes in (1000, 365, 8142, 100, 24, 5)] == [32, 8, 256, 4, 1, 1]


@pytest.mark.parametrize('pool', ['token', 'avg'])
@torch.no_grad()
def test_prompts_stand_behind_the_tokens_of_each_block(pool):
    """Beside LIFT's `Peft_ViT` with `vpt_deep` and `vpt_shallow` in float64: logits differ by at most 7.1e-15 of 15.6,
    gradients of the prompts by 4.4e-16; their start is bit-identical under one seed.
    """
    of_model = dict(global_pool=pool, class_token=pool == 'token')
    images = torch.randn(2, 3, 32, 32)
    for deep in (True, False):
        model = tuned('vpt', {'length': 3, 'deep': deep}, **of_model)
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        number = x.shape[1]
        for block in model.blocks:
            if block.prompts is not None:
                x = torch.cat([x[:, :number], block.prompts.expand(2, -1, -1)], dim=1)
            x = Block.forward(block, x)
        torch.testing.assert_close(model(images), model.forward_head(model.norm(x[:, :number])))
        assert sum(block.prompts is not None for block in model.blocks) == (3 if deep else 1)
        plain = with_head(vit(**of_model), 'cosine', {'scale': 25.0})
        plain.head.weight = model.head.weight
        with without_prompts(model):
            assert torch.equal(model(images), plain(images))
        assert not torch.equal(model(images), plain(images))


@pytest.mark.parametrize('head', ['linear', 'cosine', 'rectified'])
@torch.no_grad()
def test_lora_merges_into_the_weights_and_leaves_the_head(head):
    model = apply_tuning(with_head(vit(), head, {}), 'lora', {'r': 2, 'lora_alpha': 2})
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(parameter, std=0.3)
    images, weight = torch.randn(2, 3, 32, 32), model.blocks[0].attn.qkv.base_layer.weight.clone()
    merged = deployed(model)
    torch.testing.assert_close(merged(images), model(images), rtol=1e-4, atol=1e-5)
    plain = vit()
    if head == 'cosine':
        assert type(merged.head) is CosineLinear
        plain = with_head(plain, head, {})
    plain.load_state_dict(merged.state_dict(), strict=True)  # keys of timm's again
    lora = model.blocks[0].attn.qkv
    change = lora.lora_B['default'].weight @ lora.lora_A['default'].weight
    torch.testing.assert_close(merged.blocks[0].attn.qkv.weight, weight + change)


@pytest.mark.parametrize('head', ['cosine', 'rectified', 'cosplus'])
def test_lora_does_not_take_a_head_that_is_not_linear(head):
    model = with_head(vit(), head, {})
    assert not isinstance(model.head, nn.Linear)
    with pytest.raises(InputError, match='peft cannot put lora into VisionTransformer'):
        apply_tuning(model, 'lora', {'target_modules': ['head']})


@pytest.mark.parametrize('name, kwargs, message', [
    ('lora', {'kind': 'lorra'}, 'kind=lorra.*lora'),
    ('lora', {'rank': 4}, 'rank'),
    ('lora', {'r': 0}, 'r=0'), ('lora', {'r': 2.5}, 'r=2.5'), ('lora', {'r': 10 ** 10}, 'r=10000000000'),
    ('lora', {'lora_alpha': 0}, 'lora_alpha=0: give a number above 0'), ('lora', {'lora_alpha': math.nan}, 'alpha=nan'),
    ('lora', {'lora_dropout': -0.1}, 'lora_dropout=-0.1: give a number from 0 to less than 1'),
    ('lora', {'lora_dropout': 1}, 'lora_dropout=1'), ('lora', {'use_rslora': 'false'}, 'give True or False'),
    ('lora', {'rank_pattern': {'qkv': 0}}, 'rank_pattern=0'), ('lora', {'alpha_pattern': {'qkv': -1}}, 'pattern=-1'),
    ('lora', {'kind': 'lokr', 'module_dropout': 2}, 'module_dropout=2'), ('lora', {'kind': 'oft', 'r': -1}, 'r=-1'),
    ('lora', {'kind': 'vera', 'd_initial': math.inf}, 'd_initial=inf'),
    ('lora', {'target_modules': '*('}, 'peft cannot put lora.*target_modules=.*'),
    ('lora', {'target_modules': 3}, 'peft cannot put lora.*target_modules=3'),
    ('lora', {'bias': 'foo'}, 'peft cannot put lora.*bias=foo'),
    ('adaptformer', {'width': 10 ** 10}, 'width=10000000000'), ('vpt', {'length': 10 ** 11}, 'length=100000000000'),
    ('lora', {'modules_to_save': ['head']}, 'the classifier is trained in any case'),
    ('lora', {'target_modules': []}, 'peft cannot put lora.*target_modules'),
    ('adaptformer', {'width': 0}, 'width=0'),
    ('adaptformer', {'dim': 3}, "no setting 'dim'|has no .*dim"),
    ('vpt', {'length': 'many'}, 'length=many'),
])
def test_wrong_settings_are_one_sentence(name, kwargs, message):
    with pytest.raises(InputError, match=message):
        apply_tuning(vit(), name, kwargs)


@pytest.mark.parametrize('head, settings', [('cosine', {'scale': math.inf}), ('cosplus', {'gamma': math.nan}),
                                            ('cosplus', {'gamma': -1}), ('cosplus', {'gamma': 'x'})])
def test_numbers_that_mean_nothing_to_a_head_are_refused(head, settings):
    with pytest.raises(InputError, match='give a number (above|from) 0'):
        with_head(vit(), head, settings)


@pytest.mark.parametrize('name, kwargs', [
    ('beit_base_patch16_224', dict(depth=1, embed_dim=24, num_heads=2)),
    ('eva02_tiny_patch14_224', dict(depth=1, embed_dim=24, num_heads=2))])
def test_lora_is_refused_where_a_network_reads_weights_past_the_layer(name, kwargs):
    with pytest.raises(InputError, match="reads the weight of '.*qkv|q_proj.*' without calling the layer"):
        apply_tuning(timm.create_model(name, num_classes=3, **kwargs), 'lora', {})


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_lora_goes_into_a_network_of_another_type(dtype):
    assert 'blocks.0.attn.qkv.lora_A.default.weight' in apply_tuning(vit().to(dtype), 'lora', {'r': 2}).state_dict()


def test_statistics_that_cannot_be_frozen_are_refused():
    model = apply_tuning(timm.create_model('levit_128s', num_classes=3), 'lora', {'target_modules': r'.*qkv\.linear'})
    with pytest.raises(InputError, match='would let the statistics of BatchNorm1d move in Levit'):
        learn_only_tuned(model, 'lora', {'target_modules': r'.*qkv\.linear'})


def test_a_network_of_chance_is_not_tuned(folder, tmp_path):
    given = command(folder, tmp_path, '--tune', 'norm', '--epochs', '1')
    at = given.index('--pretrained-path')
    with pytest.raises(InputError, match='--tune norm trains a small part .* give --pretrained,'):
        train(given[:at] + given[at + 2:])


def test_an_adapter_brings_its_format_and_its_classes_and_takes_no_other_network(folder, tmp_path, monkeypatch):
    train([*command(folder, tmp_path), '--tune', 'norm', '--epochs', '1', '--mean', '0.9', '0.9', '0.9',
           '--experiment', 'run'])
    file = str(tmp_path / 'run' / 'adapter.safetensors')
    whole = opening.open_trained(str(tmp_path / 'run' / 'last.pth.tar'))

    def plain(*args, **kwargs) -> nn.Module:
        model = timm.create_model(MODEL, img_size=32, num_classes=5)
        model.load_state_dict(read_checkpoint(folder / 'base.safetensors'))
        return model

    monkeypatch.setattr(opening, 'create_model', plain)  # instead of a download
    again = opening.open_trained(file)
    assert again.input == whole.input and again.input.mean == (0.9, 0.9, 0.9)
    assert again.classes.names == whole.classes.names == ('ant', 'bee', 'cat')
    assert str(tmp_path) not in Path(file).read_bytes().decode('latin1')  # no place on the machine
    for other in ({'add_nbn': True}, {'model_kwargs': {'depth': 3}}, {'num_classes': 4}):
        with pytest.raises(InputError, match='says itself what its network is'):
            opening.open_trained(file, **other)
    with pytest.raises(InputError, match='is no checkpoint file, so there are no averaged weights'):
        opening.open_trained(file, use_ema=True)


@pytest.mark.parametrize('name', ['adaptformer', 'vpt'])
def test_other_networks_are_refused(name):
    with pytest.raises(InputError, match='plain blocks of timm'):
        apply_tuning(timm.create_model('test_convnext'), name, {})


def test_class_vectors_start_the_classifier_at_unit_length():
    model, vectors = with_head(vit(), 'cosine', {'scale': 25.0}), torch.randn(6, 24) * 3
    start_from_vectors(model, vectors)
    torch.testing.assert_close(model.head.weight.data, F.normalize(vectors, dim=1))
    with pytest.raises(InputError, match=r'are \[5, 24\], and the classifier is \[6, 24\]'):
        start_from_vectors(model, vectors[:5])
    vectors[2] = 0
    with pytest.raises(InputError, match='label 2 is zero'):
        start_from_vectors(model, vectors)


@pytest.mark.parametrize('name, kwargs', WAYS)
@torch.no_grad()
def test_an_adapter_file_goes_onto_the_plain_network(name, kwargs, tmp_path):
    model, images, file = tuned(name, kwargs), torch.randn(2, 3, 32, 32), tmp_path / 'adapter.safetensors'
    about = AdapterFile('vit', 6, name, kwargs, 'cosine', {'scale': 25.0})
    save_adapter(model, file, about)
    plain = vit()
    plain.reset_classifier(9)
    whole = sum(value.nbytes for value in plain.state_dict().values())
    assert file.stat().st_size < whole / 3
    assert read_adapter(file).tune == name
    assert torch.equal(load_adapter(plain, file)(images), model(images))

    other = vit()
    other.patch_embed.proj.weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match='trained on other weights'):
        load_adapter(other, file)


def test_a_damaged_or_foreign_file_is_no_adapter(tmp_path):
    file = tmp_path / 'adapter.safetensors'
    save_adapter(tuned('vpt', {}), file, AdapterFile('vit', 6, 'vpt', {}, 'cosine', {'scale': 25.0}))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match='damaged'):
        load_adapter(vit(), file)
    save_weights(vit().state_dict(), file)
    assert read_adapter(file) is None
    with pytest.raises(InputError, match='is no file of an adapter'):
        load_adapter(vit(), file)


def metadata(file: Path) -> dict[str, str]:
    with safetensors.safe_open(file, framework='pt') as content:
        return content.metadata()


@pytest.mark.parametrize('what, value', [
    ('num_classes', '6'), ('num_classes', None), ('model', 7), ('tune', ['vpt']), ('tune_kwargs', 5), ('head', []),
    ('head_kwargs', []), ('model_kwargs', 3), ('record', [1]), ('unknown', 1)])
def test_what_an_adapter_says_is_checked(what, value, tmp_path):
    file = tmp_path / 'adapter.safetensors'
    about = AdapterFile('vit', 6, 'vpt', {}, 'cosine', {'scale': 25.0})
    save_adapter(tuned('vpt', {}), file, about)
    weights, told = safetensors.torch.load_file(file), json.loads(metadata(file)['nbn_timm_adapter'])
    text = json.dumps(told | {what: value})
    digest = hashlib.sha256(text.encode()).hexdigest()
    safetensors.torch.save_file(weights, file, metadata(file) | {
        'nbn_timm_adapter': text, 'nbn_timm_adapter_sha256': digest})
    with pytest.raises(InputError, match=f'says of its adapter is malformed .*{what}'):
        read_adapter(file)


def test_a_wrong_bit_of_what_an_adapter_says_and_classes_that_it_has_not(tmp_path):
    file = tmp_path / 'adapter.safetensors'
    about = AdapterFile('vit', 6, 'vpt', {}, 'cosine', {'scale': 25.0})
    save_adapter(tuned('vpt', {}), file, about)
    data = file.read_bytes()
    place = data.index(b'25.0')
    for position in (place, data.index(b'_adapter_sha256')):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])
        with pytest.raises(InputError, match='malformed .it does not have the digest that was written with it'):
            read_adapter(file)
    save_adapter(tuned('vpt', {}), file, replace(about, num_classes=99999999))
    with pytest.raises(InputError, match='said to be of 99999999 classes and has no classifier of so many'):
        load_adapter(vit(), file)


# Runs ----------------------------------------------------------------------------------------------------------------

MODEL = 'test_vit'


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Class folders of three classes, and `base.safetensors`, weights to begin with."""
    root, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for split, number in (('train', 4), ('test', 2)):
        for label, kind in enumerate(('ant', 'bee', 'cat')):
            (root / 'own' / split / kind).mkdir(parents=True)
            for index in range(number):
                pixels = rng.normal(60 + 60 * label, 40, (40, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / 'own' / split / kind / f'{index}.png')
    torch.manual_seed(0)
    save_weights(timm.create_model(MODEL, img_size=32, num_classes=5).state_dict(), root / 'base.safetensors')
    return root


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return ['--dataset', 'folder', '--data-dir', str(folder / 'own'), '--img-size', '32', '--workers', '0', '--device',
            'cpu', '--batch-size', '6', '--lr', '0.05', '--output', str(output), '--model', MODEL, '--model-kwargs',
            'img_size=32', '--pretrained-path', str(folder / 'base.safetensors'), '--no-report', '--head', 'cosine',
            '--head-kwargs', 'scale=25', '--loss', 'logit_adjusted', *more]


def state(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / 'last.pth.tar')['state_dict']


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adaptformer', 'lora'])
def test_a_run_that_is_resumed_ends_with_the_same_weights(name, folder, tmp_path, monkeypatch):
    def run(experiment: str, epochs: int, *more: str) -> dict[str, torch.Tensor]:
        train([*command(folder, tmp_path), '--tune', name, '--experiment', experiment, '--epochs', str(epochs),
               '--sched', 'constant', '--head-start', 'class_means', *more])
        return state(tmp_path / experiment)

    whole = run('whole', 2)
    run('half', 1)
    resumed = run('half', 2, '--resume', 'auto')
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)

    base = read_checkpoint(folder / 'base.safetensors')
    kept = {key: value for key, value in whole.items() if key.replace('.base_layer', '') in base}
    assert all(torch.equal(value, base[key.replace('.base_layer', '')]) for key, value in kept.items()
               if not key.startswith('head.'))

    trained = opening.open_trained(str(tmp_path / 'whole' / 'last.pth.tar'))
    assert type(trained.model.head) is CosineLinear and trained.model.head.scale == 25
    plain = timm.create_model(MODEL, img_size=32, num_classes=5)
    plain.load_state_dict(base)
    monkeypatch.setattr(opening, 'create_model', lambda *args, **kwargs: plain)  # instead of a download
    again = opening.open_trained(str(tmp_path / 'whole' / 'adapter.safetensors'))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.model(images), trained.model(images))


def test_the_classifier_starts_with_the_means_of_the_features(folder, tmp_path):
    """As LIFT's `init_head_class_mean`: shorter side to the size of the input, centre crop, mean, unit length; with
    --lr 0 the run ends with what it began with.
    """
    train([*command(folder, tmp_path), '--tune', 'vpt', '--epochs', '1', '--lr', '0', '--head-start', 'class_means',
           '--experiment', 'means'])
    model = timm.create_model(MODEL, img_size=32, num_classes=5)
    model.load_state_dict(read_checkpoint(folder / 'base.safetensors'))
    cfg, means = model.eval().pretrained_cfg, []
    for kind in ('ant', 'bee', 'cat'):
        pictures = [np.asarray(Image.open(file).crop((0, 4, 32, 36))) for file in
                    sorted((folder / 'own' / 'train' / kind).iterdir())]
        images = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(cfg[part])[:, None, None] for part in ('mean', 'std'))
        with torch.no_grad():
            features = model.forward_head(model.forward_features((images - mean) / std), pre_logits=True)
        means.append(features.mean(dim=0))
    torch.testing.assert_close(state(tmp_path / 'means')['head.weight'], F.normalize(torch.stack(means), dim=1),
                               rtol=1e-4, atol=1e-5)


def test_class_vectors_come_from_a_file(folder, tmp_path):
    vectors = torch.randn(3, 64)
    safetensors.torch.save_file({'vectors': vectors}, tmp_path / 'text.safetensors')
    train([*command(folder, tmp_path), '--tune', 'norm', '--epochs', '1', '--lr', '0', '--head-start', 'file',
           '--head-file', str(tmp_path / 'text.safetensors'), '--experiment', 'text'])
    torch.testing.assert_close(state(tmp_path / 'text')['head.weight'], F.normalize(vectors, dim=1))
    with pytest.raises(InputError, match='give it with --head-file'):
        train([*command(folder, tmp_path), '--head-start', 'file', '--experiment', 'none', '--epochs', '1'])


def test_tuning_is_not_for_second_stages_and_not_beside_freezing():
    with pytest.raises(InputError, match='--tune has no effect with --freeze'):
        parse_train(['--dataset', 'digits_lt', '--model', MODEL, '--tune', 'bias', '--freeze', 'blocks.1'])


def test_a_rectified_head_can_be_asked_for():
    assert type(with_head(vit(), 'rectified', {}).head) is RectifiedLinear
    with pytest.raises(InputError, match="no setting 'scale'"):
        with_head(vit(), 'rectified', {'scale': 3.0})
    with pytest.raises(InputError, match='not one linear or cosine classifier'):
        with_head(timm.create_model('resnet32_ride'), 'cosine', {})


def tiny_run(folder: Path, flags: list[str]) -> None:
    """One epoch on six pictures of two classes, into `run` of the folder."""
    for label in range(2):
        (folder / 'own' / str(label)).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(np.full((32, 32, 3), 40 * label + index, dtype=np.uint8)).save(
                folder / 'own' / str(label) / f'{index}.png')
    train(['--dataset', 'folder', '--data-dir', str(folder / 'own'), '--img-size', '32', '--epochs', '1',
           '--batch-size', '6', '--workers', '0', '--device', 'cpu', '--no-report', '--output', str(folder),
           '--experiment', 'run', *flags])


@pytest.mark.parametrize('flags', [
    ['--model-kwargs', 'head=cosplus', "head_kwargs={'scale': 10, 'gamma': 0.5}"],
    ['--head', 'cosplus', '--head-kwargs', 'scale=10', 'gamma=0.5']])
def test_a_record_says_what_weights_do_not_show(flags, tmp_path):
    """Weights of a cosplus classifier look as those of a cosine, for which they were taken, with other answers."""
    tiny_run(tmp_path, ['--model', 'resnet20', *flags])
    trained = opening.open_trained(str(tmp_path / 'run' / 'last.pth.tar'))
    head = trained.model.get_classifier()
    assert isinstance(head, CosPlusLinear) and (head.scale, head.gamma) == (10, 0.5)
    assert trained.model_args == {'head': 'cosplus', 'head_kwargs': {'scale': 10, 'gamma': 0.5}}


@pytest.mark.parametrize('model, head', [
    ('resnet18', 'cosine'), ('resnet18', 'bottleneck'), ('resnet18', 'rectified'), ('resnet20', 'rectified'),
    ('resnet20_nbn', 'cosine'), ('resnet20_nbn', 'bottleneck')])
def test_a_network_with_another_head_is_opened_with_its_record_and_without(model, head, tmp_path):
    """The head was put in twice, by the record and by the weights, or given to a constructor that knows none."""
    tiny_run(tmp_path, ['--model', model, '--head', head])
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    weights = read_state_dict(checkpoint)
    torch.save(weights, tmp_path / 'bare.pth')
    for path in (checkpoint, tmp_path / 'bare.pth'):
        trained = opening.open_trained(str(path))
        assert type(trained.model.get_classifier()) is HEADS[head]
        assert all(torch.equal(value, weights[key]) for key, value in trained.model.state_dict().items())
        assert any('not its scale, so 30 is taken' in note for note in trained.notes) == (
            head == 'cosine' and path != checkpoint)
        if model.startswith('resnet20'):  # a folder for timm is made with these
            again = timm.create_model(model, num_classes=2, **trained.model_args)
            assert type(again.get_classifier()) is HEADS[head]
            if head != 'bottleneck':  # which has a shape of its own
                plain_model(trained)

"""Settings that are handed on: which value is to blame for a refusal, and what is no value's fault."""
import inspect
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import timm
import torch
from timm.optim import get_optimizer_info, list_optimizers

import nbn_timm.models.create
import nbn_timm.models.resnet_cifar
import nbn_timm.models.size_limit
import nbn_timm.training.optim
from nbn_timm.errors import InputError
from nbn_timm.key_values import KeyValue, call, check_number, check_types, key_values, shown
from nbn_timm.layers import NormalizedBatchNorm2d
from nbn_timm.models.create import check_input_size, create_model
from nbn_timm.training.optim import OptimizerSettings, create_optimizer, step_on_stand_ins
from nbn_timm.training.optimizer_limits import check_values
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast


def given(**values: Any) -> list[KeyValue]:
    return key_values('--thing-kwargs', values)


def test_the_setting_without_which_it_would_go_is_to_blame():
    def make(a: int = 1, b: int = 1, c: int = 1) -> int:
        if b == 0:
            raise ValueError('b is 0')
        return a + b + c

    assert call(make, given(a=1, b=2), 'the thing') == 4
    with pytest.raises(InputError, match=r"^the thing cannot take --thing-kwargs b=0 \(b is 0\): correct it"):
        call(make, given(a=1, b=0, c=3), 'the thing')
    with pytest.raises(InputError, match=r"--thing-kwargs d=1 \(TypeError: .*unexpected keyword argument 'd'\)"):
        call(make, given(a=1, d=1), 'the thing')


def test_of_two_settings_that_are_wrong_each_both_are_named():
    def make(a: int = 1, b: int = 1) -> None:
        if 0 in (a, b):
            raise ValueError('there is a 0')

    with pytest.raises(InputError, match=r'cannot take --thing-kwargs a=0 with --thing-kwargs b=0 \(there is a 0\)'):
        call(make, given(a=0, b=0), 'the thing')


def test_what_fails_whatever_the_settings_are_stays_what_it_is():
    def make(a: int = 1) -> None:
        raise OSError('the network is down')

    with pytest.raises(OSError, match='^the network is down$'):
        call(make, given(a=0), 'the thing')

    def download(a: int = 1) -> None:
        raise ValueError('no such file')

    with pytest.raises(ValueError, match='^no such file$') as error:  # without the download it can be made
        call(download, given(a=0), 'the thing', retry=lambda a=1: None)
    assert not isinstance(error.value, InputError)


def test_the_same_thing_said_twice_is_refused():
    with pytest.raises(InputError, match='^--a 1 and --thing-kwargs a=2 say the same of the thing: keep one$'):
        call(dict, [KeyValue('a', 1, '--a 1'), *given(a=2)], 'the thing')


@pytest.mark.parametrize('bug', [AttributeError, IndexError, KeyError, AssertionError, RuntimeError, NameError])
def test_a_bug_of_this_package_keeps_its_traceback_also_where_a_setting_brings_it_out(bug, monkeypatch):
    source = ('def broken(self, *args, gradient="capped", **kwargs):\n'
              '    if gradient == "released":\n        raise error\n')
    scope = {'error': bug('a bug')}
    exec(compile(source, nbn_timm.models.resnet_cifar.__file__, 'exec'), scope)  # a line of this package
    monkeypatch.setattr(nbn_timm.models.resnet_cifar.ResNetCifar, '__init__', scope['broken'])
    with pytest.raises(bug, match='a bug'):
        create_model('resnet20_nbn', model_kwargs={'gradient': 'released'})


def annotated(number: float = 1.0, whole: int = 1, switch: bool = False, text: str = '', maybe: int | None = None,
              pair: tuple[float, float] = (1, 2), mapping: Mapping[str, Any] | None = None, several: Sequence[int] = (),
              anything=None, other: torch.Tensor | float = 0.0) -> None:
    """Parameters of all types that settings have."""


@pytest.mark.parametrize('values', [
    {'number': 1, 'whole': 2, 'switch': 1, 'text': 'x', 'maybe': None, 'pair': [1, 2], 'mapping': {}, 'several': (1,)},
    {'number': 0.5, 'switch': True, 'maybe': 3, 'mapping': None, 'anything': object(), 'other': 'x'},
    {'not_a_parameter': 'x'}])
def test_values_of_the_right_type_pass(values):
    check_types('the thing', given(**values), inspect.signature(annotated).parameters)


@pytest.mark.parametrize(('values', 'wanted'), [
    ({'number': 'abc'}, 'number=abc: give a number'), ({'number': '2'}, "number='2': give a number"),
    ({'number': True}, 'number=True: give a number'), ({'number': float('inf')}, 'number=inf: give a number'),
    ({'number': 10 ** 400}, 'give a number'), ({'whole': 1.5}, 'whole=1.5: give a whole number'),
    ({'switch': 'false'}, 'switch=false: give True or False'), ({'switch': 2}, 'switch=2: give True or False'),
    ({'text': 1}, 'text=1: give text'), ({'maybe': 'x'}, 'maybe=x: give a whole number or None'),
    ({'pair': 0.9}, 'pair=0.9: give several values'), ({'pair': 'ab'}, 'pair=ab: give several values'),
    ({'mapping': 3}, 'mapping=3: give a mapping or None'), ({'whole': None}, 'whole=None: give a whole number')])
def test_values_of_another_type_are_named(values, wanted):
    with pytest.raises(InputError, match=f'^the thing cannot take --thing-kwargs .*{wanted}'):
        check_types('the thing', given(**values), inspect.signature(annotated).parameters)


def test_numbers_out_of_range_are_told_the_range():
    assert check_number('the thing', '--x', 'a', 0.5, high=1) == 0.5
    for value, limits, wanted in (
            (2, dict(high=1), 'a number from 0 to 1'), (1, dict(high=1, below=True), 'a number from 0 to less than 1'),
            (0, dict(above=True), 'a number above 0'), (1.5, dict(low=1, whole=True), 'a whole number from 1'),
            (float('nan'), {}, 'a number from 0'), (10 ** 400, {}, 'a number from 0')):
        with pytest.raises(InputError, match=f'the thing cannot take --x a=.*: give {wanted}$'):
            check_number('the thing', '--x', 'a', value, **limits)


def test_long_values_are_cut():
    assert shown('x' * 1000) == 'x' * 60 + '...'
    assert shown(10 ** 5000) == 'a number of 5000 digits'
    assert len(shown(json.dumps(list(range(10_000))))) < 70


# Models


@pytest.mark.parametrize(('name', 'arguments', 'message'), [
    ('resnet20_nbn', {'model_kwargs': {'gradient': 'release'}},
     r"--model-kwargs gradient=release \(gradient 'release' is unknown.*did you mean 'released'"),
    ('resnet20_nbn', {'model_kwargs': {'drop_rate': 'abc'}}, '--model-kwargs drop_rate=abc: give a number from 0 to 1'),
    ('resnet20_nbn', {'model_kwargs': {'drop_rate': 2}}, '--model-kwargs drop_rate=2: give a number from 0 to 1'),
    ('resnet20_nbn', {'drop': 0.1, 'model_kwargs': {'drop_rate': 0.2}}, 'drop_rate=0.2 and --drop 0.1 say the same'),
    ('resnet20_nbn', {'drop_path': 0.1}, 'cannot take --drop-path 0.1 .TypeError: .*drop_path_rate'),
    ('resnet20_nbn', {'model_kwargs': {'num_classes': 3}}, 'num_classes=3 cannot be set in this way: give --num-class'),
    ('resnet20_nbn', {'model_kwargs': {'pretrained': True}}, 'give --pretrained'),
    ('resnet20_nbn', {'model_kwargs': {'checkpoint_path': 'x'}}, 'give --initial-checkpoint'),
    ('resnet20_nbn', {'model_kwargs': {'features_only': True}}, 'without a classifier'),
    ('resnet20_nbn', {'model_kwargs': {'global_pool': 'nosuch'}}, 'global_pool=nosuch .Invalid pool type: nosuch.'),
    ('test_resnet', {'model_kwargs': {'output_stride': 3}}, 'cannot take --model-kwargs output_stride=3'),
    ('test_vit', {'model_kwargs': {'class_token': 'false'}}, 'class_token=false: give True or False'),
    ('test_vit', {'model_kwargs': {'foo': 1}, 'flags': ('--kd-model-name', '--kd-model-kwargs')},
     '--kd-model-kwargs foo=1')])
def test_a_model_that_cannot_be_made_names_flag_key_and_value(name, arguments, message):
    with pytest.raises(InputError, match=message):
        create_model(name, 4, **arguments)


@pytest.mark.parametrize(('name', 'arguments', 'reason'), [
    ('test_vit', {'embed_dim': 960_000}, 'its weights take more than half of the 1 GB of memory here'),
    ('test_vit', {'embed_dim': 1_000_001}, 'give whole numbers up to 1,000,000'),
    ('test_vit', {'depth': 10 ** 9}, 'give whole numbers up to 1,000,000'),  # timm writes a list of that length first
    ('test_vit', {'depth': 10_000}, 'it has more than 500 modules'),
    ('test_vit', {'img_size': 100_000}, 'its weights take more than half'),
    ('test_vit', {'mlp_ratio': 1e9}, 'its weights take more than half'),
    ('test_vit', {'embed_dim': 999}, 'dim should be divisible by num_heads'),
    ('resnet18', {'in_chans': 999_999}, 'its weights take more than half'),
    ('resnet32_ride', {'num_experts': 1000}, 'give a whole number from 1 to 100')])
def test_a_model_that_would_take_all_memory_or_time_is_refused_before_it_does(name, arguments, reason, monkeypatch):
    monkeypatch.setattr(nbn_timm.models.size_limit, 'machine_memory', lambda: 1e9)
    monkeypatch.setattr(nbn_timm.models.size_limit, 'MOST_MODULES', 500)
    largest, empty = [], torch.empty

    def counting(*size: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*size, **kwargs)
        largest.append(0 if made.is_meta else made.numel())
        return made

    monkeypatch.setattr(torch, 'empty', counting)
    with pytest.raises(InputError, match=f'cannot take --model-kwargs {next(iter(arguments))}=.*{reason}'):
        create_model(name, 4, model_kwargs=arguments)
    assert max(largest, default=0) < 1e6


def test_a_model_without_an_outline_is_limited_while_it_is_made(monkeypatch):
    monkeypatch.setattr(nbn_timm.models.size_limit, 'machine_memory', lambda: 5e6)
    monkeypatch.setattr(nbn_timm.models.create, '_try_outline', lambda *args: None)
    with pytest.raises(InputError, match='cannot take --model-kwargs mlp_ratio=100 .its weights take more than half'):
        create_model('test_vit', 4, model_kwargs={'mlp_ratio': 100})


@pytest.mark.parametrize('settings', [{}, {'drop_rate': 0.1}])
def test_a_model_that_is_too_large_by_itself_is_no_settings_fault(settings, monkeypatch):
    monkeypatch.setattr(nbn_timm.models.size_limit, 'machine_memory', lambda: 1e6)
    with pytest.raises(InputError, match="^model 'test_vit' is too large for this machine .its weights take more than"):
        create_model('test_vit', 4, model_kwargs=settings)


def test_what_fails_without_memory_alone_is_no_fault_of_a_setting(monkeypatch):
    create, asked = timm.create_model, []

    def of_values(name: str, **kwargs: Any) -> torch.nn.Module:
        asked.append(torch.zeros(1).device.type)
        rates = torch.linspace(0, kwargs.get('drop_rate', 0), 3)
        return create(name, **{**kwargs, 'drop_rate': rates[2].item()})

    monkeypatch.setattr(timm, 'create_model', of_values)
    assert create_model('resnet20_nbn', 4, model_kwargs={'drop_rate': 0.25}).drop_rate == 0.25
    assert 'meta' in asked and 'cpu' in asked


def test_the_memory_of_a_process_is_that_of_its_container_or_its_own_limit(tmp_path, monkeypatch):
    memory = nbn_timm.models.size_limit.machine_memory()
    assert 1e8 < memory < math.inf
    (tmp_path / 'none').write_text('max\n')
    (tmp_path / 'some').write_text('50000000\n')
    monkeypatch.setattr(nbn_timm.models.size_limit, '_CONTAINER_LIMITS', [tmp_path / 'none', tmp_path / 'some'])
    assert nbn_timm.models.size_limit.machine_memory() == 5e7


def test_a_constructor_argument_that_has_a_flag_too_is_taken():
    assert create_model('resnet20_nbn', 4, model_kwargs={'drop_rate': 0.25}).drop_rate == 0.25


@pytest.mark.parametrize(('name', 'size', 'message'), [
    ('test_convnext', 8, r"cannot take images of 8x8 \(.*ernel size.*\): give another --img-size, such as its own 160"),
    ('test_vit2', 20, 'cannot take images of 20x20 .*divisible by patch size')])
def test_images_that_a_network_cannot_take_are_told_by_trying_one(name, size, message):
    model = timm.create_model(name, num_classes=4).train()
    frozen = next(module for module in model.modules() if not list(module.children())).eval()
    with pytest.raises(InputError, match=message):
        check_input_size(model, name, (3, size, size))
    assert model.training and not frozen.training  # all modes are as they were


def test_a_network_without_logits_is_refused_and_a_broken_one_is_no_fault_of_the_size(monkeypatch):
    with pytest.raises(InputError, match=r'gives an output of \[1, 64, 2, 2\] for an image, and no logits'):
        check_input_size(timm.create_model('resnet20', num_classes=0, global_pool=''), 'resnet20', (3, 8, 8))
    model = timm.create_model('resnet20', num_classes=4)
    monkeypatch.setattr(model, 'forward', lambda x: torch.zeros(1)[3])
    with pytest.raises(IndexError):
        check_input_size(model, 'resnet20', (3, 8, 8))
    with pytest.raises(InputError, match=r"'resnet20' cannot be used as it was made \(.*correct --model-kwargs a=1"):
        check_input_size(model, 'resnet20', (3, 8, 8), {'a': 1})


# Optimizers


def optimizer(opt: str = 'momentum', device: str = 'cpu', **settings: Any) -> torch.optim.Optimizer:
    flags = {key: settings.pop(key) for key in ('lr', 'weight_decay', 'momentum') if key in settings}
    return create_optimizer(torch.nn.Linear(3, 2, device=device), OptimizerSettings(opt, opt_kwargs=settings, **flags))


@pytest.mark.parametrize(('settings', 'message'), [
    ({'weight_decay_exclude_1d': True}, 'cannot be set in this way: give --decay-1d'),
    ({'foo': 1}, "optimizer 'momentum' has no setting 'foo' .it has dampening"),
    ({'nesterov': 'false'}, 'nesterov=false: give True or False'), ({'dampening': 'x'}, 'dampening=x: give a number'),
    ({'differentiable': True}, 'cannot take --opt-kwargs differentiable=True'),  # seen in a step alone
    ({'eps': 1e-8}, "'momentum' has no setting 'eps'"),  # timm would drop it without a word
    ({'opt': 'adamw', 'betas': 0.5}, 'betas=0.5: give several values'),
    ({'opt': 'adamw', 'betas': (0.9,)}, r'--opt-kwargs betas=\(0.9,\): give 2 numbers from 0 to less than 1'),
    ({'opt': 'adamw', 'betas': (0.9, 0.99, 0.9)}, 'give 2 numbers'),
    ({'opt': 'adamw', 'betas': (0.9, 2)}, 'give 2 numbers'), ({'opt': 'lamb', 'betas': ('a', 1)}, 'give 2 numbers'),
    ({'opt': 'muon', 'betas': (-0.1, 0.9)}, 'give 2 numbers'), ({'opt': 'adan', 'betas': (0.9, 0.9)}, 'give 3 numbers'),
    ({'opt': 'adafactor', 'betas': (0.9, 1.5)}, 'give 2 numbers'),
    ({'opt': 'rmsproptf', 'alpha': 2}, 'alpha=2: give a number from 0 to less than 1'),
    ({'opt': 'muon', 'ns_steps': 0}, 'from 1 to 100'), ({'opt': 'muon', 'ns_steps': 10 ** 9}, 'from 1 to 100'),
    ({'opt': 'lamb', 'max_grad_norm': 0}, 'max_grad_norm=0: give a number above 0'),
    ({'opt': 'adafactor', 'decay_rate': 0.8}, 'decay_rate=0.8: give a number from -1 to 0'),
    ({'opt': 'adafactorbv', 'decay_rate': -0.8}, 'decay_rate=-0.8: give a number from 0 to 1'),
    ({'opt': 'sgdp', 'delta': math.nan}, 'give a number'), ({'opt': 'kron', 'precond_lr': math.inf}, 'give a number'),
    ({'opt': 'lion', 'betas': (0.9, math.nan)}, 'give finite numbers'), ({'opt': 'lars', 'eps': 'x'}, 'give a number'),
    ({'opt': 'lars', 'trust_clip': 'false'}, 'trust_clip=false: give True or False'),  # which would be taken for true
    ({'opt': 'muon', 'fallback_list': 'head'}, 'fallback_list=head: give several values'),
    ({'maximize': True}, 'maximize=True cannot be set in this way: a loss is made smaller'),
    ({'layer_decay_min_scale': 0.5}, 'cannot be set in this way: give --layer-decay too'),
    ({'opt': 'adamw', 'capturable': True}, 'cannot take --opt-kwargs capturable=True'),
    ({'opt': 'adahessian'}, 'needs second derivatives'),
    ({'weight_decay': 1e308}, 'cannot take --weight-decay 1e.308 .*overflow')])
def test_an_optimizer_that_cannot_be_had_names_flag_key_and_value(settings, message):
    with pytest.raises(InputError, match=message):
        optimizer(**settings)


@pytest.mark.parametrize('name', [  # which torch compiles
    pytest.param(name, marks=[pytest.mark.slow] * name.startswith('kron')) for name in list_optimizers()])
def test_every_optimizer_of_timm_trains_and_goes_on_from_a_checkpoint_or_is_refused(name):
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), NormalizedBatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 3))
        return model, create_optimizer(model, OptimizerSettings(name, lr=0.01))

    def train(model: torch.nn.Module, made: torch.optim.Optimizer) -> list[float]:
        losses = []
        for step in range(2):
            torch.manual_seed(step)  # some draw numbers
            loss = torch.nn.functional.cross_entropy(model(images), torch.arange(8) % 3)
            made.zero_grad()
            loss.backward()
            made.step()
            losses.append(loss.item())
        return losses

    if not torch.cuda.is_available() and name.startswith(('bnb', 'fused')):
        with pytest.raises(InputError, match=f'^--opt {name} cannot be had here .*give another --opt'):
            make()
        return
    if name == 'adahessian':
        with pytest.raises(InputError, match='needs second derivatives'):
            make()
        return
    model, made = make()
    begun = model[0].weight.detach().clone()
    train(model, made)
    file = io.BytesIO()
    torch.save({'model': model.state_dict(), 'optimizer': made.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model_again, made_again = make()
    model_again.load_state_dict(saved['model'])
    made_again.load_state_dict(saved['optimizer'])
    after = train(model, made)
    assert after == train(model_again, made_again)
    assert all(map(math.isfinite, after)) and not torch.equal(model[0].weight, begun)


def test_what_optimizers_have_by_default_is_allowed():
    for name in map(str, list_optimizers()):
        if name.startswith(('bnb', 'fused')) or name == 'adahessian':
            continue
        known = nbn_timm.training.optim._parameters(name)
        given = {key: parameter.default for key, parameter in known.items()} | (get_optimizer_info(name).defaults or {})
        check_values(name, key_values('--opt-kwargs', given), known)
    check_values('AdEMAMix', key_values('--opt-kwargs', {'alpha': 5, 'betas': (0.9, 0.99, 0.9999)}), {
        key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default)
        for key, default in (('alpha', 5.0), ('betas', (0.9, 0.999, 0.9999)))})  # of bitsandbytes
    with pytest.raises(InputError, match="'momentum' is 1.5"):
        TrainSettings.of({'momentum': 1.5})


def test_settings_of_an_optimizer_reach_it():
    made = optimizer('adamw', betas=(0.8, 0.9), eps=1e-3)
    assert made.param_groups[0]['betas'] == (0.8, 0.9) and made.param_groups[0]['eps'] == 1e-3
    assert tuple(optimizer('adamw', betas=[0, 0.99]).param_groups[0]['betas']) == (0.0, 0.99)


def test_the_step_on_stand_ins_changes_nothing():
    model = torch.nn.Linear(3, 2)
    made, before = torch.optim.AdamW(model.parameters()), model.weight.detach().clone()
    state = step_on_stand_ins(made)
    assert {number: kept['exp_avg'].shape for number, kept in state.items()} == {0: (2, 3), 1: (2,)}
    assert not made.state and model.weight.grad is None and torch.equal(model.weight, before)


def test_a_bug_in_making_an_optimizer_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(nbn_timm.training.optim, 'step_on_stand_ins', lambda optimizer: optimizer.nosuch)
    with pytest.raises(AttributeError, match='nosuch'):
        optimizer(dampening=0.5)

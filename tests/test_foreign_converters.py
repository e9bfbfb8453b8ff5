"""Code that knows NBN only as a `BatchNorm2d` is stopped before it has changed anything; freezing has a form for NBN.

The converters here do what transformers', detectron2's and apex's do, as far as it matters.
"""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, convert_splitbn_model, freeze_batch_norm_2d
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nbn_timm import InputError, add_nbn, convert_sync_batchnorm, fold_nbn, freeze_nbn
from nbn_timm.layers import CosineLinear, NormalizedBatchNorm2d, RectifiedLinear, nbn_layers
from nbn_timm.layers.frozen import keep_statistics, learn_statistics, unfreeze_nbn
from nbn_timm.second_stages.ncm import CentroidLinear


class Frozen(nn.Module):
    """A frozen BatchNorm of one's own, with buffers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, torch.zeros(size))


class FrozenByComprehension(nn.Module):
    """Whose buffers are made in a frame of its own, before Python 3.12."""

    def __init__(self, size: int) -> None:
        super().__init__()
        [self.register_buffer(name, torch.zeros(size)) for name in ('weight', 'bias', 'running_mean', 'running_var')]


class ForeignSync(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


def write_modules(model: nn.Module) -> None:
    """As transformers' `replace_batch_norm`: past `add_module`, straight into the dictionary."""
    for name, module in model.named_children():
        if isinstance(module, nn.BatchNorm2d):
            new = Frozen(module.num_features)
            with torch.no_grad():
                new.weight.copy_(module.weight)
            model._modules[name] = new
        if list(module.children()):
            write_modules(module)


class Converter:
    """As detectron2's `FrozenBatchNorm2d.convert_frozen_batchnorm` and apex' `convert_syncbn_model`."""

    @classmethod
    def frozen(cls, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            new = Frozen(module.num_features)
            new.weight.data = module.weight.data.clone()
            return new
        for name, child in module.named_children():
            new_child = cls.frozen(child)
            if new_child is not child:
                module.add_module(name, new_child)
        return module

    @classmethod
    def sync(cls, module: nn.Module) -> nn.Module:
        new = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            new = ForeignSync(module.num_features)
        for name, child in module.named_children():
            new.add_module(name, cls.sync(child))
        return new


def flat(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition('.')
            model.get_submodule(parent)._modules[child] = Frozen(module.num_features)


def flat_by_comprehension(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition('.')
            model.get_submodule(parent)._modules[child] = FrozenByComprehension(module.num_features)


def frozen_copy(norm: nn.BatchNorm2d) -> nn.Module:
    new = Frozen(norm.num_features)
    new.weight.copy_(norm.weight.detach())
    return new


def by_a_helper(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            model._modules[name] = frozen_copy(child)
        by_a_helper(child)


def flat_by_a_helper(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, frozen_copy(module))


def by_apply(model: nn.Module) -> None:
    def convert(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                module._modules[name] = frozen_copy(child)

    model.apply(convert)


class Trainer:
    """No module, with a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def freeze(self) -> None:
        for name, child in list(self.model.named_modules()):
            if isinstance(child, nn.BatchNorm2d):
                parent, _, last = name.rpartition('.')
                setattr(self.model.get_submodule(parent), last, frozen_copy(child))


def of_an_object(model: nn.Module) -> None:
    Trainer(model).freeze()


MODEL: nn.Module | None = None


def freeze_the_global() -> None:
    for name, child in list(MODEL.named_modules()):
        if isinstance(child, nn.BatchNorm2d):
            parent, _, last = name.rpartition('.')
            MODEL.get_submodule(parent)._modules[last] = frozen_copy(child)


def of_a_global(model: nn.Module) -> None:
    global MODEL
    MODEL = model
    freeze_the_global()


CONVERTERS = [nn.SyncBatchNorm.convert_sync_batchnorm, timm_convert_sync_batchnorm, convert_splitbn_model,
              freeze_batch_norm_2d, write_modules, Converter.frozen, Converter.sync, flat,
              flat_by_comprehension, by_a_helper, flat_by_a_helper, by_apply, of_an_object, of_a_global]


class Nested(nn.Module):
    """Plain layers in a part of their own come before those with NBN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 6, 1), NormalizedBatchNorm2d(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(x))


@pytest.mark.parametrize('convert', CONVERTERS, ids=lambda convert: f'{convert.__module__}.{convert.__qualname__}')
def test_a_converter_is_stopped_before_it_has_changed_anything(convert):
    model = copy.deepcopy(Nested())
    before = [id(module) for module in model.modules()]
    with pytest.raises(InputError, match="'body.1'.*would drop its normalisation"):
        convert(model)
    assert [id(module) for module in model.modules()] == before
    convert(model.stem)  # a part without NBN, and a folded model, are none of our business
    convert(fold_nbn(Nested()))


def test_layers_made_beside_nbn_are_not_stopped():
    def attach(model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.SyncBatchNorm(6), Frozen(6), nn.BatchNorm2d(6))

    model = attach(Nested())
    model[0].stem[1] = frozen_copy(model[0].stem[1])  # of one plain layer, by hand


def test_nbn_is_not_replaced_by_a_layer_made_elsewhere():
    model, frozen = Nested(), Frozen(6)
    with pytest.raises(InputError, match='freeze_nbn'):
        model.body[1] = frozen
    assert isinstance(model.body[1], NormalizedBatchNorm2d)


class Forwarding(nn.Module):
    """A wrapper that gives the attributes of what is in it."""

    def __init__(self, inner: nn.Module, registered: bool = True) -> None:
        super().__init__()
        if registered:
            self.inner = inner
        else:
            object.__setattr__(self, 'inner', inner)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def compiled(layer: nn.Module) -> nn.Module:
    return torch.compile(layer, backend='eager')


def unregistered(layer: nn.Module) -> nn.Module:
    return Forwarding(layer, registered=False)


WRAPPERS = [Forwarding, unregistered, checkpoint_wrapper, compiled, torch.fx.symbolic_trace, torch.jit.script]


@pytest.mark.parametrize('wrap', WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_wrapper_that_keeps_nbn_takes_its_place(wrap):
    model = trained().eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        model[3].weight.uniform_(0.5, 2)
        expected = model(x)
        model[3] = wrap(model[3])
        torch.testing.assert_close(model(x), expected)


def test_a_wrapper_of_nbn_on_a_layer_norm_takes_its_place():
    model = add_nbn(nn.Sequential(nn.LayerNorm(5)), ['0'])
    model[0] = Forwarding(model[0])


class Affine(nn.Module):
    """What a BatchNorm amounts to, without statistics."""

    def __init__(self, weight: torch.Tensor, var: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer('factor', weight.detach() * torch.rsqrt(var + 1e-5))


def plain_copy(norm: NormalizedBatchNorm2d, weight: torch.Tensor) -> nn.Module:
    plain = nn.BatchNorm2d(norm.num_features)
    plain.weight.data = weight.detach().clone()
    return plain


def affine_copy(norm: NormalizedBatchNorm2d, weight: torch.Tensor) -> nn.Module:
    return Affine(weight, norm.running_var)


def rounded_copy(norm: NormalizedBatchNorm2d, weight: torch.Tensor) -> nn.Module:
    return plain_copy(norm, weight).bfloat16()


def test_layers_without_values_take_the_place_of_nbn():
    """As while a model is exported, or made without memory."""
    model = Nested()
    nn.init.uniform_(model.body[1].weight, 0.5, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = nn.BatchNorm2d(6)
        model.body[1] = fake
    assert model.body[1] is fake
    with FakeTensorMode():
        model = Nested()
        model.body[1] = nn.BatchNorm2d(6)


@pytest.mark.parametrize('copied', [plain_copy, rounded_copy, affine_copy], ids=lambda copied: copied.__name__)
def test_a_layer_with_the_raw_vector_does_not_take_the_place_of_trained_nbn(copied):
    model = Nested()
    norm = model.body[1]
    nn.init.uniform_(norm.running_var, 0.5, 2)
    model.body[1] = copied(norm, norm.weight)  # of an untrained one, which is as any new layer
    model.body[1] = norm
    nn.init.uniform_(norm.weight, 0.5, 2)
    with pytest.raises(InputError, match="'1'.*would drop its normalisation"):
        model.body[1] = copied(norm, norm.weight)
    assert model.body[1] is norm
    model.body[1] = copied(norm, norm.effective_affine()[0])  # what it computes
    model.body[1] = norm
    for other in (nn.Identity(), nn.BatchNorm2d(6), nn.GroupNorm(2, 6), norm.fuse(), None):
        model.body[1] = other
        model.body[1] = norm


@pytest.mark.parametrize('kind', [nn.SyncBatchNorm, nn.BatchNorm2d, ForeignSync])
def test_nbn_does_not_become_another_class(kind):
    norm = NormalizedBatchNorm2d(3)
    with pytest.raises(InputError, match=f'^{kind.__name__} as the class of an NBN layer would drop'):
        norm.__class__ = kind
    assert type(norm) is NormalizedBatchNorm2d
    norm.__class__ = type('Sharded', (NormalizedBatchNorm2d,), {})  # as torch's fully_shard and parametrisations do


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = add_nbn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6),
                                  nn.BatchNorm2d(6)), ['3', '4'], share_alpha=False)
    nn.init.normal_(model[3].bias)
    model(torch.randn(4, 3, 5, 5))
    return model


@pytest.mark.parametrize('alpha_trainable', [False, True])
def test_frozen_layers_keep_values_and_keys_while_the_rest_learns(alpha_trainable):
    model = trained()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(model).eval()(x)
    assert freeze_nbn(model, alpha_trainable) is model
    assert list(model.state_dict()) == list(before) and len(nbn_layers(model)) == 2
    assert torch.equal(model.train()(x), expected)  # in training mode too
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    alphas = {'3.scale.alpha', '4.scale.alpha'} if alpha_trainable else set()
    assert trainable == {'0.weight', '0.bias', '2.weight', '2.bias'} | alphas
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable
    model.requires_grad_(True)  # as recipes for linear probes do at the end
    model.zero_grad()
    model(x).square().sum().backward()
    assert model[3].weight.grad is None and model[3].scale.alpha.grad is not None
    assert model[1].weight.grad is None and model[1].bias.grad is None  # plain BatchNorm


@pytest.mark.parametrize('make', [lambda: nn.BatchNorm1d(3), lambda: nn.BatchNorm2d(3), lambda: BatchNormAct2d(3),
                                  lambda: nn.BatchNorm2d(3, affine=False)])
def test_frozen_plain_layers_compute_what_they_did_and_do_not_learn(make):
    torch.manual_seed(0)
    layer = make()
    for value in layer.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2)
    x = torch.randn((4, 3) if isinstance(layer, nn.BatchNorm1d) else (4, 3, 2, 2), requires_grad=True)
    expected = copy.deepcopy(layer).eval()(x)
    freeze_nbn(layer).train().requires_grad_(True)
    for form in (layer, torch.jit.script(layer)):
        assert torch.equal(form(x), expected)
        form(x).sum().backward()
        assert x.grad is not None and all(parameter.grad is None for parameter in layer.parameters())


def test_thawed_layers_take_the_mode_of_the_network_around_them():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), NormalizedBatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3)))
    for fix, undo in ((freeze_nbn, unfreeze_nbn), (keep_statistics, learn_statistics)):
        model.train()
        model[1].eval()
        undo(fix(model))
        assert [layer.training for layer in (*model[0], *model[1])] == [True, True, False]


def test_a_frozen_model_saves_loads_copies_folds_and_stays_frozen():
    model = freeze_nbn(trained())
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    plain = trained()
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(plain.eval()(x), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), convert_sync_batchnorm(model)):
        assert torch.equal(copied.train()(x), expected)
    torch.testing.assert_close(fold_nbn(model).eval()(x), expected)
    assert freeze_nbn(model) is model


def test_freezing_keeps_the_mode_of_dropout_and_a_shared_alpha():
    model = freeze_nbn(add_nbn(timm.create_model('efficientnet_b0', num_classes=2))).train()
    layer = list(nbn_layers(model).values())[-1]
    assert not layer.training and layer.act.training and layer.drop.training
    assert len({layer.scale for layer in nbn_layers(model).values()}) == 1


def test_what_cannot_be_frozen_is_named_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(3), NormalizedBatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(InputError, match="'2' is a BatchNorm2d without running statistics"):
        freeze_nbn(model)
    assert type(model[0]) is nn.BatchNorm2d and type(model[1]) is NormalizedBatchNorm2d
    with pytest.raises(InputError, match='SyncBatchNorm, which cannot be frozen: freeze before'):
        freeze_nbn(convert_sync_batchnorm(model))


@pytest.mark.parametrize('kind', [RectifiedLinear, CosineLinear, CentroidLinear])
def test_heads_that_are_not_linear_do_not_pass_for_linear(kind):
    torch.manual_seed(0)
    head = kind(4, 3)
    assert not isinstance(head, nn.Linear)  # adapters would merge W + dW into what is no W x + b
    assert head.weight.shape == (3, 4) and (head.in_features, head.out_features) == (4, 3)
    keys = {RectifiedLinear: ['weight', 'bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked'],
            CosineLinear: ['weight'], CentroidLinear: ['weight', 'bias', 'mean']}
    assert list(head.state_dict()) == keys[kind]
    if kind is not CosineLinear:
        torch.manual_seed(0)
        plain = nn.Linear(4, 3)
        assert torch.equal(head.weight, plain.weight) and torch.equal(head.bias, plain.bias)

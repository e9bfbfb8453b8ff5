"""The training loop and its parts, against plain torch."""
import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_ranks
from formats import DIGITS_LT
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch import nn

import nbn_timm.training.run_checkpoint as checkpoints
from nbn_timm.cli.train import parse_train
from nbn_timm.data import ArraySamples, ClassCounts, Splits
from nbn_timm.errors import InputError
from nbn_timm.layers import RectifiedLinear, nbn_layers
from nbn_timm.losses import create_loss
from nbn_timm.mixing import Mixing, TimmMixup
from nbn_timm.models.create import create_model
from nbn_timm.training.batch import BatchPlan, BatchSettings, plan_batch
from nbn_timm.training.build import build_train_loader
from nbn_timm.training.distributed import World, close_world, init_world, seed_everything
from nbn_timm.training.log import RunLog, setup_logging
from nbn_timm.training.loop import LoopSettings, batched, compute_loss, train_one_epoch, train_step
from nbn_timm.training.optim import AverageSettings, OptimizerSettings, create_optimizer
from nbn_timm.training.plan import Plan, input_format
from nbn_timm.training.profile import NoProfile
from nbn_timm.training.progress import Progress
from nbn_timm.training.run_checkpoint import (
    BEST,
    LAST,
    Best,
    checkpoint_state,
    find_common_resume,
    find_resume,
    resume_run,
    save_checkpoint,
)
from nbn_timm.training.task import evaluation_model, prepare_task

pytestmark = pytest.mark.fast
CPU = torch.device('cpu')
WORLD = World(CPU)
COUNTS = ClassCounts((5, 3, 2), ('a', 'b', 'c'), 'a test')


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_task(bias: bool = True) -> ClassificationTask:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias))
    return ClassificationTask(model, create_loss('cross_entropy'), device=CPU, verbose=False)


def make_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, 2, 2), torch.randint(3, (size,))


def run_epoch(task, loader, optimizer=None, settings=None, **kwargs):
    settings = settings or LoopSettings()
    updates = -(-len(loader) // settings.accum_steps)
    optimizer = optimizer or torch.optim.SGD(task.parameters(), lr=0.1)
    progress = kwargs.pop('progress', Progress(1, updates, interval=50))
    return train_one_epoch(task, loader, optimizer, settings, progress, WORLD, kwargs.pop('epoch', 0), **kwargs)


@pytest.mark.parametrize('sizes', [(4, 4), (4, 4, 1), (5,)])
def test_accumulation_is_the_gradient_of_the_one_large_batch(sizes):
    """SGD at rate 1 without momentum moves the weights by the gradient; compare with autograd over all images."""
    task = make_task()
    images, target = make_batch(sum(sizes))
    before = [parameter.detach().clone() for parameter in task.parameters()]
    whole = nn.functional.cross_entropy(task.trainable_module(images), target)
    gradients = torch.autograd.grad(whole, list(task.parameters()))
    batches = list(zip(images.split(sizes), target.split(sizes), strict=True))
    train_step(task, batches, torch.optim.SGD(task.parameters(), lr=1.0), LoopSettings(), CPU)
    for parameter, start, gradient in zip(task.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(start - parameter, gradient, rtol=1e-4, atol=1e-6)


def test_the_last_partial_group_is_an_update_of_its_own():
    assert [len(group) for group in batched(range(7), 3)] == [3, 3, 1]
    task = make_task()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    result = run_epoch(task, [make_batch(4) for _ in range(7)], optimizer, LoopSettings(accum_steps=3))
    assert len(steps) == 3
    assert result.images == 28


def test_epoch_loss_is_the_mean_over_images():
    task = make_task()
    batches = [make_batch(4), make_batch(1)]
    losses = [task(*batch)['loss'].item() for batch in batches]
    optimizer = torch.optim.SGD(task.parameters(), lr=0.0)
    assert run_epoch(task, batches, optimizer).loss == pytest.approx((4 * losses[0] + losses[1]) / 5)


def test_clipping_limits_the_gradient():
    for mode, size in (('norm', lambda gradients: torch.cat([g.flatten() for g in gradients]).norm()),
                       ('value', lambda gradients: torch.cat([g.flatten() for g in gradients]).abs().max())):
        task = make_task()
        before = [parameter.detach().clone() for parameter in task.parameters()]
        images, target = make_batch(4)
        train_step(task, [(100 * images, target)], torch.optim.SGD(task.parameters(), lr=1.0),
                   LoopSettings(clip_grad=0.01, clip_mode=mode), CPU)
        moved = [start - parameter.detach() for parameter, start in zip(task.parameters(), before, strict=True)]
        assert size(moved).item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision_and_the_loss_in_float32(dtype):
    seen = {}

    class Spy(nn.Module):
        def forward(self, logits, target):
            seen['logits'] = logits.dtype
            loss = create_loss('cross_entropy')(logits, target)
            seen['loss'] = loss.dtype
            return loss

    task = make_task()
    task.criterion = Spy()
    scaler = torch.amp.GradScaler('cpu') if dtype == torch.float16 else None
    before = task.trainable_module[1].weight.detach().clone()
    result = run_epoch(task, [make_batch(4)], settings=LoopSettings(amp_dtype=dtype), scaler=scaler)
    assert seen == {'logits': dtype, 'loss': torch.float32}
    assert math.isfinite(result.loss)
    assert not torch.equal(before, task.trainable_module[1].weight)


def test_a_step_in_float16_is_timms_and_its_parts_are_apart():
    """Two batches for an update, with clipped gradients, by timm's scaler and here."""
    torch.manual_seed(0)
    batches, told = [make_batch(4), make_batch(4)], []
    tasks = make_task(), make_task()
    tasks[1].load_state_dict(tasks[0].state_dict())
    settings = LoopSettings(accum_steps=2, amp_dtype=torch.float16, clip_grad=0.01)
    optimizers = [torch.optim.SGD(task.parameters(), lr=1.0) for task in tasks]
    timms = NativeScaler('cpu')
    for number, (images, target) in enumerate(batches):
        loss = compute_loss(tasks[0], images, target, settings, CPU) / 2
        timms(loss, optimizers[0], 0.01, 'norm', list(tasks[0].parameters()), need_update=number == 1)

    class Parts(NoProfile):
        def part(self, name):
            told.append(name)
            return super().part(name)

    scaler = torch.amp.GradScaler('cpu')
    train_step(tasks[1], batches, optimizers[1], settings, CPU, scaler, profile=Parts())
    assert told == ['forward', 'backward'] * 2 + ['optimizer']
    assert all(torch.equal(*pair) for pair in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True))
    assert scaler.state_dict() == timms.state_dict()


def test_channels_last_reaches_the_model():
    task = make_task()
    formats = []
    task.trainable_module.register_forward_pre_hook(
        lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    run_epoch(task, [make_batch(4)], settings=LoopSettings(channels_last=True))
    assert formats == [True]


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step():
    task = make_task()
    batches = [make_batch(2) for _ in range(5)]
    batches[2][0][0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match=r'epoch 4 at step 3: try a lower --lr'):
        run_epoch(task, batches, epoch=3, progress=Progress(9, 5, interval=100))


def test_mixup_gives_soft_targets_of_even_batches():
    task = make_task()
    seen = []
    task.criterion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    np.random.seed(0)
    run_epoch(task, [make_batch(5)], mixing=TimmMixup(3, smoothing=0.1, mixup_alpha=1.0))
    assert seen[0].shape == (4, 3)
    torch.testing.assert_close(seen[0].sum(1), torch.ones(4))


def test_every_batch_is_mixed_and_the_method_is_told_when_the_epoch_ends():
    calls = []

    class Spy(Mixing):
        @classmethod
        def create(cls, settings, run):
            return cls(run.num_classes)

        def mix(self, images, target):
            calls.append(len(target))
            return images, self.soft_target(target)

        def end_epoch(self):
            calls.append('end')

    result = run_epoch(make_task(), [make_batch(4), make_batch(4), make_batch(1)], settings=LoopSettings(accum_steps=2),
                       mixing=Spy(3))
    assert calls == [4, 4, 1, 'end']
    assert result.images == 9


def test_ema_is_the_average_by_hand():
    task = make_task()
    prepare_task(task, WORLD, AverageSettings(model_ema=True, model_ema_decay=0.9, model_ema_warmup=False), None)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.5)
    average = None
    for epoch in range(3):
        run_epoch(task, [make_batch(4)], optimizer, epoch=epoch)
        weight = task.trainable_module[1].weight.detach().clone()
        average = weight if average is None else 0.9 * average + 0.1 * weight  # timm copies at the first update
    torch.testing.assert_close(evaluation_model(task).module[1].weight, average)


def test_seeds_differ_by_epoch_and_rank_and_cover_all_generators():
    def draw(*key):
        import random
        seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    keys = [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert all(len(set(column)) == len(keys) for column in zip(*draws, strict=True))


@pytest.mark.parametrize('given, expected', [
    (dict(world_size=1), BatchPlan(128, 1, 128)),
    (dict(world_size=4, batch_size=32, grad_accum_steps=2), BatchPlan(32, 2, 256)),
    (dict(world_size=8, global_batch_size=512), BatchPlan(64, 1, 512)),
    (dict(world_size=2, global_batch_size=512, batch_size=64), BatchPlan(64, 4, 512)),
    (dict(world_size=2, global_batch_size=512, grad_accum_steps=4), BatchPlan(64, 4, 512)),
])
def test_batch_plan(given, expected):
    world_size = given.pop('world_size')
    assert plan_batch(BatchSettings(**given), world_size) == expected


@pytest.mark.parametrize('given', [
    dict(world_size=3, global_batch_size=512),
    dict(world_size=2, global_batch_size=512, batch_size=100),
    dict(world_size=2, global_batch_size=512, batch_size=64, grad_accum_steps=2),
    dict(world_size=8, global_batch_size=4),
    dict(world_size=1, batch_size=0),
])
def test_batches_that_do_not_divide_are_refused(given):
    world_size = given.pop('world_size')
    with pytest.raises(InputError, match='batch[-_]size'):
        plan_batch(BatchSettings(**given), world_size)


def test_progress_line_and_time_left():
    now = [0.0]
    lines = []
    progress = Progress(epochs=3, updates_per_epoch=10, interval=4, emit=lines.append, clock=lambda: now[0])
    progress.start(1)
    assert [update for update in range(10) if progress.due(update)] == [3, 7, 9]
    now[0] = 8.0
    progress.show(3, 1.23456, 0.05, 400)  # 4 updates in 8 s: 16 remain, 32 s
    assert lines == ['epoch 2/3  step  4/10  loss 1.2346  lr 0.05  50 images/s  0:00:32 left']


def test_optimizer_decays_one_dimensional_parameters_unless_told():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    assert [len(group['params']) for group in create_optimizer(model, OptimizerSettings()).param_groups] == [4]
    excluded = {group['weight_decay']: len(group['params'])
                for group in create_optimizer(model, OptimizerSettings(decay_1d=False)).param_groups}
    assert excluded == {0.0: 3, 5e-4: 1}
    with pytest.raises(InputError, match="unknown --opt 'momentom'.*did you mean 'momentum'"):
        create_optimizer(model, OptimizerSettings(opt='momentom'))
    with pytest.raises(InputError, match="optimizer 'momentum' has no setting 'nonsense'"):
        create_optimizer(model, OptimizerSettings(opt_kwargs={'nonsense': 1}))


def test_create_model_sets_momentum_and_names_what_is_wrong():
    model = create_model('resnet20_nbn', num_classes=3, bn_momentum=0.3)
    momenta = {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert momenta == {0.3}
    with pytest.raises(InputError, match="unknown --model 'resnet20_nbm'.*did you mean 'resnet20_nbn"):
        create_model('resnet20_nbm')
    with pytest.raises(InputError, match='--model-kwargs'):
        create_model('resnet20_nbn', model_kwargs={'nonsense': 1})


def test_images_must_fit_the_model():
    """The model itself is the witness: what is refused fails, what is not runs."""
    name = 'vit_tiny_patch16_224'
    vit = create_model(name, model_kwargs={'depth': 1})
    settings = parse_train(['--model', name, '--dataset', 'digits_lt'])
    with pytest.raises(InputError, match=f"'{name}' takes images of 224x224 only and these are 32x32: "
                                         'give --img-size 224 or --model-kwargs img_size=32'):
        input_format(settings, DIGITS_LT, vit)
    with pytest.raises(AssertionError):
        vit(torch.zeros(1, 3, 32, 32))
    for model in (create_model(name, model_kwargs={'depth': 1, 'img_size': 32}),
                  create_model(name, model_kwargs={'depth': 1, 'dynamic_img_size': True}),
                  create_model('resnet20_nbn')):
        assert model(torch.zeros(2, *input_format(settings, DIGITS_LT, model).input_size)).shape[0] == 2
    assert input_format(settings.with_values(img_size=224), DIGITS_LT, vit).input_size == (3, 224, 224)
    with pytest.raises(InputError, match='leave in_chans out'):
        input_format(settings, DIGITS_LT, create_model('resnet20_nbn', model_kwargs={'in_chans': 1}))


def test_a_rectified_head_needs_two_images():
    settings = parse_train(['--model', 'resnet10_nbn_lr', '--dataset', 'list', '--workers', '0'])
    samples = ArraySamples(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4) % 3)
    splits = Splits(samples, None, None, COUNTS, DIGITS_LT)

    def batches(size: int, model: nn.Module) -> int:
        plan = Plan(settings, WORLD, Path(), BatchPlan(size, 1, size), splits, DIGITS_LT, 3)
        return len(build_train_loader(plan, model))

    rectified, plain = nn.Sequential(RectifiedLinear(2, 3)), nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(InputError, match='--batch-size of at least 2'):
        batches(1, rectified)
    assert (batches(1, plain), batches(2, rectified)) == (4, 2)


def test_nbn_goes_into_any_model_and_only_once():
    assert len(nbn_layers(create_model('resnet18', num_classes=3, nbn=True))) == 5
    assert len(nbn_layers(create_model('test_vit', num_classes=3, nbn=True))) == 2
    with pytest.raises(InputError, match='has NBN already'):
        create_model('resnet20_nbn', nbn=True)
    with pytest.raises(InputError, match='no BatchNorm2d layer'):
        create_model('test_nfnet', nbn=True)


@pytest.mark.parametrize('name', ['resnet50.a1_in1k', 'resnet50_nbn', 'resnet18.no_such_tag'])
def test_weights_that_cannot_be_had_are_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.delenv('NBN_TIMM_WEIGHTS', raising=False)

    def no_network(*args, **kwargs):
        raise OSError('network is unreachable')

    monkeypatch.setattr('socket.socket.connect', no_network)
    monkeypatch.setattr('socket.getaddrinfo', no_network)
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between the tries of huggingface_hub
    with pytest.raises(InputError, match=name.partition('.')[0]) as error:
        create_model(name, pretrained=True)
    assert '\n' not in str(error.value)


def test_wrong_devices_are_refused():
    with pytest.raises(InputError, match="unknown --device 'gpu'"):
        init_world('gpu')
    with pytest.raises(InputError, match='needs 1000 GPUs'):
        init_world('cuda:999')


# Checkpoints


def trained(epochs: int = 1, ema: bool = True):
    task = make_task()
    prepare_task(task, WORLD, AverageSettings(model_ema=ema, model_ema_decay=0.9), None)
    optimizer = create_optimizer(task.trainable_module, OptimizerSettings())
    for epoch in range(epochs):
        run_epoch(task, [make_batch(4)], optimizer, epoch=epoch)
    return task, optimizer


def state_of(task, optimizer, **kwargs):
    given = dict(epoch=4, arch='net', settings={'lr': 0.1}, class_counts=COUNTS, metric=50.0, best=Best(60.0, 2))
    return checkpoint_state(task, optimizer, **{**given, **kwargs})


def test_resume_restores_model_ema_optimizer_and_best(tmp_path):
    task, optimizer = trained(epochs=3)
    save_checkpoint(tmp_path, state_of(task, optimizer))
    fresh, fresh_optimizer = trained()
    assert resume_run(tmp_path / LAST, fresh, fresh_optimizer, 'net', {'lr': 0.1}, COUNTS) == (5, Best(60.0, 2))
    for ema in (False, True):
        for old, new in zip(task.get_trainable_module(ema).state_dict().values(),
                            fresh.get_trainable_module(ema).state_dict().values(), strict=True):
            assert torch.equal(old, new)
    old, new = optimizer.state_dict()['state'], fresh_optimizer.state_dict()['state']
    assert all(torch.equal(old[key]['momentum_buffer'], new[key]['momentum_buffer']) for key in old)


def test_checkpoints_are_plain_data_that_timm_loads(tmp_path):
    from timm.models import load_state_dict
    task, optimizer = trained(epochs=2)
    save_checkpoint(tmp_path, state_of(task, optimizer))
    for use_ema in (False, True):
        loaded = load_state_dict(str(tmp_path / LAST), use_ema=use_ema)
        expected = task.get_checkpoint_state(ema=use_ema)['state_dict_ema' if use_ema else 'state_dict']
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_resuming_something_else_is_refused(tmp_path):
    task, optimizer = trained()
    save_checkpoint(tmp_path, state_of(task, optimizer))
    path = tmp_path / LAST
    with pytest.raises(InputError, match="of model 'net' and not of 'other'"):
        resume_run(path, task, optimizer, 'other', {}, COUNTS)
    with pytest.raises(InputError, match='other class counts'):
        resume_run(path, task, optimizer, 'net', {}, ClassCounts((5, 3, 1), ('a', 'b', 'c'), 'a test'))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(InputError, match=r"'3.bias' is \[3\].*\[4\].*--num-classes"):
        resume_run(path, ClassificationTask(wide, verbose=False), optimizer, 'net', {})
    with pytest.raises(InputError, match="differ in '3.bias'"):
        resume_run(path, make_task(bias=False), optimizer, 'net', {})
    torch.save({'state_dict': {}}, tmp_path / 'weights.pth')
    with pytest.raises(InputError, match="no 'epoch'.*--initial-checkpoint"):
        resume_run(tmp_path / 'weights.pth', task, optimizer, 'net', {})


def test_changed_settings_are_one_warning_and_the_new_ones_hold(tmp_path, caplog):
    task, optimizer = trained()
    save_checkpoint(tmp_path, state_of(task, optimizer, settings={'lr': 0.1, 'momentum': 0.9, 'output': 'here'}))
    changed = create_optimizer(task.trainable_module, OptimizerSettings(momentum=0.5))
    resume_run(tmp_path / LAST, task, changed, 'net', {'lr': 0.2, 'momentum': 0.5, 'output': 'there'})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].endswith('lr 0.1 -> 0.2, momentum 0.9 -> 0.5')
    assert changed.param_groups[0]['momentum'] == 0.5


def test_find_resume(tmp_path):
    assert find_resume('auto', tmp_path) is None
    assert find_resume(None, tmp_path) is None
    with pytest.raises(InputError, match='does not exist'):
        find_resume(str(tmp_path / 'nothing'), tmp_path)
    save_checkpoint(tmp_path, {'epoch': 0})
    assert find_resume('auto', tmp_path) == tmp_path / LAST
    with pytest.raises(InputError, match='--resume auto.*--experiment'):
        find_resume(None, tmp_path)


def epochs_in(folder) -> dict[str, int]:
    return {path.name: torch.load(path)['epoch'] for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(('history', 'kept'), [
    (0, {LAST: 4}), (1, {'last-1.pth.tar': 3, LAST: 4}),
    (3, {'last-1.pth.tar': 3, 'last-2.pth.tar': 2, 'last-3.pth.tar': 1, LAST: 4})])
@pytest.mark.parametrize('links', [True, False])
def test_the_previous_checkpoints_are_kept(tmp_path, monkeypatch, history, kept, links):
    if not links:
        monkeypatch.setattr('os.link', refuse)
    for epoch in range(5):
        save_checkpoint(tmp_path, {'epoch': epoch}, history=history)
    assert epochs_in(tmp_path) == kept
    save_checkpoint(tmp_path, {'epoch': 5}, history=0)  # fewer from now on
    assert epochs_in(tmp_path) == {LAST: 5}


def refuse(*args, **kwargs):
    raise OSError(95, 'Operation not supported')


def test_at_no_moment_of_a_save_is_there_less_than_before(tmp_path, monkeypatch):
    """The run goes on from last-1, as last is damaged: until the new last is in place, last-1 has to stay."""
    for epoch in range(2):
        save_checkpoint(tmp_path, {'epoch': epoch})
    (tmp_path / LAST).write_bytes(b'damaged')
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append(find_resume('auto', tmp_path).name)
        replace(source, target)
        seen.append(find_resume('auto', tmp_path).name)

    monkeypatch.setattr('os.replace', watched)
    save_checkpoint(tmp_path, {'epoch': 1})
    assert seen[0] == 'last-1.pth.tar' and set(seen[1:]) == {LAST} and len(seen) == 4


def test_auto_takes_the_newest_whole_checkpoint_and_says_so(tmp_path, caplog):
    for epoch in range(4):
        save_checkpoint(tmp_path, {'epoch': epoch}, is_best=epoch == 1, history=2)
    assert find_resume('auto', tmp_path) == tmp_path / LAST and not caplog.records
    content = bytearray((tmp_path / LAST).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / LAST).write_bytes(content)
    assert find_resume('auto', tmp_path) == tmp_path / 'last-1.pth.tar'
    assert f"'{tmp_path / LAST}' is damaged" in caplog.text
    assert "from 'last-1.pth.tar' instead, after epoch 3" in caplog.text
    caplog.clear()
    (tmp_path / LAST).unlink()
    (tmp_path / 'last-1.pth.tar').write_bytes(b'')
    (tmp_path / 'last-2.pth.tar').unlink()
    assert find_resume('auto', tmp_path) == tmp_path / BEST
    assert "'last-1.pth.tar' cannot be read" in caplog.text.replace(f'{tmp_path}/', '')
    (tmp_path / BEST).write_bytes(b'')
    with pytest.raises(InputError, match='cannot go on, since its checkpoints are damaged'):
        find_resume('auto', tmp_path)
    assert find_resume(str(tmp_path / BEST), tmp_path) == tmp_path / BEST  # one of the run's own, asked for


@pytest.mark.parametrize(('files', 'gone'), [
    # Killed in the first save.
    ({'args.yaml': 'a: 1\n', 'log.jsonl': '{"epoch": 0}\n', 'summary.csv': 'epoch\n0\n'}, False),
    ({'log.jsonl': '{"epoch": 0}\n{"epoch": 1}\n'}, True), ({'summary.csv': 'epoch\n0\n1\n'}, True),
    ({'test.json': '{}'}, True), ({}, False)])
@pytest.mark.parametrize('resume', ['auto', None])
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path, files, gone, resume):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if gone:
        with pytest.raises(InputError, match='checkpoints are gone'):
            find_resume(resume, tmp_path)
    else:
        assert find_resume(resume, tmp_path) is None


def test_a_pipe_in_a_run_folder_is_refused_as_writing_into_it_would_wait(tmp_path):
    os.mkfifo(tmp_path / 'args.yaml')
    with (pytest.raises(InputError, match="args.yaml' in the run folder is a pipe or a device: remove it"),
          checkpoints.exclusive_run(tmp_path, World(torch.device('cpu')))):
        pass
    (tmp_path / 'args.yaml').unlink()
    with checkpoints.exclusive_run(tmp_path, World(torch.device('cpu'))):
        assert (tmp_path / '.lock').exists()


def look_for_a_checkpoint(folder: Path) -> None:
    """A rank that looks into a folder that both see, and into one of its own."""
    world = init_world('cpu')
    shared, own = folder / 'shared', folder / f'node{world.rank}'
    own.mkdir()
    save_checkpoint(own, {'epoch': world.rank})
    if world.is_primary:
        save_checkpoint(shared, {'epoch': 3})
    world.barrier()
    said = []
    for place in (shared, own):
        try:
            said.append(str(find_common_resume('auto', place, world)))
        except InputError as error:
            said.append(str(error))
    (folder / f'said{world.rank}').write_text('|'.join(said))
    world.barrier()
    close_world(world)


def test_processes_that_see_different_folders_all_stop(tmp_path):
    run_ranks(look_for_a_checkpoint, tmp_path)
    for rank in range(2):
        path, said = (tmp_path / f'said{rank}').read_text().split('|')
        assert path == str(tmp_path / 'shared' / LAST)
        assert said.startswith(f"process 1 does not see the run folder '{tmp_path}/node{rank}' of process 0: give an")
    assert sorted(path.name for path in (tmp_path / 'shared').iterdir()) == [LAST]


def test_weights_that_are_not_finite_never_become_a_checkpoint():
    """The loss of the last update is finite, what it made of the weights is not."""
    task = make_task()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: task.trainable_module[1].weight.data[0].fill_(math.inf))
    with pytest.raises(InputError, match=r"'1\.weight' became NaN or infinite in epoch 3, so no checkpoint"):
        run_epoch(task, [make_batch(4)], optimizer, epoch=2, progress=Progress(9, 1, interval=50))
    task = make_task()
    task.trainable_module.append(nn.BatchNorm1d(3))
    task.trainable_module[4].running_var.fill_(math.inf)
    with pytest.raises(InputError, match=r"'4\.running_var' became NaN"):
        run_epoch(task, [make_batch(4)])


@pytest.mark.parametrize(('change', 'said'), [
    ({'epoch': 'three'}, "its 'epoch' is not"), ({'epoch': -2}, "its 'epoch' is not"),
    ({'best': {'metric': 1}}, "'best'"),
    ({'state_dict': [1]}, "its 'state_dict' is not"), ({'optimizer': {'state': {}}}, 'optimizer state'),
    ({'optimizer': {'state': 3, 'param_groups': [1]}}, 'optimizer state'),
    ({'class_counts': {'counts': 'many'}}, ''), ({'args': [3]}, None), ({'arch': 7}, "of model '7'"),
    ({'args': {'lr': torch.ones(2)}}, "its 'lr' is or holds a Tensor"),
    ({'args': {'scale': [torch.ones(1)]}}, "'scale' is or holds a T"), ({'args': {'opt': {b'x': 1}}}, 'holds a bytes'),
    ({'args': {3: 1}}, "'3' is or holds a int"), ({'args': {'interpolation': 1 + 2j}}, 'holds a complex'),
    ({'arch': torch.ones(1)}, ''), ({'state_dict_ema': {'1.weight': torch.ones(2)}}, "'1.weight' is .2. in"),
    ({'state_dict_ema': {'2.weight': torch.ones(2)}}, "the model differ in '2.weight'"),
    ({'state_dict': {3: torch.ones(1)}}, 'has 3 for a name'),
    ({'state_dict': {'1.weight': torch.full((8, 12), math.nan)}}, "'1.weight' is NaN")])
def test_malformed_checkpoints_are_one_sentence(tmp_path, change, said):
    task, optimizer = trained()
    state = state_of(task, optimizer)
    for key in ('state_dict', 'state_dict_ema'):
        if isinstance(change.get(key), dict):
            change = {key: state['state_dict'] | change[key]}
    save_checkpoint(tmp_path, state | change)
    if said is None:  # of the settings nothing is needed
        resume_run(tmp_path / LAST, task, optimizer, 'net', {}, COUNTS)
        return
    with pytest.raises(InputError, match=f'(?s){said}') as error:
        resume_run(tmp_path / LAST, task, optimizer, 'net', {}, COUNTS)
    assert '\n' not in str(error.value)


def test_the_best_checkpoint_is_written_before_the_last(tmp_path, monkeypatch):
    """A kill in between must not leave a last checkpoint that believes in a best one that was never written."""
    written = []
    monkeypatch.setattr(checkpoints, 'atomic_write', lambda path, write: written.append(path.name))
    save_checkpoint(tmp_path, {}, is_best=True)
    save_checkpoint(tmp_path, {})
    assert written == [BEST, LAST, LAST]


def test_a_write_that_fails_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {'epoch': 1})

    def full_disk(state, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(InputError, match='No space left.*intact'):
        save_checkpoint(tmp_path, {'epoch': 2})
    monkeypatch.undo()
    assert torch.load(tmp_path / LAST) == {'epoch': 1}
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


# Logs


@pytest.mark.parametrize('change', [
    lambda state: [], lambda state: {}, lambda state: {**state, 'scale': float('nan')},
    lambda state: {**state, 'scale': 0.0}, lambda state: {**state, 'scale': torch.ones(3)},
    lambda state: {key: value for key, value in state.items() if key != 'growth_factor'}])
def test_a_scaler_that_is_none_is_refused(tmp_path, change):
    """With a scale of NaN no update would ever be made, and nothing would say so."""
    task, scaler = make_task(), torch.amp.GradScaler('cpu')
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 2.0 ** 9, '_growth_tracker': 7})
    state = checkpoint_state(task, optimizer, 4, 'net', {}, scaler=scaler)
    torch.save(state, tmp_path / LAST)
    fresh = torch.amp.GradScaler('cpu')
    resume_run(tmp_path / LAST, task, optimizer, 'net', {}, scaler=fresh)
    assert fresh.state_dict() == scaler.state_dict()
    torch.save({**state, 'amp_scaler': change(state['amp_scaler'])}, tmp_path / LAST)
    with pytest.raises(InputError, match="no run can go on from .*'amp_scaler' is not what a training writes there"):
        resume_run(tmp_path / LAST, task, optimizer, 'net', {}, scaler=fresh)


def test_logs_have_a_row_per_epoch_and_resume_trims_them(tmp_path):
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.write(epoch, {'loss': 1.5}, {'top1': 50.0, 'few': None}, 0.1)
    with open(tmp_path / 'log.jsonl', 'a') as file:
        file.write('{"epoch": 3, "train_l')  # cut short by a kill
    log = RunLog(tmp_path, start_epoch=1)
    log.write(1, {'loss': 1.0}, {'top1': 60.0, 'few': 0.0}, 0.05)
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [(line['epoch'], line['eval_top1'], line['eval_few'], line['lr']) for line in lines] == [
        (0, 50.0, None, 0.1), (1, 60.0, 0.0, 0.05)]
    assert all('time' in line for line in lines)
    assert (tmp_path / 'summary.csv').read_text().split() == [
        'epoch,train_loss,eval_top1,eval_few,lr', '0,1.5,50.0,,0.1', '1,1.0,60.0,0.0,0.05']


@pytest.mark.parametrize(('name', 'before', 'after', 'line'), [
    ('log.jsonl', b'"epoch": 0', b'"epoch": \xff', 1), ('log.jsonl', b'"epoch": 1', b'"epoch": "1"x', 2),
    ('log.jsonl', b'{', b'[', 1), ('summary.csv', b'epoch', b'epoci', 1), ('summary.csv', b'1.5,50', b'1.5\x00,50', 2),
    ('summary.csv', b'1.5,50', b'1.\xff,50', 2), ('summary.csv', b'1.5,50', b'1.5-50', 2),
    ('summary.csv', b'eval_top1', b'eval_t\xefp1', 1), ('summary.csv', b'eval_top1,', b'eval_top1-', 1)])
def test_a_damaged_line_of_a_log_is_named_and_nothing_is_taken_out(tmp_path, name, before, after, line):
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.write(epoch, {'loss': 1.5}, {'top1': 50.0}, 0.1)
    path = tmp_path / name
    damaged = path.read_bytes().replace(before, after, 1)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=f"line {line} of the log '.*{name}' is damaged: correct or remove that line"):
        RunLog(tmp_path, start_epoch=2)
    assert path.read_bytes() == damaged
    RunLog(tmp_path)  # begun anew, nothing of it is needed
    assert path.read_bytes() == b''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_run_whose_output_nobody_takes_says_so_once_and_goes_on(capsys, monkeypatch):
    import logging
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        with open('/dev/full', 'w', buffering=1) as full:
            monkeypatch.setattr(sys, 'stdout', full)
            setup_logging(True)
            for _ in range(3):
                logging.getLogger('nbn_timm').info('epoch')
            monkeypatch.undo()
    finally:
        root.handlers[:], _ = before
        root.setLevel(before[1])
        logging.captureWarnings(False)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'cannot be written (No space left on device)' in said and 'Traceback' not in said


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = RunLog(tmp_path, tensorboard=True)
    log.write(0, {'loss': 1.5}, {'top1': 50.0, 'few': None}, 0.1)
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()['scalars']) == {'train/loss', 'eval/top1', 'lr'}
    assert [(event.step, event.value) for event in events.Scalars('eval/top1')] == [(0, 50.0)]


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType('wandb')
    for name in ('init', 'log', 'finish'):
        setattr(fake, name, lambda *args, _name=name, **kwargs: calls.append((_name, args, kwargs)))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    log = RunLog(tmp_path / 'run', wandb_project='tails', settings={'lr': 0.1})
    (tmp_path / 'run').mkdir()
    log.write(0, {'loss': 1.5}, {'few': None}, 0.1)
    log.close()
    assert [name for name, _, _ in calls] == ['init', 'log', 'finish']
    assert calls[0][2] == {'project': 'tails', 'name': 'run', 'id': 'run', 'resume': 'allow', 'config': {'lr': 0.1}}
    assert calls[1][1] == ({'epoch': 0, 'train_loss': 1.5, 'lr': 0.1},)


@pytest.mark.parametrize('module, kwargs', [
    ('wandb', dict(wandb_project='x')), ('torch.utils.tensorboard', dict(tensorboard=True))])
def test_a_logger_that_is_not_installed_names_its_pip_command(tmp_path, monkeypatch, module, kwargs):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match='pip install'):
        RunLog(tmp_path, **kwargs)

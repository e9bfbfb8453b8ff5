"""What a run does on a GPU: refusals and switches everywhere, the graphs themselves where there is one."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.second_stages import create_second_stage
from nbn_timm.training.cuda_graphs import capturable, move_state
from nbn_timm.training.gpu import GpuSettings, prepare_gpu
from nbn_timm.training.loop import LoopSettings, graph_backward, train_step
from nbn_timm.training.task import SecondStageTask

CUDA = torch.device('cuda')
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


def make_task(device='cpu') -> ClassificationTask:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return ClassificationTask(model.to(device), nn.CrossEntropyLoss(), device=torch.device(device), verbose=False)


@pytest.mark.parametrize('settings, device, message', [
    (LoopSettings(), 'cpu', 'needs an NVIDIA GPU'),
    (LoopSettings(accum_steps=2), 'cuda', 'one batch per update'),
    (LoopSettings(amp_dtype=torch.float16), 'cuda', 'float16'),
])
def test_graphs_that_cannot_be_had_are_refused(settings, device, message):
    with pytest.raises(InputError, match=message):
        graph_backward(make_task(), settings, torch.device(device))


def test_graphs_are_not_for_second_stages():
    """BALMS takes a step of its own around every batch, which a replay would leave out without a word."""
    model = timm.create_model('resnet20', num_classes=5, num_blocks=1)
    task = SecondStageTask(model, nn.CrossEntropyLoss(), create_second_stage('crt'), device=torch.device('cpu'))
    with pytest.raises(InputError, match='--cuda-graphs is not for a --stage'):
        graph_backward(task, LoopSettings(), CUDA)


@pytest.mark.parametrize('deterministic', [False, True])
def test_algorithms_are_the_fastest_or_repeat_themselves(deterministic, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', asked.append)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    switches = ((torch.backends.cudnn, 'benchmark'), (torch.backends.cuda.matmul, 'allow_tf32'),
                (torch.utils.deterministic, 'fill_uninitialized_memory'))
    before = [getattr(*switch) for switch in switches]
    try:
        prepare_gpu(GpuSettings(deterministic=deterministic), CUDA)
        assert torch.backends.cudnn.benchmark is not deterministic
        assert torch.backends.cuda.matmul.allow_tf32
        assert asked == [True] * deterministic
    finally:
        for (place, name), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def test_nothing_changes_on_a_processor(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', asked.append)
    before = torch.backends.cudnn.benchmark
    prepare_gpu(GpuSettings(deterministic=True), torch.device('cpu'))
    assert not asked and torch.backends.cudnn.benchmark == before


@needs_gpu
def test_graphs_give_the_steps_of_the_ordinary_loop():
    """Full batches and a smaller last one, through warm-up, recording and replay."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(size, 3, 8, 8, generator=generator).cuda(), torch.arange(size).cuda() % 5)
               for size in (16, 16, 7) * 6]
    found = []
    for graphs in (False, True):
        task, settings = make_task('cuda'), LoopSettings()
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
        record = graph_backward(task, settings, CUDA) if graphs else None
        losses = [train_step(task, [batch], optimizer, settings, CUDA, graphs=record)[0][0].item() for batch in batches]
        found.append((losses, {key: value.cpu() for key, value in task.state_dict().items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for key, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][key], rtol=1e-4, atol=1e-6)


def test_whose_step_a_graph_can_hold():
    weight = nn.Parameter(torch.zeros(4, 4))
    assert capturable(create_optimizer_v2([weight], 'muon', lr=0.1))
    assert capturable(torch.optim.AdamW([weight]))
    assert not capturable(torch.optim.SGD([weight], lr=0.1))
    assert not capturable(create_optimizer_v2([weight], 'lookahead_adamw', lr=0.1))


@needs_gpu
@pytest.mark.parametrize('name', ['muon', 'adamw', 'nadam', 'nadamw', 'radam', 'adopt', 'rmsprop'])
def test_graphs_hold_the_step_of_an_optimizer(name):
    """With a rate that changes at every update, and a weight decay that once becomes one that shows: in the last four
    updates it takes at least a tenth of every weight."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(size, 3, 8, 8, generator=generator).cuda(), torch.arange(size).cuda() % 5)
               for size in (16, 16, 7) * 6]
    found, states = [], []
    for graphs in (False, True):
        task, settings = make_task('cuda'), LoopSettings()
        optimizer = create_optimizer_v2(list(task.parameters()), name, lr=0.01, weight_decay=0.02)
        record = graph_backward(task, settings, CUDA) if graphs else None
        losses = []
        for update, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group['lr'] = 0.01 / (1 + update)
                group['weight_decay'] = 0.02 if update < 14 else 50.0
            losses.append(train_step(task, [batch], optimizer, settings, CUDA, graphs=record)[0][0].item())
        assert all(group['lr'] == 0.01 / 18 and not group['capturable'] for group in optimizer.param_groups)
        if record is not None:
            assert len(record.recorded) == 2 and all(one.step is not None for one in record.recorded.values())
        found.append((losses, {key: value.cpu() for key, value in task.state_dict().items()}))
        states.append(optimizer.state_dict()['state'])
    # Muon's steps are in bfloat16, whose rounding the rate meets in another order.
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-3)
    for key, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][key], rtol=1e-2, atol=2e-4)
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert one.keys() == other.keys()
        if 'step' in one:
            assert float(one['step']) == float(other['step']) == len(batches)


def test_what_an_optimizer_keeps_on_the_processor_is_moved():
    """NAdam's product of momenta too, without which torch does not record its step."""
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.NAdam([weight])
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    move_state(optimizer, torch.device('meta'))
    assert {key: value.device.type for key, value in optimizer.state[weight].items()} == dict.fromkeys(
        ('step', 'mu_product', 'exp_avg', 'exp_avg_sq'), 'meta')

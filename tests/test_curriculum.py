"""CUDA: its operations beside the authors' code, its levels beside their rule written out, and whole runs.

With `cifar/aug/cuda.py` of the authors (sumyeongahn/CUDA_LTR, commit f4c8d35, whose numpy and Pillow names of old were
put back) each operation at each of eleven strengths on pictures of two sizes, and 300 draws of whole levels, gave the
same pixels by the same draws. The figures below are of what their code made of one picture.
"""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from forks import run_killed_at
from PIL import Image, ImageFilter
from test_train_run import assert_same, data_flags, images, run_two_processes  # noqa: F401  (a fixture)
from torch import nn
from torchvision import transforms

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli import train
from nbn_timm.data import ArraySamples, AugmentSettings, create_transform
from nbn_timm.data.class_strength import OPERATIONS, TOP_LEVEL, ClassStrength, CurriculumSettings, LevelledImages
from nbn_timm.data.cutout import Cutout
from nbn_timm.data.decoders import DecodedCrop, FileViews
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.data.transforms import Views
from nbn_timm.datasets.cifar import CifarLT
from nbn_timm.errors import InputError
from nbn_timm.training.curriculum import Curriculum, _experts_apart
from nbn_timm.training.distributed import World
from nbn_timm.training.run_checkpoint import LAST

RUN = ['--model', 'resnet20', '--img-size', '8', '--device', 'cpu', '--workers', '0', '-b', '4', '--lr', '0.02',
       '--log-interval', '1', '--curriculum', '--curriculum-trials', '1', '--curriculum-accept', '0']
# Sum of the pixels and of their products with 0, 1, 2, ... modulo 97, by operation, at the strength of level 10.
PIXELS = [
    (385257, 146700), (385257, 144123), (387625, 119466), (385535, 144299), (384847, 145459), (384741, 145694),
    (389688, 144675), (398103, 144222), (385411, 147677), (389247, 144393), (360837, 133221), (194304, 72462),
    (340210, 143207), (260051, 143062), (384766, 143554), (384427, 147632), (268312, 144670), (383901, 145587),
    (365211, 136015), (369650, 138694), (0, 0), (0, 0)]
OF_LEVELS = [
    (385257, 142417), (387625, 119466), (236089, 91715), (195057, 136109), (387842, 112812), (20540, 68139),
    (359832, 137715), (197290, 141349), (61549, 25460), (179578, 68040), (634112, 146958)]


def picture() -> Image.Image:
    y, x, channel = np.mgrid[:32, :32, :3]
    pixels = (7 * y * y + 11 * x * channel + 13 * x * y + 60 * channel) % 256
    return Image.fromarray(pixels.astype(np.uint8)).filter(ImageFilter.SMOOTH)


def sums(image: Image.Image) -> tuple[int, int]:
    pixels = np.asarray(image).astype(int)
    return int(pixels.sum()), int((pixels * np.arange(pixels.size).reshape(pixels.shape) % 97).sum())


@pytest.mark.fast
def test_operations_and_levels_are_the_authors():
    found = []
    for operation, weakest, strongest in OPERATIONS:
        random.seed(3)
        found.append(sums(operation(picture(), 10 / 30 * (strongest - weakest) + weakest)))
    assert found == PIXELS
    step, found = ClassStrength(), []
    for step.level in range(TOP_LEVEL + 1):
        random.seed(step.level)
        found.append(sums(step(picture())))
    assert found == OF_LEVELS


@pytest.mark.fast
@pytest.mark.parametrize('size', [(33, 21), (8, 8)])
def test_pictures_keep_their_size(size):
    for operation, weakest, strongest in OPERATIONS:
        assert operation(Image.new('RGB', size), (weakest + strongest) / 2).size == size


@pytest.mark.fast
def test_the_step_stands_between_flip_and_cutout_and_in_no_view_of_simclr():
    augment = AugmentSettings(curriculum=True, cutout=8, other_views={'simclr': True})
    steps = [type(step) for step in create_transform(CifarLT.defaults, True, augment).transforms]
    places = [steps.index(step) for step in (transforms.RandomHorizontalFlip, ClassStrength, Cutout)]
    assert places == sorted(places)
    assert ClassStrength not in map(type, create_transform(CifarLT.defaults, True, augment.of_other_views()).transforms)
    assert ClassStrength not in map(type, create_transform(CifarLT.defaults, False, augment).transforms)


@pytest.mark.fast
def test_pictures_have_the_level_of_their_class_with_the_probability():
    data = LevelledImages(ArraySamples(np.zeros((600, 4, 4, 3), np.uint8), np.arange(600) % 3), 3, prob=0.25)
    step = ClassStrength()
    data.transform = Views([transforms.Compose([step, lambda image: step.level]), np.asarray])
    data.levels[:] = (0, 2, 7)
    random.seed(0)
    found = np.array([data[index][0][0] for index in range(600)]).reshape(200, 3)
    assert [set(found[:, label]) for label in range(3)] == [{0}, {0, 2}, {0, 7}]
    assert (found[:, 1:] > 0).mean(axis=0) == pytest.approx(0.25, abs=0.09)
    assert data[5, 4][0][0] == 4 and data[5, 0][0][0] == 0  # for certain
    assert len(data) == 600 and data[4][1] == 1


@pytest.mark.fast
def test_the_step_is_found_where_files_are_decoded_otherwise():
    pipeline = create_transform(DataDefaults(), True, AugmentSettings(curriculum=True))
    data = LevelledImages(ArraySamples(np.zeros((1, 4, 4, 3), np.uint8), [0]), 1, prob=1.0)
    data.transform = FileViews([DecodedCrop(pipeline, decoder=None)])
    assert list(data.steps) == [step for step in pipeline.transforms if isinstance(step, ClassStrength)]


class Knows(nn.Module):
    """Says of pictures [B, 2], of a label and a level, the label or, where the table has False, another."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = torch.from_numpy(table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        label, level = x.long().unbind(1)
        return nn.functional.one_hot(torch.where(self.table[label, level], label, (label + 1) % 4), 4)


def curriculum(accept: float, targets: np.ndarray, rank: int = 0, world_size: int = 1, others=()) -> Curriculum:
    """One whose loader gives the label and the level of each trial, in batches of two."""
    class Loader(list):
        def set_epoch(self, epoch):
            assert epoch == 3

    class OfSeveral(World):
        def gather(self, value):
            return [*others, value]

    def train_loader(dataset, trials, batch_size, seed, drop_last):
        pictures = torch.tensor([[dataset.targets[index], level] for index, level in trials])
        return Loader((pictures[k:k + 2], pictures[k:k + 2, 0]) for k in range(0, len(trials), 2))

    data = LevelledImages(ArraySamples(np.zeros((len(targets), 4, 4, 3), np.uint8), targets), 4, prob=0.5)
    settings = SimpleNamespace(
        curriculum=CurriculumSettings(curriculum_trials=2, curriculum_accept=accept), run=SimpleNamespace(seed=1),
        precision=SimpleNamespace(autocast=None, channels_last=False))
    return Curriculum(SimpleNamespace(
        splits=SimpleNamespace(train=data), settings=settings, batch=SimpleNamespace(size=2), train_loader=train_loader,
        world=OfSeveral(torch.device('cpu'), rank, rank, world_size)))


@pytest.mark.fast
def test_levels_move_by_the_rule_of_the_authors():
    """Up where all levels so far are passed, else down, within 0 and 10; a class without pictures stays."""
    found = curriculum(0.6, np.array([0, 0, 1, 1, 2]))
    table = np.ones((4, 11), bool)
    table[1, 2] = False
    steps = ((0, 0, 0, 0), (1, 1, 1, 0)), ((10, 3, 0, 5), (10, 2, 1, 5)), ((9, 1, 10, 0), (10, 2, 10, 0))
    for before, after in steps:
        found.images.levels[:] = before
        found.set_epoch(Knows(table), 3)
        assert tuple(found.images.levels) == after
    table[:, 0] = False
    found.set_epoch(Knows(table), 3)
    assert found.images.levels.tolist() == [9, 1, 9, 0]
    found.images.levels[:] = (2, 0, 1, 7)
    trials = found.draw(3)
    assert trials == found.draw(3) != found.draw(4)
    tried = np.array([(found.images.targets[index], level) for index, level in trials])
    assert np.unique(tried, axis=0, return_counts=True)[1].tolist() == [2, 4, 6, 2, 2, 4]  # 2 (l + 1) of each level


@pytest.mark.fast
@pytest.mark.parametrize('accept, level', [(0.59, 1), (0.6, 0)])
def test_the_share_of_right_answers_must_be_above_the_limit(accept, level):
    """Three of five are 0.6."""
    one = curriculum(accept, np.array([0]))
    one._counts = lambda *_: (np.eye(4, 11, dtype=int) * 5, np.eye(4, 11, dtype=int) * 3)
    one.set_epoch(nn.Identity(), 3)
    assert one.images.levels[0] == level


@pytest.mark.fast
def test_processes_divide_the_trials_and_have_the_same_levels():
    targets, table = np.array([0, 1, 1, 2, 3, 3]), np.random.default_rng(0).random((4, 11)) < 0.7
    alone = curriculum(0.5, targets)
    alone.images.levels[:] = start = (3, 1, 2, 2)
    whole = alone._counts(Knows(table), alone.draw(3), 3)
    halves = []
    for rank in (0, 1):
        one = curriculum(0.5, targets, rank, 2)
        one.images.levels[:] = start
        halves.append(one._counts(Knows(table), one.draw(3), 3))
    assert (halves[0][0].sum(), halves[1][0].sum()) == (whole[0].sum() // 2,) * 2
    both = curriculum(0.5, targets, 1, 2, others=[np.stack(halves[0])])
    both.images.levels[:] = start
    both.set_epoch(Knows(table), 3)
    alone.set_epoch(Knows(table), 3)
    assert both.state() == alone.state() != list(start)


@pytest.mark.fast
def test_experts_answer_one_by_one_and_keep_their_statistics():
    model = timm.create_model('resnet32_ride', num_blocks=1, num_classes=3).train()
    model.set_expert_logits()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with _experts_apart(model), torch.no_grad():
        logits = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 3, 3)
    assert_same(before, model.state_dict())
    assert not any(module.training for module in model.modules())


@pytest.mark.fast
@pytest.mark.parametrize('levels', [None, [0, 1], [0, 1, 2, 11], [0, 1, 2, True], 'abcd'])
def test_levels_of_a_checkpoint_are_checked(levels):
    with pytest.raises(InputError, match="'last.pth.tar' has no levels of --curriculum for these classes: resume"):
        curriculum(0.5, np.array([0])).load_state(levels, 'last.pth.tar')


@pytest.mark.fast
@pytest.mark.parametrize('flags, message', [
    (['--curriculum-prob', '1'], '--curriculum-prob has no effect without --curriculum'),
    (['--curriculum', '--no-aug'], '--curriculum has no effect with --no-aug'),
    (['--curriculum', '--in-memory'], 'takes one image at a time .*--curriculum'),
    (['--curriculum', '--in-chans', '1'], '--curriculum changes the colours of RGB pictures'),
    (['--curriculum', '--adversarial', 'pgd'], '--curriculum is for the ordinary training of a network, and --adver'),
    (['--curriculum', '--stage', 'crt', '--initial-checkpoint', 'FIRST'], 'training of a network, and --stage is')])
def test_what_does_not_go_together_is_one_sentence(flags, message, images, tmp_path):  # noqa: F811
    first = tmp_path / 'first.pth'
    torch.save({'args': {'model': 'resnet20'}}, first)
    flags = [str(first) if word == 'FIRST' else word for word in flags]
    with pytest.raises(InputError, match=message):
        train.main([*data_flags(images), *RUN[:6], '--output', str(tmp_path), '--epochs', '1', *flags])


@pytest.mark.slow
def test_killed_and_resumed_and_on_two_processes(images, tmp_path):  # noqa: F811
    flags = [*data_flags(images, 'train', 'test'), *RUN, '--epochs', '3', '--output', str(tmp_path)]
    train.main([*flags, '--experiment', 'whole'])
    run_killed_at('epoch 3/3  step 2/5', train.main, [*flags, '--experiment', 'killed'])
    train.main([*flags, '--experiment', 'killed', '--resume', 'auto'])
    whole, killed = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ('whole', 'killed'))
    for key in ('state_dict', 'optimizer', 'curriculum'):
        assert_same(whole[key], killed[key])
    assert max(whole['curriculum']) > 0
    run_two_processes([*flags, '--experiment', 'two'])
    first, second = (torch.load(tmp_path / 'two' / f'rank{rank}.pt') for rank in (0, 1))
    assert_same(first, second)

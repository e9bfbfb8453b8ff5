"""Wrong settings of whole commands: one sentence that names them, before any data are read where the settings tell."""
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_train_run import MODEL, data_flags, images  # noqa: F401  (a fixture)

import nbn_timm.training.plan
from nbn_timm.cli import train, validate
from nbn_timm.computation import PrecisionSettings
from nbn_timm.data.settings import DataSettings
from nbn_timm.datasets import find_dataset
from nbn_timm.errors import InputError
from nbn_timm.training.distributed import init_world
from nbn_timm.training.loop import enough_values


def refused(images: Path, tmp_path: Path, *flags: str, model=MODEL) -> str:  # noqa: F811
    with pytest.raises(InputError) as error:
        train.main([*data_flags(images), *model, '-b', '4', '--epochs', '1', '--output', str(tmp_path), *flags])
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--mixup', '0.5', '--cmo', '1'], '--cmo and --mixup cannot mix the same batch: leave one of them out'),
    (['--mixup', '0.5', '--loss', 'seql'], "loss 'seql' takes labels and no mixed targets: leave out --mixup"),
    (['--smoothing', '0.1', '--loss-kwargs', 'smoothing=0.1'], 'label smoothing is given twice'),
    (['--loss', 'influence_balanced', '--kd-checkpoint', 'x.pth'], 'which training with --kd-checkpoint does not hand'),
    (['--loss-kwargs', 'smoothing=abc'], "loss 'cross_entropy' cannot take --loss-kwargs smoothing=abc: give a number"),
    (['--loss-kwargs', 'foo=1'], "loss 'cross_entropy' has no setting 'foo' (it has smoothing)"),
    (['--loss', 'focal', '--loss-kwargs', 'start_epoch=x'], '--loss-kwargs start_epoch=x: give the number of epochs'),
    (['--loss', 'hcm', '--smoothing', '0.1'], "loss 'hcm' has no setting 'smoothing'"),
    (['--sampler-kwargs', 'seed=3'], "sampler 'instance_balanced' has no setting 'seed'"),
    (['--sampler', 'class_aware', '--sampler-kwargs', 'k=2.5'], '--sampler-kwargs k=2.5: give a whole number'),
    (['--stage', 'tau_norm', '--pretrained', '--stage-kwargs', 'tau=x'], '--stage-kwargs tau=x: give a number or None'),
    (['--stage', 'tau_norm', '--pretrained', '--stage-kwargs', 'step=1e-9'], 'step=1e-09: give a number from 0.002 to'),
    (['--epochs', '3', '--freeze-epochs', '3'], '--freeze-epochs 3 leaves none of the 3 --epochs for the rest of the '
     'network: give --freeze backbone'),
    (['--torchcompile', 'inductr'], "no backend 'inductr' for --torchcompile"),
    (['--watch-test'], '--watch-test has no effect where there is a validation split: leave it out'),
    (['--loss-kwargs', 'foo=1', '--loss', 'bcl'], "loss 'bcl' has no setting 'foo' (it has"),
    (['--model-kwargs', 'exportable={1,2}'], '--model-kwargs exportable={1, 2} is or holds a value of the kind set, '
     'which no checkpoint can keep: give numbers, text, true, false, none, or lists and mappings of these'),
    (['--model-kwargs', 'exportable=[{"a": b"x"}]'], 'is or holds a value of the kind bytes'),
    (['--opt-kwargs', 'foo=1j'], 'is or holds a value of the kind complex'),
    (['--stage-kwargs', 'a=...', '--stage', 'tau_norm'], 'is or holds a value of the kind ellipsis'),
    (['--stage-kwargs', 'a={(1, 2): 3}', '--stage', 'tau_norm'], 'is or holds a value of the kind tuple'),
    (['--loss', 'gpaco', '--other-views', 'ratio=(1,)'], '--other-views ratio=(1,): give 2 values'),
    (['--loss', 'gpaco', '--other-views', 'ratio=()'], '--other-views ratio=(): give 2 values'),
    (['--loss', 'gpaco', '--other-views', 'blur=16'], '--other-views blur=16: give a number at least 0 and at most 1'),
])
def test_what_the_settings_tell_is_refused_before_the_data_are_read(
        flags, message, images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(nbn_timm.training.plan, 'create_splits', lambda *_, **__: pytest.fail('the data were read'))
    assert message in refused(images, tmp_path, *flags)


@pytest.mark.parametrize(('flags', 'message'), [
    ('--aa v0 --force-color-jitter', '--force-color-jitter has no effect on --dataset cifar100_lt, which is not'),
    ('--aa v0 --force-color-jitter --color-jitter 0', '--force-color-jitter has no effect with --color-jitter 0'),
    ('--force-color-jitter --color-jitter 0.4', '--force-color-jitter has no effect without --aa'),
    ('--train-interpolation bicubic', '--train-interpolation has no effect on --dataset cifar100_lt, whose images are'),
    ('--train-interpolation bicubic --img-size 64', None), ('--train-interpolation bicubic --aa v0', None),
    ('--train-interpolation bicubic --train-list a.txt', None),
    ('--train-interpolation bicubic --dataset imagenet_lt', None),
    ('--aa v0 --force-color-jitter --color-jitter 0.4', None)])
def test_augmentation_that_a_benchmark_leaves_unused_is_refused_at_once(flags, message):
    argv = ['--dataset', 'cifar100_lt', '--model', 'resnet20_nbn', '--data-dir', 'none', *flags.split()]
    if message is None:
        train.parse_train(argv)
        return
    with pytest.raises(InputError) as error:
        train.parse_train(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--model-kwargs', 'gradient=release'], '--model-kwargs gradient=release'),
    (['--opt-kwargs', 'weight_decay=0.1'], '--opt-kwargs weight_decay=0.1 cannot be set in this way: give --weight'),
    (['--loss-kwargs', 'smoothing=2'], '--loss-kwargs smoothing=2: give a number from 0 to 1'),
    (['--img-size', '4', '-b', '1'], 'one value per channel of 1 image of 4x4, which has no variance: give a larger'),
    (['--model', 'test_convnext'], "model 'test_convnext' cannot take images of 8x8"),
])
def test_what_a_part_of_the_run_refuses_names_the_setting(flags, message, images, tmp_path):  # noqa: F811
    assert message in refused(images, tmp_path, *flags)


def test_a_metric_without_a_validation_split_is_refused(images, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match='^--eval-metric has no effect without a validation split to choose a'):
        train.main([*data_flags(images, 'train', 'test'), *MODEL, '--eval-metric', 'few', '--output', str(tmp_path)])


def test_statistics_of_several_processes_are_told_to_have_no_effect_on_one(images, tmp_path, capsys):  # noqa: F811
    (tmp_path / 'own.yaml').write_text('eval_metric: few\n')
    train.main([*data_flags(images, 'train'), *MODEL, '-b', '10', '--epochs', '1', '--dist-bn', 'broadcast',
                '--output', str(tmp_path), '--config', str(tmp_path / 'own.yaml')])
    said = capsys.readouterr().out
    assert 'Settings without effect here: dist_bn (has no effect on one process); eval_metric (has no effect' in said
    assert 'eval-metric' not in said  # one line tells it


@pytest.mark.parametrize(('settings', 'validated'), [
    (dict(dataset='list'), False), (dict(dataset='list', val_list='x'), True), (dict(dataset='digits_lt'), True),
    (dict(dataset='cifar10_lt'), False), (dict(dataset='cifar10_lt', train_list='x', val_list='y'), True),
    (dict(dataset='imagenet_lt'), True), (dict(dataset='inat18', val_list='x'), True),
    (dict(dataset='torch/cifar10'), False), (dict(dataset='torch/cifar10', val_split='test'), True)])
def test_whether_there_is_a_validation_split_is_known_without_the_data(settings, validated):
    assert find_dataset(settings['dataset']).validates(DataSettings(**settings)) is validated


def test_of_class_folders_only_the_lack_of_a_validation_split_is_known(tmp_path):
    folders, settings = find_dataset('folder'), DataSettings('folder', str(tmp_path))
    assert folders.validates(settings) is False
    (tmp_path / 'valid').mkdir()
    assert folders.validates(settings) is None


def test_errors_of_a_batch_other_than_too_few_values_keep_their_traceback():
    for error in (ValueError('something else'), RuntimeError('a bug')):
        with pytest.raises(type(error)) as caught, enough_values(torch.zeros(1, 3, 8, 8)):
            raise error
        assert caught.value is error


@pytest.mark.parametrize('device', ['meta', 'cpu:x', 'nosuch'])
def test_devices_that_nothing_can_be_computed_on_are_refused(device):
    with pytest.raises(InputError, match=f"--device '{device}'.*give cpu, cuda or cuda:N"):
        init_world(device)


def test_a_backend_that_fails_is_told_and_a_fault_of_the_model_is_not_hidden():
    settings = PrecisionSettings(torchcompile='relu_compile_error_TESTING_ONLY')
    with pytest.raises(InputError, match='^--torchcompile relu_compile_error.* cannot compile this model here'), \
            settings.compiling():
        torch.compile(torch.relu, backend=settings.torchcompile)(torch.zeros(2))
    with pytest.raises(ZeroDivisionError), PrecisionSettings(torchcompile='eager').compiling():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), PrecisionSettings().compiling():
        raise ZeroDivisionError


def test_a_validation_without_a_model_says_so():
    with pytest.raises(InputError, match='^there is no --model whose published weights --pretrained takes'):
        validate.main(['--pretrained', '--dataset', 'cifar100_lt'])


def test_a_validation_names_the_setting_too(images, tmp_path):  # noqa: F811
    torch.save(timm.create_model('resnet20_nbn', num_classes=4).state_dict(), tmp_path / 'model.pth')
    flags = ['--checkpoint', str(tmp_path / 'model.pth'), '--model', 'resnet20_nbn', *data_flags(images, 'test'),
             '--counts-from', 'none', '--device', 'cpu', '--workers', '0']
    for more, message in ((['--model-kwargs', 'gradient=release'], '--model-kwargs gradient=release'),
                          (['--torchcompile', 'inductr'], "did you mean 'inductor'"),
                          (['--model-kwargs', 'num_classes=3'], 'give --num-classes')):
        with pytest.raises(InputError, match=message):
            validate.main([*flags, *more])


@pytest.mark.parametrize(('argv', 'message'), [
    (['--lrr', '0.1'], "unknown argument '--lrr'; did you mean '--lr'?"),
    (['--xyzzy'], "unknown argument '--xyzzy': --help lists the flags"),
    (['picture.png'], "unknown argument 'picture.png'"),
    (['-b', str(10 ** 30)], 'is no whole number of 64 bits at least 1'),
    (['--workers', '1000000'], "'1000000' is no whole number at least 0 and at most 1024"),
    (['--img-size', '1000000'], 'at most 10000'), (['--num-classes', '99999999'], 'at most 1e+06'),
    (['--crop-pct', '0.0001'], 'at least 0.1'), (['--checkpoint-hist', '999999999'], 'at most 1000'),
    (['--recount', '999999999'], 'at most 1000'), (['--rotation', '1e308'], 'at most 180')])
def test_numbers_that_would_take_all_memory_or_time_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(['--dataset', 'list', *argv])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_null_character_in_a_config_is_refused(tmp_path):
    (tmp_path / 'c.yaml').write_text('model: resnet20\ndataset: list\nexperiment: "a\\0b"\n')
    with pytest.raises(InputError, match="^setting 'experiment' holds a null character"):
        train.main(['--config', str(tmp_path / 'c.yaml')])


def test_a_jitter_too_small_to_change_anything_changes_nothing(tmp_path, images):  # noqa: F811
    from nbn_timm.data.batch_policies import ColorJitter
    pixels = torch.from_numpy(np.array(Image.open(next(images.glob('*.png'))))).permute(2, 0, 1)[None]
    assert torch.equal(ColorJitter(None, None, None)(pixels), pixels)

"""--val-fraction: what is drawn, what stays together, where it is kept, and who finds it."""
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import yaml
from PIL import Image

from nbn_timm.cli import train, validate
from nbn_timm.cli.sweep import parse_args as parse_sweep
from nbn_timm.data import DataSettings
from nbn_timm.data.grouping import Groups, same_files
from nbn_timm.data.tables import read_table
from nbn_timm.data.val_split import draw_validation
from nbn_timm.datasets import create_splits, draw_split_file
from nbn_timm.errors import InputError
from nbn_timm.settings import Tolerated, Values, fields_of
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training.settings import TrainSettings
from nbn_timm.validation import ValidateSettings

COUNTS = {'ant': 12, 'bee': 5, 'cow': 2, 'dog': 1}


def write_pictures(folder, counts, seed=0):
    """Noise of 8 x 8 pixels as <folder>/<class>/<number>.png."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f'{number}.png')


@pytest.fixture
def data(tmp_path):
    write_pictures(tmp_path / 'data' / 'train', COUNTS)
    write_pictures(tmp_path / 'data' / 'test', {name: 2 for name in COUNTS}, seed=1)
    return tmp_path / 'data'


def split_of(path):
    """'train' or 'val' by picture."""
    table = read_table(path, ['file', 'split'])
    return dict(zip(table.columns['file'], table.columns['split'], strict=True))


def validating(path):
    return {file for file, part in split_of(path).items() if part == 'val'}


# Drawing


def names_of(labels):
    return [f'{label}/{number}.png' for number, label in enumerate(labels)]


@pytest.mark.parametrize('fraction', [0.01, 0.2, 0.5, 0.9])
def test_every_class_gives_its_share_one_at_least_and_never_all(fraction):
    counts = [100, 37, 10, 3, 2, 1]
    targets = np.repeat(np.arange(6), counts)
    given = np.bincount(targets[draw_validation(names_of(targets), targets, fraction)], minlength=6)
    wanted = [min(max(int(fraction * count + 0.5), 1), count - 1) for count in counts]
    assert given.tolist() == wanted and given[5] == 0


def test_a_draw_depends_on_names_and_seed_and_not_on_the_order_or_on_later_pictures():
    targets = np.repeat([0, 1], 50)
    keys = names_of(targets)
    drawn = draw_validation(keys, targets, 0.2)
    order = np.random.default_rng(0).permutation(100)
    again = draw_validation([keys[index] for index in order], targets[order], 0.2)
    assert (again == drawn[order]).all()
    assert (draw_validation(keys, targets, 0.2, seed=1) != drawn).any()
    more = draw_validation([*keys, '0/new.png'], np.append(targets, 0), 0.2)
    assert (more[:100] != drawn).sum() <= 1


def test_units_stay_together_and_no_class_loses_its_last_picture():
    rng = np.random.default_rng(0)
    targets, units = rng.integers(0, 4, 300), rng.integers(0, 60, 300)  # patients of several classes
    chosen = draw_validation(names_of(targets), targets, 0.25, units=units)
    assert not set(units[chosen]) & set(units[~chosen])
    shares = np.bincount(targets[chosen], minlength=4) / np.bincount(targets)
    assert (abs(shares - 0.25) < 0.1).all()
    # class 1 has one unit, which therefore trains; class 2 shares a unit with the only picture of class 3
    targets, units = np.array([0, 0, 1, 1, 2, 2, 3]), np.array([0, 1, 2, 2, 3, 4, 4])
    chosen = draw_validation(names_of(targets), targets, 0.5, units=units)
    assert chosen[:2].sum() == 1 and not chosen[2:4].any() and chosen[4:].tolist() == [True, False, False]


def test_groups_by_pairs_and_by_content(tmp_path):
    groups = Groups(6)
    groups.join(4, 1)
    groups.join_equal(['a', None, 'b', None, 'a', 'b'])
    assert groups.labels().tolist() == [0, 0, 2, 3, 0, 2] and groups.members() == [[0, 1, 4], [2, 5]]
    contents = [b'x' * 9000, b'x' * 9000, b'y' + b'x' * 8999, b'', b'', b'x' * 9000]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    assert list(same_files([str(tmp_path / str(number)) for number in [*range(6), 'gone']])) == [[0, 1, 5]]


# Datasets


def draw(settings, path, fraction=0.25):
    draw_split_file(settings, fraction, path)
    return validating(path)


def test_the_same_pictures_as_folders_lists_and_csv_give_the_same_split(data, tmp_path):
    drawn = draw(DataSettings('folder', str(data)), tmp_path / 'a.csv')
    assert Counter(file.split('/')[1] for file in drawn) == {'ant': 3, 'bee': 1, 'cow': 1}
    files = [f'train/{name}/{number}.png' for name, count in COUNTS.items() for number in range(count)]
    labels = {name: label for label, name in enumerate(COUNTS)}
    (tmp_path / 'list.txt').write_text(''.join(f'{file} {labels[file.split("/")[1]]}\n' for file in files[::-1]))
    assert draw(DataSettings('list', str(data), train_list=str(tmp_path / 'list.txt')), tmp_path / 'b.csv') == drawn
    (tmp_path / 'x.csv').write_text('file,label\n' + ''.join(f'{file},{file.split("/")[1]}\n' for file in files))
    csv = DataSettings('csv', str(data), train_csv=str(tmp_path / 'x.csv'))
    assert draw(csv, tmp_path / 'c.csv') == drawn
    # what is written can be read as a dataset of its own, and divides each of the three
    own = DataSettings('csv', str(data), train_csv=str(tmp_path / 'a.csv'), split_column='split')
    assert len(create_splits(own, ('train', 'val')).val) == 5
    splits = create_splits(DataSettings('folder', str(data), split_file=str(tmp_path / 'a.csv')))
    assert {splits.val.path(index).removeprefix(f'{data}/') for index in range(5)} == drawn
    assert splits.classes.counts == (9, 4, 1, 1) and len(splits.train_targets) == 15
    assert any('validation split: 5 of 20 training pictures' in note for note in splits.notes)
    assert "classes without a picture in the val split: 1 of 4 ('dog')" in splits.notes


def test_names_are_below_the_data_folder_however_it_is_given(data, tmp_path, monkeypatch):
    drawn = draw(DataSettings('folder', str(data)), tmp_path / 'a.csv')
    assert all(file.startswith('train/') for file in drawn)
    monkeypatch.chdir(data.parent)
    for place in ('data', './data/', 'data/../data'):
        assert draw(DataSettings('folder', place), tmp_path / 'b.csv') == drawn
        splits = create_splits(DataSettings('folder', place, split_file=str(tmp_path / 'a.csv')))
        assert len(splits.val) == 5
    monkeypatch.chdir(data)
    assert draw(DataSettings('folder', '.'), tmp_path / 'b.csv') == drawn
    files = [f'{data}/{file}' if 'ant' in file else f'./{file}' for file in split_of(tmp_path / 'a.csv')]
    rows = [f'{file},{file.split("/")[-2]}\n' for file in files]
    (tmp_path / 'x.csv').write_text('file,label\n' + ''.join(rows))  # absolute and relative paths
    csv = DataSettings('csv', str(data), train_csv=str(tmp_path / 'x.csv'), split_file=str(tmp_path / 'a.csv'))
    assert len(create_splits(csv, ('train', 'val')).val) == 5


def test_copies_stay_together(data, tmp_path):
    for number in range(100, 104):
        shutil.copy(data / 'train/bee/0.png', data / f'train/bee/{number}.png')
    draw(DataSettings('folder', str(data)), tmp_path / 'a.csv', 0.5)
    parts = split_of(tmp_path / 'a.csv')
    assert len({parts[f'train/bee/{number}.png'] for number in (0, *range(100, 104))}) == 1
    assert {parts[f'train/bee/{number}.png'] for number in range(5)} == {'train', 'val'}


def test_groups_of_a_column_and_of_a_file_stay_together(data, tmp_path):
    files = [f'train/ant/{number}.png' for number in range(12)] + [f'train/bee/{number}.png' for number in range(4)]
    (tmp_path / 'x.csv').write_text('file,label,patient\n' + ''.join(
        f'{file},{file.split("/")[1]},{number // 3 if number < 12 else ""}\n' for number, file in enumerate(files)))
    settings = dict(data_dir=str(data), train_csv=str(tmp_path / 'x.csv'))
    drawn = draw(DataSettings('csv', group_column='patient', **settings), tmp_path / 'a.csv')
    ants = sorted(int(file[10:-4]) // 3 for file in drawn if 'ant' in file)
    assert len(ants) == 3 and len(set(ants)) == 1 and len(drawn) == 4
    assert read_table(tmp_path / 'a.csv', ['group']).columns['group'][:4] == ['0', '0', '0', '1']
    (tmp_path / 'groups.csv').write_text('file;group\n' + ''.join(f'{data}/train/ant/{n};x\n' for n in ())
                                         + ''.join(f'train/ant/{n}.png;{n % 6}\n' for n in range(12)))
    draw(DataSettings('folder', str(data), val_groups=str(tmp_path / 'groups.csv')), tmp_path / 'b.csv')
    parts = split_of(tmp_path / 'b.csv')
    assert all(parts[f'train/ant/{n}.png'] == parts[f'train/ant/{n + 6}.png'] for n in range(6))
    (tmp_path / 'groups.csv').write_text('file,group\nelsewhere.png,1\n')
    with pytest.raises(InputError, match='names no training picture'):
        draw(DataSettings('folder', str(data), val_groups=str(tmp_path / 'groups.csv')), tmp_path / 'c.csv')


def test_a_file_without_groups_says_that_nothing_belongs_together(data, tmp_path):
    """As `nbn-check --groups-file` writes it where no two pictures are alike."""
    (tmp_path / 'groups.csv').write_text('file,group\n')
    drawn = draw(DataSettings('folder', str(data), val_groups=str(tmp_path / 'groups.csv')), tmp_path / 'a.csv')
    assert drawn == draw(DataSettings('folder', str(data)), tmp_path / 'b.csv')


def test_a_split_is_not_for_the_pictures_of_another_folder(data, tmp_path):
    before = NetworkRecord(arguments={'dataset': 'folder', 'data_dir': str(data), 'split_file': 'run/split.csv',
                                      'val_fraction': 0.2, 'model': 'resnet20'})
    for given, kept in (({}, True), ({'data_dir': str(data)}, True), ({'data_dir': f'{data}/../data'}, True),
                        ({'data_dir': str(tmp_path / 'more')}, False)):
        found = before.inherited_by_training(TrainSettings, given)
        assert ('split_file' in found) == kept, given
    moved = before.inherited_by_training(TrainSettings, {'data_dir': str(tmp_path / 'moved')}, same_task=True)
    assert moved['split_file'] == 'run/split.csv'  # a second stage goes on with the same pictures


def test_a_split_goes_along_with_pictures_that_have_moved(data, tmp_path, caplog):
    drawn = draw(DataSettings('folder', str(data)), tmp_path / 'split.csv')
    before = NetworkRecord(arguments={'dataset': 'folder', 'data_dir': str(data), 'val_fraction': 0.2,
                                      'split_file': str(tmp_path / 'split.csv'), 'model': 'resnet20'})
    shutil.move(data, tmp_path / 'moved')
    given = {'data_dir': str(tmp_path / 'moved')}
    kept = before.inherited_by_training(TrainSettings, given)
    splits = create_splits(DataSettings('folder', given['data_dir'], split_file=kept['split_file']))
    assert len(splits.val) == len(drawn) and not caplog.text
    (tmp_path / 'moved' / sorted(drawn)[0]).unlink()
    assert 'split_file' not in before.inherited_by_training(TrainSettings, given)
    assert "its validation split is left out: give --val-fraction" in caplog.text and 'split.csv' in caplog.text
    caplog.clear()
    before.inherited_by_training(TrainSettings, {**given, 'val_fraction': 0.5})  # which says it
    assert not caplog.text


def test_a_sweep_may_draw_its_validation_split(data):
    flags = ['--dataset', 'folder', '--data-dir', str(data), '--model', 'resnet20', '--val-fraction', '0.2']
    assert len(parse_sweep(['--set', 'lr=0.1,0.2', '--', *flags]).trials) == 2


def test_what_cannot_be_divided_is_refused(data, tmp_path):
    shutil.copytree(data / 'test', data / 'val')
    with pytest.raises(InputError, match='has a validation split here'):
        draw(DataSettings('folder', str(data)), tmp_path / 'a.csv')
    (tmp_path / 'a.csv').write_text('file,split\ntrain/ant/0.png,val\n')
    with pytest.raises(InputError, match='there is a validation split'):
        create_splits(DataSettings('folder', str(data), split_file=str(tmp_path / 'a.csv')))
    shutil.rmtree(data / 'val')
    with pytest.raises(InputError, match='puts no training picture that is here into train'):
        create_splits(DataSettings('folder', str(data), split_file=str(tmp_path / 'a.csv')))
    (tmp_path / 'a.csv').write_text('file,split\ntrain/ant/0.png,test\n')
    with pytest.raises(InputError, match="line 2 of .* has the split 'test': write train or val"):
        create_splits(DataSettings('folder', str(data), split_file=str(tmp_path / 'a.csv')))
    (tmp_path / 'a.csv').write_text('file,split\ntrain/ant/0.png,train\ntrain/bee/0.png,val\n'
                                    './train/ant/0.png,val\n')
    with pytest.raises(InputError, match="line 4 of .* gives 'train/ant/0.png' the split 'val', and an earlier one '"):
        create_splits(DataSettings('folder', str(data), split_file=str(tmp_path / 'a.csv')))
    (tmp_path / 'a.csv').write_text('file,group\ntrain/ant/0.png,1\ntrain/ant/0.png,1\ntrain/ant/0.png,2\n')
    with pytest.raises(InputError, match="line 4 of .* the group '2', and an earlier one '1': keep one"):
        draw(DataSettings('folder', str(data), val_groups=str(tmp_path / 'a.csv')), tmp_path / 'b.csv')
    write_pictures(tmp_path / 'single' / 'train', {'ant': 1, 'bee': 1})
    with pytest.raises(InputError, match='no picture that training can spare'):
        draw(DataSettings('folder', str(tmp_path / 'single')), tmp_path / 'b.csv')
    assert not (tmp_path / 'b.csv').exists()
    with pytest.raises(InputError, match='--val-fraction is for pictures in files, and --dataset cifar100_lt has none'):
        train.parse_train(['--dataset', 'cifar100_lt', '--model', 'resnet20', '--val-fraction', '0.1'])
    given = ValidateSettings.of({'dataset': 'folder', 'val_fraction': 0.1})
    assert 'give that as --split-file' in given.without_effect(['val_fraction'], ['val_fraction'])['val_fraction']


def test_a_draw_of_a_long_tail_comes_after_the_split(data, tmp_path):
    drawn = draw(DataSettings('folder', str(data)), tmp_path / 'a.csv')
    splits = create_splits(DataSettings('folder', str(data), split_file=str(tmp_path / 'a.csv'), imbalance_factor=12))
    assert len(splits.val) == len(drawn) == 5 and splits.classes.counts[:2] == (9, 3) and len(splits.train) < 15


def test_new_pictures_are_left_out_and_gone_ones_told(data, tmp_path):
    draw(DataSettings('folder', str(data)), tmp_path / 'a.csv')
    shutil.copy(data / 'train/ant/0.png', data / 'train/ant/99.png')
    (data / 'train/bee/0.png').unlink()
    splits = create_splits(DataSettings('folder', str(data), split_file=str(tmp_path / 'a.csv')))
    assert len(splits.train) + len(splits.val) == 19
    assert any("are left out: 1, such as 'train/ant/99.png'" in note for note in splits.notes)
    assert any('no longer there: 1' in note for note in splits.notes)


# Runs


def flags(data, tmp_path, experiment, *more):
    return ['--dataset', 'folder', '--data-dir', str(data), '--model', 'resnet20', '--img-size', '16', '--batch-size',
            '4', '--epochs', '1', '-j', '0', '--device', 'cpu', '--output', str(tmp_path / 'out'), '--experiment',
            experiment, *more]


@pytest.fixture
def run(data, tmp_path):
    train.main(flags(data, tmp_path, 'first', '--val-fraction', '0.25'))
    return tmp_path / 'out' / 'first'


def test_a_run_records_its_split_and_later_commands_find_it(data, run, tmp_path, capsys):
    drawn = (run / 'split.csv').read_bytes()
    assert len(validating(run / 'split.csv')) == 5 and (run / 'model_best.pth.tar').exists()
    recorded = yaml.safe_load((run / 'args.yaml').read_text())
    assert (recorded['val_fraction'], recorded['split_file']) == (0.25, str(run / 'split.csv'))
    capsys.readouterr()
    validate.main(['--checkpoint', str(run / 'last.pth.tar'), '--split', 'val', '-j', '0', '--device', 'cpu'])
    assert '  4        5\n' in capsys.readouterr().out  # classes and images
    # another seed of the run shares it, a second stage takes it over, a copied folder brings it along
    train.main(flags(data, tmp_path, 'other', '--val-fraction', '0.25', '--seed', '1'))
    assert (tmp_path / 'out/other/split.csv').read_bytes() == drawn
    moved = tmp_path / 'moved'
    run.rename(moved)
    stage = ['--stage', 'tau_norm', '--initial-checkpoint', str(moved / 'last.pth.tar'), '--output',
             str(tmp_path / 'out'), '--experiment', 'second', '-j', '0', '--device', 'cpu']
    train.main(stage)
    assert (tmp_path / 'out/second/split.csv').read_bytes() == drawn
    assert yaml.safe_load((tmp_path / 'out/second/args.yaml').read_text())['split_file'].endswith('second/split.csv')
    validate.main(['--checkpoint', str(moved / 'last.pth.tar'), '--split', 'test', '-j', '0', '--device', 'cpu'])
    (moved / 'split.csv').unlink()
    with pytest.raises(InputError, match=r'split.csv'):
        validate.main(['--checkpoint', str(moved / 'last.pth.tar'), '--split', 'val', '-j', '0', '--device', 'cpu'])


def test_a_run_goes_on_with_its_own_split_only(data, run, tmp_path):
    drawn = (run / 'split.csv').read_bytes()
    shutil.copy(data / 'train/ant/0.png', data / 'train/ant/new.png')  # it would change the draw
    again = flags(data, tmp_path, 'first', '--resume', 'auto')
    again[again.index('--epochs') + 1] = '2'
    train.main([*again, '--val-fraction', '0.25'])
    assert (run / 'split.csv').read_bytes() == drawn
    for other in (['--val-fraction', '0.5'], ['--val-fraction', '0.25', '--val-seed', '1'], []):
        with pytest.raises(InputError, match=r'was trained with --val-fraction 0.25 .*give it as it was'):
            train.main([*again, *other])
    assert (run / 'split.csv').read_bytes() == drawn


def test_two_processes_have_the_split_of_one(data, run, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m',
               'nbn_timm.cli.train', *flags(data, tmp_path, 'two', '--val-fraction', '0.25')]
    command[command.index('--batch-size') + 1] = '2'
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out/two/split.csv').read_bytes() == (run / 'split.csv').read_bytes()
    assert 'data      folder: 15 training images of 4 classes' in done.stdout


def test_settings_that_go_together():
    given = TrainSettings.of({'dataset': 'folder', 'val_fraction': 0.1, 'split_file': 'x.csv'})
    assert given.without_effect(['val_fraction'], ['val_fraction', 'split_file']) == {
        'val_fraction': 'has no effect with --split-file'}
    given = TrainSettings.of({'dataset': 'folder', 'val_fraction': 0.1})
    assert not given.without_effect(['eval_metric', 'val_seed', 'val_groups'], ['eval_metric'])
    assert 'watch_test' in given.without_effect(['watch_test'], ['watch_test'])


@pytest.mark.parametrize(('typed', 'refused'), [((), False), (('split_file',), True)])
def test_the_draw_that_a_run_brings_along_may_be_given_again(typed, refused):
    known = {one.name: one for one in fields_of(DataSettings)}
    values = Values({'split_file': 'split.csv', 'initial_checkpoint': 'run'}, typed)
    reason = known['val_fraction'].declaration.effect('val_fraction', values)
    assert reason and isinstance(reason, Tolerated) is not refused

"""benchmarks/frontier.py: what is held out, what is counted, and a whole run on few images."""
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_train_run import images  # noqa: F401

from nbn_timm.cli.train import parse_train
from nbn_timm.errors import InputError
from nbn_timm.training.report import config_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def frontier():
    import frontier
    return frontier


def test_held_out_images_are_unused_ones_where_there_are_enough(frontier):
    train = [f'a{i}.png 0' for i in range(9)] + ['b0.png 1', 'b1.png 1']
    pool = train + ['a9.png 0', *(f'b{i}.png 1' for i in range(2, 8)), 'c0.png 2']
    kept, held_out = frontier.hold_out(train, pool, 3)
    assert Counter(row.split()[1] for row in held_out) == {'0': 3, '1': 3}
    assert not set(kept) & set(held_out)
    assert set(train) - set(kept) == {row for row in held_out if row in train}
    assert 'a9.png 0' in held_out and {'b0.png 1', 'b1.png 1'} <= set(kept) and len(kept) == 9
    assert set(frontier.hold_out(train[::-1], pool[::-1], 3)[1]) == set(held_out)


def test_the_whole_pool_is_held_out_beside_the_same_training_images(frontier):
    train = ['a0.png 0', 'a1.png 0', 'b0.png 1', 'c0.png 2', 'c1.png 2']
    pool = [*train, 'a2.png 0', *(f'b{i}.png 1' for i in range(1, 6)), 'c2.png 2', 'd0.png 3']
    few, whole = (frontier.hold_out(train, pool, 2, whole_pool) for whole_pool in (False, True))
    assert few[0] == whole[0]
    assert Counter(row.split()[1] for row in few[1]) == {'0': 2, '1': 2, '2': 2}
    assert Counter(row.split()[1] for row in whole[1]) == {'0': 2, '1': 5, '2': 2}  # class 3 is none of training


def test_runs_on_other_images_do_not_go_into_one_folder(frontier, tmp_path):
    for _ in range(2):
        frontier.write_list(tmp_path / 'held_out.txt', 'a.png 0\n')
    with pytest.raises(InputError, match='has other images than .* give another --output'):
        frontier.write_list(tmp_path / 'held_out.txt', 'a.png 0\nb.png 0\n')
    assert (tmp_path / 'held_out.txt').read_text() == 'a.png 0\n'


def test_files_are_compared_and_not_rows(frontier):
    kept, held_out = frontier.hold_out(['./a1.png 0', 'a2.png 0'], ['a1.png\t0', 'a2.png 0', 'b/../a3.png 0'], 1)
    assert kept == ['./a1.png 0', 'a2.png 0'] and held_out == ['b/../a3.png 0']


@pytest.mark.parametrize('pool', [['a.png 0'], ['a.png 0', 'e.png 0']])
def test_a_class_keeps_an_image_for_training(frontier, pool):
    with pytest.raises(InputError, match=f'class 0 has {len(pool)} images in both lists, of which 2 cannot be held'):
        frontier.hold_out(['a.png 0', 'b.png 1', 'c.png 1', 'd.png 1'], pool, 2)


def settings(*flags):
    return parse_train(['--dataset', 'cifar100_lt', '--model', 'resnet32', *flags])


def test_the_first_stage_counts_if_it_is_of_another_list(frontier, tmp_path):
    def run(name, **given):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'args.yaml').write_text(config_text(settings('--epochs', '5').with_values(**given)))
        (folder / 'test.json').write_text('{"mean_class": 10}')

    entries = [frontier.Entry('second-s1', ['--initial-checkpoint', '{runs}/first-s1/last.pth.tar'])]
    run('second-s1', stage='crt')
    with pytest.raises(InputError, match="begins with the run 'first-s1', whose cost counts"):
        frontier.points_of(tmp_path, entries, Counter('ab'), 1)
    run('first-s1')
    (point,) = frontier.points_of(tmp_path, entries, Counter('ab'), 1)
    assert point.name == 'second'
    assert point.pflop == pytest.approx(2 * 5 * 4 * 2 * 68_865_952 / 1e15, rel=1e-3)


@pytest.mark.parametrize('name', ['frontier', 'frontier_quick', 'frontier_wide', 'frontier_long', 'frontier_stage2',
                                  'frontier_full'])
def test_the_recipes_of_its_lists_are_taken(frontier, name):
    for entry in frontier.read_list(ROOT / 'benchmarks' / f'{name}.txt'):
        if entry.first_stage() is None:  # whose weights are there
            frontier.check_counted(parse_train([*entry.flags, '--workers', '0', '--no-amp', '--channels-last']))


def test_the_frontier_is_what_no_cheaper_one_beats(frontier):
    points = [frontier.Point(name, [accuracy], cost, 10 / cost) for name, accuracy, cost in (
        ('a', 30.0, 1.0), ('b', 29.0, 2.0), ('c', 40.0, 3.0), ('d', 35.0, 3.0))]
    assert [point.name for point in frontier.on_frontier(points, 'pflop')] == ['a', 'c']
    assert [point.name for point in frontier.on_frontier(points, 'core_minutes')] == ['c']


@pytest.mark.slow
def test_a_list_is_trained_and_drawn(frontier, images, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Two recipes of one epoch, one of them with a second stage of one pass."""
    pool = tmp_path / 'pool.txt'
    pool.write_text((images / 'train.txt').read_text() + (images / 'val.txt').read_text())
    recipes = tmp_path / 'recipes.txt'
    common = '--dataset list --img-size 8 --epochs 1 -b 4 --device cpu --workers 0'
    recipes.write_text(f'first-s1 --model resnet20 {common}\n'
                       'second-s1 --stage tau_norm --stage-kwargs tau=1.0 --initial-checkpoint '
                       '{runs}/first-s1/last.pth.tar --img-size 8 -b 4 --device cpu --workers 0 --dataset list\n')
    monkeypatch.setattr(sys, 'argv', [
        'frontier.py', str(recipes), '--data-dir', str(images), '--train-list', 'train.txt', '--pool-list', str(pool),
        '--held-out', '1', '--output', str(tmp_path / 'runs')])
    frontier.main()
    text = (tmp_path / 'runs' / 'frontier.md').read_text()
    assert text in capsys.readouterr().out
    rows = {row.split('|')[1].strip(' *'): [cell.strip() for cell in row.split('|')[2:-1]]
            for row in text.splitlines() if row.startswith('| ') and 'recipe' not in row}
    assert set(rows) == {'first', 'second'}
    assert float(rows['second'][3]) > float(rows['first'][3]) > 0  # with the first stage's
    assert (tmp_path / 'runs' / 'frontier.svg').read_text().count('<svg') == 1
    held_out = (tmp_path / 'runs' / 'lists' / 'held_out.txt').read_text().splitlines()
    assert len(held_out) == 4 and all(row.startswith('val_') for row in held_out)

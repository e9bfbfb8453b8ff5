"""benchmarks/held_out_strength.py: the strength that unseen images ask for."""
import re

import held_out_strength as strength
import numpy as np
import pytest

from nbn_timm.errors import InputError


@pytest.fixture
def lists(tmp_path):
    """Classes of 80, 20 and 5 training images; the pool has all of these, and 30 more of each."""
    train = [f'{label}/{place}.png {label}' for label, count in enumerate((80, 20, 5)) for place in range(count)]
    pool = [*train, *(f'./{label}/new{place}.png {label}' for label in range(3) for place in range(30))]
    for name, rows in (('train', train), ('pool', pool)):
        (tmp_path / f'{name}.txt').write_text('\n'.join(rows) + '\n')
    return tmp_path, train, pool


def answers(pool, bias):
    """Logits of a network that sees the class under noise, with `bias` times the log prior on top; training images it
    knows by heart."""
    labels = np.array([int(row.split()[-1]) for row in pool])
    logits = np.random.default_rng(0).normal(size=(len(pool), 3)) + 2 * np.eye(3)[labels]
    logits += bias * np.log(np.array([80, 20, 5]) / 105)
    logits[:105] = 50 * np.eye(3)[labels[:105]]
    return logits, labels


def test_the_strength_is_that_of_the_bias_and_training_images_do_not_count(lists, capsys):
    folder, _, pool = lists
    logits, labels = answers(pool, bias=0.4)
    np.savez(folder / 'run-s1.npz', logits=logits, labels=labels)
    strength.main([str(folder / 'run-s1.npz'), '--train-list', 'train.txt', '--pool-list', 'pool.txt', '--data-dir',
                   str(folder)])
    said = capsys.readouterr().out
    assert '90 unseen images of 3 classes, beside 105 of training' in said and '| strength | run-s1 |' in said
    assert abs(float(re.search(r'best on average: (\S+)', said)[1]) - 0.4) <= 0.2
    rows = dict(re.findall(r'\| (-?[\d.]+) \| ([\d.]+) \|', said))
    right = logits[105:].argmax(axis=1) == labels[105:]
    assert float(rows['0']) == pytest.approx(100 * right.reshape(3, 30).mean(axis=1).mean(), abs=0.01)


def test_classes_with_few_unseen_images_are_left_out():
    labels = np.array([0, 0, 0, 1])
    logits = np.eye(2)[[0, 0, 1, 0]]
    counts = np.array([5, 5])
    assert strength.mean_accuracy(logits, labels, counts, 0.0, least=1) == pytest.approx(100 / 3)
    assert strength.mean_accuracy(logits, labels, counts, 0.0, least=2) == pytest.approx(200 / 3)
    with pytest.raises(InputError, match='no class has 9 images that training has not seen'):
        strength.mean_accuracy(logits, labels, counts, 0.0, least=9)


def test_logits_of_other_images_are_refused(lists):
    folder, train, _ = lists
    np.savez(folder / 'run-s1.npz', logits=np.zeros((len(train), 3)), labels=np.zeros(len(train), dtype=int))
    flags = ['--train-list', str(folder / 'train.txt'), '--pool-list', str(folder / 'pool.txt')]
    with pytest.raises(InputError, match="has not the labels of .*pool.txt': validate with it as --test-list"):
        strength.main([str(folder / 'run-s1.npz'), *flags])
    with pytest.raises(InputError, match="the logits '.*none.npz' cannot be read"):
        strength.main([str(folder / 'none.npz'), *flags])
    (folder / 'cut.npz').write_bytes((folder / 'run-s1.npz').read_bytes()[:-30])
    with pytest.raises(InputError, match="the logits '.*cut.npz' cannot be read"):
        strength.main([str(folder / 'cut.npz'), *flags])


def test_files_of_one_name_and_classes_without_training_images_are_refused(lists):
    folder, train, pool = lists
    logits, labels = answers(pool, bias=0.0)
    for place in ('a', 'b'):
        (folder / place).mkdir()
        np.savez(folder / place / 'run-s1.npz', logits=logits, labels=labels)
    files, flags = [str(folder / place / 'run-s1.npz') for place in 'ab'], ['--pool-list', str(folder / 'pool.txt')]
    with pytest.raises(InputError, match="two files are called 'run-s1'"):
        strength.main([*files, *flags, '--train-list', str(folder / 'train.txt')])
    (folder / 'two.txt').write_text('\n'.join(row for row in train if not row.endswith(' 2')) + '\n')
    with pytest.raises(InputError, match='class 2 has no image in .*two.txt'):
        strength.main([files[0], *flags, '--train-list', str(folder / 'two.txt')])

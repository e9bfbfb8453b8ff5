"""nbn-check where a picture can be of several classes."""
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_check import files, save, scene

from nbn_timm.cli import check
from nbn_timm.data import DataSettings
from nbn_timm.data.quick_look import quick_look
from nbn_timm.datasets import create_splits
from nbn_timm.inspection.label_sets import common_pairs, labels_per_picture, never_apart, together

pytestmark = pytest.mark.fast

CELLS = {'train': ['sea;fish', 'sea', 'sea;fish', 'sea;fish;boat', 'boat', '', 'sea', 'boat;sea'],
         'val': ['sea;boat', 'sea', ''], 'test': ['fish', 'sea', 'boat;fish']}
FLAGS = ['--train-csv', 'train.csv', '--val-csv', 'val.csv', '--test-csv', 'test.csv', '--label-separator', ';']


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'pictures'
    for seed, (part, cells) in enumerate(CELLS.items()):
        for number in range(len(cells)):
            save(folder / f'{part}{number}.png', scene(100 * seed + number))
        rows = [f'{part}{number}.png,{cell}' for number, cell in enumerate(cells)]
        (folder / f'{part}.csv').write_text('\n'.join(['file,label', *rows]) + '\n')
    return folder


def checked(folder, *flags):
    file = folder.parent / 'found.json'
    check.main(['--dataset', 'csv', '--data-dir', str(folder), *FLAGS, '-j', '0', '--json', str(file), *flags])
    told = json.loads(file.read_text())
    return told, {finding['kind']: finding for finding in told['findings']}


def test_classes_labels_and_pairs(pictures, capsys):
    told, found = checked(pictures)
    assert told['label_sets'] and not told['stops'] and told['pictures'] == 14
    assert told['splits']['train'] == {
        'pictures': 8, 'classes': 3, 'largest': 6, 'smallest': 3, 'imbalance_factor': 2.0, 'many': 0, 'medium': 0,
        'few': 3, 'labels': {'mean': 1.5, 'most': 3, 'none': 1}}
    assert told['splits']['val']['labels'] == {'mean': 1.0, 'most': 2, 'none': 1}
    assert told['per_class']['fish'] == {'train': 3, 'val': 0, 'test': 2, 'shot': 'few'}
    assert told['pairs'] == [{'classes': ['fish', 'sea'], 'pictures': 3, 'of_each': [3, 6]},
                             {'classes': ['boat', 'sea'], 'pictures': 2, 'of_each': [3, 6]},
                             {'classes': ['boat', 'fish'], 'pictures': 1, 'of_each': [3, 3]}]
    assert found['absent_in_val']['names'] == ['fish'] and 'absent_in_test' not in found
    assert files(found['of_no_class']) == [['train5.png']]
    assert found['never_apart']['names'] == ["'fish' only with 'sea'"]
    text = capsys.readouterr().out
    assert re.search(r'^train +8 +3 +6 +3 +2 +0/0/3 +1\.50 +3 +1$', text, re.MULTILINE)
    assert re.search(r'^fish +sea +3 +100\.0 +50\.0$', text, re.MULTILINE)


def test_repeats_are_told_by_their_labels(pictures):
    for name in ('other.png', 'same.png', 'leak.png'):
        Image.open(pictures / 'train0.png').save(pictures / name)
    with open(pictures / 'train.csv', 'a') as file:
        file.write('other.png,sea\nsame.png,fish;sea\n')
    with open(pictures / 'test.csv', 'a') as file:
        file.write('leak.png,sea;fish\n')
    _, found = checked(pictures)
    group = [['train0.png', 'other.png', 'same.png', 'leak.png']]
    assert files(found['same_two_classes']) == group and 'with different labels' in found['same_two_classes']['what']
    assert {picture['class'] for picture in found['same_two_classes']['pictures'][0]} == {'sea', 'fish; sea'}
    assert files(found['same_across_splits']) == group == files(found['same_inside_class'])


def test_a_damaged_picture_stops_and_the_page_shows_the_pairs(pictures):
    (pictures / 'train1.png').write_text('no picture')
    told, found = checked(pictures, '--html', str(pictures / 'page.html'))
    assert told['stops'] and files(found['damaged']) == [['train1.png']]
    page = (pictures / 'page.html').read_text()
    assert 'Classes that come together' in page and 'labels per picture' in page and 'no class' in page
    assert re.search(r'<td>fish</td><td>sea</td><td class="num">3</td><td class="num">100.0</td>', page)


def test_pairs_are_those_of_every_picture():
    sets = (np.random.default_rng(0).random((200, 7)) < 0.3).astype(np.uint8)
    sets[:, 6] = sets[:, 2] & sets[:, 4]  # never without these two
    sets[0, 5] = 1
    sets[:, 5] &= np.arange(200) == 0  # of one picture: chance
    expected = {frozenset((a, b)): sum(row[a] and row[b] for row in sets.tolist()) for a in range(7) for b in range(a)}
    found = {frozenset((pair.rarer, pair.other)): pair.pictures for pair in common_pairs(sets)}
    assert found == {pair: count for pair, count in expected.items() if count}
    assert all(pair.of_rarer <= pair.of_other and pair.of_rarer == sets[:, pair.rarer].sum()
               for pair in common_pairs(sets))
    assert never_apart(sets) == [(6, 2), (6, 4)] and np.diag(together(sets)).tolist() == sets.sum(axis=0).tolist()
    assert labels_per_picture(sets[:0]) == {'mean': None, 'most': 0, 'none': 0}


def test_a_training_is_told_of_copies_with_other_labels(pictures):
    (pictures / 'train7.png').write_bytes((pictures / 'train0.png').read_bytes())
    data = DataSettings('csv', str(pictures), train_csv='train.csv', label_separator=';')
    note, = quick_look(create_splits(data, label_sets=True))
    assert 'the same picture with different labels: once' in note and note.endswith('(nbn-check shows all)')

"""What classes are called: files of names, and what takes them."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from nbn_timm.cli import check
from nbn_timm.data import Classes, DataSettings
from nbn_timm.data.class_names import ClassNames
from nbn_timm.data.splits import Known
from nbn_timm.datasets import create_splits
from nbn_timm.errors import InputError
from nbn_timm.models.create import create_model
from nbn_timm.trained.opening import open_trained

pytestmark = pytest.mark.fast

CODES = ('n01', 'n02', 'n10')
NAMES = ('tench, Tinca tinca', 'crane', 'cock')


@pytest.fixture
def pictures(tmp_path):
    """Class folders called by codes: train with three of them, test with two."""
    rng = np.random.default_rng(0)
    for place in ('train/n01/0', 'train/n01/1', 'train/n02/2', 'train/n10/3', 'test/n01/4', 'test/n10/5'):
        path = tmp_path / 'pictures' / f'{place}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return tmp_path / 'pictures'


def write(folder, text, name='names.txt'):
    (folder / name).write_text(text, encoding='utf-8', newline='')
    return str(folder / name)


def splits_of(folder, known=None, **settings):
    return create_splits(DataSettings(dataset='folder', data_dir=str(folder), **settings), ('train', 'test'), known)


@pytest.mark.parametrize('text', [
    'n01\ttench, Tinca tinca\nn02\tcrane\nn10\tcock\nn99\tanother\n',  # words.txt
    'n02 crane\n\nn01 tench, Tinca tinca\nn10 cock\n',  # ImageNet's LOC_synset_mapping.txt
    '\ufeffcode,name\nn01,"tench, Tinca tinca"\nn02, crane\nn10,cock\n',
    'tench, Tinca tinca\ncrane\ncock\n',  # in label order
    '{"n10": "cock", "n02": "crane", "n01": "tench, Tinca tinca"}',
    '["tench, Tinca tinca", "crane", "cock"]',
])
def test_forms_of_a_file(text, tmp_path):
    names = ClassNames.read(write(tmp_path, text))
    assert names.called(CODES) == dict(zip(CODES, NAMES, strict=True))
    assert names.note(names.called(CODES)) == f"the classes are called as in file '{tmp_path}/names.txt'"


def test_a_class_without_a_name_keeps_its_code_and_equal_names_are_told_apart(tmp_path):
    names = ClassNames.read(write(tmp_path, 'n01\tcrane\nn02\tcrane\n'))
    assert names.called(CODES) == {'n01': 'crane (n01)', 'n02': 'crane (n02)', 'n10': 'n10'}
    assert names.note(names.called(CODES)).endswith("which does not name 1 of 3 ('n10')")


def test_classes_that_are_called_so_already_stay(tmp_path):
    names = ClassNames.read(write(tmp_path, 'n01\ttench\nn02\tcrane\n'))
    assert names.called(('crane', 'tench', 'crane (n9)')) == {name: name for name in ('crane', 'tench', 'crane (n9)')}
    assert names.note({'crane': 'crane'}).endswith("names.txt'")


def test_a_first_word_that_is_also_a_class_does_not_decide(tmp_path):
    names = ClassNames.read(write(tmp_path, 'n01 tench\nold crane\ncock\n'))
    assert list(names.called(CODES).values()) == ['n01 tench', 'old crane', 'cock']


@pytest.mark.parametrize('text', ['cat\ndog\nbird\n', '["dog", "bird", "cat"]'])
def test_a_list_of_the_codes_in_another_order_renames_nothing(text, tmp_path):
    names = ClassNames.read(write(tmp_path, text))
    called = names.called(('bird', 'cat', 'dog'))
    assert called == {'bird': 'bird', 'cat': 'cat', 'dog': 'dog'}
    assert names.note(called).endswith("names.txt'")


def test_a_list_in_order_fits_a_network_that_it_has_named(tmp_path):
    names = ClassNames.read(write(tmp_path, 'crane\ncrane\ncock\n'))
    called = tuple(names.called(CODES).values())
    assert called == ('crane (n01)', 'crane (n02)', 'cock')
    assert tuple(names.called(called).values()) == called and names.note(names.called(called)).endswith("names.txt'")


@pytest.mark.parametrize('text, said', [
    ('cat\ndog\nfish\n', "'cat', a line of file"),
    ('bird\tx\ncat\ty\nbird\tz\n', "has 'bird' twice, with different names"),
    ('{"bird": "x", "cat": "y", "bird": "z"}', "has 'bird' twice, with different names"),
    ('bird x\ncat x\ndog x (bird)\n', "several classes are called 'x (bird)'"),
])
def test_names_that_leave_a_choice_are_refused(text, said, tmp_path):
    with pytest.raises(InputError, match=r'write a line per class|give each') as error:
        ClassNames.read(write(tmp_path, text)).called(('bird', 'cat', 'dog'))
    assert said in str(error.value)


def test_a_code_may_be_there_twice_with_one_name_or_begin_several_names(tmp_path):
    names = ClassNames.read(write(tmp_path, 'n01\ttench\nn01\ttench\nx\ty\nx\tz\n'))
    assert names.called(('n01', 'n02')) == {'n01': 'tench', 'n02': 'n02'}
    names = ClassNames.read(write(tmp_path, 'great shark\ngreat owl\ngreat tit\n'))
    assert list(names.called(('0', 'great', '2')).values()) == ['great shark', 'great owl', 'great tit']


@pytest.mark.parametrize('name', [r'"\ud800"', r'"a\u0000"', r'"a\u001b[31m"', r'"a\nb"', r'"\u202etac"', 'a\x00b',
                                  'a\x1b[31m', 'a\u202eb', 'a\u2028b', 'a\x0bb', 'a\x85b', 'a\rb'])
def test_characters_that_no_name_has_are_refused(name, tmp_path):
    for text in [f'[{name}, "b"]', f'{{"n01": {name}}}'] if name[0] == '"' else [f'{name}\nb\n', f'n01\t{name}\n']:
        with pytest.raises(InputError, match='has a control character.*remove it$'):
            ClassNames.read(write(tmp_path, text))
    assert ClassNames.read(write(tmp_path, 'n01\tا\u200cب\r\nn02\tB\r\n')).called(['n01', 'n02'])['n01'] == 'ا\u200cب'


@pytest.mark.parametrize('text, said', [
    (None, 'No such file'), ('', 'is empty'), ('{"a": ', 'no valid JSON'), ('[1, 2, 3]', 'something else than names'),
    ('cat\ndog\n', "names none of the 3 classes ('n01', 'n02', 'n10')"), ('x1\tcat\n', 'names none of the 3 classes')])
def test_a_wrong_file_is_one_sentence_with_a_remedy(text, said, tmp_path, pictures):
    path = str(tmp_path / 'gone.txt') if text is None else write(tmp_path, text)
    with pytest.raises(InputError, match=r'correct the path|write a line per class') as error:
        splits_of(pictures, class_names=path)
    assert said in str(error.value) and path in str(error.value)


def test_words_beside_class_folders_name_them_and_labels_stay(pictures):
    plain = splits_of(pictures)
    assert plain.classes.names == CODES
    write(pictures, 'n02\tcrane\nn10\tcock\nn01\ttench, Tinca tinca\n', 'words.txt')
    named = splits_of(pictures)
    assert named.classes.names == NAMES and named.classes.counts == (2, 1, 1)
    assert named.train_targets.tolist() == plain.train_targets.tolist() and named.test.targets.tolist() == [0, 2]
    assert any('words.txt' in note for note in named.notes)
    given = splits_of(pictures, class_names=write(pictures.parent, 'A\nB\nC\n'))
    assert given.classes.names == ('A', 'B', 'C')
    assert splits_of(pictures, class_names='none').classes.names == CODES


@pytest.mark.parametrize('text', ['some words about these pictures\n', 'x7\tfish\n', ''])
def test_another_words_file_is_left_alone(text, pictures):
    write(pictures, text, 'words.txt')
    assert splits_of(pictures).classes.names == CODES


@pytest.mark.parametrize('theirs', [NAMES[::-1], CODES[::-1]])
def test_a_network_of_names_or_of_codes_fits(theirs, pictures):
    """It may have been trained before the file was there."""
    write(pictures, 'n02\tcrane\nn10\tcock\nn01\ttench, Tinca tinca\n', 'words.txt')
    splits = splits_of(pictures, Known(Classes((1, 1, 1), theirs, 'a checkpoint'), 'a checkpoint'))
    assert splits.classes.names == NAMES[::-1] and splits.test.targets.tolist() == [0, 2][::-1]


def test_counts_by_code_fit_named_classes(pictures):
    counts = write(pictures.parent, json.dumps({'n10': 7, 'n02': 8, 'n01': 9}), 'counts.json')
    names = write(pictures.parent, '\n'.join(map(' '.join, zip(CODES, NAMES, strict=True))))
    assert splits_of(pictures, class_names=names, class_counts=counts).classes.counts == (9, 8, 7)


def test_lists_of_numbers_get_names(pictures):
    (pictures / 'train.lst').write_text('train/n01/0.png 1\ntrain/n01/1.png 0\ntrain/n02/2.png 2\n')
    names = write(pictures.parent, '0,ant\n1,bee\n2,cow\n')
    splits = create_splits(DataSettings(dataset='list', data_dir=str(pictures), train_list='train.lst',
                                        class_names=names), ('train',))
    assert splits.classes.names == ('ant', 'bee', 'cow') and splits.train_targets.tolist() == [1, 0, 2]


def test_a_check_names_classes_and_tells_where_they_are(pictures, tmp_path, capsys):
    write(pictures, 'n02\tcrane\nn10\tcock\nn01\ttench, Tinca tinca\n', 'words.txt')
    check.main([str(pictures), '-j', '0', '--json', str(tmp_path / 'found.json')])
    assert 'tench, Tinca tinca      2' in (printed := capsys.readouterr().out) and "'crane (n02)'" in printed
    found = json.loads((tmp_path / 'found.json').read_text())
    assert found['per_class']['crane'] == {'train': 1, 'test': 0, 'shot': 'few', 'folder': 'n02'}
    check.main([str(pictures), '-j', '0', '--class-names', write(tmp_path, '["A", "B", "C"]')])
    assert 'A          2     1' in capsys.readouterr().out


def test_a_finished_network_answers_by_other_names(tmp_path):
    network = create_model('resnet20_nbn', 3)
    torch.save({'arch': 'resnet20_nbn', 'state_dict': network.state_dict(), 'version': 2,
                'class_counts': Classes((5, 4, 3), CODES, 'a test').to_dict()}, tmp_path / 'last.pth.tar')
    names = write(tmp_path, 'n01\ttench, Tinca tinca\nn02\tcrane\nn10\tcock\n')
    trained = open_trained(str(tmp_path / 'last.pth.tar'), class_names_file=names)
    assert trained.classes.names == NAMES and trained.classes.counts == (5, 4, 3)
    assert trained.notes[-1] == f"the classes are called as in file '{names}'"

"""The classes: counts, their many/medium/few split, matching by name, and counts from files."""
import inspect
import json
import os
import re

import numpy as np
import pytest
import torch

from nbn_timm.data.classes import FEW_BELOW, MANY_ABOVE, ClassCounts, Classes, read_counts
from nbn_timm.errors import InputError
from nbn_timm.evaluation import LongTailEvaluator
from nbn_timm.evaluation.prediction import TopClasses
from nbn_timm.losses import create_loss

pytestmark = pytest.mark.fast


def make(*counts):
    return ClassCounts(counts, tuple('abcdefgh'[:len(counts)]), 'test')


def test_measures_of_a_long_tail():
    counts = make(500, 100, 0, 5)
    assert (counts.num_classes, counts.total, counts.imbalance_factor) == (4, 605, 100.0)
    assert counts.tensor().dtype == counts.prior().dtype == torch.float64
    assert counts.tensor().tolist() == [500, 100, 0, 5]
    torch.testing.assert_close(counts.prior().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert counts.prior()[1] == 100 / 605


def test_exactly_100_and_exactly_20_images_are_medium():
    split = make(101, 100, 99, 21, 20, 19, 0).shot_split()
    assert (split.many, split.medium, split.few) == ((0,), (1, 2, 3, 4), (5, 6))
    assert dict(split.items()) == {'many': (0,), 'medium': (1, 2, 3, 4), 'few': (5, 6)}
    assert (split.many_above, split.few_below) == (100, 20)


def test_thresholds_are_settable():
    counts = make(50, 10, 5)
    assert counts.shot_split(many=10, few=10).items() == (('many', (0,)), ('medium', (1,)), ('few', (2,)))
    with pytest.raises(InputError, match='lies above'):
        counts.shot_split(many=10, few=11)


def test_counts_of_targets():
    targets = np.random.RandomState(0).permutation(np.repeat([0, 1, 3], [5, 2, 1]))
    assert ClassCounts.from_targets(targets, None, 'x').counts == (5, 2, 0, 1)
    assert ClassCounts.from_targets(targets, None, 'x').names == ('0', '1', '2', '3')
    assert ClassCounts.from_targets(targets.tolist(), list('abcde'), 'x').counts == (5, 2, 0, 1, 0)
    with pytest.raises(InputError, match='label 3 of x is out of range for 3 classes'):
        ClassCounts.from_targets(targets, list('abc'), 'x')
    with pytest.raises(InputError, match='has no images'):
        ClassCounts.from_targets([], None, 'x')


def test_dict_survives_json():
    counts = make(3, 2, 1)
    assert ClassCounts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts


@pytest.mark.parametrize('data', [
    {}, {'counts': 3}, {'counts': ['many']}, {'counts': [1.5]}, [1, 2], {'counts': [1, 2], 'names': ['a', [1]]},
    {'counts': [1, 2], 'names': ['a', None]}])
def test_malformed_dict_is_an_error(data):
    with pytest.raises(InputError, match='cannot be read'):
        ClassCounts.from_dict(data)


@pytest.mark.parametrize('text, counts, names', [
    ('[30, 20, 10]', (30, 20, 10), ('0', '1', '2')),
    ('{"counts": [30, 20], "names": ["cat", "dog"]}', (30, 20), ('cat', 'dog')),
    ('{"counts": [30, 20]}', (30, 20), ('0', '1')),
    ('{"cat": 3, "dog": 4}', (3, 4), ('cat', 'dog')),
    ('{"10": 1, "9": 2, "0": 7}', (7, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1), tuple(map(str, range(11)))),
    ('a b.jpg 1\nc.jpg 0\nd.jpg 1\n', (1, 2), ('0', '1')),
])
def test_files(tmp_path, text, counts, names):
    path = tmp_path / 'counts'
    path.write_text(text)
    read = ClassCounts.from_file(path)
    assert (read.counts, read.names) == (counts, names)
    assert str(path) in read.source


@pytest.mark.parametrize('text', [
    '{', '[]', '{}', '[1, -1]', '[0, 0]', '["3"]', '[true]', '[1.5]', '[NaN]', '[Infinity]', '3',
    '{"counts": [1, 2], "names": ["a"]}', '{"counts": [1, 2], "names": 3}', '{"a": [1]}',
])
def test_malformed_files_are_errors(tmp_path, text):
    path = tmp_path / 'counts.json'
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        ClassCounts.from_file(path)
    assert 'counts.json' in str(caught.value) and '\n' not in str(caught.value)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match='absent.json.*No such file'):
        ClassCounts.from_file(tmp_path / 'absent.json')


# Without counts ---------------------------------------------------------------------------------------------------

def test_classes_without_counts_say_so_where_counts_are_needed():
    classes = Classes(None, ('ant', 'bee'), 'the checkpoint')
    assert (classes.num_classes, classes.named, classes.counts) == (2, True, None)
    assert Classes.from_dict(json.loads(json.dumps(classes.to_dict()))) == classes
    for use in (Classes.tensor, Classes.prior, Classes.shot_split, lambda c: c.total, lambda c: c.train_images,
                lambda c: c.imbalance_factor):
        with pytest.raises(InputError, match='of the checkpoint are not known: give them with --class-counts'):
            use(classes)


def test_losses_and_evaluation_take_classes_without_counts_for_unknown():
    classes = Classes(None, ('ant', 'bee'), 'x')
    with pytest.raises(InputError, match="loss 'ldam' needs the training images per class"):
        create_loss('ldam', classes)
    assert LongTailEvaluator(2, classes).shot_split is None
    predicted = TopClasses(classes.names, classes)(torch.tensor([[0.0, 3.0]]))[0][0]
    assert (predicted.name, predicted.train_images, predicted.shot) == ('bee', None, None)


def test_records_of_before_are_read():
    record = {'counts': [3, 2], 'names': ['ant', 'bee'], 'source': 'train split of folder'}
    assert Classes.from_dict(record) == Classes((3, 2), ('ant', 'bee'), 'train split of folder')
    assert Classes.from_dict({**record, 'names': None}).names == ('0', '1')
    assert not Classes.from_dict({**record, 'names': None}).named
    assert Classes.from_dict({**record, 'counts': None}).counts is None
    with pytest.raises(InputError, match='cannot be read'):
        Classes.from_dict({**record, 'names': 'ab'})
    with pytest.raises(InputError, match='cannot be read'):
        Classes.from_dict({'counts': None, 'names': None, 'source': 'x'})


def test_shot_limits_have_one_owner():
    split = make(101, 50, 3).shot_split()
    assert (split.many_above, split.few_below) == (MANY_ABOVE, FEW_BELOW) == (100, 20)
    for function in (Classes.shot_split, LongTailEvaluator.__init__):
        defaults = inspect.signature(function).parameters
        assert (defaults['many'].default, defaults['few'].default) == (MANY_ABOVE, FEW_BELOW)


# Matching ---------------------------------------------------------------------------------------------------------

def named(*names):
    return Classes(None, names, ' '.join(names))


def numbered(number):
    return Classes(None, tuple(map(str, range(number))), f'{number} numbers')


def test_other_order_is_matched_by_name():
    matching = named('apple', 'leaf', 'sky').match(named('sky', 'apple', 'leaf'), 'the checkpoint')
    assert (matching.labels, matching.reordered, matching.notes) == ((2, 0, 1), True, [])
    assert matching.only_ours == matching.only_theirs == ()
    assert matching.relabel(np.array([0, 0, 1, 2])).tolist() == [2, 2, 0, 1]
    matching.require_same()


def test_same_order_needs_no_new_labels():
    for classes in (named('ant', 'bee'), numbered(3)):
        matching = classes.match(classes, 'the checkpoint')
        assert not matching.reordered and matching.notes == []
        matching.require_same()


def test_odd_names_are_refused_by_name():
    matching = named('ant', 'bee', 'cat').match(named('ant', 'cat', 'beee'), 'data x', 'checkpoint y')
    assert (matching.labels, matching.only_theirs, matching.only_ours) == ((0, 2, -1), ('beee',), ('bee',))
    with pytest.raises(InputError, match="^class 'beee' of data x is not among the classes of checkpoint y: .*"
                                         "did you mean 'bee'"):
        matching.require_theirs()
    assert matching.relabel(np.array([0, 1])).tolist() == [0, 2]  # no picture of the odd class
    with pytest.raises(InputError, match="'beee'"):
        matching.relabel(np.array([0, 2]))
    fewer = named('ant', 'bee', 'cat').match(named('cat'), 'data x', 'checkpoint y')
    fewer.require_theirs()
    with pytest.raises(InputError, match="classes 'ant', 'bee' of checkpoint y are not among the classes of data x: "
                                         "rename .* --class-names [(]FILE, or none[)]"):
        fewer.require_same()


def test_names_are_compared_letter_by_letter():
    matching = named('Rosa', 'caf\u00e9', '07').match(named('rosa', 'cafe\u0301', '7'), 'x')
    assert matching.labels == (-1, -1, -1)


@pytest.mark.parametrize('ours, theirs', [(named('ant', 'bee', 'cat'), numbered(3)),
                                          (numbered(3), named('ant', 'bee', 'cat'))])
def test_without_names_on_one_side_position_decides_and_it_is_said(ours, theirs):
    matching = ours.match(theirs, 'data x', 'checkpoint y')
    assert (matching.labels, matching.by_position) == ((0, 1, 2), 3)
    assert re.fullmatch('the classes of data x are matched .* of checkpoint y by position, because .*',
                        matching.notes[0])
    matching.require_same()


def test_without_names_numbers_of_classes_must_agree():
    with pytest.raises(InputError, match="class 'cat' of data x is not among the classes of checkpoint y"):
        numbered(2).match(named('ant', 'bee', 'cat'), 'data x', 'checkpoint y').require_same()
    with pytest.raises(InputError, match="class '3' of checkpoint y"):
        numbered(4).match(named('ant', 'bee', 'cat'), 'data x', 'checkpoint y').require_same()


def test_numbers_that_are_names_are_names():
    # Folders 1, 2, 3 are not the labels 0, 1, 2: 1 is label 1.
    matching = numbered(3).match(named('1', '2', '3'), 'x')
    assert (matching.labels, matching.only_theirs) == ((1, 2, -1), ('3',))
    assert named('9', '10').match(named('10', '9'), 'x').labels == (1, 0)
    assert numbered(10).match(named('3', '7'), 'x').labels == (3, 7)


def test_a_class_without_a_name_among_others_stands_by_its_label():
    matching = named('ant', 'bee', '2').match(named('bee', 'ant', 'cat'), 'x')
    assert (matching.labels, matching.by_position) == ((1, 0, 2), 1)
    assert matching.notes[0].startswith('1 of 3 classes of x are matched')


def test_a_name_twice_cannot_be_matched_unless_the_order_is_the_same():
    crane = named('crane', 'ant', 'crane')
    assert not crane.match(crane, 'x').reordered
    with pytest.raises(InputError, match="two classes of x are called 'crane'.*rename one"):
        named('ant', 'crane', 'bee').match(crane, 'x')


# Counts from files, matched -----------------------------------------------------------------------------------------

ANIMALS = Classes((1, 1, 1), ('ant', 'bee', 'cow'), 'train split of folder')


def counts_of(tmp_path, text, known):
    path = tmp_path / 'counts.json'
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return read_counts(path).of(known)


@pytest.mark.parametrize('text', [{'cow': 200, 'bee': 50, 'ant': 10},
                                  {'counts': [200, 10, 50], 'names': ['cow', 'ant', 'bee']}])
def test_counts_by_name_in_any_order(tmp_path, text):
    classes, notes = counts_of(tmp_path, text, ANIMALS)
    assert (classes.counts, classes.names, notes) == ((10, 50, 200), ANIMALS.names, [])
    assert 'counts.json' in classes.source
    assert Classes.from_file(tmp_path / 'counts.json', ANIMALS) == classes


@pytest.mark.parametrize('text, odd', [
    ({'cow': 200, 'bee': 50, 'emu': 10}, "'emu' of file .*not among the classes of train split of folder"),
    ({'cow': 200, 'bee': 50}, "'ant' of train split of folder is not among the classes of file"),
    ({'cow': 200, 'bee': 50, 'Ant': 10}, "'Ant'.*did you mean 'ant'"),
    ([1, 2], 'counts 2 classes but train split of folder has 3'),
    ({'0': 1, '3': 5}, 'counts 4 classes but train split of folder has 3'),
])
def test_counts_of_other_classes_are_refused_by_name(tmp_path, text, odd):
    with pytest.raises(InputError, match=odd):
        counts_of(tmp_path, text, ANIMALS)


@pytest.mark.parametrize('text', [[5, 6, 7], {'2': 7, '1': 6, '0': 5}, {'counts': [5, 6, 7]}])
def test_counts_by_label_beside_names_are_said(tmp_path, text):
    classes, notes = counts_of(tmp_path, text, ANIMALS)
    assert (classes.counts, classes.names) == ((5, 6, 7), ANIMALS.names)
    assert len(notes) == 1 and 'by position' in notes[0]


def test_names_in_digits_are_names(tmp_path):
    folders = Classes(None, ('9', '10'), 'folders')
    assert counts_of(tmp_path, {'10': 3, '9': 4}, folders)[0].counts == (4, 3)
    zeros = Classes(None, ('007', '07', '7'), 'folders')
    assert counts_of(tmp_path, {'7': 1, '07': 2, '007': 3}, zeros)[0].counts == (3, 2, 1)
    ids = Classes(None, ('10394837', '20394837'), 'folders')
    assert counts_of(tmp_path, {'20394837': 1, '10394837': 2}, ids)[0].counts == (2, 1)
    with pytest.raises(InputError, match="class '0' of file"):
        counts_of(tmp_path, {'0': 1, '1': 2}, Classes(None, ('1', '2'), 'folders'))


def test_names_of_a_file_name_classes_that_have_none(tmp_path):
    classes, notes = counts_of(tmp_path, {'cow': 200, 'bee': 50}, numbered(2))
    assert (classes.counts, classes.names) == ((200, 50), ('cow', 'bee')) and 'by position' in notes[0]
    classes, notes = counts_of(tmp_path, {'cow': 200, 'bee': 50}, None)
    assert (classes.counts, classes.names) == ((200, 50), ('cow', 'bee')) and 'in its order' in notes[0]
    with pytest.raises(InputError, match="class 'bee' of file"):
        counts_of(tmp_path, {'cow': 200, 'bee': 50}, numbered(1))


def test_a_training_list_is_counted_by_its_folders(tmp_path):
    (tmp_path / 'train.txt').write_text('train/cow/0.jpg 0\ntrain/cow/1.jpg 0\ntrain/ant/0.jpg 1\n')
    assert Classes.from_file(tmp_path / 'train.txt', ANIMALS).counts == (1, 0, 2)
    assert Classes.from_file(tmp_path / 'train.txt', numbered(3)).counts == (2, 1, 0)
    with pytest.raises(InputError, match="class 'cow' of file"):
        Classes.from_file(tmp_path / 'train.txt', Classes(None, ('ant', 'bee', 'cat'), 'folders'))


@pytest.mark.parametrize('text, message', [
    ('{"99999999": 5}', 'label 99999999 of file .* looks like an id'),
    ('{"99999999999999999999999": 5, "1": 1}', 'looks like an id'),
    ('{"a": 1, "a": 2}', "has 'a' twice"),
    ('{"counts": [1, 2], "names": ["a", "a"]}', "has 'a' twice"),
    ('{"a": 1e300}', 'no number of images'),
    ('{"a": 10000000000000000000000}', 'no number of images'),
    ('[' * 100000, 'no valid JSON'),
    ('[1, ' + '9' * 5000 + ']', 'no valid JSON'),
    ('{"counts": {"a": 1}}', 'no number of images'),
    ('a.jpg 10000000', 'looks like an id'),
])
def test_counts_that_would_take_all_memory_are_refused(tmp_path, text, message):
    path = tmp_path / ('counts.txt' if text.startswith('a') else 'counts.json')
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_counts(path).of(None)
    assert '\n' not in str(caught.value) and 'counts.' in str(caught.value)


def test_a_pipe_is_no_file_of_counts(tmp_path):
    os.mkfifo(tmp_path / 'counts.json')
    with pytest.raises(InputError, match='no regular file'):
        read_counts(tmp_path / 'counts.json')


def test_byte_order_marks_are_no_content(tmp_path):
    (tmp_path / 'counts').write_bytes(b'\xef\xbb\xbf{"cow": 2, "ant": 1, "bee": 3}')
    assert Classes.from_file(tmp_path / 'counts', ANIMALS).counts == (1, 3, 2)
    (tmp_path / 'list').write_bytes(b'\xef\xbb\xbfx.jpg 1\r\ny.jpg 0\r\n')
    assert Classes.from_file(tmp_path / 'list').counts == (1, 1)

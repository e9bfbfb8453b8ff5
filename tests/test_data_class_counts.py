"""Class counts and their many/medium/few split."""
import json

import numpy as np
import pytest
import torch

from nbn_timm.data.classes import ClassCounts
from nbn_timm.errors import InputError


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


@pytest.mark.parametrize('data', [{}, {'counts': 3}, {'counts': ['many']}, {'counts': [1.5]}, [1, 2]])
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

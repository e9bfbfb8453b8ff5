"""Labels of data that lack classes of a finished network: by the names, whatever number of classes is asked for."""
import numpy as np
import pytest
from PIL import Image

from nbn_timm.data import Classes, DataSettings
from nbn_timm.data.splits import Known
from nbn_timm.datasets import create_splits
from nbn_timm.errors import InputError

pytestmark = pytest.mark.fast
ANIMALS = Known(Classes((3, 2, 1, 1), ('ant', 'bee', 'cat', 'dog'), 'a test'), 'the network')


@pytest.fixture
def site(tmp_path):
    """A folder with test pictures alone, of all animals but bees."""
    def pictures(*names: str) -> str:
        for name in names:
            (tmp_path / 'test' / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / 'test' / name / '0.png')
        return str(tmp_path)
    return pictures


@pytest.mark.parametrize('num_classes', [None, 4])
def test_names_win_over_a_number(num_classes, site):
    data = DataSettings('folder', site('ant', 'cat', 'dog'), num_classes=num_classes)
    splits = create_splits(data, ('test',), ANIMALS)
    assert np.asarray(splits.test.targets).tolist() == [0, 2, 3]
    assert splits.classes.names == ANIMALS.classes.names and splits.num_classes == 4
    assert not any('by position' in note for note in splits.notes)


@pytest.mark.parametrize('num_classes', [None, 4])
def test_a_class_that_the_network_does_not_have_is_named(num_classes, site):
    with pytest.raises(InputError, match="'emu'"):
        create_splits(DataSettings('folder', site('ant', 'cat', 'emu'), num_classes=num_classes), ('test',), ANIMALS)


def test_names_are_kept_where_more_classes_are_asked_for(site):
    splits = create_splits(DataSettings('folder', site('ant', 'cat'), num_classes=4), ('test',))
    assert splits.classes.names == ('ant', 'cat', '2', '3')


def listed(folder, file: str, *lines: str) -> str:
    (folder / file).write_text('\n'.join(lines) + '\n')
    return file


def test_lists_that_number_a_class_otherwise_are_refused(tmp_path):
    train = listed(tmp_path, 'train.txt', 'train/ant/0.png 0', 'train/bee/0.png 1', 'train/cat/0.png 2')
    test = listed(tmp_path, 'test.txt', 'test/bee/0.png 0', 'test/ant/0.png 1', 'test/cat/0.png 2')
    with pytest.raises(InputError, match="'(bee|ant)' has label [01] in the test list and [01] in the train list"):
        create_splits(DataSettings('list', str(tmp_path), train_list=train, test_list=test))
    mixed = listed(tmp_path, 'mixed.txt', 'a/0.png 0', 'a/1.png 1', 'b/0.png 1', 'b/1.png 0')  # folders are no classes
    create_splits(DataSettings('list', str(tmp_path), train_list=train, test_list=mixed))


@pytest.mark.parametrize('lines, expected', [
    (('test/cat/0.png 0', 'test/dog/0.png 1'), [2, 3]),  # numbered by the folders that are there
    (('test/cat/0.png 2', 'test/dog/0.png 3'), [2, 3]),
    (('test/x/0.png 0', 'test/y/0.png 1'), [0, 1]),
])
def test_a_test_list_alone_goes_by_the_names_of_its_folders(lines, expected, tmp_path):
    test = listed(tmp_path, 'test.txt', *lines)
    splits = create_splits(DataSettings('list', str(tmp_path), test_list=test, num_classes=4), ('test',), ANIMALS)
    assert np.asarray(splits.test.targets).tolist() == expected
    assert any('are not called as the classes' in note for note in splits.notes) == (expected == [0, 1])


def test_classes_without_a_training_image_are_told(tmp_path):
    train = listed(tmp_path, 'train.txt', 'train/ant/0.png 0', 'train/dog/0.png 1')
    loose = Known(ANIMALS.classes, ANIMALS.whose, binding=False)
    for known in (ANIMALS, loose):
        splits = create_splits(DataSettings('list', str(tmp_path), train_list=train), ('train',), known)
        assert splits.train_targets.tolist() == [0, 3] and splits.num_classes == 4
        assert "2 classes of the network have no training image here: 'bee', 'cat'" in splits.notes
    splits = create_splits(DataSettings('list', str(tmp_path), train_list=train, num_classes=2), ('train',), loose)
    assert splits.train_targets.tolist() == [0, 1] and splits.num_classes == splits.classes.num_classes == 2


def test_more_names_than_classes_are_refused(site):
    with pytest.raises(InputError, match="3 classes and --num-classes is 2.*'cat'"):
        create_splits(DataSettings('folder', site('ant', 'bee', 'cat'), num_classes=2), ('test',))

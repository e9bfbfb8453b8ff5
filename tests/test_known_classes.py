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

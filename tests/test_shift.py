"""Long-tailed test sets: SADE's rule against its own words in a loop, and its lists against what is known of them."""
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from nbn_timm.data import ArraySamples, ClassCounts, DataSettings
from nbn_timm.data.shift import ClassShift, shifted_indices
from nbn_timm.data.splits import Splits
from nbn_timm.datasets import create_splits, find_benchmark, shifted_test, with_shifted_test
from nbn_timm.datasets.list_benchmark import SADE_LISTS
from nbn_timm.errors import InputError
from nbn_timm.evaluation import shifted_accuracy

pytestmark = pytest.mark.fast


def counts_of(*train_images: int) -> ClassCounts:
    return ClassCounts(train_images, tuple(f'class {label}' for label in range(len(train_images))), 'a test')


@pytest.mark.parametrize('ratio', [1, 2, 3.5, 5, 10, 25, 50, 100])
@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_cifars_shifted_tests_are_sades_image_for_image(direction, ratio):
    """`IMBALANCECIFAR100(train=False, imb_factor=1 / ratio, reverse=...)`: NumPy's global generator with seed 0, all
    indices of a class shuffled, in label order, and the first int(100 imb_factor^(c / 99)) kept; c from the end in
    reverse. CIFAR-100-LT's ranks are its labels; equal counts keep their order."""
    targets = np.random.RandomState(5).permutation(np.repeat(np.arange(100), 100))
    train = counts_of(*(max(int(500 * 0.01 ** (label / 99)), 1) for label in range(100)))
    state = np.random.get_state()
    np.random.seed(0)
    expected = []
    for label in range(100):
        place = 99 - label if direction == 'backward' else label
        number = int(100 * (1 / ratio) ** (place / 99.0))
        indices = np.where(targets == label)[0]
        np.random.shuffle(indices)
        expected += indices[:number].tolist()
    np.random.set_state(state)
    assert shifted_indices(targets, train, ClassShift(direction, ratio)).tolist() == expected


def test_ranks_are_of_training_images():
    targets = np.repeat(np.arange(3), 40)
    drawn = shifted_indices(targets, counts_of(5, 900, 70), ClassShift('forward', 4))
    assert np.bincount(targets[drawn]).tolist() == [10, 40, 20]
    drawn = shifted_indices(targets, counts_of(5, 900, 70), ClassShift('backward', 4))
    assert np.bincount(targets[drawn]).tolist() == [40, 10, 20]
    assert len(shifted_indices(targets, counts_of(5, 900, 70), ClassShift('forward', 1e6))) == 40 + 1 + 1
    assert len(shifted_indices(np.zeros(4, dtype=np.int64), counts_of(7), ClassShift('backward', 50))) == 4 * 1


SIZES = {  # lines of the files of Vanint/SADE-AgnosticLT, data_txt, commit cba11b8
    'imagenet_lt': {50: 12_058, 25: 14_437, 10: 19_059, 5: 24_365, 2: 35_574},
    'places_lt': {50: 8_989, 25: 10_727, 10: 14_103, 5: 17_970, 2: 26_155},
    'inat18': {3: (11_147, 11_137), 2: 12_906},  # forward and backward
}


@pytest.mark.parametrize('name', SIZES)
def test_sades_lists_are_there_and_have_its_numbers(name, tmp_path):
    benchmark, settings = find_benchmark(name), DataSettings(name, str(tmp_path))
    test = benchmark.published.test
    assert benchmark.shift_ratios == tuple(SIZES[name])
    for ratio, sizes in SIZES[name].items():
        for direction, size in zip(('forward', 'backward'), np.broadcast_to(sizes, 2), strict=True):
            images = benchmark.published_test(settings, ClassShift(direction, ratio))
            assert len(images) == len(np.unique(images)) == size and 0 <= images.min() <= images.max() < test
    assert benchmark.published_test(settings, ClassShift('forward', 7)) is None
    assert benchmark.published_test(DataSettings(name, str(tmp_path), test_list='own.txt'),
                                    ClassShift('forward', 2)) is None
    (tmp_path / benchmark.lists['test'].name).write_text('some.jpg 0\n')
    with pytest.raises(InputError, match='is not the published .*SADE.s tests are parts of that one'):
        benchmark.published_test(settings, ClassShift('forward', 2))


def test_imagenet_lts_lists_have_fifty_images_of_the_most_frequent_class():
    """Its test list has 50 images a class, in order; a class of rank r keeps int(50 ratio^(-r / 999))."""
    with np.load(SADE_LISTS) as lists:
        for direction in ('forward', 'backward'):
            kept = np.unpackbits(lists[f'imagenet_lt/{direction}_50']).reshape(1000, 50).sum(axis=1)
            assert sorted(kept, reverse=True) == [int(50 * 0.02 ** (rank / 999)) for rank in range(1000)]


@pytest.mark.parametrize('owned', [True, False])
def test_the_test_split_becomes_the_part_asked_for(owned):
    images, targets = np.zeros((40, 2, 2, 3), np.uint8), np.repeat(np.arange(2), 20)
    whole = ArraySamples(images, targets) if owned else TensorDataset(torch.arange(40))
    whole.targets = targets
    splits = Splits(None, None, whole, counts_of(9, 3), None)
    settings = DataSettings('list', test_distribution='backward_4')
    found = with_shifted_test(settings, splits, counts_of(9, 3))
    assert np.bincount(found.test.targets).tolist() == [5, 20]
    assert found.notes == ["the test is 25 of the 40 test images, backward_4, by SADE's rule for CIFAR"]
    assert with_shifted_test(DataSettings('list', test_distribution='uniform'), splits, None) is splits
    with pytest.raises(InputError, match='follows from the training images per class'):
        shifted_test(settings, whole, None, ClassShift('forward', 4))
    with pytest.raises(InputError, match='labels of the test images of list are not known beforehand'):
        shifted_test(settings, TensorDataset(torch.arange(4)), counts_of(9, 3), ClassShift('forward', 4))


@pytest.mark.parametrize('text', ['forward', 'sideways_3', 'forward_0.5', 'backward_x', '50'])
def test_other_distributions_are_refused(text):
    with pytest.raises(InputError, match='give forward_RATIO or backward_RATIO'):
        create_splits(DataSettings('list', test_distribution=text))


def test_accuracies_are_of_the_images_in_order_of_strength():
    hits = np.array([True, True, False, True, False, False])
    tests = {ClassShift('forward', 2): np.array([0, 1, 2]), ClassShift('backward', 2): np.array([3, 4, 5]),
             ClassShift('forward', 10): np.array([0, 1]), ClassShift('backward', 2.5): np.array([4])}
    found = shifted_accuracy(hits, tests)
    assert found.to_dict() == {'forward_10': 100.0, 'forward_2': 66.666667, 'uniform': 50.0,
                               'backward_2': 33.333333, 'backward_2.5': 0.0}
    assert 'Backward 2.5              0.00' in found.table()

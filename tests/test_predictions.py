"""What is kept of each picture: from logits to files and tables, and back."""
import csv
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_evaluation import NUM_CLASSES, make_counts, make_predictions

from nbn_timm.data import ArraySamples, ImageSamples
from nbn_timm.data.dataset import picture, picture_names, pictures_digest
from nbn_timm.errors import InputError
from nbn_timm.evaluation import LongTailEvaluator, evaluate
from nbn_timm.evaluation.label_sets import LabelSetPredictions
from nbn_timm.evaluation.predictions import Predictions, check_format, order_of_split, write_predictions
from nbn_timm.models.create import create_model

pytestmark = pytest.mark.fast
NAMES = [f'class "{label}", ünï' for label in range(NUM_CLASSES)]


@pytest.fixture(scope='module')
def found():
    return Predictions.of_logits(*make_predictions())


def test_they_are_those_of_the_logits(found):
    logits, labels = make_predictions()
    log = logits.double().log_softmax(1)
    assert found.top.shape == (997, 5) and (found.predicted == logits.argmax(1).numpy()).all()
    np.testing.assert_allclose(found.probabilities, log.exp().gather(1, torch.from_numpy(found.top)), rtol=1e-5)
    np.testing.assert_allclose(found.label_log_probability, log[range(997), labels], rtol=1e-5, atol=1e-6)
    assert found.correct.tolist() == (logits.argmax(1) == labels).tolist()
    few = Predictions.of_logits(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert few.top.tolist() == [[0, 1, 2]] * 2


def test_what_processes_hold_is_put_back_in_order(found):
    parts = [found[np.arange(997)[rank::3]] for rank in range(3)]
    again = Predictions.in_order(parts)
    for name, array in vars(found).items():
        assert array is None or (getattr(again, name) == array).all()
    assert order_of_split([2, 1]).tolist() == [0, 2, 1]


def test_written_and_read_back(found, tmp_path):
    found.write(tmp_path / 'x.npz')
    again = Predictions.read(tmp_path / 'x.npz')
    for name, array in vars(found).items():
        assert array is None or ((getattr(again, name) == array).all() and getattr(again, name).dtype == array.dtype)
    assert again.feature_length is None
    np.savez(tmp_path / 'old.npz', labels=np.uint16([1, 2]), top5=np.uint16([[1, 2], [0, 2]]),
             confidence=np.float16([0.5, 0.25]), label_log_probability=np.float16([-1, -2]))
    old = Predictions.read(tmp_path / 'old.npz')
    assert old.confidence.tolist() == [0.5, 0.25] and old.correct.tolist() == [True, False]
    np.savez(tmp_path / 'other.npz', labels=np.zeros(3))
    (tmp_path / 'text.npz').write_text('no array')
    for name in ('other.npz', 'text.npz', 'gone.npz'):
        with pytest.raises(InputError, match='--save-predictions'):
            Predictions.read(tmp_path / name)


def test_the_digest_of_the_pictures_goes_by_content_targets_and_order(found, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / f'{index}.png')
    paths = [f'{index}.png' for index in range(3)]
    one = ImageSamples(paths, [0, 0, 0], root=tmp_path)
    shutil.copytree(tmp_path, tmp_path / 'moved')
    assert pictures_digest(one) == pictures_digest(ImageSamples(paths, [0, 0, 0], root=tmp_path / 'moved'))
    shutil.copy(tmp_path / '0.png', tmp_path / 'moved' / '1.png')
    others = (one.select([1, 0, 2]), one.select([0, 1]), ImageSamples(paths, [0, 0, 1], root=tmp_path),
              ImageSamples(paths, [0, 0, 0], root=tmp_path / 'moved'))
    assert len({pictures_digest(one), *map(pictures_digest, others)}) == 5
    pixels = rng.integers(0, 255, (2, 4, 4, 3), np.uint8)
    assert pictures_digest(ArraySamples(pixels, [0, 0])) != pictures_digest(ArraySamples(pixels[::-1], [0, 0]))
    assert pictures_digest([]) is None
    with pytest.raises(InputError, match=r"gone.png' cannot be read \(No such file"):
        pictures_digest(ImageSamples(['gone.png'], [0], root=tmp_path))
    replace(found, digest=pictures_digest(one)).write(tmp_path / 'x.npz')
    assert Predictions.read(tmp_path / 'x.npz').digest == pictures_digest(one)
    sets = LabelSetPredictions(np.uint8([[0, 1]]), np.float32([[1, 2]]), pictures_digest(one))
    sets.write(tmp_path / 'y.npz')
    assert LabelSetPredictions.read(tmp_path / 'y.npz').digest == pictures_digest(one)


def test_an_array_of_another_name_is_not_passed_over(found, tmp_path):
    replace(found, feature_length=np.ones(len(found), dtype=np.float32)).write(tmp_path / 'x.npz')
    assert Predictions.read(tmp_path / 'x.npz').feature_length is not None
    content = (tmp_path / 'x.npz').read_bytes()
    (tmp_path / 'x.npz').write_bytes(content.replace(b'feature_length', b'feature_lenguh'))
    with pytest.raises(InputError, match="it has 'feature_lenguh', which is none of its arrays.*--save-predictions"):
        Predictions.read(tmp_path / 'x.npz')


@pytest.mark.parametrize('change', [
    dict(labels=np.float32([0.5] * 997)), dict(labels=np.int64([-1] * 997)), dict(labels=np.int64([10 ** 12] * 997)),
    dict(top5=np.zeros(997, np.int64)), dict(probabilities=np.full((997, 5), np.nan)), dict(labels=np.zeros(3, int)),
    dict(probabilities=np.full((997, 5), 1.5)), dict(label_log_probability=np.ones(997)),
    dict(digest=np.zeros(31, np.uint8)), dict(digest=np.zeros(32)),
    dict(feature_length=-np.ones(997)), dict(feature_length=np.full(997, None)), dict(labels=np.int64(3))])
def test_arrays_that_no_evaluation_gives_are_refused(found, tmp_path, change):
    found.write(tmp_path / 'x.npz')
    with np.load(tmp_path / 'x.npz') as arrays:
        np.savez(tmp_path / 'y.npz', **{**arrays, **change})
    with pytest.raises(InputError, match='--save-predictions') as error:
        Predictions.read(tmp_path / 'y.npz')
    assert '\n' not in str(error.value)


def test_a_wrong_bit_or_a_cut_in_predictions_is_told(found, tmp_path):
    found.write(tmp_path / 'x.npz')
    content = (tmp_path / 'x.npz').read_bytes()
    rng = np.random.default_rng(40_210)
    for place in rng.integers(30, len(content) - 30, 60).tolist():
        wrong = bytearray(content)
        wrong[place] ^= 1 << int(rng.integers(8))
        for damaged in (bytes(wrong), content[:place]):
            (tmp_path / 'x.npz').write_bytes(damaged)
            try:
                again = Predictions.read(tmp_path / 'x.npz')
            except InputError:
                continue  # else the bit is of what nobody reads, as a date
            assert all(array is None or (getattr(again, name) == array).all() for name, array in vars(found).items())


def test_a_table_as_csv(found, tmp_path):
    write_predictions(tmp_path / 'x.csv', found, NAMES, [f'a/{index}\udcff.png' for index in range(997)])
    with open(tmp_path / 'x.csv', newline='', encoding='utf-8', errors='surrogateescape') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['path', 'label', *(f'top{k}' for k in range(1, 6)),
                             *(f'probability{k}' for k in range(1, 6)), 'label_probability']
    assert rows[9]['path'] == 'a/9\udcff.png' and rows[9]['label'] == NAMES[found.labels[9]]
    assert [row['top2'] for row in rows] == [NAMES[label] for label in found.top[:, 1]]
    assert [float(row['probability1']) for row in rows] == pytest.approx(found.confidence)


def test_a_table_as_parquet(found, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    write_predictions(tmp_path / 'x.parquet', found, NAMES, [f'{index}\udcff' for index in range(997)])
    table = parquet.read_table(tmp_path / 'x.parquet').to_pydict()
    assert table['path'][3] == '3\\udcff' and table['label'] == [NAMES[label] for label in found.labels]
    assert table['probability5'] == found.probabilities[:, 4].tolist()


def test_another_ending_and_a_missing_library_are_told_before_the_work(monkeypatch):
    with pytest.raises(InputError, match='ends in none of .csv, .parquet, .npz'):
        check_format('x.txt')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(InputError, match=r"pip install 'nbn_timm\[parquet\]'"):
        check_format('x.parquet')
    check_format('x.csv')
    check_format(None)


@pytest.mark.parametrize(('model', 'known'), [('resnet20_nbn', True), ('resnet20_nbn_lr', True),
                                              ('resnet32_ride', False)])
def test_feature_lengths_are_of_what_the_classifier_sees(model, known):
    torch.manual_seed(0)
    model = create_model(model, NUM_CLASSES).eval()
    images, target = torch.randn(21, 3, 16, 16), torch.arange(21) % NUM_CLASSES
    evaluator = LongTailEvaluator(NUM_CLASSES, make_counts())
    evaluator.keep_predictions()
    evaluate(model, list(zip(images.split(9), target.split(9), strict=True)), evaluator, torch.device('cpu'))
    kept = evaluator.predictions()
    assert len(kept) == 21
    assert (kept.feature_length is not None) == known
    if known:
        with torch.no_grad():
            features = model.forward_head(model.forward_features(images), pre_logits=True)
        np.testing.assert_allclose(kept.feature_length, features.norm(dim=1), rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_names_and_pixels_of_pictures(tmp_path):
    arrays = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    samples = ArraySamples(arrays, [0, 1], transform=lambda image: None)
    assert picture_names(samples, 2) == ['0', '1']
    assert (np.asarray(picture(samples, 1)) == arrays[1]).all()
    (tmp_path / 'cat').mkdir()
    samples.image(0).save(tmp_path / 'cat' / 'a.png')
    assert picture_names(ImageSamples(['cat/a.png'], [0], root=tmp_path), 1) == [str(tmp_path / 'cat' / 'a.png')]
    theirs = timm.data.ImageDataset(str(tmp_path), transform=lambda image: None)
    assert picture_names(theirs, 1) == [str(tmp_path / 'cat' / 'a.png')]
    assert (np.asarray(picture(theirs, 0)) == arrays[0]).all() and theirs.transform is not None

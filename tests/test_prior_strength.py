"""Two methods at every strength of logit adjustment: `benchmarks/prior_strength.py`."""

import numpy as np
import pytest
from prior_strength import ALL, FEW, MANY, STRENGTHS, accuracies, tables, where_few_is

from nbn_timm.errors import InputError

SHARES = np.array([0.7, 0.2, 0.1])
SHOTS = ('many', 'medium', 'few')


def logits(seed: int, rare: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Of 12,000 images: noise, two more for the right class, and so much more for the rare one."""
    labels = np.arange(12000) % 3
    values = np.random.default_rng(seed).normal(size=(12000, 3)) + 2 * np.eye(3)[labels]
    return values + rare * np.array([0, 0, 1]), labels


@pytest.mark.fast
def test_a_strength_is_an_offset_of_the_logits():
    values, labels = logits(0)
    found = accuracies(values, labels, SHARES, SHOTS)
    place = int(np.abs(STRENGTHS - 0.5).argmin())
    right = (values - 0.5 * np.log(SHARES)).argmax(1) == labels
    expected = [right.mean(), *(right[labels == label].mean() for label in range(3))]
    np.testing.assert_allclose(found[place], 100 * np.array(expected), atol=1e-9)
    assert found[-1, FEW] > found[0, FEW] and found[-1, MANY] < found[0, MANY]


@pytest.mark.fast
def test_an_offset_after_training_is_told_from_a_better_network():
    """An offset that a method adds is found again, and nothing is left at equal few-shot accuracy."""
    shift = 0.4 * np.log(SHARES)
    plain = {seed: accuracies(*logits(seed), SHARES, SHOTS) for seed in (0, 1, 2)}
    moved = {seed: accuracies(logits(seed)[0] - shift, logits(seed)[1], SHARES, SHOTS) for seed in (0, 1, 2)}
    for seed in plain:
        as_trained = moved[seed][len(STRENGTHS) // 2]
        found = where_few_is(plain[seed], as_trained[FEW])
        assert found[-1] == pytest.approx(0.4, abs=0.05)
        np.testing.assert_allclose(found[[ALL, MANY]], as_trained[[ALL, MANY]], atol=0.3)
    lines = '\n'.join(tables(['plain', 'moved'], [plain, moved], [0, 1, 2]))
    assert '| moved | 0.40 on average | +0.' in lines or '| moved | 0.40 on average | -0.' in lines
    better = {seed: accuracies(0.5 * np.eye(3)[labels] + values, labels, SHARES, SHOTS)
              for seed, (values, labels) in ((seed, logits(seed)) for seed in (0, 1, 2))}
    lines = '\n'.join(tables(['plain', 'better'], [plain, better], [0, 1, 2]))
    assert float(lines.rsplit('difference +', 1)[1].split()[0]) > 3


@pytest.mark.fast
def test_a_few_shot_accuracy_out_of_reach_is_told():
    with pytest.raises(InputError, match='at no strength from -1 to 1 few-shot accuracy is 101.00'):
        where_few_is(accuracies(*logits(0), SHARES, SHOTS), 101)

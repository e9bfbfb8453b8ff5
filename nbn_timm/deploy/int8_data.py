"""The pictures that 8-bit files need: training ones for their ranges, test ones for what they lose."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from nbn_timm.data import ClassCounts, DataDefaults, DataSettings
from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.splits import Known
from nbn_timm.data.transforms import create_transform, set_transform
from nbn_timm.datasets import create_splits, find_dataset
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult, LongTailEvaluator
from nbn_timm.settings import AT_LEAST_1, NOT_NEGATIVE, Settings, only_with, setting
from nbn_timm.trained.opening import TrainedModel

from .check_images import CheckImages, pixels_of

__all__ = ['Int8Data', 'Int8Settings', 'balanced', 'int8_data']


@dataclass(frozen=True)
class Int8Settings(Settings):
    """Whether the network is also written with 8-bit integers, and by which pictures."""

    title = '8 bits'

    int8: bool = setting(False, 'write ONNX with 8-bit integers too, for ONNX Runtime and OpenVINO')
    data_dir: str | None = setting(
        None, 'root of the training data, to calibrate by and to test on', metavar='DIR', kind='place',
        unset='that which the record names', effect=only_with('int8'))
    calibration_images: int = setting(
        512, 'training images to calibrate by, equally many of each class, one of each at least', limits=AT_LEAST_1,
        effect=only_with('int8'))
    int8_test_images: int = setting(10_000, 'test images to measure the loss of accuracy on, at most',
                                    limits=AT_LEAST_1, effect=only_with('int8'))
    int8_loss: float = setting(1.0, 'greatest loss of few-shot accuracy, in points', limits=NOT_NEGATIVE,
                               effect=only_with('int8'))


@dataclass(frozen=True)
class Int8Data:
    """Pictures of the data that a network was trained on.

    Attributes:
        calibration: Training images, balanced over the classes.
        test: Test images, or None if there are none at hand.
        counts: Training images per class, if they are known.
        shot_limits: Of many and few.
        greatest_loss: Of few-shot accuracy, in points.
    """

    calibration: CheckImages
    test: LabelledImages | None
    counts: ClassCounts | None
    shot_limits: tuple[int, int]
    greatest_loss: float

    def accuracy(
            self,
            run: Callable[[torch.Tensor], torch.Tensor],
            prepare: Callable[[torch.Tensor], torch.Tensor],
            num_classes: int,
    ) -> EvalResult | None:
        """Accuracy of a function from what `prepare` makes of uint8 images [B, C, H, W] to logits [B, num_classes]."""
        if self.test is None:
            return None
        evaluator = LongTailEvaluator(num_classes, self.counts, torch.device('cpu'), None, *self.shot_limits)
        evaluator.reset()
        with torch.inference_mode():
            for pixels, target in DataLoader(self.test, batch_size=32):
                evaluator.update(run(prepare(pixels)), target)
        return evaluator.compute()


def balanced(targets: np.ndarray, count: int) -> np.ndarray:
    """Indices of equally many images of each class, one at least; of a class that has fewer, of all of its own.

    The draw is of a fixed seed.

    Args:
        targets: Labels, [N].
        count: Of images, if no class has too few.
    """
    drawn = np.random.default_rng(0).permutation(len(targets))
    by_class = drawn[np.argsort(targets[drawn], kind='stable')]
    _, starts, sizes = np.unique(targets[by_class], return_index=True, return_counts=True)
    place = np.arange(len(targets)) - np.repeat(starts, sizes)  # within the class
    return by_class[place < max(1, count // len(sizes))]


def int8_data(trained: TrainedModel, settings: Int8Settings) -> Int8Data:
    """The pictures, from where the record of the training or --data-dir says.

    Raises:
        InputError: The training images are not at hand.
    """
    data = trained.record.told(DataSettings)
    if settings.data_dir:
        data = replace(data, data_dir=settings.data_dir)
    if not data.dataset:
        raise InputError('--int8 calibrates by training images, and the data that the network was trained on are not '
                         'recorded: leave it out')
    if find_dataset(data.dataset).needs_folder and not data.data_dir:
        raise InputError(f'--int8 calibrates by training images, and where those of {data.dataset} lie is not '
                         'recorded: give --data-dir DIR')
    known = None if trained.classes is None else Known(trained.classes, f"'{trained.name}'")
    data = replace(data, download=False, class_counts=None)
    splits = create_splits(data, ('train',), known)
    train = splits.train
    if not isinstance(train, LabelledImages):
        raise InputError(f'--int8 calibrates by training images, and {data.dataset} is a stream of them: leave it out')
    chosen = balanced(train.targets, settings.calibration_images)
    source = f'{len(chosen)} training images of {len(np.unique(train.targets))} classes of {data.dataset}'
    calibration = CheckImages(pixels_of(train, chosen, trained.input), source, True)
    counts = trained.classes if trained.classes is not None and trained.classes.counts else splits.class_counts
    return Int8Data(calibration, _test(data, known, settings.int8_test_images, trained.input), counts,
                    splits.shot_limits, settings.int8_loss)


def _test(data: DataSettings, known: Known | None, count: int, input_format: DataDefaults) -> Any:
    """Test images, evenly spaced in their order; None if there are none."""
    try:
        test = create_splits(data, ('test',), known).test
    except InputError:
        return None
    if not isinstance(test, LabelledImages):
        return None
    if len(test) > count:
        test = test.select(np.linspace(0, len(test) - 1, count).round().astype(int))
    set_transform(test, create_transform(input_format), input_format)
    return test

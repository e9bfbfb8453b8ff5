"""From the logits of an evaluation to a temperature, or thresholds, in a checkpoint."""
from pathlib import Path
from typing import Any

import torch

from nbn_timm.errors import InputError
from nbn_timm.evaluation import LabelSetEvaluator, LongTailEvaluator
from nbn_timm.evaluation.predictions import order_of_split
from nbn_timm.evaluation.temperature import CALIBRATION, FittedTemperature
from nbn_timm.evaluation.thresholds import THRESHOLDS, Thresholds
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.training.distributed import World
from nbn_timm.training.run_checkpoint import save_file


def gather_logits(
        evaluator: LongTailEvaluator | LabelSetEvaluator,
        world: World,
        in_turn: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C] and targets of all processes' images, in the order of the split; of the others, their own.

    For `in_turn` see `order_of_split`.
    """
    of_processes = world.gather_to_primary(evaluator.logits())
    if of_processes is None:
        return evaluator.logits()
    order = torch.from_numpy(order_of_split([len(labels) for _, labels in of_processes], in_turn))
    logits, labels = (torch.cat(parts)[order] for parts in zip(*of_processes, strict=True))
    return logits, labels


def write_calibration(checkpoint: Path, found: FittedTemperature) -> None:
    """Keep a temperature in a checkpoint, whole or not at all.

    Raises:
        InputError: It cannot be read or written, or holds weights alone.
    """
    _keep(checkpoint, CALIBRATION, found.to_dict(), 'a temperature has no place: give a checkpoint of nbn-train, or '
          '--temperature to nbn-predict')


def write_thresholds(checkpoint: Path, found: Thresholds) -> None:
    """Keep thresholds in a checkpoint, whole or not at all.

    Raises:
        InputError: It cannot be read or written, or holds weights alone.
    """
    _keep(checkpoint, THRESHOLDS, found.to_dict(), 'thresholds have no place: give a checkpoint of nbn-train, or '
          '--threshold to nbn-predict')


def _keep(checkpoint: Path, key: str, entry: dict[str, Any], refusal: str) -> None:
    state = {**read_checkpoint(checkpoint), key: entry}
    if 'state_dict' not in state or checkpoint.suffix == '.safetensors':
        raise InputError(f"'{checkpoint}' is a file of weights alone, in which {refusal}")
    save_file(checkpoint, state)


def in_words(found: FittedTemperature | None, images: int) -> str:
    """What was fitted on so many images of the validation split."""
    if found is None:
        return (f'No temperature could be fitted on the {images:,} images of the validation split, since the best one '
                'would be without bound (all are right, or the logits say too little of the labels); so probabilities '
                'stay the softmax of the logits.')
    return (f'Probabilities: temperature {found.temperature:.3f}, fitted on the {images:,} images of the validation '
            f'split (negative log-likelihood {found.nll_before:.4f} before, {found.nll:.4f} with it).')

"""Checkpoints in the released format, rebuilt by rule: the value of each tensor is a function of its name and shape.

The rule belongs to the measured figures in tests/reference, which were obtained with the released code (yuxiangbao/NBN,
commit 7365e21; torch 2.15, CPU, float32) on exactly these weights.
"""
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

REFERENCE = Path(__file__).parent / 'reference'
FIGURES = json.loads((REFERENCE / 'released.json').read_text())


def value(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The tensor of that name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith('num_batches_tracked'):
        return torch.tensor(100)
    if name == 'scale_factor':
        array = random.uniform(8, 16, shape)
    elif name.endswith('running_var'):
        array = random.uniform(0.5, 1.5, shape)
    elif name.endswith('running_mean'):
        array = 0.1 * random.standard_normal(shape)
    elif len(shape) == 4:
        array = random.standard_normal(shape) * np.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    elif len(shape) == 2:
        array = 0.02 * random.standard_normal(shape)
    elif name.endswith('weight'):
        array = random.uniform(0.5, 1.5, shape)
    else:
        array = 0.1 * random.standard_normal(shape)
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def state_dict(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value(name, shape) for name, shape in shapes.items()}


def images(number: int = 2, seed: int = 7) -> torch.Tensor:
    """The input of the measured figures, [number, 3, 224, 224]."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((number, 3, 224, 224)).astype(np.float32))


def checkpoint(weights: Mapping[str, torch.Tensor], prefix: str = 'module.') -> dict:
    """A training checkpoint as the released code writes it."""
    return {
        'epoch': 90, 'arch': 'resnext50_nbn', 'best_acc1': torch.tensor(50.0), 'optimizer': {'state': {}},
        'scheduler': {'last_epoch': 90}, 'state_dict': {f'{prefix}{name}': tensor for name, tensor in weights.items()},
    }


def as_released(state_dict: Mapping[str, torch.Tensor], entries: int = 20) -> dict[str, torch.Tensor]:
    """This package's weights of a single network under the released names: one `scale_factor`, its first alpha."""
    alphas = [tensor for name, tensor in state_dict.items() if name.endswith('.scale.alpha')]
    plain = {name: tensor for name, tensor in state_dict.items() if not name.endswith('.scale.alpha')}
    return {'scale_factor': torch.cat([alphas[0], torch.full((entries - 1,), 7.0)]), **plain}


def relative_error(result: torch.Tensor, expected) -> float:
    """Greatest difference over the greatest magnitude."""
    expected = torch.as_tensor(expected)
    return ((result.detach() - expected).abs().max() / expected.abs().max()).item()

"""How a training run uses a GPU."""
import os
from dataclasses import dataclass

import torch

from nbn_timm.settings import Settings, not_with, setting


@dataclass(frozen=True)
class GpuSettings(Settings):
    """How a training run uses a GPU."""

    title = 'GPU'
    of_training = True

    cuda_graphs: bool = setting(
        False, 'start the forward and backward pass of a batch as one CUDA graph, and the step of an optimizer that '
        'lets it: several times faster for small networks', kind='machine', effect=not_with('torchcompile'))
    deterministic: bool = setting(
        False, 'only algorithms that give the same bits in every run', kind='machine')


def prepare_gpu(settings: GpuSettings, device: torch.device) -> None:
    """Let torch take the fastest algorithms of a GPU, or those that repeat their results to the bit."""
    if device.type != 'cuda':
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = not settings.deterministic
    if settings.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time

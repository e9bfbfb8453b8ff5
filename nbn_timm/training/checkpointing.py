"""Activations that are computed again in the backward pass instead of being kept (`--grad-checkpointing`)."""
from typing import Any

import torch
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.models.create import BATCH_NORMS


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Switch timm's gradient checkpointing on, with BatchNorm statistics that move once per batch all the same.

    A layer that is computed again in the backward pass would count its batch a second time. Here it does not, so that
    weights and statistics are those of a training without checkpointing, to the bit.

    Args:
        model: Is changed in place.
        name: Of the model, for the message.

    Raises:
        InputError: It has no such thing.
    """
    switch = getattr(model, 'set_grad_checkpointing', None)
    try:
        if switch is None:
            raise AssertionError('it has no such switch')
        switch(True)
    except (AssertionError, NotImplementedError) as error:
        raise InputError(f"model '{name}' cannot compute its activations again ({' '.join(str(error).split())}): leave "
                         'out --grad-checkpointing, or give a smaller --batch-size with --grad-accum-steps') from error
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.register_forward_pre_hook(_hold_statistics)
            module.register_forward_hook(_let_go, always_call=True)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _hold_statistics(module: Any, inputs: tuple[Any, ...]) -> None:
    if module.training and module.track_running_stats and _in_backward():
        module._held = module.running_mean, module.running_var, module.num_batches_tracked
        for name in ('running_mean', 'running_var', 'num_batches_tracked'):
            setattr(module, name, getattr(module, name).clone())


def _let_go(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
    held = module.__dict__.pop('_held', None)
    if held is not None:
        module.running_mean, module.running_var, module.num_batches_tracked = held

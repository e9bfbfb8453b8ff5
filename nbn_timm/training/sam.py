"""Sharpness-aware minimisation.

Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization" (SAM), ICLR 2021.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_EPS = 1e-12  # keeps a gradient of zero where it is


@contextmanager
def uphill(model: nn.Module, optimizer: torch.optim.Optimizer, rho: float) -> Iterator[None]:
    """Let the body compute at w + rho g / |g|, with the gradients g that are there on entry (algorithm 1 of the paper).

    |g| is the 2-norm over all parameters of the optimizer. On entry the gradients are dropped. Afterwards the
    parameters are what they were, to the bit, and so is what the model keeps of a batch, as statistics of BatchNorm.

    Args:
        model: Whose buffers are put back.
        optimizer: Over all parameters.
        rho: Length of the step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']
                  if parameter.grad is not None]
    buffers = list(model.buffers())
    with torch.no_grad():
        before = [value.clone() for value in (*parameters, *buffers)]
        gradients = [parameter.grad for parameter in parameters]
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients]))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(gradient * (rho / (length + _EPS)))
    optimizer.zero_grad()
    yield
    with torch.no_grad():
        for value, kept in zip((*parameters, *buffers), before, strict=True):
            value.copy_(kept)

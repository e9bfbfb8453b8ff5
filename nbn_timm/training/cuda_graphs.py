"""The forward and backward pass of a batch as one CUDA graph, and an optimizer's step as another.

A small network keeps a GPU waiting: the processor takes longer to start the few hundred kernels of a step than the GPU
takes to run them. A CUDA graph starts all of them at once. It is recorded from the very calls of the ordinary step, so
the values are those of the same kernels. An optimizer that starts many kernels of its own, as Muon does for every
matrix, says by its setting `capturable` that a graph may hold its step; its rate is then read from the GPU.
"""
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lookahead
from timm.task import TrainingTask

from nbn_timm.errors import InputError

WARM_UP = 3  # batches of a shape that are computed without a graph, while libraries choose their kernels

ComputeLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
GroupSettings = list[dict[str, Any]]  # of an optimizer's groups, without the rate


@dataclass(frozen=True)
class _RecordedStep:
    """A graph of an optimizer's step, the rates that it reads and the settings that it holds."""

    graph: torch.cuda.CUDAGraph
    rates: list[torch.Tensor]
    settings: GroupSettings


@dataclass
class _Recorded:
    """A graph, what it reads and what it writes, and the step by these gradients."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    target: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]  # of the parameters, in their order
    step: _RecordedStep | None = None


class GraphedBackward:
    """Compute the loss of a batch and the gradients of the parameters; one graph for each shape of a batch.

    `step` then changes the weights by them.

    Args:
        compute_loss: Maps images and target on the GPU to the mean loss. It must do the same for every batch of a shape
            until `forget`, and never wait for the GPU.
        task: Whose parameters get gradients.
    """

    def __init__(self, compute_loss: ComputeLoss, task: TrainingTask) -> None:
        self.compute_loss = compute_loss
        self.parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
        self.stream = torch.cuda.Stream()
        self.seen: Counter[Any] = Counter()
        self.recorded: dict[Any, _Recorded] = {}
        self.replayed: _Recorded | None = None  # by the last call

    def forget(self) -> None:
        """Record anew: what the loss does has changed."""
        self.seen.clear()
        self.recorded.clear()
        self.replayed = None

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The detached loss, valid until the next call; the gradients of the parameters are replaced.

        Raises:
            InputError: The network or its loss does what a graph cannot hold.
        """
        shape = images.shape, images.stride(), images.dtype, target.shape, target.dtype
        self.seen[shape] += 1
        if self.seen[shape] <= WARM_UP:
            self.replayed = None
            return self._without_graph(images, target)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(images, target)
        recorded = self.recorded[shape]
        recorded.images.copy_(images)
        recorded.target.copy_(target)
        recorded.graph.replay()
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        self.replayed = recorded
        return recorded.loss

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take its step by the gradients of the last call, as a graph if it can be held by one.

        Raises:
            InputError: The optimizer says that a graph can hold its step, and it cannot.
        """
        recorded = self.replayed
        if recorded is None or not capturable(optimizer):
            optimizer.step()
            return
        if recorded.step is None or recorded.step.settings != _held_settings(optimizer):
            recorded.step = self._record_step(optimizer)
        for group, rate in zip(optimizer.param_groups, recorded.step.rates, strict=True):
            rate.fill_(group['lr'])
        recorded.step.graph.replay()
        # Autograd counts the changes of a weight, and sees none of a graph's.
        torch.autograd.graph.increment_version(self.parameters)

    def _record_step(self, optimizer: torch.optim.Optimizer) -> _RecordedStep:
        """Record a step; nothing is computed."""
        device = self.parameters[0].device
        move_state(optimizer, device)
        settings = _held_settings(optimizer)
        rates = [torch.tensor(float(group['lr']), device=device) for group in optimizer.param_groups]
        graph = torch.cuda.CUDAGraph()
        try:
            with _reading(optimizer, rates), torch.cuda.graph(graph, stream=self.stream):
                optimizer.step()
        except (RuntimeError, AssertionError) as error:  # torch asserts that all it reads is on the GPU
            raise InputError(f'--cuda-graphs cannot hold a step of {type(optimizer).__name__} ({error}): leave it out, '
                             'or give another --opt') from error
        return _RecordedStep(graph, rates, settings)

    def _without_graph(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self._drop_gradients()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.compute_loss(images, target)
            loss.backward()
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss.detach()

    def _record(self, images: torch.Tensor, target: torch.Tensor) -> _Recorded:
        """Record the pass on copies of the batch; nothing is computed."""
        images, target = images.clone(), target.clone()
        self._drop_gradients()  # so that the backward pass writes its gradients into memory of the graph
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                loss = self.compute_loss(images, target)
                loss.backward()
        except RuntimeError as error:
            raise InputError(f'--cuda-graphs cannot hold a step of this network and loss ({error}): leave it out'
                             ) from error
        return _Recorded(graph, images, target, loss.detach(), [parameter.grad for parameter in self.parameters])

    def _drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a graph can hold the optimizer's step, which has no use for one if it starts few kernels, as SGD does."""
    return 'capturable' in optimizer.defaults and not isinstance(optimizer, Lookahead)  # which counts its steps itself


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put on `device` what the optimizer keeps on the processor: counts of steps, and NAdam's product of momenta."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.device.type == 'cpu':
                state[key] = value.to(device)


def _held_settings(optimizer: torch.optim.Optimizer) -> GroupSettings:
    return [{key: value for key, value in group.items() if key not in ('params', 'lr')}
            for group in optimizer.param_groups]


@contextmanager
def _reading(optimizer: torch.optim.Optimizer, rates: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let the groups take their rates from tensors, and their counts of steps from the GPU.

    The groups are afterwards as before, so that a checkpoint has the settings that were given.
    """
    before = [dict(group) for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.update(lr=rate, capturable=True)
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)

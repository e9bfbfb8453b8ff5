"""The forward and backward pass of a batch as one CUDA graph.

A small network keeps a GPU waiting: the processor takes longer to start the few hundred kernels of a step than the GPU
takes to run them. A CUDA graph starts all of them at once. It is recorded from the very calls of the ordinary step, so
the values are those of the same kernels.
"""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import TrainingTask

from nbn_timm.errors import InputError

WARM_UP = 3  # batches of a shape that are computed without a graph, while libraries choose their kernels

ComputeLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Recorded:
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    target: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]  # of the parameters, in their order


class GraphedBackward:
    """Compute the loss of a batch and the gradients of the parameters; one graph for each shape of a batch.

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

    def forget(self) -> None:
        """Record anew: what the loss does has changed."""
        self.seen.clear()
        self.recorded.clear()

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The detached loss, valid until the next call; the gradients of the parameters are replaced.

        Raises:
            InputError: The network or its loss does what a graph cannot hold.
        """
        shape = images.shape, images.stride(), images.dtype, target.shape, target.dtype
        self.seen[shape] += 1
        if self.seen[shape] <= WARM_UP:
            return self._without_graph(images, target)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(images, target)
        recorded = self.recorded[shape]
        recorded.images.copy_(images)
        recorded.target.copy_(target)
        recorded.graph.replay()
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return recorded.loss

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

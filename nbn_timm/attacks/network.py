"""A network while it is attacked: in which mode it is, and how it looks from the side of pixels."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbn_timm.attacks.pixels import Pixels

RUNNING, BATCH, UPDATE = STATISTICS = ('running', 'batch', 'update')


@contextmanager
def under_attack(network: nn.Module, statistics: str = RUNNING) -> Iterator[None]:
    """Evaluation mode around an attack; afterwards every module has its own mode again.

    Args:
        network: Any network.
        statistics: What BatchNorm normalises by. 'running': as in evaluation, which leaves its statistics as they are.
            'batch': by those of the attacked batch, and what it keeps of these is put back. 'update': the same without
            putting back. Layers that were in evaluation mode before, as frozen ones, stay there.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    if statistics != RUNNING:
        for module, training in modes:
            if isinstance(module, _BatchNorm):
                module.training = training
    norms = [module for module, _ in modes if isinstance(module, _BatchNorm)] if statistics == BATCH else []
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


class PixelNetwork(nn.Module):
    """A network in evaluation that takes pixels in [0, 1] and gives the logits that are judged, in float32.

    Attacks climb the very function that is evaluated: normalisation, precision and adjustment of the logits included.

    Args:
        network: Maps normalised images to logits.
        pixels: The normalisation.
        dtype: Of the images; None is float32.
        amp_dtype: Autocast to this type; None computes in the network's own.
        channels_last: Give the network channels-last images.
        adjust: What is done to the logits, as subtracting a prior.
    """

    def __init__(
            self,
            network: nn.Module,
            pixels: Pixels,
            dtype: torch.dtype | None = None,
            amp_dtype: torch.dtype | None = None,
            channels_last: bool = False,
            adjust: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.pixels = pixels
        self.dtype = dtype
        self.amp_dtype = amp_dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.adjust = adjust

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, C, H, W] to logits [B, classes]."""
        images = self.pixels.images(pixels, self.dtype).to(memory_format=self.memory_format)
        with torch.autocast(images.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.network(images)
        logits = logits.float()
        return logits if self.adjust is None else self.adjust(logits)

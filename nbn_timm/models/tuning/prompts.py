"""Visual prompt tuning (VPT): learned tokens beside those of the image.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, in the form of LIFT (shijxcs/LIFT at 661ead9), which appends the
prompts behind the tokens of the image.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from nbn_timm.key_values import check_number

from .tuning import FLAG, Tuning, register_tuning
from .vit_blocks import vit_blocks

__all__ = ['PromptTuning', 'PromptedBlock', 'without_prompts']


class PromptedBlock(Block):
    """A block that sees prompts behind the tokens [B, N, D] that it is given.

    Attributes:
        prompts: [P, D], or None where those of an earlier block are among the tokens.
        surplus: Number of tokens at the end that it does not hand on.
    """

    if TYPE_CHECKING:  # TorchScript would take the annotations for declarations
        prompts: nn.Parameter | None
        surplus: int

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        if self.prompts is not None:
            x = torch.cat([x, self.prompts.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x[:, :x.shape[1] - self.surplus]


@contextmanager
def without_prompts(model: nn.Module) -> Iterator[None]:
    """Around calls of a network: it computes what it did before it got prompts, if it has any."""
    prompted: list[Any] = [module for module in model.modules() if type(module) is PromptedBlock]
    try:
        for block in prompted:
            block.__class__ = Block
        yield
    finally:
        for block in prompted:
            block.__class__ = PromptedBlock


@register_tuning('vpt')
class PromptTuning(Tuning):
    """Prompts in each block (deep), which sees those of its own alone, or in the first (shallow), for all of them.

    Args:
        length: Number of prompts.
        deep: In each block.
    """

    traces = ('.prompts',)

    def __init__(self, length: int = 10, deep: bool = True) -> None:
        self.length = int(check_number('--tune vpt', FLAG, 'length', length, low=1, high=100_000, whole=True))
        self.deep = bool(deep)

    def apply(self, model: nn.Module) -> None:
        """Give the blocks their prompts; the names of all else stay, and the pooling sees the image alone."""
        blocks = vit_blocks(model, self.name)
        embedding: Any = model.patch_embed.proj.weight  # type: ignore[union-attr]
        dim = blocks[0].norm1.weight.numel()
        bound = math.sqrt(6 / (3 * math.prod(embedding.shape[2:]) + dim))
        for number, block in enumerate(blocks):
            block.__class__ = PromptedBlock  # only what it computes changes
            own = self.deep or number == 0
            prompts = torch.empty(self.length, dim, device=embedding.device, dtype=embedding.dtype)
            block.register_parameter('prompts', nn.Parameter(prompts.uniform_(-bound, bound)) if own else None)
            block.surplus = self.length if self.deep or block is blocks[-1] else 0

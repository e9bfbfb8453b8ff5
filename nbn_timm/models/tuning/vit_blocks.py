"""The blocks of timm's vision transformers, into which adapters and prompts are put."""
from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from nbn_timm.errors import InputError

__all__ = ['vit_blocks']


def vit_blocks(model: nn.Module, purpose: str) -> Sequence[Any]:
    """The blocks of a vision transformer, in their order.

    Raises:
        InputError: The network is another one, or its blocks compute something else.
    """
    blocks = list(model.blocks) if isinstance(model, VisionTransformer) else []
    if not blocks or any(type(block) is not Block for block in blocks):
        found = type(blocks[0]).__name__ if blocks else 'none'
        raise InputError(f'--tune {purpose} is for the plain blocks of timm\'s VisionTransformer (vit_*, deit_*, also '
                         f'of CLIP and DINO), and {type(model).__name__} has {found}: give --tune lora, norm or bias')
    return blocks

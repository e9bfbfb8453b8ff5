"""AdaptFormer: a small bottleneck beside the MLP of each block.

Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, in the
form of LIFT (Shi et al., "Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts", ICML 2024;
shijxcs/LIFT at 661ead9): a norm of its own in front, and a learned scale that starts at 1.
"""
import math
from typing import TYPE_CHECKING

import torch
from timm.models.vision_transformer import Block
from torch import nn

from nbn_timm.key_values import check_number

from .tuning import FLAG, Tuning, register_tuning
from .vit_blocks import vit_blocks

__all__ = ['AdaptFormer', 'AdaptFormerTuning']


class AdaptFormer(nn.Module):
    """scale * up(relu(down(norm(x)))), [..., D] to [..., D]; zero as it starts.

    Args:
        dim: D.
        width: Of the bottleneck.
    """

    def __init__(self, dim: int, width: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.down = nn.Linear(dim, width, device=device, dtype=dtype)
        self.up = nn.Linear(width, dim, device=device, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(self.norm(x)).relu()) * self.scale


class AdaptedBlock(Block):
    """A block whose MLP has an adapter beside it, which reads what the attention gives, before the norm of the MLP."""

    if TYPE_CHECKING:  # TorchScript would take the annotation for a declaration
        adaptformer: AdaptFormer

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + self.adaptformer(x)


@register_tuning('adaptformer')
class AdaptFormerTuning(Tuning):
    """An adapter in each block.

    Args:
        width: Of the bottlenecks; None is LIFT's rule, the largest power of two that is at most classes / (2 blocks),
            so that the adapters have no more parameters than the classifier.
    """

    traces = ('.adaptformer.',)

    def __init__(self, width: int | None = None) -> None:
        if width is not None:
            check_number('--tune adaptformer', FLAG, 'width', width, low=1, high=100_000, whole=True)
        self.width = width

    def apply(self, model: nn.Module) -> None:
        """Give each block its adapter; the names of all else stay."""
        blocks = vit_blocks(model, self.name)
        width = self.width or default_width(model.num_classes, len(blocks))  # type: ignore[arg-type]
        for block in blocks:
            weight = block.mlp.fc1.weight
            block.__class__ = AdaptedBlock  # only what it computes changes
            block.adaptformer = AdaptFormer(weight.shape[1], width, weight.device, weight.dtype)


def default_width(num_classes: int, depth: int) -> int:
    """LIFT's width of a bottleneck: the largest power of two that is at most classes / (2 blocks), and at least 1."""
    return 1 << max(0, int(math.log2(max(1.0, num_classes / (2 * depth)))))

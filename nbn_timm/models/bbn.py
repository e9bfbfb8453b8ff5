"""BBN's network: two branches, one for the data as they are and one for the rare classes, on a shared trunk.

Source: Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual Recognition", CVPR
2020 (Megvii-Nanjing/BBN, commit 7992e90). The branches are the last block of the last stage, once for each, and the
classifier is one linear map of the features of both side by side. In evaluation both branches see every image.
"""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import checkpoint_seq, generate_default_cfgs, register_model

from nbn_timm.layers import ExpertStage, add_nbn
from nbn_timm.layers.norm import CAPPED

from ._cfgs import cifar_cfgs
from ._pretrained import build_zoo_model, register_aliases
from .resnet_cifar import ResNetCifar

__all__ = ['ResNetCifarBbn']

BRANCHES = 2

default_cfgs = generate_default_cfgs({**cifar_cfgs('resnet32_bbn')})


class ResNetCifarBbn(ResNetCifar):
    """CIFAR's ResNet of depth 6n + 2 whose last block is there twice, as `layer4`.

    With `set_branch_logits` it gives in training the logits of each branch [B, 2, C], 2 W_e f_e + b, whose mean is the
    ordinary output W [f_0, f_1] + b, and it takes two streams of images [2, B, 3, H, W] as well: each passes the trunk
    by itself, with statistics of its own, and goes on through its own branch.

    Args:
        num_blocks: n, blocks in each of the three stages.
        channels: Of the three stages.
        nbn: NBN in the last norm of every block of `layer3` and `layer4`, with an alpha for each branch.
        gradient, share_alpha: Of NBN.
        **kwargs: See `ResNetCifar`.
    """

    def __init__(
            self,
            num_blocks: int,
            channels: tuple[int, int, int] = (16, 32, 64),
            nbn: bool = False,
            gradient: str = CAPPED,
            share_alpha: bool = True,
            **kwargs,
    ) -> None:
        super().__init__(num_blocks, channels=channels, **kwargs)
        self.separate = False
        self.layer4: nn.Sequential = ExpertStage.from_stage(self.layer3[-1:], BRANCHES, shared_input=True)
        self.layer3 = self.layer3[:-1]
        self.num_features *= BRANCHES
        self.feature_info[-1] = dict(num_chs=self.num_features, reduction=4, module='layer4')
        self.reset_classifier(self.num_classes)
        if nbn:
            add_nbn(self, 'layer3', r'bn2$', share_alpha=share_alpha, gradient=gradient)
            for branch in range(BRANCHES):
                add_nbn(self, 'layer4', rf'^\d+\.{branch}\.bn2$', share_alpha=share_alpha, gradient=gradient)
        self.init_weights()

    @torch.jit.ignore
    def set_branch_logits(self, enable: bool = True) -> None:
        """In training, give the logits of each branch [B, 2, C], for losses on two streams."""
        self.separate = enable

    def _trunk(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the maps that both branches start from."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))

    @torch.jit.unused
    def _two_streams(self, x: torch.Tensor) -> torch.Tensor:
        """Streams [2, B, 3, H, W], the first to the first branch's maps and the second to the second's, on channels."""
        stage: Any = self.layer4
        return torch.cat([stage.expert(self._trunk(images), branch) for branch, images in enumerate(x)], dim=1)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] to the maps of both branches [B, num_features, H/4, W/4]."""
        if self.separate and self.training and x.ndim == 5:
            return self._two_streams(x)
        return self.layer4(self._trunk(x))

    @torch.jit.unused
    def _branch_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features of both branches [B, F] to the logits of each [B, 2, C]; a pooling may give several runs."""
        classifier: Any = self.fc
        runs = (self.global_pool.feat_mult(), BRANCHES, -1)
        features, weight = x.unflatten(1, runs), classifier.weight.unflatten(1, runs)
        return torch.stack([
            BRANCHES * F.linear(features[:, :, branch].flatten(1), weight[:, :, branch].flatten(1)) + classifier.bias
            for branch in range(BRANCHES)], dim=1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature maps to logits [B, num_classes], or to pooled features."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        if pre_logits:
            return x
        return self._branch_logits(x) if self.separate and self.training else self.fc(x)

    @torch.jit.ignore
    def _last_maps(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """The maps of both branches."""
        return self.layer4(maps[3])

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """As in `ResNetCifar`; without `layer3` there are no branches."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if max(take) < 3:
            self.layer4 = nn.Sequential()
        return take


@register_model
def resnet32_bbn(pretrained: bool = False, **kwargs) -> ResNetCifarBbn:
    """ResNet-32 for CIFAR with two branches (BBN)."""
    feature_cfg = dict(out_indices=(0, 1, 2, 3), feature_cls='getter')
    return build_zoo_model(ResNetCifarBbn, 'resnet32_bbn', pretrained, feature_cfg=feature_cfg,
                           **dict(dict(num_blocks=5), **kwargs))


register_aliases(__name__, default_cfgs)
